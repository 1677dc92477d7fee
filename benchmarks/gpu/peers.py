"""The sides of a row: PEFT in its settings, torch.compile of them, Unsloth, ours, and the frozen floor.

| name | adapters | mode |
|---|---|---|
| E1 | fp32 | PEFT's default, no autocast |
| E2, E2-nocast | fp32 | bf16 autocast; the second with PEFT's `disable_input_dtype_casting` |
| E3 | dtype of the base | PEFT's best setting |
| compile(E1), compile(E3) | | the same under torch.compile |
| unsloth, unsloth-inplace | dtype of the base | its autograd functions; in place it writes dX over X |
| ours-fp32, ours | fp32, dtype of the base | `FusedLoraConfig`, one operator a layer |
| ours-grouped-fp32, ours-grouped | | the same with `lora_group` and `gated_lora` |
| ours[…] | dtype of the base | ours with one variant of the chooser forced |
| floor | none | the frozen layers, forward and dX |
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn

from benchmarks.gpu.problem import SCALE, Problem, named_linears, outputs
from petune import FusedLoraConfig
from petune.kernels import chooser
from petune.kernels.gated_lora import gated_lora
from petune.kernels.lora_group import lora_group

FLOOR = "floor"
COMPILE_BACKEND = {"cuda": "inductor", "cpu": "aot_eager"}

Forward = Callable[[Tensor], Any]


@dataclass
class Side:
    """One way to compute a row."""

    name: str
    forwards: list[Forward]
    """One for each base of the problem."""
    parameters: list[Tensor] = field(default_factory=list[Tensor])
    """A and B of each linear map in turn, of the first base; none for the floor."""
    compiled: bool = False
    overwrites_x: bool = False
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Entered around everything that this side runs, outside of what is timed."""

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours")

    def run(self, problem: Problem, step: int, x: Tensor | None = None) -> tuple[Tensor, ...]:
        """The outputs for the set whose turn it is; x replaces the set's own."""
        x = problem.sets[step % len(problem.sets)].x if x is None else x
        return outputs(self.forwards[step % len(self.forwards)](x))


def adapted(
    problem: Problem, base: nn.Module, config_cls: type[LoraConfig], fp32_adapters: bool
) -> tuple[nn.Module, list[Any]]:
    """A module with the base's own weights and LoRA on each linear map, and its LoRA layers in order."""
    shared = {id(p): p for p in base.parameters()}
    names = list(named_linears(base))
    row = problem.row
    config = config_cls(r=row.rank, lora_alpha=int(SCALE * row.rank), lora_dropout=row.dropout, target_modules=names)
    model: Any = get_peft_model(copy.deepcopy(base, shared), config, autocast_adapter_dtype=fp32_adapters).train()  # pyright: ignore
    inner = model.base_model.model
    layers = [inner.get_submodule(name) for name in names]
    for layer, (a, b) in zip(layers, problem.adapters, strict=True):
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    return inner, layers


def factors(layers: Sequence[Any]) -> list[Tensor]:
    return [getattr(layer, name)["default"].weight for layer in layers for name in ("lora_A", "lora_B")]


def floor(problem: Problem) -> Side:
    return Side(FLOOR, list(problem.bases))


def peft(problem: Problem, name: str, stack: ExitStack) -> Side:
    """E1, E2, E2-nocast or E3; `stack` holds PEFT's settings for as long as the side lives."""
    forwards, parameters = list[Forward](), list[Tensor]()
    for base in problem.bases:
        module, layers = adapted(problem, base, LoraConfig, fp32_adapters=name != "E3")
        if name == "E2-nocast":
            stack.enter_context(disable_input_dtype_casting(module))
        forwards.append(partial(_autocast, module, base) if name.startswith("E2") else module)
        parameters = parameters or factors(layers)
    return Side(name, forwards, parameters)


def _autocast(module: nn.Module, base: nn.Module, x: Tensor) -> Any:
    dtype = next(base.parameters()).dtype
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        return module(x)


def compiled(side: Side, device: torch.device) -> Side:
    """The side under torch.compile; the first call compiles."""
    backend = COMPILE_BACKEND[device.type]
    forwards: list[Forward] = [torch.compile(forward, dynamic=False, backend=backend) for forward in side.forwards]
    return Side(f"compile({side.name})", forwards, side.parameters, compiled=True)


def ours(problem: Problem, fp32_adapters: bool) -> Side:
    """`FusedLoraConfig` in the place of `LoraConfig`, layer by layer."""
    wrapped = [adapted(problem, base, FusedLoraConfig, fp32_adapters) for base in problem.bases]
    name = "ours-fp32" if fp32_adapters else "ours"
    return Side(name, [module for module, _ in wrapped], factors(wrapped[0][1]))


