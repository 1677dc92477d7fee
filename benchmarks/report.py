"""Writes the tables of benchmarks/README.md from the committed JSON: run it after a benchmark has written a result.

python benchmarks/report.py
"""

import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import report_pat, report_runs, report_side
from benchmarks.gpu import reach
from benchmarks.report_parts import UNMEASURED, gate, gate_table, place, spread, table, versions

HERE = Path(__file__).parent
READMES = (
    HERE / "README.md",
    HERE.parent / "adapters" / "onebit" / "README.md",
    HERE.parent / "adapters" / "emoe" / "README.md",
    HERE.parent / "adapters" / "pat" / "README.md",
    HERE.parent / "adapters" / "side" / "README.md",
    HERE.parent / "petune" / "many" / "README.md",
)
LINEAR_COLUMNS = ("E1", "E3", "compile(E3)", "unsloth", "ours-fp32", "ours", "ours-grouped")
FORMS = ("sparse", "masked")  # of a routed feed-forward
STEP_COLUMNS = ("ms a step", "tokens/s", "peak MiB", "loss")


def render(results: Path) -> dict[str, str]:
    """Section name to Markdown, for all sections between markers in the README."""
    gpus = [folder for folder in sorted(results.iterdir()) if folder.is_dir()]
    return {
        "lora_cpu": lora_cpu(_read(results / "lora_cpu.json")),
        "demo": demo(_read(results / "demo.json")),
        **_onebit(results / "onebit.json"),
        **_emoe(results / "emoe.json"),
        **report_pat.render(_read_if_there(results / "pat.json")),
        **report_side.render(_read_if_there(results / "side.json")),
        **report_runs.render(results),
        "lora_linear": _per_gpu(gpus, "lora_linear", reach.linear_cells([]), linear_table),
        "lora_step": _per_gpu(gpus, "lora_step", reach.step_cells([]), step_table),
    }


def fill(text: str, sections: Mapping[str, str]) -> str:
    """The README with each section that it has markers for between them.

    Raises:
        ValueError: the text has no pair of markers at all, or one of no section.
    """
    wanted = re.findall(r"<!-- (\w+) -->\n", text)
    if not wanted or not set(wanted) <= set(sections):
        raise ValueError(f"README: markers {wanted} are not those of sections; there are {', '.join(sections)}.")
    for name in wanted:
        section = sections[name]
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README: section {name} has no end; add <!-- /{name} -->.")
        text = pattern.sub(lambda match, section=section: f"{match[1]}{section}\n{match[2]}", text)
    return text


def lora_cpu(result: Mapping[str, Any]) -> str:
    """Time, bytes and error of fused LoRA over PEFT's, each with the limit that the script checks."""
    gates, hardware = result["gates"], result["hardware"]
    kept = {name: found for name, found in gates.items() if name.startswith("bytes")}
    rows = [(name, gate(found)) for name, found in gates.items() if name not in kept]
    models = dict.fromkeys(name.removeprefix("bytes ").split(", to ")[0] for name in kept)
    memory = [(m, gate(kept[f"bytes {m}, to PEFT"]), gate(kept[f"bytes {m}, to full"])) for m in models]
    times = [
        (
            row["shape"],
            row["dtype"],
            f"{row['dropout']:g}",
            f"{row['ratio']:.2f} ({row['ratio_min']:.2f}..{row['ratio_max']:.2f})",
            f"{row['ours_ms']:.0f}",
            f"{row['peft_ms']:.0f}",
        )
        for row in result["time"]
    ]
    where = f"{hardware['cpu']}, {hardware['threads']} threads, {hardware['capability']}; {versions(result)}."
    return "\n\n".join(
        (
            where,
            table(("ours / PEFT", "value"), rows),
            table(("bytes kept", "ours / PEFT", "ours / full fine-tuning"), memory),
            table(("MLP", "dtype", "dropout", "time ratio (seeds)", "ours ms", "PEFT ms"), times),
        )
    )


def demo(result: Mapping[str, Any]) -> str:
    """Score of each row of both tasks: mean and range over the seeds."""
    parts: list[str] = []
    for task, score in (("retrieval", "R@1"), ("vision", "accuracy")):
        runs = result[task]
        rows: list[tuple[str, ...]] = []
        for index, row in enumerate(runs[0]["rows"]):
            scores = [run["rows"][index]["scores"][score] for run in runs]
            rows.append(
                (
                    row["name"],
                    f"{statistics.mean(scores):.3f}",
                    f"{min(scores):.3f}..{max(scores):.3f}",
                    f"{row['trainable_parameters']:,}",
                )
            )
        parts.append(f"{runs[0]['title']} ({len(runs)} seeds)")
        parts.append(table((task, score, "seeds", "trained parameters"), rows))
    return "\n\n".join(parts)


def _onebit(path: Path) -> dict[str, str]:
    result = _read(path) if path.exists() else None
    tables = {"onebit": onebit, "onebit_summary": onebit_summary}
    return {name: make(result) if result else UNMEASURED for name, make in tables.items()}


