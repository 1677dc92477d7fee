"""`petune fit-many`: the runs of a file on one base, from the command line."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from petune.cli import main
from petune.tasks import TextClassification
from tests.cli.test_run import read_jsonl

RUNS = {
    "small": {"recipes": "lora", "model": {"adapter": {"r": 2}}, "seed_everything": 1},
    "wide": {"recipes": ["lora"], "model": {"adapter": {"r": 6}, "learning_rate": 0.02}, "trainer": {"max_epochs": 3}},
    "one_bit": {"recipes": "bilora", "model": {"adapter": {"r": 4}}, "data": {"batch_size": 16}},
}


def write_runs(folder: Path, runs: object) -> str:
    path = folder / "runs.yaml"
    path.write_text(yaml.safe_dump(runs))
    return str(path)


def arguments(tiny_bert: Path, reviews: dict[str, Path], runs: str, output: Path, *more: str) -> list[str]:
    return [
        *("fit-many", "-c", "text_classification", "--runs", runs, "--output", str(output)),
        f"--model.model={tiny_bert}",
        f"--data.train_file={reviews['train']}",
        f"--data.validation_file={reviews['validation']}",
        *("--data.max_length=16", "--data.batch_size=8", "--model.learning_rate=0.01", "--trainer.max_epochs=2"),
        *more,
    ]


@pytest.fixture(scope="module")
def many(tiny_bert, reviews, tmp_path_factory) -> Path:
    """The folder of three finished runs."""
    folder = tmp_path_factory.mktemp("many")
    assert main(arguments(tiny_bert, reviews, write_runs(folder, RUNS), folder / "out")) == 0
    return folder / "out"


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "runs.csv").open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_each_run_leaves_its_own_adapter_checkpoints_log_and_a_row_of_the_table(many):
    for name in RUNS:
        assert {"adapter", "checkpoints", "logs", "run.json"} <= {path.name for path in (many / name).iterdir()}
    rows = table(many)
    assert {name: (row["status"], row["steps"]) for name, row in rows.items()} == {
        "small": ("finished", "24"),
        "wide": ("finished", "36"),
        "one_bit": ("finished", "12"),
    }
    assert float(rows["wide"]["val/accuracy"]) > 0.9


def test_what_a_run_says_goes_over_what_all_share(many):
    runs = {name: yaml.safe_load((many / name / "adapter" / "petune.yaml").read_text()) for name in RUNS}
    assert {name: run["config"]["model"]["init_args"]["adapter"]["init_args"]["r"] for name, run in runs.items()} == {
        "small": 2,
        "wide": 6,
        "one_bit": 4,
    }
    assert {name: run["seed"] for name, run in runs.items()} == {"small": 1, "wide": 0, "one_bit": 0}
    assert runs["wide"]["config"]["model"]["init_args"]["learning_rate"] == 0.02


def test_an_adapter_of_many_predicts_like_any_other(many, reviews, tmp_path):
    answers = tmp_path / "answers.jsonl"
    options = ["--adapter", str(many / "wide" / "adapter"), "--input", str(reviews["test"]), "--output", str(answers)]
    assert main(["predict", *options]) == 0
    with Path(reviews["test"]).open(newline="") as file:
        expected = [row["label"] for row in csv.DictReader(file)]
    found = [row["label"] for row in read_jsonl(answers)]
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 30


def test_resume_skips_what_is_finished_and_goes_on_with_what_failed(tiny_bert, reviews, tmp_path, monkeypatch, capsys):
    output, runs = tmp_path / "out", {name: RUNS[name] for name in ("small", "one_bit")}
    command = arguments(tiny_bert, reviews, write_runs(tmp_path, runs), output, "--resume")
    whole = tmp_path / "whole"
    assert main(arguments(tiny_bert, reviews, write_runs(tmp_path, runs), whole)) == 0
    step = TextClassification.training_step

    def fails_in_the_second_epoch(task, *args):
        if task.current_epoch == 1 and task.adapter.r == 4:
            raise RuntimeError("the cable was pulled")
        return step(task, *args)

    monkeypatch.setattr(TextClassification, "training_step", fails_in_the_second_epoch)
    assert main(command) == 1
    assert "one_bit: failed: the cable was pulled" in capsys.readouterr().out
    assert {name: row["status"] for name, row in table(output).items()} == {
        "small": "finished",
        "one_bit": "the cable was pulled",
    }
    monkeypatch.setattr(TextClassification, "training_step", step)
    written = (output / "small" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    assert (output / "small" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == written
    found, expected = (
        torch.load(folder / "one_bit" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (output, whole)
    )
    # alone in its last epoch, so up to rounding, which a quantiser may carry across a threshold
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)


def test_other_settings_for_a_started_run_are_refused(tiny_bert, reviews, tmp_path, capsys):
    folder = tmp_path / "out" / "small"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"digest": "of something else", "finished": True}))
    command = arguments(
        tiny_bert, reviews, write_runs(tmp_path, {"small": RUNS["small"]}), tmp_path / "out", "--resume"
    )
    assert main(command) == 2
    assert "the run 'small' was started with other settings than it has now; take another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ({}, "holds no runs; write `name: {data: {train_file"),
        (["a"], "holds no runs"),
        ({"a/b": {}}, "the run's name 'a/b' becomes a folder; use one without '/'"),
        ({"Same": {}, "same": {}}, "the runs 'Same' and 'same' would write into one folder; rename one"),
        ({"a": "lora"}, "'a' is 'lora'; write its settings as below `petune fit -c`"),
    ],
)
def test_a_wrong_file_of_runs_is_one_sentence(runs, said, tmp_path, capsys):
    assert main(["fit-many", "-c", "text_classification", "--runs", write_runs(tmp_path, runs)]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_file_and_a_missing_option_are_one_sentence(tmp_path, capsys):
    assert main(["fit-many", "-c", "text_classification", "--runs", str(tmp_path / "none.yaml")]) == 2
    assert "No such file or directory; give a YAML file that maps names to settings" in capsys.readouterr().err
    assert main(["fit-many", "-c", "text_classification"]) == 2
    assert "--runs" in capsys.readouterr().err


def test_an_unknown_setting_of_a_run_is_named_and_the_others_train(tiny_bert, reviews, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal, which has a bar for each run
    runs = {
        "good": {"recipes": "lora", "trainer": {"max_epochs": 1}},
        "bad": {"recipes": "lora", "model": {"ranks": 3}},
    }
    assert main(arguments(tiny_bert, reviews, write_runs(tmp_path, runs), tmp_path / "out")) == 1
    assert table(tmp_path / "out")["good"]["status"] == "finished"
    assert "there is no option 'ranks' here" in table(tmp_path / "out")["bad"]["status"]
    assert re.search(r"good.*━.*\d+%", capsys.readouterr().out)
