"""What the parts of `many.py` share: bases, adapters, batches, and two sides timed in turns."""

import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, BertConfig

from benchmarks.common import quieten
from petune import FusedLoraConfig, fuse
from petune.demo.retrieval import demo_encoder

PEFT, OURS = "PEFT adapter_names", "grouped"


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    sizes: tuple[tuple[str, int, int, int, tuple[int, ...]], ...] = (
        ("tiny", 1, 16, 12, (1, 2, 4, 8, 16)),
        ("small", 2, 16, 12, (1, 2, 4, 8, 16)),
        ("large", 16, 64, 6, (1, 4)),
    )
    """Name, rows and tokens a row of one run's step, steps, and numbers of runs."""
    rounds: int = 5
    memory_runs: tuple[int, ...] = (1, 8)
    infer: tuple[tuple[str, int, int, tuple[int, ...]], ...] = (
        ("forward", 64, 32, (1, 8, 64)),
        ("generate", 8, 12, (1, 8)),
        ("generate", 64, 12, (1, 8, 64)),
    )
    """Call, rows, tokens of a row's input or to generate, numbers of adapters."""
    infer_repeats: int = 5
    repeats: int = 9
    tasks: int = 1000
    switches: int = 200


_SMOKE_INFER = ("forward", 4, 8, (1, 2)), ("generate", 2, 2, (2,))
SMOKE = Plan((("large", 2, 8, 2, (1, 2)),), 1, (), _SMOKE_INFER, 1, 2, 3, 4)


SMOKE_VARIABLE = "PETUNE_BENCHMARK_SMOKE"


def is_smoke() -> bool:
    """Whether bases are to be small and of random weights."""
    return SMOKE_VARIABLE in os.environ


def encoder(auto_class: Any, **options: Any) -> Any:
    """The demo's encoder; of a smoke run, a BERT of two blocks of random weights."""
    if is_smoke():
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        torch.manual_seed(0)
        return auto_class.from_config(BertConfig(**sizes), **options)  # pyright: ignore[reportArgumentType]
    return auto_class.from_pretrained(demo_encoder(), **options)


def batch_of(rows: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """Random words, all rows of one length."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 30_000, (rows, tokens), generator=rng)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}


def encoder_body() -> Any:
    """The encoder without a head."""
    return encoder(AutoModel, add_pooling_layer=False)


def adapted(
    config: Callable[[], LoraConfig], adapters: int, base: Callable[[], nn.Module] = encoder_body
) -> PeftModel:
    """The base with some adapters of random weights, in eval mode."""
    torch.manual_seed(0)
    model: Any = get_peft_model(base(), config(), "0")  # pyright: ignore[reportArgumentType]
    for number in range(1, adapters):
        model.add_adapter(str(number), config())
    model.set_requires_grad([str(number) for number in range(adapters)])
    if isinstance(model.peft_config["0"], FusedLoraConfig):
        fuse(model)
    return model.eval()


CONFIGS: dict[str, Callable[[], LoraConfig]] = {
    PEFT: lambda: LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False),
    OURS: lambda: FusedLoraConfig(r=8, init_lora_weights=False),
}


def in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, one after the other, `repeats` times after one that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def compared(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Milliseconds, and ours over PEFT's."""
    ratios = [ours / theirs for ours, theirs in zip(times[OURS], times[PEFT], strict=True)]
    return {
        "peft_ms": round(1000 * statistics.median(times[PEFT]), 2),
        "ours_ms": round(1000 * statistics.median(times[OURS]), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }


def all_cores() -> None:
    """All cores, which is the point; no warnings, bars or messages."""
    quieten()
    torch.set_num_threads(os.cpu_count() or 1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
