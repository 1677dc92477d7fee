"""`petune demo`: a first run on data that every Python has, against baselines that could win."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from petune.demo.report import DemoResult

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["DemoResult", "run_demo"]


def run_demo(
    task: Literal["retrieval", "vision"] = "retrieval",
    compare: bool = False,
    budget_s: float = 180.0,
    seed: int = 0,
    methods: Sequence[str] | None = None,
    output: str | Path | None = None,
    *,
    quiet: bool = False,
    console: "Console | None" = None,
) -> DemoResult:
    """Train the installed methods on a small task, compare them with baselines, save the adapters and print it all.

    Args:
        task: retrieval finds the docstring of a signature with the encoder of the `demo` extra; vision adapts a tiny
            ViT to turned digits.
        compare: fine-tune the whole model as well, on top of the budget.
        budget_s: seconds that the rest may take; training is cut to fit.
        seed: of data, training and intervals.
        methods: short names of methods; None for all that can be trained on the demo's base.
        output: folder for the adapters; None for `petune-demo` in the working directory.
        quiet: neither progress nor report.
        console: where the report is printed; None for standard output.

    Raises:
        ModuleNotFoundError: the `demo` extra is not installed.
        ValueError: unknown task or method, a method that was asked for and cannot be trained on the base, or a
            budget that is not above 0.
    """
    started = time.monotonic()
    if task not in ("retrieval", "vision"):
        raise ValueError(f"task={task!r} is not known to the demo; use 'retrieval' or 'vision'.")
    if not budget_s > 0:
        raise ValueError(f"budget_s={budget_s} leaves no time; use a number of seconds above 0, such as 180.")
    folder = Path("petune-demo" if output is None else output)
    if task == "retrieval":
        from petune.demo.retrieval import run_retrieval as run
    else:
        from petune.demo.vision import run_vision as run
    result = run(
        compare=compare,
        budget_s=budget_s,
        seed=seed,
        methods=methods,
        output=folder,
        started=started,
        quiet=quiet,
    )
    if not quiet:
        result.print(console)
    return result
