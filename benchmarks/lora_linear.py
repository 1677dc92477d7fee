"""What does LoRA cost on a GPU, layer by layer, in our operators, in PEFT, in Unsloth? Time, memory, error.

    python benchmarks/lora_linear.py                     # writes benchmarks/results/<gpu>/lora_linear.json
    python benchmarks/lora_linear.py --smoke             # tests this script on any device, measures nothing

Rows are the linear maps of a Llama-8B block and of ViT-B, alone and grouped, in training and in decoding. All sides
of a row hold the same tensors and run in turn in one process; a side is timed only after its outputs and gradients
have agreed with float64. Eager times start from an idle device and show launch costs; graph times are the GPU's own.
"""

import gc
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # also finds petune where it is not installed

from benchmarks.gpu import gate, harness, measure, peers, reach, unsloth
from benchmarks.gpu.peers import Side
from benchmarks.gpu.problem import SCALE, Problem, Row, make

PEFT_SETTINGS = ("E3", "E1", "E2", "E2-nocast")  # E3 first: its errors bound ours
LLAMA: dict[str, Any] = {"batch": 4, "length": 2048}
LLAMA_SHORT: dict[str, Any] = {"batch": 1, "length": 2048}
VIT: dict[str, Any] = {"batch": 64, "length": 197}
BLOCK = {"q/o": (4096, (4096,)), "k/v": (4096, (1024,)), "gate/up": (4096, (14336,)), "down": (14336, (4096,))}
GROUPS = {"QKV grouped": (4096, (4096, 1024, 1024)), "gate/up grouped": (4096, (14336, 14336))}
VIT_LINEARS = {"ViT qkv/proj": (768, (768,)), "ViT fc1": (768, (3072,)), "ViT fc2": (3072, (768,))}
MLP = ("SwiGLU MLP", (4096, (14336,)))


def rows() -> list[Row]:
    """All rows, the most important first: a run that ends early has measured what was asked for most."""
    both = ("E3", "E1")
    block = [
        Row(name, **LLAMA, in_features=k, out_features=n, compiled=both, variants=name in ("q/o", "k/v"))
        for name, (k, n) in BLOCK.items()
    ]
    groups = [Row(name, **LLAMA, in_features=k, out_features=n) for name, (k, n) in GROUPS.items()]
    vit = [Row(name, **VIT, in_features=k, out_features=n, compiled=("E3",)) for name, (k, n) in VIT_LINEARS.items()]
    mlp = [Row(MLP[0], **LLAMA, in_features=MLP[1][0], out_features=MLP[1][1], mlp=True, compiled=("E3",))]
    decode = [
        Row(f"{name} decode", batch=m, length=1, in_features=k, out_features=n, backward=False)
        for m in (1, 16, 64)
        for name, (k, n) in BLOCK.items()
    ]
    dropped, dropped_vit = (
        [row._replace(dropout=0.05, compiled=(), variants=False) for row in plain]
        for plain in ((*block, *groups), vit)
    )
    short = [row._replace(**LLAMA_SHORT, compiled=(), variants=False) for row in (*block, *groups, *mlp)]
    wide = [row._replace(rank=64, compiled=(), variants=False) for row in (*block, *groups)]
    return [*block, *groups, *vit, *dropped, *decode, *mlp, *dropped_vit, *short, *wide]


def smoke_rows() -> list[Row]:
    """One row of each kind, small enough for a CPU."""
    tiny: dict[str, Any] = {"batch": 2, "length": 72, "rank": 4}
    return [
        Row("q/o", **tiny, in_features=96, out_features=(80,), compiled=("E3",), variants=True),
        Row("q/o with bias", **tiny, in_features=96, out_features=(80,), bias=True),
        Row("QKV grouped", **tiny, in_features=96, out_features=(80, 48, 48)),
        Row("SwiGLU MLP", **tiny, in_features=96, out_features=(128,), mlp=True),
        Row("q/o", **tiny, in_features=96, out_features=(80,), dropout=0.05),
        Row("QKV grouped", **tiny, in_features=96, out_features=(80, 48, 48), dropout=0.25),
        Row("q/o decode", batch=3, length=1, rank=4, in_features=96, out_features=(80,), backward=False),
    ]


