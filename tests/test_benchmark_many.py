"""The benchmark of many adapters runs all its parts, and its tables read what they write."""

import json

import pytest

from benchmarks import many, report_runs


def test_smoke_runs_all_parts_and_their_tables_can_be_written(tmp_path):
    out = tmp_path / "many.json"
    assert many.main(["--smoke", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [(row["size"], row["runs"]) for row in result["train"]["rows"]] == [("small", 1), ("small", 2)]
    assert [row["adapters"] for row in result["infer"]["by_adapters"]] == [1, 2]
    assert result["serve"]["tasks"] == 3
    assert result["serve"]["resident_bytes"] > 0
    for name, make in report_runs.MANY.items():
        assert make(result[name]).count("|") > 8
    with pytest.raises(ValueError, match="smoke run, which measures nothing"):
        report_runs.render(tmp_path)


def test_a_gain_is_that_of_a_round():
    assert many.speedup([2.0, 3.0, 2.5]) == {"gain": 2.5, "gain_min": 2.0, "gain_max": 3.0}
    times = {many.PEFT: [0.4, 0.2, 0.4], many.OURS: [0.1, 0.1, 0.1]}
    assert many.compared(times)["ratio"] == 0.25


def test_a_smoke_run_may_not_write_the_result():
    with pytest.raises(SystemExit):
        many.main(["--smoke"])
