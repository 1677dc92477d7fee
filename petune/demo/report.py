"""What a demo run found, as a table, as sentences derived from its numbers, and as JSON."""

import dataclasses
import json
import os
import platform
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from petune.demo.metrics import Interval

PACKAGES = ("petune", "peft", "transformers", "lightning", "torch", "scikit-learn")


@dataclass(frozen=True)
class Row:
    """One way to solve the task."""

    name: str
    kind: Literal["baseline", "adapter", "full"]
    scores: dict[str, float]
    """By metric, 0..1; the first one decides."""
    interval: Interval
    """Of the first metric."""
    gain: Interval | None = None
    """Paired difference of the first metric to the reference row; None for the reference itself."""
    trainable_parameters: int = 0
    saved_bytes: int = 0
    """Of the adapter's weights on disk; of the trained tensors where nothing is written."""
    steps: int = 0
    """Optimizer steps."""
    seconds: float = 0.0
    """Wall clock of training and evaluation."""


@dataclass(frozen=True)
class Comparison:
    """A trained row against the best of the baselines."""

    name: str
    baseline: str
    difference: Interval
    """Paired difference of the first metric."""


@dataclass(frozen=True)
class Example:
    """One query before and after training."""

    query: str
    answer: str
    before: str
    """Top hit of the reference row."""
    after: str
    """Top hit of the trained row."""

    @property
    def outcome(self) -> str:
        return outcome(self.before == self.answer, self.after == self.answer)


@dataclass(frozen=True)
class Check:
    """A promise about the saved adapter, and how far the outputs are from it."""

    name: str
    largest_difference: float
    """Largest absolute difference of any output element."""
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.largest_difference <= self.tolerance


