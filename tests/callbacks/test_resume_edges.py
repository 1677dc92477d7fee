"""Resuming where Lightning's own counters would train something else than a run in one go."""

from datetime import timedelta
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from petune.adapters.lora import FusedLoraConfig
from petune.callbacks import AdapterCheckpoint
from petune.callbacks.loop_state import Taken, mend
from petune.tasks import TextClassification
from petune.tasks.data import TextClassificationData
from tests.callbacks import runs
from tests.tasks import tiny


class Validated(runs.Module):
    """Validation draws from the global generator, in its loader and in its step."""

    def val_dataloader(self):
        return DataLoader(runs.dataset(32), runs.BATCH)

    def validation_step(self, batch, index):
        if not self.trainer.sanity_checking:
            self.losses.append(float(torch.rand(())))
        super().validation_step(batch, index)


class WithPlateau(Validated):
    """The learning rate falls after each epoch whose loss is not below a bound that it never reaches."""

    frequency = 1

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.9)
        entry = {"scheduler": schedule, "monitor": "val_loss", "frequency": self.frequency}
        return {"optimizer": optimizer, "lr_scheduler": entry}


class EverySecondEpoch(WithPlateau):
    frequency = 2


class Counters(Callback):
    """Where the loops stand when the training is over."""

    def on_train_end(self, trainer, pl_module):
        loop = trainer.fit_loop
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        taken = [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs]
        self.seen = loop.epoch_progress.current.state_dict(), loop.epoch_loop._batches_that_stepped, rates, taken


def assert_resumes(tmp_path, module, legs, loader=False, **common):
    """Each leg (options, step) goes on from the checkpoint of the leg before; the last one's options run in one go."""

    def fit(folder, resume=None, **options):
        made = {"loader": runs.ResumableLoader(runs.dataset())} if loader else {}
        counters = Counters()
        task = runs.fit(
            tmp_path / folder, resume=resume, module=module(), callbacks=[counters], **common, **options, **made
        )
        return task, counters

    checkpoint = None
    for number, (options, step) in enumerate(legs):
        resumed, stands = fit(str(number), checkpoint, **options)
        checkpoint = tmp_path / str(number) / f"step={step}.ckpt"
    reference, stood = fit("reference", **legs[-1][0])
    assert 0 < len(resumed.losses) < len(reference.losses)
    assert resumed.losses == reference.losses[-len(resumed.losses) :]
    ours, theirs = resumed.state_dict(), reference.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert stands.seen == stood.seen


def cut(*steps, **options):
    """Runs with the same options, the first cut after steps[0], and so on."""
    return [(options, step) for step in (*steps, None)]


EVERY_2, EVERY_3 = {"every_steps": 2}, {"every_steps": 3}
HALF = {"val_check_interval": 0.5}  # of six steps an epoch: after the third and the sixth
ONE, THREE, FOUR = {"epochs": 1}, {"epochs": 3}, {"epochs": 4}
CASES = {
    "on the last batch": (cut(6), EVERY_2),
    "on the last batch, then inside the next epoch": (cut(6, 8), EVERY_2),
    "on the last batch of two epochs": (cut(6, 8, 12), EVERY_2),
    "on the last batch, with max_steps": (cut(6, 8), {**EVERY_2, "max_steps": 16}),
    "inside an epoch, with max_steps": (cut(4, 10), {**EVERY_2, "max_steps": 16}),
    "at the end of an epoch, with max_steps": ([(ONE, 6), (THREE, None)], {"max_steps": 14}),
    "at the end of each epoch, with max_steps": ([(ONE, 6), ({"epochs": 2}, 12), (FOUR, None)], {"max_steps": 20}),
    "where max_steps ended": ([({"max_steps": 8}, 8), ({"max_steps": 16}, None)], EVERY_2),
    "where max_steps ended inside an epoch": (
        [({"max_steps": 8}, 8), ({"max_steps": 16}, 16), ({}, None)],
        {"loader": True},
    ),
    "on the last batch, accumulating": (cut(3, 4, 5), {"every_steps": 1, "accumulate_grad_batches": 2}),
    "on the last batch, accumulating a part": (cut(2, 3), {"every_steps": 1, "accumulate_grad_batches": 4}),
    "accumulating, with max_steps": ([(ONE, 3), (THREE, None)], {"accumulate_grad_batches": 2, "max_steps": 7}),
    "before and after a validation inside the epoch": (cut(3, 6, 9), {**EVERY_3, **HALF}),
    "after a validation inside the epoch": (cut(3, 6, 9), {"loader": True, **HALF}),
    "after a validation, with max_steps": (cut(3, 6, 9), {"loader": True, "max_steps": 16, **HALF}),
    "where every second epoch validates": (cut(6, 8, 12), {**EVERY_2, "check_val_every_n_epoch": 2}),
}


