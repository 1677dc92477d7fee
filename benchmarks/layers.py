"""What do layer schedules save in training memory, and what does keeping a frozen prefix's outputs save in time?

    python benchmarks/layers.py --only memory    # writes results/layers.json
    python benchmarks/layers.py --only prefix    # on an idle machine; keeps the rest

*Memory*: bytes that autograd keeps for the backward pass of one training step (`benchmarks.common.saved_bytes`) of a
BERT and a ViT of 16 blocks with LoRA on queries and values: all blocks active, a quarter of them drawn at random, and
a quarter drawn from block 8 and from block 12 on. *Prefix*: seconds an epoch of the demo's sentence encoder with LoRA
in its upper blocks, with a `FeatureCache` and without, in turns; dropout off, so that the losses are to be equal.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import torch
from peft import get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import environment, quieten, saved_bytes
from benchmarks.side import MODELS, SMOKE, Plan, time_epochs
from petune import FusedLoraConfig
from petune.layer_scheduler import LayerScheduler, RandomLayers

RESULTS = Path(__file__).parent / "results" / "layers.json"
BLOCKS, SHARE, DRAWS, ROWS = 16, 4, 12, 2
MIN_LAYERS = (0, 8, 12)
LOWEST = (3, 4)
"""Of six blocks of the demo's encoder, the lowest that is adapted."""


def measure_memory(smoke: bool) -> dict[str, Any]:
    """Bytes with all blocks active, and with a quarter of them from each of MIN_LAYERS on."""
    rows: list[dict[str, Any]] = []
    blocks, draws = (4, 2) if smoke else (BLOCKS, DRAWS)
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, inputs, targets = make(blocks)
        inputs = {key: tensor[: 1 if smoke else ROWS] for key, tensor in inputs.items()}
        model = get_peft_model(model, FusedLoraConfig(r=8, target_modules=targets)).train()  # pyright: ignore
        whole = saved_bytes(model, inputs)
        rows.append({"model": name, "active": blocks, "min_layer": 0, "bytes": whole, "ratio": 1.0})
        for min_layer in MIN_LAYERS:
            scheduler = LayerScheduler(model, min_layer=min_layer * blocks // BLOCKS)
            policy = RandomLayers(blocks // SHARE, 1, seed=0)
            policy.start(scheduler)
            different = draws if policy.count < len(scheduler.blocks) else 1
            found = [draw(model, inputs, scheduler, policy, step) for step in range(different)]
            mean = statistics.mean(count for count, _ in found)
            row = {"model": name, "active": blocks // SHARE, "min_layer": min_layer, "bytes": mean}
            row |= {"ratio": mean / whole, "lowest": statistics.mean(lowest for _, lowest in found)}
            rows.append(row | {"least": min(found)[0], "most": max(found)[0]})
            print(json.dumps(rows[-1]), flush=True)
    return {"blocks": blocks, "draws": draws, "batch": ROWS, "rows": rows}


def draw(model: nn.Module, inputs: Any, scheduler: LayerScheduler, policy: RandomLayers, step: int) -> tuple[int, int]:
    """(bytes, lowest active block) of a step."""
    scheduler.select(policy.choose(step) or ())
    with scheduler.training():
        return saved_bytes(model, inputs), min(scheduler.active)


def measure_prefix(smoke: bool) -> dict[str, Any]:
    """Seconds of epochs with LoRA from each of LOWEST on."""
    return {"runs": [{"lowest": lowest, **time_prefix(lowest, smoke)} for lowest in LOWEST[: 1 if smoke else None]]}


def time_prefix(lowest: int, smoke: bool) -> dict[str, Any]:
    """Seconds of epochs with LoRA from block `lowest` of the demo's encoder on."""

    def adapt(base: Any) -> nn.Module:
        for module in base.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        upper = list(range(lowest, base.config.num_hidden_layers))
        config = FusedLoraConfig(r=8, target_modules=["query", "value"], layers_to_transform=upper)
        return get_peft_model(base, config)

    return time_epochs(replace(SMOKE, texts=32) if smoke else Plan(texts=320), adapt)


PARTS = {"memory": measure_memory, "prefix": measure_prefix}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure anew")
    parser.add_argument("--smoke", action="store_true", help="a little of everything, in seconds: no measurement")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.smoke and args.out == RESULTS:
        parser.error(f"a smoke run measures nothing, so it may not write {RESULTS.name}; give another --out.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    quieten()
    result: dict[str, Any] = {
        "question": "what do layer schedules save in memory, and a frozen prefix's cache in time"
    }
    if args.out.exists():
        result = json.loads(args.out.read_text())
    for part in args.only:
        result[part] = {"smoke": args.smoke, **environment(), **PARTS[part](args.smoke)}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
