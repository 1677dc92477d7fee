"""Whole models for the training-step benchmark: one base, and a side for each way to run LoRA on it.

All sides share the base's tensors and start from the same A and B, both random, so that a broken adapter shows.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

import petune
from benchmarks.gpu.peers import COMPILE_BACKEND, FLOOR, factors
from benchmarks.gpu.problem import SCALE
from benchmarks.gpu.unsloth import UnslothError

Batch = dict[str, Tensor]
LEARNING_RATE = 1e-4


class Model(NamedTuple):
    """A model of random weights and the batches it trains on."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[torch.device, bool], Batch]
    """Of the device; True gives the small batch that a float32 copy of the model can take."""
    tokens: int
    """What one step of a full batch trains on."""
    loss: Callable[[nn.Module, Batch], Tensor]
    rank: int = 16
    graph: bool = False
    """Whether the step is captured as a CUDA graph too: where launches take longer than kernels."""


@dataclass
class Side:
    """One way to run LoRA on the whole model."""

    name: str
    model: nn.Module
    loss_of: Callable[[nn.Module, Batch], Tensor]
    parameters: list[Tensor] = field(default_factory=list[Tensor])
    autocast: bool = False
    note: str = ""
    optimizer: torch.optim.Optimizer | None = None
    losses: list[Tensor] = field(default_factory=list[Tensor])

    def loss(self, batch: Batch) -> Tensor:
        device = next(iter(batch.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            return self.loss_of(self.model, batch)

    def step(self, batch: Batch) -> None:
        loss = self.loss(batch)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())


def llama(smoke: bool) -> Model:
    """Llama-3.2-1B's sizes, batch 4 × 2048; or two small blocks."""
    sizes: dict[str, Any] = {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 2048,
    }  # fmt: skip
    if smoke:
        sizes.update(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
        sizes.update(num_key_value_heads=2, head_dim=16, vocab_size=128)
    sequences, length = (2, 32) if smoke else (4, 2048)

    def batch(device: torch.device, small: bool) -> Batch:
        shape = (1, min(256, length)) if small else (sequences, length)
        ids = torch.randint(sizes["vocab_size"], shape, device=device)
        return {"input_ids": ids, "labels": ids}

    def build() -> nn.Module:
        return LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False))  # pyright: ignore[reportCallIssue]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(**batch).loss  # from logits in fp32

    return Model("Llama-1B", build, batch, sequences * length, loss, rank=4 if smoke else 16)


