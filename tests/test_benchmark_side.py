"""The benchmark of side networks runs part by part, counts what autograd keeps, and says what it missed."""

import json

import pytest
import torch
from torch import nn

from benchmarks import side


class Squares(nn.Module):
    """loss = Σ (w x)²: autograd keeps x, for w, and w x, for the square; w is a parameter and x · 1 a view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(7))

    def forward(self, x):
        loss = (x.view_as(x) * self.weight).square().sum()
        return type("Output", (), {"loss": loss})


def test_bytes_are_those_of_distinct_storages_without_parameters():
    x = torch.randn(5, 7)
    assert side.saved_bytes(Squares(), {"x": x}) == 2 * 5 * 7 * 4


def test_the_committed_memory_table_is_what_its_gates_were_judged_by():
    result = json.loads(side.RESULTS.read_text())
    assert not result["memory"]["smoke"]
    judged = {name: verdict for name, verdict in result["gates"].items() if "bytes" in name}
    found = side.gates({"memory": result["memory"]})
    assert found == judged
    assert all(verdict["passed"] for verdict in found.values())


def test_a_share_that_rises_with_depth_is_a_miss():
    rows = [
        {"model": "BERT", "blocks": blocks, "side": side.LADDER, "ratio": ratio}
        for blocks, ratio in ((4, 0.2), (8, 0.5), (16, 0.4))
    ]
    verdicts = side.gates({"memory": {"rows": rows}})
    assert [verdict["passed"] for verdict in verdicts.values()] == [False, False]
    assert [verdict["value"] for verdict in verdicts.values()] == pytest.approx([0.5, 0.3])


def test_smoke_runs_every_part_and_a_cache_changes_no_loss(tmp_path, monkeypatch, capsys):
    # the texts' own smoke run is that of onebit.py
    monkeypatch.setattr(side, "CONTESTS", {"turned digits": side.CONTESTS["turned digits"]})
    out = tmp_path / "side.json"
    assert side.main(["--smoke", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {row["side"] for row in result["memory"]["rows"]} == set(side.MEASURED)
    assert result["quality"]["tasks"].keys() == set(side.CONTESTS)
    for task in result["quality"]["tasks"].values():
        assert all(len(found["scores"]) and found["trained_parameters"] for found in task["sides"].values())
    losses = result["epoch"]["losses"]
    assert losses["with"] == pytest.approx(losses["without"], rel=1e-5)
    assert "turned digits: LoRA r=8 − ladder, points" in capsys.readouterr().out


def test_a_smoke_run_may_not_write_the_result():
    with pytest.raises(SystemExit):
        side.main(["--smoke"])