@pytest.mark.parametrize("module", [runs.Module, Validated])
@pytest.mark.parametrize("case", CASES)
def test_resume_is_bit_exact(tmp_path, case, module):
    legs, options = CASES[case]
    if "val_check_interval" in options and module is runs.Module:
        options = {**EVERY_3, **options}  # nothing validates, so nothing is saved after validation
    assert_resumes(tmp_path, module, legs, **options)


@pytest.mark.parametrize(
    ("legs", "options"),
    [(cut(8), EVERY_2), (cut(6), EVERY_2), (cut(12), {}), (cut(6), {"max_steps": 16}), (cut(3, 6), HALF)],
    ids=["inside an epoch", "last batch", "end of an epoch", "end with max_steps", "after validation"],
)
@pytest.mark.parametrize("module", [WithPlateau, EverySecondEpoch])
def test_a_schedule_that_watches_a_metric_takes_each_of_its_steps(tmp_path, legs, options, module):
    assert_resumes(tmp_path, module, legs, **{"loader": True, **options})


@pytest.mark.parametrize("module", [runs.Module, Validated])
def test_resume_on_the_last_batch_is_bit_exact_with_a_plain_shuffling_loader(tmp_path, module):
    def fit(folder, resume=None):
        loader = DataLoader(runs.dataset(), runs.BATCH, shuffle=True)
        return runs.fit(tmp_path / folder, every_steps=6, loader=loader, module=module(), resume=resume)

    reference = fit("one")
    resumed = fit("two", resume=tmp_path / "one" / "step=6.ckpt")
    assert resumed.losses == reference.losses[6:]


def test_no_checkpoint_is_made_between_two_accumulating_batches_after_resuming(tmp_path):
    options = {"every_steps": 1, "accumulate_grad_batches": 2}
    runs.fit(tmp_path / "one", **options)
    runs.fit(tmp_path / "two", resume=tmp_path / "one" / "step=4.ckpt", **options)
    steps = {path.stem for path in (tmp_path / "two").iterdir()}
    assert steps == {*(f"step={step}" for step in range(5, 10)), "last"}


def test_a_training_metric_of_an_epoch_with_nothing_left_to_train_is_missed_and_no_more(tmp_path):
    class Logs(Validated):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.log("epoch_loss", loss, on_step=False, on_epoch=True)
            return loss

    def best(name):
        return ModelCheckpoint(tmp_path / name, monitor="epoch_loss")

    reference = runs.fit(tmp_path / "one", every_steps=2, module=Logs(), callbacks=[best("best")])
    resume = tmp_path / "one" / "step=6.ckpt"
    with pytest.warns(UserWarning, match="could not find the monitored key"):
        resumed = runs.fit(tmp_path / "two", every_steps=2, module=Logs(), callbacks=[best("more")], resume=resume)
    assert resumed.losses == reference.losses[-len(resumed.losses) :]