def onebit(result: Mapping[str, Any]) -> str:
    """The gates; per task the scores and sizes of all sides, each seed against fp32 LoRA; and the step times.

    Raises:
        ValueError: the result is from a smoke run, or cut short.
    """
    if result["smoke"] or "gates" not in result:
        raise ValueError("onebit.json is from a smoke run, or from one that was cut short; run the benchmark again.")
    settings = result["settings"]
    where = f"{result['hardware']['cpu']}, one thread; {versions(result)}."
    parts = [
        f"{where} {settings['seeds']} seeds; settings chosen on the validation splits of {settings['tuning_seeds']}.",
        *gate_table(result),
    ]
    parts += [onebit_task(name, task) for name, task in result["tasks"].items()]
    times = [
        (
            row["task"],
            row["side"],
            row["parent"],
            f"{row['ratio']:.2f} ({row['ratio_min']:.2f}..{row['ratio_max']:.2f})",
            f"{row['side_ms']:.1f}",
            f"{row['parent_ms']:.1f}",
        )
        for row in result["time"]
    ]
    parts.append(table(("a training step", "side", "over", "time ratio (repetitions)", "ms", "parent ms"), times))
    return "\n\n".join(parts)


def onebit_task(name: str, task: Mapping[str, Any]) -> str:
    """Mean ± standard deviation of every side, and of its difference to the first one seed by seed, in points."""
    metrics = list(task["frozen"])
    first = next(iter(task["sides"].values()))["scores"][metrics[0]]
    rows = [("no adapter", *(spread(task["frozen"][metric]) for metric in metrics), "", "", "", "")]
    for side, found in task["sides"].items():
        scores = found["scores"]
        change = [score - base for score, base in zip(scores[metrics[0]], first, strict=True)]
        rows.append(
            (
                side,
                *(spread(scores[metric]) for metric in metrics),
                "" if scores[metrics[0]] is first else spread(change, sign="+"),
                f"{found['file_bytes']:,}",
                f"{found['learning_rate']:g}",
                f"{found['scale']:g}",
            )
        )
    size = task["rows"]
    caption = f"{name}: {size['train']} rows to train on, {size['test']} to test, {task['steps']} steps"
    header = (name, *metrics, f"to {next(iter(task['sides']))}", "file bytes", "rate", "scale")
    return f"{caption}\n\n{table(header, rows)}"


def onebit_summary(result: Mapping[str, Any]) -> str:
    """Scores of every side, mean ± standard deviation over the seeds, and its bytes over those of fp32 LoRA."""
    tasks = result["tasks"]
    sides = list(next(iter(tasks.values()))["sides"])
    metrics = {name: next(iter(task["frozen"])) for name, task in tasks.items()}
    rows = [("no adapter", *(spread(task["frozen"][metrics[name]]) for name, task in tasks.items()), "")]
    for side in sides:
        found = [task["sides"][side] for task in tasks.values()]
        bytes_ratio = [
            row["file_bytes"] / task["sides"][sides[0]]["file_bytes"]
            for row, task in zip(found, tasks.values(), strict=True)
        ]
        scores = [spread(row["scores"][metrics[name]]) for name, row in zip(tasks, found, strict=True)]
        rows.append((side, *scores, f"{min(bytes_ratio):.3f} to {max(bytes_ratio):.3f}"))
    header = ("", *(f"{name}, {metric}" for name, metric in metrics.items()), f"bytes over {sides[0]}")
    return table(header, rows)


def _emoe(path: Path) -> dict[str, str]:
    result = _read(path) if path.exists() else {}
    return {"emoe": emoe(result), "emoe_summary": "\n\n".join(emoe_tables(result))}


def emoe(result: Mapping[str, Any]) -> str:
    """The gates, where and with what each part was measured, and its table.

    Raises:
        ValueError: a part is from a smoke run.
    """
    return "\n\n".join([*gate_table(result), *emoe_tables(result, places=True)])


def emoe_tables(result: Mapping[str, Any], *, places: bool = False) -> list[str]:
    """Accuracy, invariance and speed: of each part its table, or that it was not measured."""
    parts: list[str] = []
    for name, make in (("accuracy", emoe_accuracy), ("invariance", emoe_invariance), ("speed", emoe_speed)):
        found = result.get(name)
        if found and found["smoke"]:
            raise ValueError(
                f"{name} of emoe.json is from a smoke run, which measures nothing; run the benchmark again."
            )
        if found and places:
            parts.append(place(found))
        parts.append(make(found) if found else f"{name}: {UNMEASURED}")
    return parts


