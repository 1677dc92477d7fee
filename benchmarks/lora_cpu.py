"""Is one fused LoRA training step cheaper than PEFT's own, on a CPU? Time, error and bytes kept for backward.

    python benchmarks/lora_cpu.py                 # about three minutes on two cores; writes results/lora_cpu.json

Both sides hold the same weights, run interleaved in one process, and PEFT runs in its default setting (fp32 adapters,
`autocast_adapter_dtype=True`). Gates: median time ratio <= 0.92 (fp32 base) and <= 0.80 (bf16 base); the error of the
update and of the gradients against float64 no larger than that of PEFT with bf16 adapters; bytes kept for backward
never above full fine-tuning's and <= 0.70 (fp32) and <= 0.55 (bf16) of PEFT's with dropout 0.05.
"""

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedModel, ViTConfig, ViTModel

import petune
from petune import FusedLoraConfig

RANK, DROPOUT = 8, 0.05
TIME_GATE = {"float32": 0.92, "bfloat16": 0.80}
BYTES_GATE = {"float32": 0.70, "bfloat16": 0.55}
# name: hidden size, inner size, tokens (batch · sequence), gated
SHAPES = {
    "bert-mlp": (768, 3072, 1024, False),
    "vit-mlp": (384, 1536, 1576, False),
    "llama-mlp": (1024, 2816, 1024, True),
}


class Mlp(nn.Module):
    """The feed-forward half of a transformer block: up, GELU, down; or gate, up, SiLU, down."""

    def __init__(self, hidden: int, inner: int, gated: bool) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, inner, bias=not gated)
        self.gate = nn.Linear(hidden, inner, bias=False) if gated else None
        self.down = nn.Linear(inner, hidden, bias=not gated)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(nn.functional.gelu(self.up(x)))
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def wrap(base: nn.Module, config_cls: type[LoraConfig], dropout: float, **kwargs: Any) -> nn.Module:
    """A copy of the base with LoRA on every linear layer, A and B random so that a broken low-rank path shows."""
    torch.manual_seed(1)
    targets = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    config = config_cls(r=RANK, lora_dropout=dropout, target_modules=targets, init_lora_weights=False)
    return get_peft_model(copy.deepcopy(base), config, **kwargs)


def step_seconds(model: nn.Module, x: Tensor) -> float:
    leaf = x.clone().requires_grad_()  # as inside a network: the gradient flows on
    start = time.perf_counter()
    model(leaf).sum().backward()
    return time.perf_counter() - start


