"""The vision demo end to end, in fewer steps than the real one."""

import io

import pytest
from rich.console import Console

import petune
from petune.demo import run_demo
from petune.demo.trials import FULL
from petune.demo.vision import PIXELS, PROBE, SCRATCH, ZERO_SHOT, VisionSettings, run_vision

SETTINGS = VisionSettings(num_pretrain=400, num_adapt=100, pretrain_epochs=6, adapt_epochs=10)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    output = tmp_path_factory.mktemp("vision")
    return run_vision(methods=["lora"], compare=True, output=output, settings=SETTINGS, quiet=True)


def test_the_rows_are_the_baselines_the_methods_and_the_comparisons(result):
    assert [row.name for row in result.rows] == [ZERO_SHOT, PROBE, PIXELS, "lora", FULL, SCRATCH]
    assert result.row("lora").gain.mean == pytest.approx(
        result.row("lora").scores["accuracy"] - result.row(ZERO_SHOT).scores["accuracy"]
    )


def test_the_adapter_recovers_from_the_turn_and_passes_its_checks(result):
    assert result.row("lora").gain.low > 0.1
    assert [check.passed for check in result.checks] == [True, True]


def test_the_report_says_that_pixels_beat_the_networks(result):
    best = max(row.scores["accuracy"] for row in result.rows if row.name != PIXELS)
    assert best < result.row(PIXELS).scores["accuracy"]
    assert "beats every network in the table" in result.notes[0]
    assert f"lora is worse than the best baseline ({PIXELS})" in result.conclusion
    console = Console(file=io.StringIO(), width=80)
    result.print(console)
    assert max(len(line) for line in console.file.getvalue().splitlines()) <= 80


def test_without_a_choice_every_method_that_takes_the_vit_is_trained_and_the_others_are_named(tmp_path):
    few = VisionSettings(num_pretrain=64, num_adapt=32, pretrain_epochs=1, adapt_epochs=1)
    result = run_vision(output=tmp_path, settings=few, quiet=True)
    adapters = [row.name for row in result.rows if row.kind == "adapter"]
    assert adapters == [name for name in petune.methods() if name not in ("hside", "pat")]
    assert all(check.passed for check in result.checks)
    left_out = [note for note in result.notes if "left out" in note]
    assert left_out[0].startswith("pat is left out: the method 'pat' needs its schedule")
    assert left_out[1].startswith("hside is left out: an image of 8 x 8 pixels is too small for four scales")


def test_run_demo_prints_and_cuts_the_training_to_its_budget(tmp_path, monkeypatch):
    monkeypatch.setattr("petune.demo.vision.VisionSettings", lambda: SETTINGS)
    console = Console(file=io.StringIO(), width=80)
    result = run_demo("vision", budget_s=1e-3, output=tmp_path, methods=["lora"], console=console)
    assert result.row("lora").steps == 1
    assert "The time budget cut the training from 40 to 1 steps." in console.file.getvalue()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
