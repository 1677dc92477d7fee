"""Verdicts come from the rows, and benchmarks/README.md shows the committed results."""

import json
from typing import Any

import pytest

from benchmarks import lora_linear, report
from benchmarks.gpu import harness, reach


def measured(name: str, tokens: int, dropout: float, **medians: float) -> dict[str, Any]:
    graphs = {side: {"graph": {"both": {"median_us": us}}} for side, us in medians.items()}
    return {"name": name, "tokens": tokens, "rank": 16, "dropout": dropout, "sides": graphs}


def test_a_block_is_the_sum_of_its_linear_maps_and_misses_where_it_is_slow():
    times = {"q/o": 100.0, "k/v": 20.0, "gate/up": 300.0, "down": 300.0}  # twice, twice, twice, once: 1140
    slower = {"q/o": 2.0, "k/v": 2.0, "gate/up": 2.0, "down": 4.0}  # E3: 2 · 840 + 4 · 300 = 2880
    rows = [measured(name, 8192, 0.0, ours=us, E3=slower[name] * us, floor=us / 1.2) for name, us in times.items()]
    cells = {(c["what"], c["peer"]): c for c in reach.linear_cells(rows)}
    what = "Llama-8B block linears, M=8192, layer by layer"
    assert cells[what, "E3, p=0"]["value"] == pytest.approx(1140 / 2880)
    assert cells[what, "E3, p=0"]["verdict"] == "pass"
    assert cells[what, "floor, p=0"]["verdict"] == "MISS"
    assert cells[what, "unsloth, p=0"]["verdict"] == "not measured"
    assert reach.linear_cells(rows[1:])[0]["verdict"] == "not measured"  # a part is missing


def test_groups_are_compared_with_what_the_peers_have():
    times = {"E3": 120.0, "unsloth": 100.0, "unsloth-inplace": 80.0, "ours": 90.0, "ours-grouped": 60.0}
    rows = [measured("QKV grouped", 8192, 0.0, **times)]
    cells = {c["peer"]: c for c in reach.linear_cells(rows) if c["what"].startswith("k/v grouped")}
    assert cells["E3, p=0"]["value"] == pytest.approx(0.5)
    assert cells["unsloth, p=0"]["value"] == pytest.approx(0.75)  # the faster of its two forms


def test_tokens_must_be_many_and_memory_little():
    sides = {
        "ours-grouped": {"tokens_per_s": 120.0, "peak_mib": 96.0},
        "ours-grouped-fp32": {"tokens_per_s": 120.0, "peak_mib": 96.0},
        "E1": {"tokens_per_s": 60.0, "peak_mib": 100.0},
        "E3": {"tokens_per_s": 100.0, "peak_mib": 100.0},
    }
    cells = {
        (c["what"][:4], c["peer"]): c["verdict"] for c in reach.step_cells([{"name": "Llama-1B", "sides": sides}])
    }
    assert cells["toke", "E1"] == cells["toke", "E3"] == "pass"
    assert cells["peak", "E1"] == cells["peak", "E3"] == "MISS"
    assert cells["toke", "floor"] == "not measured"


def test_all_rows_of_the_goals_are_measured():
    rows = {(row.name, row.tokens, row.rank, row.dropout) for row in lora_linear.rows()}
    for goal in reach.GOALS:
        for name in (*goal.parts, *(goal.peer_parts or ())):
            assert (name, goal.tokens, 16, 0.0) in rows
    labels = [row.label for row in lora_linear.rows()]
    assert len(labels) == len(set(labels))


# the report


def test_the_readme_shows_the_committed_results():
    for path in report.READMES:
        text = path.read_text()
        assert report.fill(text, report.render(harness.RESULTS)) == text, "run `python benchmarks/report.py`"


def test_what_was_not_measured_is_said_not_to_be(tmp_path):
    for name in ("lora_cpu.json", "demo.json"):
        (tmp_path / name).write_text((harness.RESULTS / name).read_text())
    sections = report.render(tmp_path)
    assert sections["lora_linear"].count(report.UNMEASURED) == len(reach.linear_cells([]))
    assert sections["lora_step"].count(report.UNMEASURED) == len(reach.step_cells([]))


def test_a_gpu_run_is_shown_with_its_verdicts_and_what_it_left_out(tmp_path):
    row = measured("q/o", 8192, 0.0, floor=50.0, E3=100.0, ours=60.0) | {"label": "q/o 8192", "backward": True}
    cells = [reach.step_cells([])[0] | {"value": 1.6, "verdict": "pass"}]
    content = {
        "smoke": False, "complete": False, "reach": cells, "rows": [row], "left_out": [{"what": "ViT", "why": "late"}],
        "environment": {"device": "NVIDIA X1", "commit": "abc", "versions": {"torch": "2.11"}},
    }  # fmt: skip
    folder = tmp_path / "nvidia-x1"
    folder.mkdir()
    (folder / "lora_linear.json").write_text(json.dumps(content))
    for name in ("lora_cpu.json", "demo.json"):
        (tmp_path / name).write_text((harness.RESULTS / name).read_text())
    section = report.render(tmp_path)["lora_linear"]
    assert "NVIDIA X1, commit abc; torch 2.11." in section
    assert "This run was cut short." in section
    assert "1.60 (>= 1.5, pass)" in section
    assert "| q/o 8192 | 50 |  | 2.00 |  |  |  | 1.20 |  |" in section
    assert f"- ViT: {report.UNMEASURED} (late)" in section
    (folder / "lora_linear.json").write_text(json.dumps(content | {"smoke": True}))
    with pytest.raises(ValueError, match="from a smoke run, which measures nothing"):
        report.render(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Benchmarks", r"markers \[\] are not those of sections; there are lora_cpu"),
        ("<!-- lora_cpux -->\n<!-- /lora_cpux -->", r"markers \['lora_cpux'\] are not those of sections"),
        ("<!-- lora_cpu -->\n", "section lora_cpu has no end"),
    ],
)
def test_a_readme_without_a_place_for_a_section_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        report.fill(text, {"lora_cpu": ""})
