"""From rows to verdicts: ratios to the peers, the limits of the project, and the tables that are printed last."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

Rows = Sequence[Mapping[str, Any]]

COLUMNS = ("E1", "E2", "E2-nocast", "E3", "compile(E1)", "compile(E3)", "unsloth", "unsloth-inplace")
OURS = ("ours-fp32", "ours", "ours-grouped-fp32", "ours-grouped")
UNSLOTH = ("unsloth", "unsloth-inplace")
BLOCK = {"q/o": 2, "k/v": 2, "gate/up": 2, "down": 1}
BLOCK_GROUPED = {"QKV grouped": 1, "q/o": 1, "gate/up grouped": 1, "down": 1}
VIT = {"ViT qkv/proj": 4, "ViT fc1": 1, "ViT fc2": 1}


SHORT = {
    "E2-nocast": "E2n",
    "compile(E1)": "c(E1)",
    "compile(E3)": "c(E3)",
    "unsloth": "uns",
    "unsloth-inplace": "uns-i",
    "ours-fp32": "ours32",
    "ours-grouped-fp32": "grp32",
    "ours-grouped": "grp",
}


class Goal(NamedTuple):
    """One line of the table of what is to be reached: ours over a peer, at most the limit."""

    what: str
    parts: Mapping[str, int]
    """Rows that add up to one side, and how often each."""
    tokens: int
    limits: Mapping[str, float]
    grouped: bool = False
    peer_parts: Mapping[str, int] | None = None
    """Where the peers have no grouped form: the rows that add up to theirs."""


GOALS = (
    Goal(
        "Llama-8B block linears, M=8192, layer by layer",
        BLOCK,
        8192,
        {"E1": 0.50, "E3": 0.80, "compile(E3)": 0.85, "unsloth": 0.90, "floor": 1.12},
    ),
    Goal(
        "Llama-8B block linears, M=8192, grouped",
        BLOCK_GROUPED,
        8192,
        {"E1": 0.50, "E3": 0.80, "compile(E3)": 0.85, "unsloth": 0.90, "floor": 1.12},
        grouped=True,
        peer_parts=BLOCK,
    ),
    Goal(
        "k/v grouped with q, M=8192",
        {"QKV grouped": 1},
        8192,
        {"E3": 0.65, "unsloth": 0.75, "floor": 1.35},
        grouped=True,
    ),
    Goal(
        "ViT-B linears",
        VIT,
        12608,
        {"E1": 0.25, "E3": 0.55, "compile(E3)": 0.70, "unsloth": 0.75, "floor": 1.9},
    ),
)


def median_us(row: Mapping[str, Any], side: str, quantity: str = "both", mode: str = "graph") -> float | None:
    """The median, or None where the side was not measured."""
    return row["sides"].get(side, {}).get(mode, {}).get(quantity, {}).get("median_us")


def linear_cells(rows: Rows) -> list[dict[str, Any]]:
    """Every cell of the goals at rank 16: measured value, limit, verdict; "not measured" where a part is missing.

    Against E1 ours has fp32 adapters too, against all others those of the base's dtype; the same dropout on both.
    """
    cells: list[dict[str, Any]] = []
    for goal in GOALS:
        for peer, limit in goal.limits.items():
            for dropout in (0.0, 0.05) if peer == "E1" else (0.0,):
                ours = "ours-fp32" if peer == "E1" else "ours"
                above = _total(rows, goal, goal.parts, dropout, (ours.replace("ours", "ours-grouped"), ours))
                if not goal.grouped:
                    above = _total(rows, goal, goal.parts, dropout, (ours,))
                names = UNSLOTH if peer == "unsloth" else (peer,)
                below = _total(rows, goal, goal.peer_parts or goal.parts, dropout, names)
                value = above / below if above and below else None
                cells.append(_cell(goal.what, f"{peer}, p={dropout:g}", value, limit, at_least=False))
    return cells


def _total(rows: Rows, goal: Goal, parts: Mapping[str, int], dropout: float, sides: Sequence[str]) -> float | None:
    """Microseconds of all parts, of each the fastest of the sides named; None where one was not measured."""
    total = 0.0
    for name, count in parts.items():
        matching = (
            row
            for row in rows
            if (row["name"], row["tokens"], row["rank"], row["dropout"]) == (name, goal.tokens, 16, dropout)
        )
        row = next(matching, None)
        times = [] if row is None else [us for side in sides if (us := median_us(row, side)) is not None]
        if not times:
            return None
        total += count * min(times)
    return total


def outcomes(row: Mapping[str, Any]) -> list[str]:
    """One word or two for each side of a row, for the line that is printed while it runs."""
    return [f"{name} {_outcome(side)}" for name, side in row["sides"].items()]


def _outcome(side: Mapping[str, Any]) -> str:
    if "missing" in side:
        return "-"
    if "failed" in side:
        return f"FAILED ({side['failed']})"
    return "ok" if side["gate"]["passed"] else f"WRONG ({side['gate']['reason']})"


def ours_wrong(rows: Rows) -> list[str]:
    """What of ours raised or failed its gate."""
    return [
        f"{row.get('label', row.get('name'))}: {name} {_outcome(side)}"
        for row in rows
        for name, side in row["sides"].items()
        if name.startswith("ours") and _outcome(side) != "ok"
    ]


def print_linear(content: Mapping[str, Any]) -> None:
    """The ratios of every row, then the cells of the goals."""
    console = _console(content)
    mode = "graph" if content["environment"]["device"] != "cpu" else "eager"
    table = Table(title=f"time over the frozen floor, {mode}, forward + backward (decode: forward)")
    for column in ("row", "floor µs", *COLUMNS, *OURS, "best variant", "noise"):
        left = column in ("row", "best variant")
        table.add_column(SHORT.get(column, column), justify="left" if left else "right", no_wrap=True)
    for row in content["rows"]:
        table.add_row(*_line(row, mode))
    console.print(table)
    console.print(", ".join(f"{short} = {name}" for name, short in SHORT.items()))
    print_left_out(content, console)
    print_cells(content["reach"], console)


def print_cells(cells: Rows, console: Console) -> None:
    if not cells:
        return
    table = Table(title="reached?")
    for column in ("what", "peer", "ours / peer", "limit", "verdict"):
        table.add_column(column)
    for cell in cells:
        value = "" if cell["value"] is None else f"{cell['value']:.3f}"
        limit = f"{'>=' if cell['at_least'] else '<='} {cell['limit']:g}"
        table.add_row(cell["what"], cell["peer"], value, limit, cell["verdict"])
    console.print(table)


def _line(row: Mapping[str, Any], mode: str) -> list[str]:
    quantity = "both" if row["backward"] else "forward"
    floor = median_us(row, "floor", quantity, mode)

    def ratio(side: str) -> str:
        if side not in row["sides"]:
            return ""
        us = median_us(row, side, quantity, mode)
        return f"{us / floor:.2f}" if us and floor else _outcome(row["sides"][side]).split(" ")[0]

    variants = {
        name[5:-1]: us
        for name in row["sides"]
        if name.startswith("ours[") and (us := median_us(row, name, quantity, mode)) is not None
    }
    best = min(variants, key=lambda name: variants[name], default="")
    noises = [side[mode][quantity]["noise_ratio"] for side in row["sides"].values() if quantity in side.get(mode, {})]
    noise = f"{max(noises):.1%}" if noises else ""
    return [row["label"], f"{floor:.0f}" if floor else "", *map(ratio, (*COLUMNS, *OURS)), best, noise]


STEP_GOALS = (
    ("tokens/s of a step, Llama-1B", "tokens_per_s", True, {"E1": 1.5, "E3": 1.10, "floor": 0.85}),
    ("peak memory of that step", "peak_mib", False, {"E1": 0.75, "E3": 0.95}),
)


def step_cells(rows: Rows) -> list[dict[str, Any]]:
    """The goals of the whole step; ours is the model after `petune.fuse`, with the adapter dtype of the peer."""
    sides = next((row["sides"] for row in rows if row["name"] == "Llama-1B"), {})
    cells: list[dict[str, Any]] = []
    for what, quantity, at_least, limits in STEP_GOALS:
        for peer, limit in limits.items():
            above = sides.get("ours-grouped-fp32" if peer == "E1" else "ours-grouped", {}).get(quantity)
            below = sides.get(peer, {}).get(quantity)
            value = above / below if above and below else None
            cells.append(_cell(what, peer, value, limit, at_least))
    return cells


def _cell(what: str, peer: str, value: float | None, limit: float, at_least: bool) -> dict[str, Any]:
    verdict = "not measured"
    if value is not None:
        verdict = "pass" if (value >= limit if at_least else value <= limit) else "MISS"
    return {"what": what, "peer": peer, "value": value, "limit": limit, "at_least": at_least, "verdict": verdict}


def print_step(content: Mapping[str, Any]) -> None:
    """One line for each side of each model, then the cells of the goals."""
    console = _console(content)
    table = Table(title="one training step")
    for column in ("model", "side", "ms", "p10-p90", "noise", "tokens/s", "graph ms", "peak MiB", "loss", "compile s"):
        table.add_column(column, justify="left" if column in ("model", "side") else "right", no_wrap=True)
    for row in content["rows"]:
        for name, side in row["sides"].items():
            table.add_row(row["name"], name, *_step_line(side))
    console.print(table)
    print_left_out(content, console)
    print_cells(content["reach"], console)


def _step_line(side: Mapping[str, Any]) -> list[str]:
    if "step" not in side:
        return [_outcome(side).split(" ")[0]]
    step, graph = side["step"], side.get("graph", {})
    loss = f"{side['loss']:.4f}" + ("" if side.get("loss_agrees", True) else " DIFFERS")
    return [
        f"{step['median_us'] / 1e3:.1f}",
        f"{step['p10_us'] / 1e3:.1f}-{step['p90_us'] / 1e3:.1f}",
        f"{step['noise_ratio']:.1%}",
        f"{side['tokens_per_s']:.0f}",
        f"{graph['median_us'] / 1e3:.1f}" if "median_us" in graph else "",
        f"{side['peak_mib']:.0f}" if "peak_mib" in side else "",
        loss,
        f"{side['compile_s']:.0f}" if "compile_s" in side else "",
    ]


def print_left_out(content: Mapping[str, Any], console: Console) -> None:
    for left in content["left_out"]:
        console.print(f"left out: {left['what']} ({left['why']})")


def _console(content: Mapping[str, Any]) -> Console:
    console = Console(width=190)
    if content["smoke"]:
        console.print("[b]Smoke run: the script works; no figure of it is a measurement.[/b]")
    environment = content["environment"]
    console.print(f"{environment['device']}, {environment['versions']}, commit {environment['commit']}")
    return console