def emoe_accuracy(found: Mapping[str, Any]) -> str:
    """Mean ± standard deviation of every side on both splits, and of its difference to the first side seed by seed."""
    splits, sides = list(found["frozen"]), found["sides"]
    first = next(iter(sides))
    rows = [("no adapter", *(cell for split in splits for cell in (spread(found["frozen"][split]), "")), "")]
    for side, row in sides.items():
        cells = [side]
        for split in splits:
            scores, base = row["scores"][split], sides[first]["scores"][split]
            change = [score - other for score, other in zip(scores, base, strict=True)]
            cells += [spread(scores), "" if side == first else spread(change, sign="+")]
        rows.append((*cells, f"{row['learning_rate']:g}"))
    size = found["rows"]
    tested = ", ".join(f"{size[split]} {split}" for split in splits)
    caption = f"{found['seeds']} seeds, {size['train']} rows to train on, {found['steps']} steps; test rows: {tested}."
    header = ("accuracy", *(cell for split in splits for cell in (split, f"to {first}")), "rate")
    return f"{caption}\n\n{table(header, rows)}"


def emoe_invariance(found: Mapping[str, Any]) -> str:
    """How much a sample's routing and logits depend on the rest of its batch."""
    names = {"dropless": "ours", "capacity": f"capacity {found['capacity_factor']:g}"}
    rows = [
        (
            name,
            f"{100 * found[key]['same_ratio']:.4g} %",
            f"{100 * found[key]['dropped_ratio']:.3g} %",
            f"{found[key]['logits_difference']:.2g}",
            f"{found[key]['logits_std']:.2g}",
        )
        for key, name in names.items()
    ]
    header = (f"a batch of {found['rows']} against each alone", "tokens routed alike", "choices dropped")
    return table((*header, "largest difference of logits", "logits' standard deviation"), rows)


def emoe_speed(found: Mapping[str, Any]) -> str:
    """Time over the dense feed-forward: median of the rounds, and their range."""
    rows = [
        (
            f"{row['device']}, {row['dtype']}",
            f"{row['top_k']} of {row['num_experts']}",
            str(row["tokens"]),
            *(
                f"{row[form]['ratio']:.2f} ({row[form]['ratio_min']:.2f}..{row[form]['ratio_max']:.2f})"
                for form in FORMS
            ),
            f"{row['dense']['ms']:.3g}",
        )
        for row in found["rows"]
    ]
    forms = [f"{form} / dense (rounds)" for form in FORMS]
    return table(("feed-forward, 768 to 3072", "experts", "tokens", *forms, "dense ms"), rows)


def linear_table(content: Mapping[str, Any]) -> str:
    """Time over the frozen floor of every row, from CUDA graphs."""
    lines: list[tuple[str, ...]] = []
    for row in content["rows"]:
        quantity = "both" if row["backward"] else "forward"
        floor = reach.median_us(row, "floor", quantity)
        times = [reach.median_us(row, side, quantity) for side in LINEAR_COLUMNS]
        ratios = [f"{us / floor:.2f}" if us and floor else "" for us in times]
        lines.append((row["label"], f"{floor:.0f}" if floor else "", *ratios))
    return table(("row, time / floor", "floor µs", *LINEAR_COLUMNS), lines)


def step_table(content: Mapping[str, Any]) -> str:
    lines: list[tuple[str, ...]] = []
    for row in content["rows"]:
        for name, side in row["sides"].items():
            values = ("", "", "", side.get("missing", "failed"))
            if "step" in side:
                values = (
                    f"{side['step']['median_us'] / 1e3:.1f}",
                    f"{side['tokens_per_s']:.0f}",
                    f"{side['peak_mib']:.0f}",
                    f"{side['loss']:.4f}",
                )
            lines.append((row["name"], name, *values))
    return table(("model", "side", *STEP_COLUMNS), lines)


def cells_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """What is to be reached, one row a goal and one column a peer."""
    peers = dict.fromkeys(cell["peer"] for cell in cells)
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        limit = f"{'>=' if cell['at_least'] else '<='} {cell['limit']:g}"
        value = UNMEASURED if cell["value"] is None else f"{cell['value']:.2f}"
        verdict = "" if cell["value"] is None else f", {cell['verdict']}"
        rows.setdefault(cell["what"], {})[cell["peer"]] = f"{value} ({limit}{verdict})"
    return table(("ours over", *peers), [(what, *(row.get(peer, "") for peer in peers)) for what, row in rows.items()])


def _per_gpu(gpus: Sequence[Path], name: str, unmeasured: Sequence[Mapping[str, Any]], detail: Any) -> str:
    parts: list[str] = []
    for file in (folder / f"{name}.json" for folder in gpus):
        if not file.exists():
            continue
        content = _read(file)
        if content["smoke"]:
            raise ValueError(f"{file} is from a smoke run, which measures nothing; delete it.")
        where = content["environment"]
        parts.append(f"{where['device']}, commit {where['commit']}; {versions(where)}.")
        if not content["complete"]:
            parts.append("This run was cut short.")
        parts += [cells_table(content.get("reach", unmeasured)), detail(content)]
        parts += [f"- {left['what']}: {UNMEASURED} ({left['why']})" for left in content["left_out"]]
    return "\n\n".join(parts or [cells_table(unmeasured)])


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def _read_if_there(file: Path) -> dict[str, Any]:
    return _read(file) if file.exists() else {}


def main() -> None:
    sections = render(HERE / "results")
    for path in READMES:
        path.write_text(fill(path.read_text(), sections))


if __name__ == "__main__":
    main()