def ours_grouped(problem: Problem, fp32_adapters: bool) -> Side:
    """The operators that read x once for several projections; what `petune.fuse` puts into a transformer block."""
    base = problem.bases[0]
    _, layers = adapted(problem, base, FusedLoraConfig, fp32_adapters)
    forward = partial(_mlp if problem.row.mlp else _group, layers, problem.row.dropout)
    return Side("ours-grouped-fp32" if fp32_adapters else "ours-grouped", [forward], factors(layers))


def _group(layers: Sequence[Any], dropout: float, x: Tensor) -> tuple[Tensor, ...]:
    a, b = factors(layers)[::2], factors(layers)[1::2]
    weights, biases = ([getattr(layer.base_layer, name) for layer in layers] for name in ("weight", "bias"))
    return lora_group(x, weights, biases, a, b, [SCALE] * len(layers), dropout)


def _mlp(layers: Sequence[Any], dropout: float, x: Tensor) -> Tensor:
    gate, up = _group(layers[:2], dropout, x)
    base, (a, b) = layers[2].base_layer, factors(layers[2:])
    return gated_lora(gate, up, "silu", base.weight, base.bias, a, b, SCALE, dropout)


def variant_names(side: Side, problem: Problem) -> list[str]:
    """The variants of the base product that the chooser may take for this row; none where only the reference runs."""
    names: dict[str, None] = {}

    def record(key: Any, candidates: Mapping[str, Any], default: str, device: torch.device) -> str:
        if str(key[0]).startswith("project"):
            names.update(dict.fromkeys(candidates))
        return default

    with _choosing(record):
        y = side.run(problem, 0)
        if problem.row.backward:
            torch.autograd.grad(y, [problem.sets[0].x, *side.parameters], problem.sets[0].dys)
    return list(names)


def forced(side: Side, variant: str) -> Side:
    """The side with one variant of the base product, wherever that variant is eligible."""

    def choose(key: Any, candidates: Mapping[str, Any], default: str, device: torch.device) -> str:
        if variant in candidates and str(key[0]).startswith("project"):
            return variant
        return chooser.choose(key, candidates, default, device)

    return Side(f"ours[{variant}]", side.forwards, side.parameters, within=partial(_choosing, choose))


def _choosing(choose: Callable[..., str]) -> AbstractContextManager[Any]:
    from petune.kernels.lora_linear import kernel

    # what is known from earlier calls would not ask
    return mock.patch.multiple(kernel, choose=choose, known=lambda key, default, device: None)


def unsloth(problem: Problem, functions: ModuleType, *, inplace: bool = False) -> Side:
    """Unsloth's own entry points on PEFT's layers, as its patched models call them."""
    row = problem.row
    forwards, parameters = list[Forward](), list[Tensor]()
    for base in problem.bases:
        _, layers = adapted(problem, base, LoraConfig, fp32_adapters=False)
        forwards.append(_unsloth_forward(functions, layers, row.mlp, row.backward, inplace))
        parameters = parameters or factors(layers)
    return Side("unsloth-inplace" if inplace else "unsloth", forwards, parameters, overwrites_x=inplace)


def _unsloth_forward(
    functions: ModuleType, layers: Sequence[Any], mlp: bool, backward: bool, inplace: bool
) -> Forward:
    if mlp:
        owner = SimpleNamespace(gate_proj=layers[0], up_proj=layers[1], down_proj=layers[2])
        return partial(functions.apply_lora_mlp_swiglu, owner, inplace=inplace)
    if len(layers) == 3:
        owner = SimpleNamespace(q_proj=layers[0], k_proj=layers[1], v_proj=layers[2])
        return partial(functions.apply_lora_qkv, owner, inplace=inplace)
    if not backward:
        return partial(_decode, functions, layers[0])
    owners = [SimpleNamespace(o_proj=layer) for layer in layers]
    return lambda x: tuple(functions.apply_lora_o(owner, x) for owner in owners)


def _decode(functions: ModuleType, layer: Any, x: Tensor) -> Tensor:
    # fast_linear_forward is what its decoding calls; it lies beside fast_lora
    utils: Any = __import__(f"{functions.__package__}.utils", fromlist=["fast_linear_forward"])
    return utils.fast_linear_forward(layer, x)


def kernels_run(device: torch.device) -> bool:
    """Whether our Triton kernels run here, on a GPU or interpreted, and with them the chooser."""
    mode = os.environ.get("PETUNE_KERNELS", "auto")
    return mode == "triton" or (mode == "auto" and device.type == "cuda")