class Bench:
    """Measures rows on one device."""

    def __init__(self, device: torch.device, args: Any) -> None:
        self.device, self.seed, self.dtype = device, args.seed, getattr(torch, args.dtype)
        self.plan = harness.SMOKE if args.smoke else harness.FULL
        self.longest_compile_s = 10.0
        self.functions: ModuleType | None = None
        try:
            self.functions, self.unsloth_missing = unsloth.load(args.unsloth), ""
        except unsloth.UnslothError as error:
            self.unsloth_missing = str(error)

    def row(self, row: Row, budget: harness.Budget) -> dict[str, Any]:
        """Build every side, check it, time those that are right."""
        problem = make(row, self.device, self.dtype, self.seed)
        found: dict[str, dict[str, Any]] = {}
        with ExitStack() as stack:
            sides = self._checked(self._sides(problem, found, stack), problem, found)
            self._compile(row, problem, sides, found, budget)
            for name, times in measure.eager(sides, problem, self.plan, self.device).items():
                found[name]["eager"] = times
            if self.device.type == "cuda":
                times, failed = measure.graphed(sides, problem, self.plan, self.device)
                for side in sides:
                    found[side.name]["graph"] = times.get(side.name, {"failed": failed.get(side.name)})
                    peak = self._attempt(side.name, lambda side=side: measure.peak_mib(side, problem), {})
                    found[side.name]["peak_mib"] = peak
        torch._dynamo.reset()  # the next row's shapes are no recompilation of this one's
        return {**row._asdict(), "label": row.label, "tokens": row.tokens, "sides": found}

    def _sides(self, problem: Problem, found: dict[str, dict[str, Any]], stack: ExitStack) -> list[Side]:
        builders: dict[str, Callable[[], Side]] = {peers.FLOOR: lambda: peers.floor(problem)}
        for name in PEFT_SETTINGS:
            builders[name] = lambda name=name: peers.peft(problem, name, stack)
        builders["ours-fp32"] = lambda: peers.ours(problem, True)
        builders["ours"] = lambda: peers.ours(problem, False)
        row, functions = problem.row, self.functions
        if row.mlp or len(row.out_features) > 1:
            builders["ours-grouped-fp32"] = lambda: peers.ours_grouped(problem, True)
            builders["ours-grouped"] = lambda: peers.ours_grouped(problem, False)
        if functions is None:
            found["unsloth"] = {"missing": self.unsloth_missing}
        elif row.bias or len(row.out_features) == 2:
            what = "adds the base's bias" if row.bias else "takes gate and up without the rest of the MLP"
            found["unsloth"] = {"missing": f"unsloth has no function that {what}"}
        else:
            builders["unsloth"] = lambda: peers.unsloth(problem, functions)
            if row.mlp or len(row.out_features) == 3:
                builders["unsloth-inplace"] = lambda: peers.unsloth(problem, functions, inplace=True)
        built = (self._attempt(name, build, found) for name, build in builders.items())
        sides = [side for side in built if side is not None]
        plain = next((side for side in sides if side.name == "ours"), None)
        if row.variants and plain is not None and peers.kernels_run(self.device):
            names = self._attempt("ours", lambda: peers.variant_names(plain, problem), found) or []
            sides += [peers.forced(plain, name) for name in names]
        return sides

    def _checked(self, sides: list[Side], problem: Problem, found: dict[str, dict[str, Any]]) -> list[Side]:
        right, best = list[Side](), None
        for side in sorted(sides, key=lambda side: side.name != "E3"):
            start = time.perf_counter()
            verdict = self._attempt(side.name, lambda side=side, best=best: gate.check(side, problem, best), found)
            if verdict is None:
                continue
            # compilation, the chooser's trials and the check itself
            found[side.name] = {"gate": verdict.as_row(), "first_s": time.perf_counter() - start}
            if verdict.passed:
                right.append(side)
            if side.name == "E3":
                best = verdict
        return right

    def _compile(
        self, row: Row, problem: Problem, sides: list[Side], found: dict[str, dict[str, Any]], budget: harness.Budget
    ) -> None:
        """Add torch.compile of the settings that the row asks for, as long as there is time to compile."""
        for setting in row.compiled:
            eager = next((side for side in sides if side.name == setting), None)
            name = f"compile({setting})"
            if eager is None or budget.left_s() < 2 * self.longest_compile_s:
                found[name] = {"missing": "no time left to compile" if eager else f"{setting} failed"}
                continue
            side = self._attempt(name, lambda eager=eager: peers.compiled(eager, self.device), found)
            right = [] if side is None else self._checked([side], problem, found)
            if right:
                self.longest_compile_s = max(self.longest_compile_s, found[name]["first_s"])
            sides += right

    def _attempt(self, name: str, call: Callable[[], Any], found: dict[str, dict[str, Any]]) -> Any:
        """What a side raises is its result: it is written down, printed, and the other sides go on."""
        try:
            return call()
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            return None


def run(bench: Bench, todo: list[Row], results: harness.Results, budget: harness.Budget) -> None:
    recent_s: list[float] = []
    for row in todo:
        if budget.left_s() < max(recent_s[-2:], default=0.0):  # of the last two: the first row compiles our kernels
            results.leave_out(row.label, "the time was up")
            continue
        start = time.perf_counter()
        try:
            found = bench.row(row, budget)
        except torch.OutOfMemoryError as error:
            results.leave_out(row.label, str(error).splitlines()[0])
            continue
        finally:
            gc.collect()
            recent_s.append(time.perf_counter() - start)
        results.add({**found, "seconds": recent_s[-1]})
        print(f"{row.label}: {', '.join(reach.outcomes(found))}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = harness.arguments(__doc__ or "", budget_s=200)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the base")
    parser.add_argument("--only", default="", help="rows whose label has this in it, for example 'k/v' or 'p=0.05'")
    args = parser.parse_args(argv)
    budget = harness.Budget(args.budget_s)
    device, out = harness.place("lora_linear", args)
    bench = Bench(device, args)
    header = {
        "question": "LoRA linear maps on a GPU: forward, backward, both, in microseconds; memory in MiB",
        "smoke": args.smoke,
        "environment": harness.environment(device),
        "unsloth": bench.unsloth_missing or unsloth.release(args.unsloth),
        "clocks_before": harness.clocks(),
        "dtype": args.dtype,
        "scale": SCALE,
        "seed": args.seed,
        "plan": bench.plan._asdict(),
    }
    results = harness.Results(out, header)
    todo = [row for row in (smoke_rows() if args.smoke else rows()) if args.only in row.label]
    run(bench, todo, results, budget)
    results.finish(reach=[] if args.smoke else reach.linear_cells(results.rows))
    reach.print_linear(results.content)
    print(f"written: {out}")
    wrong = reach.ours_wrong(results.rows)
    for line in wrong:
        print(f"WRONG {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
