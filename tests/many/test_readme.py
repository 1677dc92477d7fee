"""What petune/many/README.md shows works as it stands there, with small files and a tiny model."""

import csv
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

import petune.many
from petune.cli import main
from tests.cli.conftest import tiny_bert, write_rows  # noqa: F401  (a fixture)

FOLDER = Path(petune.many.__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")
TEXTS = ["great film was the cast", "the awful plot", "a very great plot and cast"]
COLUMNS = {"reviews": ("text", "label"), "topics": ("headline", "topic"), "spam": ("text", "label")}


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with the files that the README names."""
    monkeypatch.chdir(tmp_path)
    for seed, (name, columns) in enumerate(COLUMNS.items()):
        write_rows(tmp_path / f"{name}.csv", 15, seed, columns)
    return tmp_path


def test_the_recipe_of_runs_that_the_readme_shows_trains(tiny_bert, files):  # noqa: F811
    assert main(["recipes", "cp", "many-runs"]) == 0
    runs = yaml.safe_load((files / "many-runs.yaml").read_text())
    assert [yaml.safe_load(shown) for shown in blocks("yaml")] == [runs]
    (command,) = re.findall(r"^petune (fit-many .*)$", README, flags=re.MULTILINE)
    more = [f"--model.model={tiny_bert}", "--data.max_length=16", "--trainer.max_epochs=1"]
    assert main([*shlex.split(command), *more]) == 0
    with (files / "runs" / "many" / "runs.csv").open(newline="") as file:
        found = {row["run"]: (row["status"], int(row["steps"])) for row in csv.DictReader(file)}
    # 13 rows to train on, 16 at a time; those of topics 8 at a time, and five times
    assert found == {"reviews": ("finished", 1), "topics": ("finished", 10), "spam": ("finished", 1)}
    for name in runs:
        left = {path.name for path in (files / "runs" / "many" / name).iterdir()}
        assert {"adapter", "checkpoints", "logs", "run.json"} <= left


def test_the_python_of_the_readme_trains_mixes_and_serves(tiny_bert, files, capsys):  # noqa: F811
    training, mixing, mixed_training, serving = blocks("python")
    batch = dict(AutoTokenizer.from_pretrained(tiny_bert)(TEXTS, padding=True, return_tensors="pt"))
    names = {"encoder": str(tiny_bert), "batch": batch, "labels": torch.tensor([0, 1, 0])}
    exec(training, names)
    assert {name: (result.error, result.steps) for name, result in names["results"].items()} == dict.fromkeys(
        COLUMNS, (None, 2)
    )
    exec(mixing, names)
    assert names["logits"].shape == (3, 2)
    for row, name in enumerate(["topics", "reviews"]):
        model = names["runs"][name].task.model.eval()
        own = model(**{key: value[row : row + 1] for key, value in batch.items()}).logits
        torch.testing.assert_close(names["logits"][row], own[0], rtol=1e-4, atol=1e-5)
    exec(mixed_training, names)
    moved = {key for key, p in names["model"].named_parameters() if p.grad is not None and p.grad.any()}
    assert all(any(f".{name}." in key for key in moved) for name in ("reviews", "topics"))
    capsys.readouterr()
    exec(serving, names)
    label, resident, size = re.fullmatch(r"(\w+) (\[.*\]) (\d+)\n", capsys.readouterr().out).groups()
    assert label in {"good", "bad"}
    assert resident == "['spam']"
    assert 0 < int(size) < 10_000
    own = names["runs"]["spam"].task.model.eval()(**batch).logits
    torch.testing.assert_close(names["answers"][2], own[2], rtol=1e-4, atol=1e-5)
