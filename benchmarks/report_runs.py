"""The tables of `trainer_overhead.py`, `resume.py`, `layers.py` and `many.py`, for `report.py`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report_parts import UNMEASURED, place, table

_MIB = 2**20


def render(results: Path) -> dict[str, str]:
    """Section name to Markdown."""
    read = {name: _read(results / f"{name}.json") for name in ("trainer_overhead", "resume", "resume2", "layers")}
    many = _read(results / "many.json")
    return {
        "trainer_overhead": _section(read["trainer_overhead"], overhead),
        "resume": "\n\n".join(_section(read[name], resume) for name in ("resume", "resume2")),
        "layers": "\n\n".join(_section(read["layers"].get(part), make) for part, make in LAYERS.items()),
        "many": "\n\n".join(_section(many.get(part), make) for part, make in MANY.items()),
        "many_summary": "\n\n".join(make(many[part]) if part in many else UNMEASURED for part, make in MANY.items()),
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _section(found: Mapping[str, Any] | None, make: Any) -> str:
    if not found:
        return UNMEASURED
    if found.get("smoke"):
        raise ValueError(f"{make.__name__} is from a smoke run, which measures nothing; run it again.")
    return f"{place(found)}\n\n{make(found)}"


def overhead(found: Mapping[str, Any]) -> str:
    """Milliseconds a step, over the bare loop's."""
    gate = found["gate"]
    verdict = f"at most {gate['limit']}: {'reached' if gate['passed'] else 'MISSED'}"
    rows = [
        (
            row["trainer"],
            f"{row['step_ms']:.1f}",
            f"{row['ratio']:.3f} ({row['ratio_min']:.3f}..{row['ratio_max']:.3f})",
        )
        for row in found["rows"]
    ]
    return table(("trainer", "ms a step", f"of the bare loop's ({verdict})"), rows)


def resume(found: Mapping[str, Any]) -> str:
    """Points at which all was equal."""
    gate = found["gate"]
    processes = "one process" if found["processes"] == 1 else f"{found['processes']} processes"
    return f"{processes}: {gate['equal']} of {gate['of']} killed and resumed runs bit-equal to the uninterrupted one."


def memory(found: Mapping[str, Any]) -> str:
    """Bytes kept for backward over those with all blocks active."""
    rows = [
        (
            row["model"],
            f"{row['active']} of {found['blocks']}",
            str(row["min_layer"]),
            f"{row['bytes'] / _MIB:.1f}",
            f"{row['ratio']:.2f}",
        )
        for row in found["rows"]
    ]
    return table(("model", "active blocks", "min_layer", "MiB kept for backward", "of all active"), rows)


def prefix(found: Mapping[str, Any]) -> str:
    """Seconds of an epoch with the frozen prefix kept, over those without."""
    rows = [
        (
            str(run["lowest"]),
            f"{run['first']:.2f}",
            f"{run['later']:.2f} ({run['later_min']:.2f}..{run['later_max']:.2f})",
            "equal" if run["losses"]["with"] == run["losses"]["without"] else "DIFFERENT",
        )
        for run in found["runs"]
    ]
    return table(("lowest adapted block, of 6", "first epoch", "later epochs", "losses"), rows)


LAYERS = {"memory": memory, "prefix": prefix}


def train(found: Mapping[str, Any]) -> str:
    """Tokens/s of runs together, over those of the same runs one after the other."""
    rows = [
        (
            f"{row['rows']} x {row['tokens']}",
            f"{row['fills']:.2f}",
            str(row["runs"]),
            _gain(row),
            f"{row['together']:,}",
            f"{row['one after the other']:,}",
        )
        for row in found["rows"]
    ]
    memory = [(str(row["runs"]), row["way"], str(row["peak_mib"]), str(row["before_mib"])) for row in found["memory"]]
    step = [
        (row["size"], str(row["adapters"]), *_compared(row))
        for row in found["step"]
    ]  # fmt: skip
    return "\n\n".join(
        (
            table(("rows x tokens of a run's step", "fills", "runs", "gain", "tokens/s together", "one by one"), rows),
            table(("runs", "way", "peak MiB of the process", "before training"), memory),
            "The step alone, forward and backward of one mixed batch:",
            table(("size", "adapters", "time over PEFT's", "ms, ours", "ms, PEFT"), step),
        )
    )


def asleep(found: Mapping[str, Any]) -> str:
    """The same where waiting threads do not stay awake."""
    case = f"{found['runs']} runs of {found['rows']} x {found['tokens']}"
    return f"The gain of {case} with threads that fall asleep after a while, which is the default: {_gain(found)}."


def _gain(row: Mapping[str, Any]) -> str:
    return f"{row['gain']:.2f} ({row['gain_min']:.2f}..{row['gain_max']:.2f})"


def infer(found: Mapping[str, Any]) -> str:
    """Time of a mixed batch over PEFT's loop."""
    rows = [
        (row["call"], str(row["rows"]), str(row["tokens"]), str(row["adapters"]), *_compared(row))
        for row in found["by_call"]
    ]
    columns = ("inference", "rows", "tokens of each", "adapters", "time over PEFT's", "ms, ours", "ms, PEFT")
    return table(columns, rows)


def _compared(row: Mapping[str, Any]) -> tuple[str, str, str]:
    ratio = f"{row['ratio']:.2f} ({row['ratio_min']:.2f}..{row['ratio_max']:.2f})"
    return ratio, f"{row['ours_ms']:.0f}", f"{row['peft_ms']:.0f}"


def serve(found: Mapping[str, Any]) -> str:
    """Bytes and milliseconds."""
    rows = [
        ("adapters resident", f"{found['tasks']:,}"),
        ("MB of their file", f"{found['file_bytes'] / 1e6:.1f}"),
        ("MB resident, as counted", f"{found['resident_bytes'] / 1e6:.1f}"),
        ("MB that the process grew by", f"{found['process_grew_bytes'] / 1e6:.1f}"),
        ("ms to activate one from the file", _times(found["from_file_ms"])),
        ("ms to activate one that is resident", _times(found["resident_ms"])),
    ]
    return table(("1-bit adapters r=32 on a ViT-B", ""), rows)


def _times(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.3f} (90 % below {spread['p90']:.3f})"


MANY = {"train": train, "asleep": asleep, "infer": infer, "serve": serve}