def test_a_run_that_its_time_limit_stopped_goes_on_inside_the_epoch(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 8  # what Lightning's Timer does when time is up

    def loader():
        return runs.ResumableLoader(runs.dataset())

    reference = runs.fit(tmp_path / "one", loader=loader())
    runs.fit(tmp_path / "two", loader=loader(), callbacks=[Stop()], max_time=timedelta(hours=1))
    resumed = runs.fit(tmp_path / "three", loader=loader(), resume=tmp_path / "two" / "step=8.ckpt")
    assert resumed.losses == reference.losses[8:]


def test_the_end_of_an_epoch_gone_on_with_runs_its_hooks_once(tmp_path):
    class Ends(Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.seen.append((trainer.current_epoch, trainer.global_step))

    runs.fit(tmp_path / "one", every_steps=2)
    ends = Ends()
    runs.fit(tmp_path / "two", every_steps=2, resume=tmp_path / "one" / "step=6.ckpt", callbacks=[ends])
    assert ends.seen == [(0, 6), (1, 12), (2, 18)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_task_on_a_table_or_a_stream_resumes_on_the_last_batch_and_with_max_steps(tmp_path, streaming):
    base = tiny.save_body(tmp_path / "base", hidden_dropout_prob=0.2)
    rows = tmp_path / "rows.csv"
    rows.write_text(
        "text,label\n" + "".join(f"{tiny.WORDS[i % 40]} {tiny.WORDS[i * 3 % 40]},{'ab'[i % 2]}\n" for i in range(48))
    )

    def fit(folder, resume=None):
        L.seed_everything(5, verbose=False)
        data = TextClassificationData(
            tokenizer=base,
            train_file=str(rows),
            validation_file=str(rows),
            batch_size=8,
            max_length=16,
            streaming=streaming,
            seed=1,
            labels=["a", "b"],
        )
        task = TextClassification(
            base, labels=["a", "b"], adapter=FusedLoraConfig(target_modules="all-linear", r=4), learning_rate=1e-2
        )
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=2)
        options = {"max_epochs": 4, "max_steps": 20, "enable_checkpointing": True}
        run = tiny.trainer(tmp_path, callbacks=[AdapterCheckpoint(), saver], **options)
        run.fit(task, datamodule=data, ckpt_path=resume)
        return task.state_dict()

    wanted = fit("one")
    fit("two", resume=tmp_path / "one" / "step=6.ckpt")
    for resume in ("one/step=6.ckpt", "two/step=8.ckpt", "two/step=12.ckpt"):
        ours = fit("three", resume=tmp_path / resume)
        assert [name for name in wanted if not torch.equal(ours[name], wanted[name])] == []


def loops(epoch, batch, last=False):
    """Counters as Lightning saves them: ready, started, processed, completed."""
    names = ("ready", "started", "processed", "completed")
    epochs, batches = (
        {part: dict(zip(names, c, strict=True)) for part in ("total", "current")} for c in (epoch, batch)
    )
    return {
        "loops": {
            "fit_loop": {
                "epoch_progress": epochs,
                "epoch_loop.batch_progress": {**batches, "is_last_batch": last},
                "state_dict": {"combined_loader": [SimpleNamespace()]},
            }
        }
    }


@pytest.mark.parametrize(
    ("epoch", "batch", "last", "taken", "mended_epoch", "mended_batch"),
    [
        ((2, 2, 1, 1), (4, 4, 4, 3), False, Taken.AFTER_BATCH, (2, 2, 1, 1), (4, 4, 4, 4)),
        ((2, 2, 1, 1), (6, 6, 6, 6), True, Taken.AFTER_VALIDATION, (2, 2, 1, 1), (6, 6, 6, 6)),
        ((2, 2, 2, 1), (4, 4, 4, 4), False, Taken.AFTER_STOP, (2, 2, 1, 1), (4, 4, 4, 4)),
        ((2, 2, 2, 1), (6, 6, 6, 6), True, Taken.AT_EPOCH_END, (2, 2, 2, 1), (6, 6, 6, 6)),
        ((2, 2, 2, 2), (6, 6, 6, 6), True, Taken.BETWEEN_EPOCHS, (2, 2, 2, 2), (6, 6, 6, 6)),
        ((2, 1, 1, 1), (6, 6, 6, 6), True, None, (2, 1, 1, 1), (6, 6, 6, 6)),
    ],
)
def test_counters_are_set_to_what_they_mean(epoch, batch, last, taken, mended_epoch, mended_batch):
    checkpoint = loops(epoch, batch, last)
    assert mend(checkpoint) is taken
    wanted = loops(mended_epoch, mended_batch, last)["loops"]["fit_loop"]
    state = checkpoint["loops"]["fit_loop"]
    assert state["epoch_progress"] == wanted["epoch_progress"]
    assert state["epoch_loop.batch_progress"] == wanted["epoch_loop.batch_progress"]
    assert ("combined_loader" in state["state_dict"]) == (taken is None or taken.inside_epoch)


def test_a_checkpoint_without_counters_is_left_as_it_is():
    checkpoint = {"state_dict": {}}
    assert mend(checkpoint) is None
    assert checkpoint == {"state_dict": {}}