@dataclass(frozen=True)
class DemoResult:
    """Everything a demo run found."""

    task: Literal["retrieval", "vision"]
    title: str
    """What is solved, on how much data."""
    settings: dict[str, Any]
    """Seed, sizes and training settings."""
    reference: str
    """Name of the row that `Row.gain` is measured against."""
    rows: list[Row]
    comparisons: list[Comparison]
    checks: list[Check] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    """Queries by outcome, before to after."""
    shown: str = ""
    """Name of the row that the examples and the outcomes are of."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Folder of each saved adapter, by method."""
    notes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return next(iter(self.rows[0].scores))

    def row(self, name: str) -> Row:
        """The row of that name.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"the demo has no row {name!r}; it has {', '.join(row.name for row in self.rows)}.")

    @property
    def conclusion(self) -> str:
        """One line a trained row; it claims a difference only where the 95% interval excludes zero."""
        return "\n".join(_verdict(comparison, self.metric) for comparison in self.comparisons)

    def to_json(self, *, timings: bool = True) -> str:
        """The whole result; without `timings` two runs with one seed on one machine give the same text."""
        values: dict[str, Any] = dataclasses.asdict(self) | {"conclusion": self.conclusion}
        for example, named in zip(self.examples, values["examples"], strict=True):
            named["outcome"] = example.outcome
        for check, named in zip(self.checks, values["checks"], strict=True):
            named["passed"] = check.passed
        if not timings:
            del values["seconds"]
            for row in values["rows"]:
                del row["seconds"]
        return json.dumps(values, indent=2, ensure_ascii=False)

    def table(self) -> Table:
        """Every row with its scores, intervals, sizes and seconds; 80 columns wide at most."""
        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column("method", no_wrap=True)
        first, *others = self.rows[0].scores
        table.add_column(f"{first}\n95%", justify="right", no_wrap=True)
        for metric in others:
            table.add_column(metric, justify="right", no_wrap=True)
        table.add_column("\n".join(["points over", *self.reference.split(), "95%"]), justify="right", no_wrap=True)
        for title in ("trains", "saved", "s"):
            table.add_column(title, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*_cells(row, others), style="bold" if row.kind == "adapter" else None)
        return table

    def print(self, console: Console | None = None) -> None:
        """Print table, conclusion, examples, checks and environment."""
        console = console or Console()
        console.print(self.table())
        console.print(Text(self.conclusion, style="bold"))
        for note in self.notes:
            console.print(Text(note, style="dim"))
        if self.examples:
            console.print(_examples(self))
        for check in self.checks:
            state = "ok" if check.passed else f"FAILED (allowed {check.tolerance:g})"
            console.print(f"{check.name}: largest difference {check.largest_difference:.1e}, {state}", markup=False)
        for method, folder in self.adapters.items():
            console.print(f"{method} adapter saved in {folder}", markup=False)
        described = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        console.print(Text(f"{self.seconds:.0f} s, seed {self.settings['seed']}, {described}", style="dim"))


def outcome(right_before: bool, right_after: bool) -> str:
    """Name of what became of a query."""
    return f"{'right' if right_before else 'wrong'} → {'right' if right_after else 'wrong'}"


def choose_examples(outcomes: list[str], count: int = 5) -> list[int]:
    """Queries to show: the first of every outcome, then the first of those left, all in the order of the data.

    So none is chosen for its looks, and a query that training broke is shown if there is one.
    """
    chosen = [outcomes.index(kind) for kind in Counter(outcomes)]
    left = (query for query in range(len(outcomes)) if query not in chosen)
    return sorted([*chosen, *left][:count])


def environment() -> dict[str, str]:
    """Versions and processor settings that the numbers depend on."""
    import torch

    described = {"Python": platform.python_version(), "threads": str(torch.get_num_threads())}
    described |= {"cores": str(os.cpu_count())}
    return described | {package: version(package) for package in PACKAGES}


def _verdict(comparison: Comparison, metric: str) -> str:
    difference = comparison.difference
    between = f"{_points(difference.low)} to {_points(difference.high)} points"
    against = f"the best baseline ({comparison.baseline})"
    if difference.low > 0:
        return f"{comparison.name} is better than {against} in {metric}: by {between} (95% interval)."
    if difference.high < 0:
        return (
            f"{comparison.name} is worse than {against} in {metric}: by {between} (95% interval); prefer the baseline."
        )
    return (
        f"{comparison.name} is not shown to be better than {against} in {metric}: the 95% interval, {between}, "
        "includes no difference."
    )


def _cells(row: Row, others: list[str]) -> list[str]:
    interval = f"{_share(row.interval.mean)}\n{_share(row.interval.low, 2)}–{_share(row.interval.high, 2)}"
    gain = "–"
    if row.gain is not None:
        gain = f"{_points(row.gain.mean)}\n{_points(row.gain.low)}…{_points(row.gain.high)}"
    return [
        escape(row.name),
        interval,
        *(_share(row.scores[metric]) for metric in others),
        gain,
        _short(row.trainable_parameters, ("", " k", " M", " G")),
        _short(row.saved_bytes, (" B", " kB", " MB", " GB")),
        f"{row.seconds:.1f}",
    ]


def _examples(result: DemoResult) -> Group:
    total = sum(result.outcomes.values())
    counts = ", ".join(f"{kind}: {count}" for kind, count in sorted(result.outcomes.items()))
    lines = [
        Text(f"\nTop hits of {total} queries, {result.reference} → {result.shown}: {counts}."),
        Text("Shown are the first query of each outcome and the first ones left, in the order of the data."),
    ]
    for example in result.examples:
        lines.append(Text(f"\n{example.query}   [{example.outcome}]", style="bold"))
        for label, hit in (("before", example.before), ("after", example.after)):
            mark, style = ("✓", "green") if hit == example.answer else ("✗", "red")
            lines.append(_line(f"  {label:6} {mark} {hit}", style))
        if example.after != example.answer:
            lines.append(_line(f"  answer   {example.answer}"))
    return Group(*lines, Text(""))


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _share(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".removeprefix("0") if 0 <= value < 1 else f"{value:.{digits}f}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _short(value: float, units: tuple[str, ...]) -> str:
    if not value:
        return "–"
    for unit in units[:-1]:
        if value < 1000:
            return f"{value:.0f}{unit}" if value >= 100 or unit == units[0] else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f}{units[-1]}"