def time_rows(steps: int, seeds: int) -> list[dict[str, Any]]:
    """One row per shape, dtype and dropout: per seed the ratio of the medians of interleaved steps."""
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, (hidden, inner, tokens, gated) in SHAPES.items():
            for dropout in (0.0, DROPOUT):
                ratios, medians = list[float](), list[tuple[float, float]]()
                for seed in range(seeds):
                    torch.manual_seed(seed)
                    base = Mlp(hidden, inner, gated).to(dtype)
                    pair = [wrap(base, config_cls, dropout).train() for config_cls in (FusedLoraConfig, LoraConfig)]
                    x = torch.randn(1, tokens, hidden, dtype=dtype)
                    seconds: list[list[float]] = [[], []]
                    for step in range(steps + 1):
                        for side in (0, 1) if step % 2 else (1, 0):
                            seconds[side].append(step_seconds(pair[side], x))
                    ours, theirs = (statistics.median(series[1:]) for series in seconds)  # the first step warms up
                    ratios.append(ours / theirs)
                    medians.append((ours, theirs))
                rows.append(
                    {
                        "shape": name,
                        "dtype": str(dtype)[6:],
                        "dropout": dropout,
                        "ratio": statistics.median(ratios),
                        "ratio_min": min(ratios),
                        "ratio_max": max(ratios),
                        "ours_ms": 1e3 * statistics.median(m[0] for m in medians),
                        "peft_ms": 1e3 * statistics.median(m[1] for m in medians),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def update_errors(
    dtype: torch.dtype, adapter_dtype: torch.dtype, config_cls: type[LoraConfig], seed: int
) -> dict[str, float]:
    """Relative error against float64 of Y − xWᵀ − b, dX, dA and dB of one layer with a sizeable update."""
    torch.manual_seed(seed)
    tokens, in_features, out_features = 512, 768, 768
    base = nn.Sequential(nn.Linear(in_features, out_features)).to(dtype)
    model = wrap(base, config_cls, 0.0, autocast_adapter_dtype=adapter_dtype == torch.float32)
    layer: Any = model.base_model.model[0]  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.manual_seed(seed)  # wrap has set its own
    # fp32 draws that bf16 cannot hold: adapters in bf16 round them, as they round every step of an optimizer
    exact = [torch.randn(RANK, in_features) / in_features**0.5, torch.randn(out_features, RANK) / 4]
    a.data, b.data = (t.to(adapter_dtype) for t in exact)
    x = torch.randn(tokens, in_features, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, out_features, dtype=dtype)
    y = model(x)
    y.backward(dy)

    leaves = [t.detach().double().requires_grad_() for t in (x, *exact)]
    weight, bias = layer.base_layer.weight.double(), layer.base_layer.bias.double()
    frozen = leaves[0] @ weight.T + bias
    reference = frozen + layer.scaling["default"] * (leaves[0] @ leaves[1].T) @ leaves[2].T
    reference.backward(dy.double())
    pairs = {
        "update": (y.double() - frozen, reference - frozen),
        "dx": (x.grad, leaves[0].grad),
        "da": (a.grad, leaves[1].grad),
        "db": (b.grad, leaves[2].grad),
    }
    return {key: ((out.double() - ref).norm() / ref.norm()).item() for key, (out, ref) in pairs.items()}  # pyright: ignore


def error_rows(seeds: int) -> list[dict[str, Any]]:
    sides = {
        "ours": (torch.float32, FusedLoraConfig),
        "peft bf16 adapters": (torch.bfloat16, LoraConfig),
        "peft default": (torch.float32, LoraConfig),
    }
    rows: list[dict[str, Any]] = []
    for name, (adapter_dtype, config_cls) in sides.items():
        errors = [update_errors(torch.bfloat16, adapter_dtype, config_cls, seed) for seed in range(seeds)]
        rows.append({"side": name, **{key: [error[key] for error in errors] for key in errors[0]}})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that one forward in training keeps for its backward: distinct storages, parameters not counted."""
    model.train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = dict[int, Tensor]()  # the tensors are held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def small_models() -> dict[str, tuple[PreTrainedModel, dict[str, Tensor]]]:
    """A small BERT, Llama and ViT with random weights, each with a batch."""
    torch.manual_seed(0)
    bert = BertConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, vocab_size=1000
    )
    llama = LlamaConfig(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=704,
        vocab_size=1000,
    )
    vit = ViTConfig(hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768, image_size=112)
    ids = torch.randint(1, 1000, (8, 128))
    return {
        "bert": (BertModel(bert, add_pooling_layer=False), {"input_ids": ids}),
        "llama": (LlamaModel(llama), {"input_ids": ids, "use_cache": False}),  # pyright: ignore[reportReturnType]
        "vit": (ViTModel(vit, add_pooling_layer=False), {"pixel_values": torch.randn(8, 3, 112, 112)}),
    }


def bytes_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, (base, batch) in small_models().items():
        for dtype in (torch.float32, torch.bfloat16):
            model: Any = copy.deepcopy(base).to(dtype)  # pyright: ignore[reportArgumentType]
            cast_batch = {
                key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
                for key, value in batch.items()
            }
            counted = {"full": saved_bytes(copy.deepcopy(model), cast_batch)}
            for side, config_cls in (("peft", LoraConfig), ("ours", FusedLoraConfig)):
                counted[side] = saved_bytes(wrap(model, config_cls, DROPOUT), cast_batch)
            rows.append(
                {
                    "model": name,
                    "dtype": str(dtype)[6:],
                    **{f"{k}_bytes": v for k, v in counted.items()},
                    "ours_to_peft": counted["ours"] / counted["peft"],
                    "ours_to_full": counted["ours"] / counted["full"],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def gates(times: list[dict[str, Any]], errors: list[dict[str, Any]], kept: list[dict[str, Any]]) -> dict[str, Any]:
    """Every gate with its value: name to {value, limit, passed}."""
    verdicts = dict[str, tuple[float, float]]()
    for dtype, limit in TIME_GATE.items():
        ratios = [row["ratio"] for row in times if row["dtype"] == dtype]
        verdicts[f"time {dtype}"] = (statistics.median(ratios), limit)
    ours, theirs = errors[0], errors[1]
    for key in ("update", "dx", "da", "db"):
        verdicts[f"error {key}"] = (max(o / t for o, t in zip(ours[key], theirs[key], strict=True)), 1.0)
    for row in kept:
        verdicts[f"bytes {row['model']} {row['dtype']}, to PEFT"] = (row["ours_to_peft"], BYTES_GATE[row["dtype"]])
        verdicts[f"bytes {row['model']} {row['dtype']}, to full"] = (row["ours_to_full"], 1.0)
    return {name: {"value": v, "limit": limit, "passed": v <= limit} for name, (v, limit) in verdicts.items()}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="timed steps per side, shape, dropout and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lora_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)

    kept, errors, times = bytes_rows(), error_rows(args.seeds), time_rows(args.steps, args.seeds)
    verdicts = gates(times, errors, kept)
    versions = {m.__name__: m.__version__ for m in (petune, torch, peft, transformers)}
    hardware = {
        "cpu": cpu_name(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    result = {
        "question": "fused LoRA against PEFT's LoRA in its default setting on a CPU, ratios below 1 are better",
        "hardware": hardware,
        "versions": {**versions, "python": platform.python_version()},
        "rank": RANK,
        "steps": args.steps,
        "seeds": args.seeds,
        "shapes": SHAPES,
        "gates": verdicts,
        "time": times,
        "error": errors,
        "saved_bytes": kept,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, verdict in verdicts.items():
        print(f"{'ok  ' if verdict['passed'] else 'MISS'} {name}: {verdict['value']:.3f} <= {verdict['limit']}")
    return 0 if all(verdict["passed"] for verdict in verdicts.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
