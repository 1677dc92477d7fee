"""The layer schedules from the command line: they train, log, and resume."""

import csv

import pytest
import torch
from safetensors.torch import load_file

from petune.cli import main

OPTIONS = {
    "LISACallback": ["layers=1", "interval_steps=2"],
    "ISTCallback": ["ratio=0.5", "interval_steps=2"],
    "FreezeByMotion": ["freeze_ratio=0.5"],
}


def fit(tiny_bert, reviews, output, name, *more):
    callback = [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{option}" for option in OPTIONS[name])]
    settings = ["--data.max_length=16", "--data.batch_size=16", "--model.learning_rate=0.01", "--model.adapter.r=4"]
    steady = ["--model.scheduler=constant", "--model.warmup_ratio=0", "--trainer.log_every_n_steps=1"]
    files = [f"--model.model={tiny_bert}", f"--data.train_file={reviews['train']}"]
    validation = f"--data.validation_file={reviews['validation']}"
    arguments = [*files, validation, *settings, *steady, *callback, f"--output={output}", *more]
    return main(["fit", "-c", "lora", "-c", "text_classification", *arguments])


@pytest.mark.parametrize("name", OPTIONS)
def test_a_schedule_from_the_command_line_trains_logs_and_resumes(name, tiny_bert, reviews, tmp_path, capsys):
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert fit(tiny_bert, reviews, whole, name, "--trainer.max_epochs=2") == 0
    assert fit(tiny_bert, reviews, half, name, "--trainer.max_epochs=1") == 0
    before = load_file(half / "adapter" / "adapter_model.safetensors")
    assert fit(tiny_bert, reviews, half, name, "--trainer.max_epochs=2", "--ckpt_path=last") == 0
    after = load_file(half / "adapter" / "adapter_model.safetensors")
    unbroken = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert [n for n in unbroken if not torch.equal(after[n], unbroken[n])] == []
    assert any(not torch.equal(before[n], after[n]) for n in after)
    with (whole / "logs" / "version_0" / "metrics.csv").open() as file:
        losses = [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) == 12
    checkpoint = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)
    state = next(state for key, state in checkpoint["callbacks"].items() if key.startswith(name))
    assert state["blocks"] == [0, 1]
    assert len(state["active"]) == 1


def test_an_option_that_is_out_of_range_is_named(tiny_bert, reviews, tmp_path, capsys):
    assert fit(tiny_bert, reviews, tmp_path, "LISACallback", "--trainer.callbacks.layers=0") != 0
    assert "LISACallback.layers=0 lets no block train; use 1 or more." in capsys.readouterr().err
