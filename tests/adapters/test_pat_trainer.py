"""PruningTrainerCallback in real `transformers.Trainer` runs."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from petune.adapters.pat import PatConfig, PruningTrainerCallback
from tests.families import FAMILIES

WIDTH, KEPT, ROWS = 32, 23, 12


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        batch = FAMILIES["bert"].inputs(1, seed=index, head="cls")
        return {name: value[0] for name, value in batch.items()}


def build(**options):
    fields = {"target_dim": KEPT, "r": 3, "hsm_rank": 5, "lora_dropout": 0.1, "task_type": "SEQ_CLS", **options}
    torch.manual_seed(5)
    return get_peft_model(FAMILIES["bert"].build(head="cls"), PatConfig(**fields))


def mask(model):
    return model.base_model.mask()


class Steps(TrainerCallback):
    """(step, is hard) of the mask before every optimiser step."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.seen.append((mask(model).now, mask(model).is_final))


def train(folder, model, *callbacks, resume=None, trainer_cls=Trainer, **options):
    fields = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "logging_steps": 2, "learning_rate": 1e-2}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 11}
    args = TrainingArguments(str(folder), **{**fields, **quiet, **options})
    given = callbacks or (PruningTrainerCallback(),)
    trainer = trainer_cls(model=model, args=args, train_dataset=Rows(), callbacks=[*given])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_mask_takes_the_length_of_the_training_and_is_hard_after_a_third(tmp_path):
    model, steps = build(), Steps()
    train(tmp_path, model, PruningTrainerCallback(), steps)
    assert steps.seen == [(step, step >= 6) for step in range(18)]
    assert mask(model).total_steps == model.peft_config["default"].total_steps == 18
    assert mask(model).hard.sum() == KEPT


def test_steps_are_those_of_the_optimizer(tmp_path):
    model, steps = build(milestone=0.5), Steps()
    train(tmp_path, model, PruningTrainerCallback(), steps, gradient_accumulation_steps=3)
    assert steps.seen == [(step, step >= 3) for step in range(6)]
    assert mask(model).now == mask(model).total_steps == 6


def test_a_length_that_was_given_stays(tmp_path):
    model = build(total_steps=27)
    train(tmp_path, model, max_steps=10)
    assert mask(model).total_steps == model.peft_config["default"].total_steps == 27
    assert mask(model).is_final


@pytest.mark.parametrize("step", [3, 6, 9], ids=["soft", "just hard", "hard"])
def test_a_resumed_training_goes_on_as_one_in_one_go(tmp_path, step):
    saves = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    reference, steps = build(), Steps()
    train(tmp_path / "one", reference, PruningTrainerCallback(), steps, **saves)
    resumed, rest = build(), Steps()
    at = str(tmp_path / "one" / f"checkpoint-{step}")
    train(tmp_path / "two", resumed, PruningTrainerCallback(), rest, resume=at, **saves)
    assert rest.seen == steps.seen[step:]
    ours, theirs = resumed.state_dict(), reference.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_the_log_history_gets_channels_temperature_and_the_terms_of_the_loss(tmp_path):
    callback = PruningTrainerCallback()
    trainer = train(tmp_path, build(), callback, logging_steps=1, save_strategy="epoch")
    found = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in found] == list(range(1, 19))
    for row in found:
        terms = {name: value for name, value in row.items() if name.endswith("_loss")}
        assert sum(terms.values()) == pytest.approx(row["loss"], rel=1e-3)
        soft = {"pat/bimodal_loss"} if row["step"] <= 6 else set()  # the sixth loss is of the mask before it
        assert terms.keys() == {"pat/active_loss", "pat/identity_loss", "pat/task_loss", *soft}
        assert ("pat/temperature" in row) == (row["step"] < 6)
    assert found[3]["pat/temperature"] == pytest.approx(1 / (1 - math.log(4) / math.log(6)), rel=1e-4)
    assert {row["pat/kept_channels"] for row in found[5:]} == {KEPT}
    assert "pat/kept_channels" not in trainer.state.log_history[-1]  # the summary of the training
    saved = json.loads((tmp_path / "checkpoint-18" / "trainer_state.json").read_text())
    assert saved["log_history"][3] == found[3]


