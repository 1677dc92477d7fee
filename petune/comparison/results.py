"""What a comparison found: each run, each method over its seeds, as rows, as tables, as files."""

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from petune.atomic import replacing_file
from petune.comparison.plan import Trial
from petune.comparison.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

RESULTS, SUMMARY, PLOT, PAGE = "results.csv", "summary.csv", "comparison.png", "index.html"
COSTS = ("trainable_parameters", "weights_bytes", "peak_memory_bytes", "saved_for_backward_bytes", "seconds", "steps")
"""Fields of a record that are numbers of a run."""


@dataclass(frozen=True)
class Metric:
    """The metric that decides."""

    name: str
    """As it was logged, such as val/accuracy."""
    best: Literal["max", "min"]

    @property
    def direction(self) -> str:
        """In words."""
        return "higher is better" if self.best == "max" else "lower is better"


@dataclass(frozen=True)
class Run:
    """One run, finished or failed."""

    trial: Trial
    record: Record | None
    failure: str = ""
    """Why there is no record."""
    chosen: bool = True
    """Whether it counts in the summary: not with a learning rate that was tried and not taken."""

    def row(self) -> dict[str, Any]:
        """The line of the run in results.csv."""
        found: dict[str, Any] = {
            "method": self.trial.method,
            "seed": self.trial.seed,
            "learning_rate": self.trial.rate,
            "chosen": self.chosen,
            "failure": self.failure,
            "folder": str(self.trial.folder),
        }
        if self.record is not None:
            found |= {"learning_rate": self.record.learning_rate, **numbers(self.record)}
            found |= {"memory": self.record.memory, "device": self.record.device, "adapter": self.record.adapter}
        return found


@dataclass(frozen=True)
class Summary:
    """A method over its seeds."""

    method: str
    n: int
    """Runs that finished."""
    failures: tuple[str, ...]
    learning_rate: float | None
    mean: Mapping[str, float]
    """By the names of `numbers`."""
    std: Mapping[str, float]
    """Sample standard deviation (n - 1); none of a single run."""

    def row(self) -> dict[str, Any]:
        """The line of the method in summary.csv."""
        found: dict[str, Any] = {"method": self.method, "n": self.n, "failed": len(self.failures)}
        found["learning_rate"] = self.learning_rate
        for name, mean in self.mean.items():
            found |= {f"{name}_mean": mean, f"{name}_std": self.std.get(name)}
        return found | {"failure": " ".join(self.failures)}


