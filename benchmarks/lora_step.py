"""What does a whole LoRA training step cost on a GPU? Tokens a second, peak memory, loss, against PEFT and Unsloth.

    python benchmarks/lora_step.py                       # writes benchmarks/results/<gpu>/lora_step.json
    python benchmarks/lora_step.py --smoke               # tests this script on any device, measures nothing

Llama-1B with random weights, batch 4 × 2048, r=16 on all linear layers, AdamW on the adapters, gradient checkpointing
off and on; and ViT-B/16, batch 64, whose step is bound by launches and is captured as a CUDA graph too. All sides
share one base and train in turn, five steps each. A side is timed only after its gradients have agreed with a float32
copy of the model; its loss after all steps must be that of PEFT with adapters of the same dtype to 1e-2.
"""

import gc
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # also finds petune where it is not installed

from benchmarks.gpu import harness, reach, steps, unsloth
from benchmarks.gpu.peers import FLOOR
from benchmarks.gpu.steps import Batch, Builder, Model, Side

LOSS_LIMIT = 1e-2
FP32_ADAPTERS = ("E1", "E2", "ours-fp32", "ours-grouped-fp32")  # bf16 ones lose part of each optimizer step
GRADIENT_LIMIT = 0.1  # of peers; ours: this many times E3's error, since both round at the same places
TO_BEST = 1.25
STEPS = 5  # a block of steps is timed as one: the host may run ahead, as it does in training
BLOCKS = harness.Plan(warm_up=1, timed=2, repetitions=2)
SMOKE_BLOCKS = harness.Plan(warm_up=1, timed=1, repetitions=2)