def test_later_callbacks_see_what_is_logged(tmp_path):
    class Seen(TrainerCallback):
        logs = ()

        def on_log(self, args, state, control, logs, **kwargs):
            self.logs = (*self.logs, dict(logs))

    seen = Seen()
    train(tmp_path, build(), PruningTrainerCallback(), seen, max_steps=4)
    assert all("pat/kept_channels" in logs for logs in seen.logs[:2])


def test_the_history_shows_the_mask_from_open_to_hard(tmp_path):
    callback, model = PruningTrainerCallback(), build(milestone=0.5)
    train(tmp_path, model, callback)
    assert [step for step, _ in callback.history] == [0, 2, 4, 6, 8, 9]
    assert torch.equal(callback.history[0][1], torch.ones(WIDTH))
    assert torch.equal(callback.history[-1][1], mask(model).hard.float())


def test_a_training_that_is_too_short_makes_the_mask_hard_and_says_so(tmp_path):
    model = build(total_steps=300)
    with pytest.warns(
        UserWarning, match="ended at step 4, before the mask was to become hard at step 100: the 23 cha"
    ):
        train(tmp_path, model, max_steps=4)
    assert mask(model).hard.sum() == KEPT


def test_nothing_is_written_where_the_program_runs(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train(tmp_path / "out", build(), max_steps=3)
    assert list(Path.cwd().iterdir()) == []


def test_a_loss_that_leaves_the_masks_out_is_pointed_out(tmp_path):
    with pytest.warns(UserWarning, match="leaves out the mask's own, so that nothing leads to 23 channels"):
        train(tmp_path, build(), label_smoothing_factor=0.1, max_steps=6)  # the Trainer's own loss, from the logits


def test_a_loss_that_is_not_finite_stops_the_training_and_names_its_term(tmp_path):
    model = build()
    with torch.no_grad():
        mask(model).logits[3] = math.nan
    with pytest.raises(FloatingPointError, match="the loss is not finite at step 0, because its term 'active' is nan"):
        train(tmp_path, model)


@pytest.mark.parametrize("what", ["another adapter", "no adapter", "a disabled one"])
def test_a_model_without_a_mask_is_refused(tmp_path, what):
    model: nn.Module = build() if what == "a disabled one" else FAMILIES["bert"].build(head="cls")
    if what == "another adapter":
        model = get_peft_model(model, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    if what == "a disabled one":
        model.base_model.disable_adapter_layers()
        model.classifier.requires_grad_(True)
    name = type(model).__name__
    message = f"PruningTrainerCallback found no mask of an active adapter in {name}; put a PatConfig adapter on the"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, model)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_micro_batches_of_one_step_count_the_masks_loss_once(family):
    batch = FAMILIES[family].inputs(6, head="lm")
    model = get_peft_model(FAMILIES[family].build(head="lm"), PatConfig(r=4, total_steps=9)).train()
    counted = batch["labels"][..., 1:] if family == "llama" else batch["labels"]
    items = counted.ne(-100).sum()  # what the Trainer passes where it gathers gradients

    def gradient(*parts: slice) -> torch.Tensor:
        model.zero_grad()
        for rows in parts:
            model(**{name: x[rows] for name, x in batch.items()}, num_items_in_batch=items).loss.backward()
        return model.base_model.mask().logits.grad.norm()

    whole, gathered = gradient(slice(6)), gradient(slice(2), slice(2, 4), slice(4, 6))
    assert whole > 20  # the task's own part is a hundredth of it
    assert abs(gathered / whole - 1) < 0.01