@dataclass(frozen=True)
class Comparison:
    """Everything a comparison found."""

    folder: Path
    """Where it was written."""
    title: str
    """Task and data."""
    metric: Metric | None
    """None where no run finished."""
    runs: Sequence[Run]
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Command line, versions and hardware."""
    notes: Sequence[str] = ()
    """How to read the numbers."""

    @property
    def failed(self) -> list[Run]:
        """Runs without a result."""
        return [run for run in self.runs if run.record is None]

    @property
    def summaries(self) -> list[Summary]:
        """A row for each method, in the order given."""
        methods = dict.fromkeys(run.trial.method for run in self.runs)
        return [_summary(method, [run for run in self.runs if run.trial.method == method]) for method in methods]

    @property
    def table(self) -> "DataFrame":
        """A row for each method: mean, std and n of the metric that decides, and the mean of each cost."""
        from pandas import DataFrame

        name = self.metric.name if self.metric else "metric"
        rows = [
            {"method": row.method, name: row.mean.get(name), "std": row.std.get(name), "n": row.n}
            | {"learning_rate": row.learning_rate, **{cost: row.mean.get(cost) for cost in COSTS}}
            for row in self.summaries
        ]
        return DataFrame(rows).set_index("method")

    @property
    def details(self) -> "DataFrame":
        """A row for each run."""
        from pandas import DataFrame

        return DataFrame([run.row() for run in self.runs])

    def figure(self) -> "Figure":
        """The metric against parameters, bytes, memory and seconds.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: no run finished.
        """
        from petune.comparison.figure import draw

        if self.metric is None:
            raise ValueError("no run finished, so there is nothing to draw; the failures say why.")
        return draw(self.summaries, self.metric, memory=self.memory)

    @property
    def memory(self) -> str:
        """Which memory was measured; '' where none was."""
        known = (run.record for run in self.runs if run.record is not None and run.record.peak_memory_bytes)
        return ", ".join(dict.fromkeys(record.memory for record in known))

    def rich_table(self) -> Table:
        """The table for a terminal; failures stand below their methods."""
        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column("method", no_wrap=True)
        for heading in HEADINGS:
            name = heading.format(metric=self.metric.name if self.metric else "metric")
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.summaries:
            table.add_row(escape(row.method), *map(escape, cells(row, self.metric)))
        failures = (f"{run.trial.method}, seed {run.trial.seed}, failed: {run.failure}" for run in self.failed)
        table.caption, table.caption_justify = escape("\n".join(failures)) or None, "left"
        return table

    def write_tables(self) -> None:
        """The two CSV files, each put in the place of the old one when it is whole."""
        _write_csv(self.folder / RESULTS, [run.row() for run in self.runs])
        _write_csv(self.folder / SUMMARY, [row.row() for row in self.summaries])

    def write(self) -> None:
        """Tables, plot and page, in the same way."""
        from petune.comparison.page import render

        self.write_tables()
        plot = b""
        if self.metric is not None:
            with replacing_file(self.folder / PLOT) as path:
                self.figure().savefig(path, format="png", dpi=150)
                plot = path.read_bytes()
        with replacing_file(self.folder / PAGE) as path:
            path.write_text(render(self, plot), encoding="utf-8")


HEADINGS = ("{metric}", "n", "trained", "weights", "memory", "s", "steps", "rate")


def cells(row: Summary, metric: Metric | None) -> list[str]:
    """A method's cells under `HEADINGS`."""
    if not row.n:
        return ["failed", "0", *[""] * 6]
    name = metric.name if metric else ""
    value = f"{row.mean[name]:.3f}" if name in row.mean else "?"
    if name in row.std:
        value += f" ± {row.std[name]:.3f}"
    peak = row.mean.get("peak_memory_bytes")
    return [
        value,
        f"{row.n}" + (f" of {row.n + len(row.failures)}" if row.failures else ""),
        f"{row.mean['trainable_parameters']:,.0f}",
        decimal(round(row.mean["weights_bytes"])),
        "?" if peak is None else decimal(round(peak)),
        f"{row.mean['seconds']:.1f}",
        f"{row.mean['steps']:g}",
        "" if row.learning_rate is None else f"{row.learning_rate:g}",
    ]


def numbers(record: Record) -> dict[str, float]:
    """All numbers of a run: metrics, costs, rows."""
    found = dict(record.metrics)
    found |= {name: value for name in COSTS if (value := getattr(record, name)) is not None}
    return found | {f"{split}_rows": rows for split, rows in record.rows.items()}


def main_metric(records: Sequence[Record], wanted: Mapping[str, Literal["max", "min"]]) -> Metric | None:
    """The first metric of a task that all runs have, of the test data if all were tested; None without runs.

    Args:
        records: of the finished runs.
        wanted: `AdapterTask.main_metrics`; the loss is taken where there is none of them.

    Raises:
        ValueError: not even a loss was logged.
    """
    if not records:
        return None
    common = set.intersection(*(set(record.metrics) for record in records))
    for stage in ("test", "val"):
        for name in (*wanted, "loss"):
            if f"{stage}/{name}" in common:
                return Metric(f"{stage}/{name}", wanted.get(name, "min"))
    raise ValueError(
        f"the task's main_metrics are {', '.join(wanted)} and what all runs logged is "
        f"{', '.join(sorted(common)) or 'nothing'}; have its validation log one of them, or val/loss."
    )


def best_of(runs: Iterable[Run], metric: Metric) -> Run | None:
    """The run with the best value; None where none has one."""
    scored = [(run.record.metrics[metric.name], run) for run in runs if run.record is not None]
    scored = [(value if metric.best == "max" else -value, run) for value, run in scored if not math.isnan(value)]
    return max(scored, key=lambda each: each[0])[1] if scored else None


def _summary(method: str, runs: list[Run]) -> Summary:
    counted = [run for run in runs if run.chosen]
    found = [numbers(run.record) for run in counted if run.record is not None]
    names = [name for name in (found[0] if found else ()) if all(name in one for one in found)]
    values = {name: [one[name] for one in found] for name in names}
    rates = {run.record.learning_rate if run.record else run.trial.rate for run in counted}
    return Summary(
        method=method,
        n=len(found),
        failures=tuple(run.failure for run in runs if run.record is None),
        learning_rate=rates.pop() if len(rates) == 1 else None,
        mean={name: statistics.fmean(values[name]) for name in names},
        std={name: statistics.stdev(values[name]) for name in names if len(found) > 1},
    )


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing_file(path) as incoming, incoming.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)
