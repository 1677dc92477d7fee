"""The plot of a comparison: quality against four costs."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from petune.comparison.methods import HEAD
from petune.comparison.results import Metric, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

_MARKERS = "osD^vPX*<>"
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#008060",
    "#a3428c",
    "#8c564b",
    "#b07d00",
    "#0f8f9f",
    "#c4161c",
    "#5b4bb7",
    "#4d4d00",
)
_LOG_FROM = 8.0  # largest over smallest value of an axis: below, a linear one is read more easily
_FEW_TICKS = 300.0  # the same for a logarithmic axis: below, powers of ten alone are too few ticks
_DISTANCES_PT = (8.0, 16.0, 26.0, 38.0, 52.0)  # of a label to its point; the first free place is taken
_DIRECTIONS = 16
_MARKER_PT, _LINE_PT = 8.0, 2.0  # kept free of labels


def draw(rows: Sequence[Summary], metric: Metric, *, memory: str) -> "Figure":
    """Four panels, in each a labelled point for each method with its standard deviation over the seeds.

    Args:
        rows: methods; those without a finished run are left out.
        metric: on the vertical axis.
        memory: which memory was measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'the plot of a comparison needs matplotlib, which is not installed; run: pip install "petune[compare]"'
        ) from error
    panels = _panels(rows, memory)
    figure = Figure(figsize=(10.0, 7.6), layout="constrained")
    FigureCanvasAgg(figure)  # measures the labels
    axes = list(figure.subplots(2, 2, sharey=True).flat)
    points = [
        _panel(axis, rows, metric, cost, unit) for axis, (cost, (_, unit)) in zip(axes, panels.items(), strict=True)
    ]
    for axis, (label, _) in zip(axes, panels.values(), strict=True):
        axis.set_xlabel(label)
    for axis in axes[::2]:
        axis.set_ylabel(f"{metric.name} ({metric.direction})")
    figure.suptitle(_caption(rows), fontsize="medium")
    figure.draw_without_rendering()  # lays the panels out, and with that every point
    figure.set_layout_engine("none")
    for axis, there in zip(axes, points, strict=True):
        _label(axis, there)
    return figure


def _panels(rows: Sequence[Summary], memory: str) -> dict[str, tuple[str, float]]:
    """Cost to its label and unit."""
    if any("peak_memory_bytes" in row.mean for row in rows):
        third = "peak_memory_bytes", (f"peak memory, MiB ({memory})", 2.0**20)
    else:
        third = "saved_for_backward_bytes", ("kept for the backward pass, MiB", 2.0**20)
    return {
        "trainable_parameters": ("trained parameters", 1.0),
        "weights_bytes": ("weights on disk, KiB", 2.0**10),
        third[0]: third[1],
        "seconds": ("seconds of training", 1.0),
    }


class Point(NamedTuple):
    """Where a method stands in a panel, in the units of its axes."""

    method: str
    x: float
    y: float
    x_error: float
    y_error: float
    colour: str


def _panel(axis: "Axes", rows: Sequence[Summary], metric: Metric, cost: str, unit: float) -> list[Point]:
    points: list[Point] = []
    others = itertools.count()
    for row in (row for row in rows if math.isfinite(row.mean.get(metric.name, math.nan))):
        value, index = row.mean[metric.name], 0 if row.method == HEAD else next(others)
        colour = "black" if row.method == HEAD else _COLOURS[index % len(_COLOURS)]
        if row.method == HEAD:
            axis.axhline(value, color="grey", linestyle="--", linewidth=0.8, zorder=0)
        if cost in row.mean:
            errors = row.std.get(cost, 0.0) / unit, row.std.get(metric.name, 0.0)
            point = Point(row.method, row.mean[cost] / unit, value, *errors, colour)
            bars: dict[str, Any] = {"xerr": point.x_error or None, "yerr": point.y_error or None, "capsize": 3}
            axis.errorbar(point.x, point.y, **bars, fmt=_MARKERS[index % len(_MARKERS)], color=colour, elinewidth=1)
            points.append(point)
    _scale(axis, [point.x for point in points], unit)
    axis.margins(0.15)
    axis.grid(alpha=0.3)
    return points


def _scale(axis: "Axes", values: Sequence[float], unit: float) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

    if values and min(values) > 0 and (ratio := max(values) / min(values)) >= _LOG_FROM:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < _FEW_TICKS else (1,)))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter(EngFormatter(sep="") if unit == 1 else StrMethodFormatter("{x:,.6g}"))


def _label(axis: "Axes", points: Sequence[Point]) -> None:
    """Write each method beside its point, where nothing else stands; a thin line leads to a point further away."""
    per_point = axis.figure.dpi / 72
    taken = [box for point in points for box in _ink(axis, point, per_point)]
    for point in points:
        text = axis.annotate(
            point.method,
            (point.x, point.y),
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            color=point.colour,
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": point.colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
        )
        offset, box = _freest(_places(text.get_window_extent(), per_point), taken, axis.bbox)
        text.set_position(offset)
        taken.append(box)


def _ink(axis: "Axes", point: Point, per_point: float) -> "Iterator[Bbox]":
    """What a point covers, in pixels: its marker and its two bars."""
    from matplotlib.transforms import Bbox

    to_pixels = axis.transData.transform
    half, line = _MARKER_PT * per_point / 2, _LINE_PT * per_point / 2
    x, y = to_pixels((point.x, point.y))
    yield Bbox.from_extents(x - half, y - half, x + half, y + half)
    low, high = (to_pixels((point.x, point.y + sign * point.y_error))[1] for sign in (-1, 1))
    yield Bbox.from_extents(x - line, low, x + line, high)
    low, high = (to_pixels((max(point.x + sign * point.x_error, point.x / 10), point.y))[0] for sign in (-1, 1))
    yield Bbox.from_extents(low, y - line, high, y + line)


Place = tuple[tuple[float, float], Any]
"""Offset of a label in points, and the box that it fills there."""


def _places(size: "Bbox", per_point: float) -> Iterator[Place]:
    """Where a label may stand, the nearest to its point first."""
    for distance, step in itertools.product(_DISTANCES_PT, range(_DIRECTIONS)):
        angle = 2 * math.pi * step / _DIRECTIONS
        across = distance + size.width / per_point / 2
        offset = across * math.cos(angle), distance * math.sin(angle)
        yield offset, size.translated(offset[0] * per_point, offset[1] * per_point)


def _freest(places: Iterable[Place], taken: Sequence["Bbox"], inside: "Bbox") -> Place:
    """The first place where nothing stands, else the least crowded."""
    best, least = None, math.inf
    for place in places:
        crowding = _crowding(place[1], taken, inside)
        if best is None or crowding < least:
            best, least = place, crowding
        if not crowding:
            break
    assert best is not None
    return best


def _crowding(box: "Bbox", taken: Sequence["Bbox"], inside: "Bbox") -> float:
    """Area of a box that is covered already, or outside of the panel."""
    from matplotlib.transforms import Bbox

    overlaps = [found.width * found.height for other in taken if (found := Bbox.intersection(box, other))]
    within = Bbox.intersection(box, inside)
    return sum(overlaps) + box.width * box.height - (within.width * within.height if within else 0.0)


def _caption(rows: Sequence[Summary]) -> str:
    runs = sorted({row.n for row in rows if row.n})
    if runs == [1]:
        return "One run of each method: no spread is known"
    return f"Mean and standard deviation over {' or '.join(map(str, runs))} seeds"
