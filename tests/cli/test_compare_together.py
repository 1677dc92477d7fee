"""`petune compare --together`: runs of low-rank methods at the same time, with the results that they have alone."""

import pytest

from petune.cli import main
from petune.comparison import compare, run_in_this_process
from petune.comparison.record import read_record
from petune.comparison.together import run_together


@pytest.fixture
def task(tiny_bert, reviews) -> list[str]:
    return [
        *("-c", "text_classification", f"--model.model={tiny_bert}"),
        f"--data.train_file={reviews['train']}",
        f"--data.validation_file={reviews['validation']}",
        *("--data.max_length=16", "--data.batch_size=16", "--trainer.max_epochs=1"),
    ]


def test_runs_that_train_together_have_the_metrics_that_they_have_alone(task, tmp_path):
    arguments = {"methods": ["lora", "bilora"], "seeds": [0, 1], "baseline": False}
    joint = compare(task, output=tmp_path / "joint", runner=run_together, **arguments)
    alone = compare(task, output=tmp_path / "alone", runner=run_in_this_process, **arguments)
    assert not joint.failed
    assert len(joint.runs) == 4
    for one, other in zip(joint.runs, alone.runs, strict=True):
        assert one.record.together == 4
        assert other.record.together == 1
        assert one.record.metrics == pytest.approx(other.record.metrics, rel=1e-3)
        assert (one.record.steps, one.record.rows) == (other.record.steps, other.record.rows)
    note = "Runs of bilora, lora trained at the same time: their seconds are shares of the time of all"
    assert any(text.startswith(note) for text in joint.notes)


def test_methods_that_cannot_join_run_alone_and_a_failure_ends_no_other(task, tmp_path, capsys):
    options = ["--methods", "lora,peft.IA3Config", "--seeds", "0", "--no-baseline", "--together"]
    bad = tmp_path / "bad.yaml"
    bad.write_text("model:\n  adapter:\n    class_path: FusedLoraConfig\n    init_args: {target_modules: [nowhere]}\n")
    options[1] += f",{bad}"
    assert main(["compare", *task, *options, "--output", str(tmp_path / "out")]) == 1
    records = {name: read_record(tmp_path / "out" / name / "seed-0") for name in ("lora", "IA3Config", "bad")}
    assert {name: record and record.together for name, record in records.items()} == {
        "lora": 2,
        "IA3Config": 1,
        "bad": None,
    }
    assert "matches no module" in capsys.readouterr().out
