"""What the processes of one command say: the first of them speaks for all."""

import pytest
from lightning.pytorch import Trainer

from petune.cli import train
from petune.cli.arguments import resolve_recipes


class Announced(train.PetuneCLI):
    """Says what `fit` says first, and ends there."""

    def _run_subcommand(self, subcommand):
        self.before_fit()


@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_process_says_what_is_trained_and_where_it_goes(
    tiny_bert, reviews, tmp_path, monkeypatch, capsys, first
):
    arguments = ["-c", "text_classification", "-c", "lora", f"--model.model={tiny_bert}", f"--output={tmp_path}"]
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda _: first))
    Announced(["fit", *resolve_recipes([*arguments, f"--data.train_file={reviews['train']}"])])
    said = capsys.readouterr().out
    assert ("adapter: FusedLoraConfig" in said, f"run: {tmp_path}" in said) == (first, first)