def vit(smoke: bool) -> Model:
    """ViT-B/16, batch 64: so small that launching its kernels takes longer than running them."""
    sizes: dict[str, Any] = {"image_size": 224, "num_labels": 1000}
    if smoke:
        sizes.update(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=32)
    images = 2 if smoke else 64

    def batch(device: torch.device, small: bool) -> Batch:
        count = min(images, 4) if small else images
        size = sizes["image_size"]
        pixels = torch.randn(count, 3, size, size, device=device)
        return {"pixel_values": pixels, "labels": torch.randint(sizes["num_labels"], (count,), device=device)}

    def build() -> nn.Module:
        return ViTForImageClassification(ViTConfig(**sizes))  # pyright: ignore[reportCallIssue]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(pixel_values=batch["pixel_values"]).logits
        return F.cross_entropy(logits.float(), batch["labels"])  # the model's own is rounded to bf16

    tokens = images * ((sizes["image_size"] // 16) ** 2 + 1)
    return Model("ViT-B/16", build, batch, tokens, loss, rank=4 if smoke else 16, graph=True)


def cast_batch(batch: Batch, dtype: torch.dtype) -> Batch:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}


class Builder:
    """Makes sides on one base."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        torch.manual_seed(seed)
        with torch.device(device):
            self.base = model.build().requires_grad_(False).train()
        for parameter in self.base.parameters():  # and no buffer: rotary frequencies stay fp32, as in a loaded model
            parameter.data = parameter.data.to(dtype)
        self.device, self.rank, self.loss_of = device, model.rank, model.loss
        self.targets = [
            name
            for name, module in self.base.named_modules()
            if isinstance(module, nn.Linear) and name.split(".")[-1] not in ("lm_head", "classifier")
        ]
        generator = torch.Generator(device).manual_seed(seed)
        self.adapters: list[tuple[Tensor, Tensor]] = []
        for name in self.targets:
            linear = cast("nn.Linear", self.base.get_submodule(name))
            a = torch.randn(self.rank, linear.in_features, device=device, generator=generator)
            b = torch.randn(linear.out_features, self.rank, device=device, generator=generator)
            self.adapters.append((a / linear.in_features**0.5, b / (4 * SCALE * self.rank**0.5)))

    def floor(self) -> Side:
        """The frozen base, forward and dX down to the embeddings."""
        model: Any = self._copy()
        model.enable_input_require_grads()
        return Side(FLOOR, model, self.loss_of)

    def lora(self, name: str, *, fp32_adapters: bool, config_cls: type[LoraConfig] = LoraConfig) -> Side:
        """PEFT's LoRA on every linear layer of the blocks, with the layers of the config class."""
        config = config_cls(
            r=self.rank, lora_alpha=int(SCALE * self.rank), lora_dropout=0.0, target_modules=self.targets
        )
        model = get_peft_model(self._copy(), config, autocast_adapter_dtype=fp32_adapters).train()  # pyright: ignore
        layers = self._layers(model)
        with torch.no_grad():
            for layer, (a, b) in zip(layers, self.adapters, strict=True):
                layer.lora_A["default"].weight.copy_(a)
                layer.lora_B["default"].weight.copy_(b)
        return self._trainable(Side(name, model, self.loss_of, factors(layers), autocast=name == "E2"))

    def ours(self, *, fp32_adapters: bool) -> Side:
        name = "ours-fp32" if fp32_adapters else "ours"
        return self.lora(name, fp32_adapters=fp32_adapters, config_cls=petune.FusedLoraConfig)

    def ours_grouped(self, *, fp32_adapters: bool) -> Side:
        """What `petune.fuse` makes of a loaded PEFT model."""
        side = self.lora("ours-grouped-fp32" if fp32_adapters else "ours-grouped", fp32_adapters=fp32_adapters)
        side.note = str(petune.fuse(side.model))
        return side

    def compiled(self) -> Side:
        """E3 with each block compiled, which is what PyTorch advises for models of equal blocks."""
        side = self.lora("compile(E3)", fp32_adapters=False)
        for block in blocks(side.model):
            block.compile(dynamic=False, backend=COMPILE_BACKEND[self.device.type])
        return side

    def unsloth(self, functions: ModuleType) -> Side:
        """E3 with Unsloth's functions for q/k/v, o and the MLP; on a CPU without the last (a Triton kernel)."""
        side = self.lora("unsloth", fp32_adapters=False)
        patched = sum(_patch(module, functions, self.device.type == "cuda") for module in list(side.model.modules()))
        if not patched:
            raise UnslothError(f"unsloth has no functions for the blocks of {type(self.base).__name__}")
        return side

    def exact(self) -> Side:
        """The model in float32 with PEFT's LoRA: what gradients are compared with."""
        side = self.lora("exact", fp32_adapters=True)
        side.model = copy.deepcopy(side.model, {id(p): p for p in side.parameters}).float()
        return side

    def _copy(self) -> Any:
        return copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})

    def _layers(self, model: nn.Module) -> list[Any]:
        found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        return [found[f"base_model.model.{name}"] for name in self.targets]

    def _trainable(self, side: Side) -> Side:
        on_gpu = self.device.type == "cuda"
        side.optimizer = torch.optim.AdamW(side.parameters, lr=LEARNING_RATE, fused=on_gpu, capturable=on_gpu)
        return side


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: the entries of the longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len))


def gradients(side: Side, batch: Batch) -> Tensor:
    """All of dA and dB as one vector, with nothing left behind."""
    torch.manual_seed(0)
    found = torch.autograd.grad(side.loss(batch), side.parameters)
    return torch.cat([g.flatten().float() for g in found])


def static_bytes(side: Side) -> int:
    """Weights, adapters and what the optimizer keeps: what a step stands on."""
    tensors: dict[int, Tensor] = {id(p): p for p in (*side.model.parameters(), *side.parameters)}
    if side.optimizer is not None:
        for state in side.optimizer.state.values():
            tensors.update({id(t): t for t in state.values() if isinstance(t, Tensor)})
    return sum(t.numel() * t.element_size() for t in tensors.values())


class _Call(nn.Module):
    """A function in the place of a layer."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def _patch(module: nn.Module, functions: ModuleType, with_mlp: bool) -> bool:
    """As Unsloth's own patches of Llama do it; whether this module is one they know."""
    if isinstance(module, LlamaMLP) and with_mlp:
        module.forward = lambda x: functions.apply_lora_mlp_swiglu(module, x)
        return True
    if not isinstance(module, LlamaAttention):
        return False
    names = ("q_proj", "k_proj", "v_proj")
    owner = SimpleNamespace(**{name: getattr(module, name) for name in (*names, "o_proj")})
    projected: list[Tensor] = []

    def attend(original: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        projected[:] = functions.apply_lora_qkv(owner, hidden_states)
        return original(hidden_states, *args, **kwargs)

    original = module.forward
    for name in names:
        setattr(module, name, _Call(lambda _: projected.pop(0)))
    module.o_proj = _Call(lambda x: functions.apply_lora_o(owner, x))  # type: ignore[assignment]
    module.forward = lambda *args, **kwargs: attend(original, *args, **kwargs)  # type: ignore[method-assign]
    return True
