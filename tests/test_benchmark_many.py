"""The benchmark of many adapters runs all its parts, and its tables read what they write."""

import json

import pytest

from benchmarks import many, many_parts, report_runs


def test_smoke_runs_all_parts_and_their_tables_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv(many_parts.SMOKE_VARIABLE, "")  # which --smoke sets: so that it is gone afterwards
    out = tmp_path / "many.json"
    assert many.main(["--smoke", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [(row["size"], row["runs"]) for row in result["train"]["rows"]] == [("large", 1), ("large", 2)]
    calls = [("forward", 1), ("forward", 2), ("generate", 2)]
    assert [(row["call"], row["adapters"]) for row in result["infer"]["by_call"]] == calls
    assert result["serve"]["tasks"] == 3
    assert result["serve"]["resident_bytes"] > 0
    for name, make in report_runs.MANY.items():
        assert make(result[name]).count("|") > 8 or name == "asleep"
    assert "2 runs of 2 x 8" in report_runs.asleep(result["asleep"])
    with pytest.raises(ValueError, match="smoke run, which measures nothing"):
        report_runs.render(tmp_path)


def test_a_gain_is_that_of_a_round():
    assert many.speedup([2.0, 3.0, 2.5]) == {"gain": 2.5, "gain_min": 2.0, "gain_max": 3.0}
    times = {many_parts.PEFT: [0.4, 0.2, 0.4], many_parts.OURS: [0.1, 0.1, 0.1]}
    assert many_parts.compared(times)["ratio"] == 0.25


def test_a_smoke_run_may_not_write_the_result():
    with pytest.raises(SystemExit):
        many.main(["--smoke"])