class Bench:
    """Measures one model after the other on one device."""

    def __init__(self, device: torch.device, args: Any, results: harness.Results, budget: harness.Budget) -> None:
        self.device, self.args, self.results, self.budget = device, args, results, budget
        self.plan = SMOKE_BLOCKS if args.smoke else BLOCKS

    def model(self, model: Model, checkpointings: tuple[bool, ...]) -> None:
        """All sides of one model, without and with activation checkpointing."""
        if self.budget.left_s() < 0:
            self.results.leave_out(model.name, "the time was up")
            return
        builder = Builder(model, self.device, torch.bfloat16, self.args.seed)
        full, small = (
            steps.cast_batch(model.batch(self.device, size == "small"), torch.bfloat16) for size in ("full", "small")
        )
        found: dict[str, dict[str, Any]] = {}
        sides = self._checked(self._sides(builder, found), builder, small, full, found)
        longest_s = 0.0
        for checkpointing in checkpointings:
            name = f"{model.name}{', checkpointing' if checkpointing else ''}"
            if self.budget.left_s() < longest_s:
                self.results.leave_out(name, "the time was up")
                continue
            start = time.perf_counter()
            if checkpointing:
                for side in sides:
                    _inner(side).gradient_checkpointing_enable({"use_reentrant": False})
            row: dict[str, Any] = {
                "name": name,
                "model": model.name,
                "tokens": model.tokens,
                "checkpointing": checkpointing,
                "sides": {side: dict(values) for side, values in found.items()},
            }
            self.results.add(row)
            self._measure(row, sides, full, model)
            longest_s = time.perf_counter() - start
            row["seconds"] = longest_s
            self.results.flush()
            print(f"{name}: {', '.join(reach.outcomes(row))}", flush=True)

    def _sides(self, builder: Builder, found: dict[str, dict[str, Any]]) -> list[Side]:
        builders: dict[str, Callable[[], Side]] = {
            "E3": lambda: builder.lora("E3", fp32_adapters=False),
            "E1": lambda: builder.lora("E1", fp32_adapters=True),
            "ours-grouped": lambda: builder.ours_grouped(fp32_adapters=False),
            "ours-grouped-fp32": lambda: builder.ours_grouped(fp32_adapters=True),
            "ours": lambda: builder.ours(fp32_adapters=False),
            "ours-fp32": lambda: builder.ours(fp32_adapters=True),
            "E2": lambda: builder.lora("E2", fp32_adapters=True),
            FLOOR: builder.floor,
            "unsloth": lambda: builder.unsloth(unsloth.load(self.args.unsloth)),
            "compile(E3)": builder.compiled,
        }
        built = (self._attempt(name, build, found) for name, build in builders.items())
        return [side for side in built if side is not None]

    def _checked(
        self, sides: list[Side], builder: Builder, small: Batch, full: Batch, found: dict[str, dict[str, Any]]
    ) -> list[Side]:
        """The sides whose adapters get the gradients of the float32 model."""
        reference = builder.exact()
        batch = {name: t.float() if t.is_floating_point() else t for name, t in small.items()}
        exact = steps.gradients(reference, batch)
        del reference
        best, right = None, list[Side]()
        for side in sides:
            if side.name == FLOOR:
                found[FLOOR] = {"gate": {"passed": True}}
                right.append(side)
                continue
            whole = side.name.startswith("compile")  # one compilation for gate and steps: it is compared with E3
            start = time.perf_counter()
            got = self._attempt(
                side.name, lambda side=side, b=full if whole else small: steps.gradients(side, b), found
            )
            if got is None:
                continue
            expected = steps.gradients(sides[0], full) if whole else exact
            error = ((got - expected).norm() / expected.norm()).item()
            limit = TO_BEST * best if side.name.startswith("ours") and best is not None else GRADIENT_LIMIT
            passed = error <= limit
            reason = "" if passed else f"gradient {error:.1e} > {limit:.1e}"
            found[side.name] = {"gate": {"passed": passed, "reason": reason, "gradient_error": error, "limit": limit}}
            if side.note:
                found[side.name]["note"] = side.note
            if whole:
                found[side.name]["compile_s"] = time.perf_counter() - start
            if side.name == "E3":
                best = error
            if passed:
                right.append(side)
        return right

    def _measure(self, row: dict[str, Any], sides: list[Side], batch: Batch, model: Model) -> None:
        found = row["sides"]
        running = [side for side in sides if self._attempt(side.name, lambda s=side: self._block(s, batch), found)]
        samplers = {side.name: self._sampler(side, batch) for side in running}
        for name, times in harness.interleaved(samplers, self.plan).items():
            found[name]["step"] = times["step"]
            found[name]["tokens_per_s"] = 1e6 * model.tokens / times["step"]["median_us"]
        last = {side.name: side.losses[-1].item() for side in running}
        for side in running:
            found[side.name]["loss"] = last[side.name]
            reference = "E1" if side.name in FP32_ADAPTERS else "E3"
            if side.name != FLOOR and reference in last:
                found[side.name]["loss_agrees"] = abs(last[side.name] - last[reference]) <= LOSS_LIMIT
            if self.device.type == "cuda":
                found[side.name]["static_mib"] = steps.static_bytes(side) / 2**20
                found[side.name]["peak_mib"] = self._peak_mib(side, batch)
            side.losses.clear()
        if model.graph and self.device.type == "cuda":
            self._graph(row, running, batch, model)

    def _block(self, side: Side, batch: Batch) -> float:
        """Microseconds a step over a block of steps."""
        clock = harness.Clock(self.device)
        clock.settle()
        start = time.perf_counter()
        for _ in range(STEPS):
            side.step(batch)
        clock.settle()
        return 1e6 * (time.perf_counter() - start) / STEPS

    def _sampler(self, side: Side, batch: Batch) -> Callable[[int], dict[str, float]]:
        return lambda _: {"step": self._block(side, batch)}

    def _peak_mib(self, side: Side, batch: Batch) -> float:
        """Of one step: what this side stands on, and what the step adds; the other sides' tensors do not count."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.step(batch)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before + steps.static_bytes(side)) / 2**20

    def _graph(self, row: dict[str, Any], sides: list[Side], batch: Batch, model: Model) -> None:
        """The same step as one CUDA graph: without the time that launching takes."""
        samplers: dict[str, Callable[[int], dict[str, float]]] = {}
        for side in sides:
            outcome: dict[str, dict[str, Any]] = {}
            graph = self._attempt(side.name, lambda s=side: _capture(s, batch), outcome)
            if graph is None:
                row["sides"][side.name]["graph"] = outcome[side.name]
            else:
                samplers[side.name] = self._replay(graph)
        for name, times in harness.interleaved(samplers, self.plan).items():
            row["sides"][name]["graph"] = times["step"]
            row["sides"][name]["graph_tokens_per_s"] = 1e6 * model.tokens / times["step"]["median_us"]

    def _replay(self, graph: torch.cuda.CUDAGraph) -> Callable[[int], dict[str, float]]:
        def sample(_: int) -> dict[str, float]:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(STEPS):
                graph.replay()
            torch.cuda.synchronize()
            return {"step": 1e6 * (time.perf_counter() - start) / STEPS}

        return sample

    def _attempt(self, name: str, call: Callable[[], Any], found: dict[str, dict[str, Any]]) -> Any:
        """What a side raises is its result: it is written down, printed, and the other sides go on."""
        try:
            return call()
        except unsloth.UnslothError as error:
            found[name] = {"missing": str(error)}
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        return None


def _inner(side: Side) -> Any:
    model: Any = side.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _capture(side: Side, batch: Batch) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            side.step(batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side.step(batch)
    return graph


def main(argv: list[str] | None = None) -> int:
    args = harness.arguments(__doc__ or "", budget_s=200).parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    budget = harness.Budget(args.budget_s)
    device, out = harness.place("lora_step", args)
    header = {
        "question": "one LoRA training step of a whole model: microseconds, tokens a second, MiB",
        "smoke": args.smoke,
        "environment": harness.environment(device),
        "unsloth": unsloth.release(args.unsloth) or unsloth.NOT_INSTALLED,
        "clocks_before": harness.clocks(),
        "dtype": "bfloat16",
        "dropout": 0.0,
        "seed": args.seed,
        "steps_a_block": STEPS,
        "plan": (SMOKE_BLOCKS if args.smoke else BLOCKS)._asdict(),
    }
    results = harness.Results(out, header)
    bench = Bench(device, args, results, budget)
    for model, checkpointings in ((steps.llama(args.smoke), (False, True)), (steps.vit(args.smoke), (False,))):
        bench.model(model, checkpointings)
        torch._dynamo.reset()
        gc.collect()
    results.finish(reach=[] if args.smoke else reach.step_cells(results.rows))
    reach.print_step(results.content)
    print(f"written: {out}")
    wrong = reach.ours_wrong(results.rows)
    for line in wrong:
        print(f"WRONG {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
