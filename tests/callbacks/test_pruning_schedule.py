"""PruningSchedule: the mask's step is the optimiser's, what it logs, and the same after resuming."""

import csv
import math
import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from petune.adapters.pat import PatConfig
from petune.callbacks import ExportAdapter, PruningSchedule
from petune.export import load_adapter, load_run
from tests.callbacks import runs

WIDTH, KEPT = 32, 21


def config(**options):
    return PatConfig(**{"target_dim": KEPT, "r": 3, "hsm_rank": 5, "task_type": "SEQ_CLS", **options})


def module(**options):
    torch.manual_seed(3)
    return runs.Module(config(**options))


def data(rows=96):
    return DataLoader(runs.dataset(rows), runs.BATCH)  # six steps an epoch


def mask(task):
    return task.model.base_model.mask()


class Steps(Callback):
    """(step, is hard) of the mask in every batch, as the forward sees them."""

    def __init__(self):
        self.seen = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append((mask(pl_module).now, mask(pl_module).is_final))

    @property
    def hard_from(self):
        return next(step for step, hard in self.seen if hard)


def fit(task, *callbacks, schedule=None, loader=None, **options):
    steps = Steps()
    trainer = runs.trainer(schedule or PruningSchedule(), steps, *callbacks, **options)
    trainer.fit(task, data() if loader is None else loader)
    return steps


def test_the_mask_takes_the_length_of_the_run_and_is_hard_after_a_third():
    task = module()
    steps = fit(task)
    assert [step for step, _ in steps.seen] == list(range(18))
    assert steps.hard_from == 6
    assert mask(task).total_steps == task.model.peft_config["default"].total_steps == 18
    assert mask(task).hard.sum() == KEPT


def test_steps_are_those_of_the_optimizer():
    task = module(milestone=0.5)
    steps = fit(task, accumulate_grad_batches=2, epochs=2)
    assert [step for step, _ in steps.seen] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert steps.hard_from == 3
    assert mask(task).now == mask(task).total_steps == 6


def test_a_length_that_was_given_stays():
    task = module(total_steps=27)
    assert fit(task).hard_from == 9
    assert mask(task).total_steps == task.model.peft_config["default"].total_steps == 27


def test_a_second_fit_goes_on_where_the_mask_is():
    task = module(total_steps=30)
    with pytest.warns(
        UserWarning, match="the training ended at step 5, before the mask was to become hard at step 10"
    ):
        fit(task, max_steps=5)
    assert mask(task).is_final
    assert [step for step, _ in fit(task, max_steps=3).seen] == [5, 6, 7]
    assert mask(task).now == 8


def test_a_run_that_begins_with_a_partly_trained_mask_counts_from_there():
    task = module()
    mask(task).step.fill_(4)
    mask(task)._seen = None
    assert [step for step, _ in fit(task, max_steps=11).seen][:3] == [4, 5, 6]
    assert mask(task).total_steps == 15


def test_a_training_that_is_too_short_makes_the_mask_hard_and_says_so():
    task, schedule = module(total_steps=300), PruningSchedule()
    message = (
        "the training ended at step 6, before the mask was to become hard at step 100: the 21 channels in front are "
        "kept from now on, and nothing was trained with them alone; train longer, or lower PatConfig.milestone"
    )
    with pytest.warns(UserWarning, match=message):
        fit(task, schedule=schedule, epochs=1)
    assert mask(task).hard.sum() == KEPT
    assert torch.equal(mask(task).hard.nonzero().flatten(), mask(task).logits.topk(KEPT).indices.sort().values)
    assert torch.equal(schedule.history[-1][1], mask(task).hard.float())


def test_a_training_that_is_long_enough_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(mask|milestone|auxiliary_loss)")
        fit(module())


@pytest.mark.parametrize("step", [4, 6, 10], ids=["soft, in an epoch", "just hard, at its end", "hard, in the next"])
def test_a_resumed_run_goes_on_as_one_in_one_go(tmp_path, step):
    def run(folder, resume=None):
        steps = Steps()
        task = runs.fit(
            tmp_path / folder,
            every_steps=2,
            module=module(lora_dropout=0.1),
            callbacks=[PruningSchedule(), steps],
            resume=resume,
        )
        return task, steps.seen

    reference, values = run("reference")
    assert values == [(one, one >= 6) for one in range(18)]
    resumed, rest = run("resumed", tmp_path / "reference" / f"step={step}.ckpt")
    assert rest == values[step:]
    assert resumed.losses == reference.losses[step:]
    ours, theirs = resumed.state_dict(), reference.state_dict()
    assert any("petune_pat_mask.default.step" in name for name in theirs)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def logged(folder):
    """The rows of the CSV log that PruningSchedule wrote, by step."""
    with (folder / "run" / "version_0" / "metrics.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return {int(row["step"]): row for row in rows if "pat/kept_channels" in row}, rows


def test_the_logger_gets_channels_temperature_and_the_terms_of_the_loss(tmp_path):
    task = module(total_steps=18)
    logger = CSVLogger(tmp_path, name="run", version=0)
    fit(task, logger=logger, log_every_n_steps=4)
    found, rows = logged(tmp_path)
    assert list(found) == [4, 8, 12, 16]
    terms = [f"pat/{term}_loss" for term in ("active", "bimodal", "identity", "task")]
    assert found[4].keys() == {"step", "pat/kept_channels", "pat/temperature", *terms}
    assert found[4]["pat/temperature"] == pytest.approx(1 / (1 - math.log(4) / math.log(6)), rel=1e-4)
    assert "pat/temperature" not in found[8]
    assert [found[step]["pat/kept_channels"] for step in (8, 12, 16)] == [KEPT] * 3
    total = next(row["train_loss"] for row in rows if row.get("train_loss") and row["step"] == 3)  # the fourth
    assert sum(found[4][term] for term in terms) == pytest.approx(total, rel=1e-5)


def test_nothing_is_logged_where_the_trainer_logs_nothing(tmp_path):
    schedule = PruningSchedule()
    logger = CSVLogger(tmp_path, name="run", version=0)
    fit(module(), schedule=schedule, logger=logger, log_every_n_steps=0, max_steps=7)
    assert not (tmp_path / "run" / "version_0" / "metrics.csv").exists()
    assert [step for step, _ in schedule.history] == [0, 3]  # the start, and the milestone


def test_the_history_shows_the_mask_from_open_to_hard():
    task, schedule = module(milestone=0.5), PruningSchedule()
    fit(task, schedule=schedule, log_every_n_steps=2)
    assert [step for step, _ in schedule.history] == [0, 2, 4, 6, 8, 9]
    assert torch.equal(schedule.history[0][1], torch.ones(WIDTH))
    assert all(value.shape == (WIDTH,) and value.device.type == "cpu" for _, value in schedule.history)
    assert not torch.equal(schedule.history[1][1], schedule.history[2][1])
    assert torch.equal(schedule.history[-1][1], mask(task).hard.float())


class OwnLoss(runs.Module):
    """A task with a loss of its own, with or without the adapter's."""

    def __init__(self, auxiliary, factor=1.0):
        torch.manual_seed(3)
        super().__init__(config())
        self.auxiliary, self.factor = auxiliary, factor

    def training_step(self, batch, index):
        loss = F.cross_entropy(self.model(input_ids=batch[0]).logits, batch[1]) * self.factor
        self.losses.append(loss.item())
        return loss + self.model.base_model.auxiliary_loss() if self.auxiliary else loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_term_of_a_task_with_its_own_loss_is_known(tmp_path, accumulate):
    task = OwnLoss(auxiliary=True)
    logger = CSVLogger(tmp_path, name="run", version=0)
    fit(task, logger=logger, log_every_n_steps=1, accumulate_grad_batches=accumulate, epochs=1)
    found = [row["pat/task_loss"] for row in logged(tmp_path)[0].values()]
    assert found == pytest.approx(task.losses[accumulate - 1 :: accumulate], rel=1e-5)


def test_a_loss_without_that_of_the_mask_is_pointed_out_once():
    message = r"leaves out the mask's own, so that nothing leads to 21 channels; add model\.base_model\.auxiliary_loss"
    with pytest.warns(UserWarning, match=message) as found:
        fit(OwnLoss(auxiliary=False), epochs=1)
    assert len([one for one in found if "leaves out the mask's own" in str(one.message)]) == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_term():
    with pytest.raises(FloatingPointError, match="the loss is not finite at step 0, because its term 'task' is nan"):
        fit(OwnLoss(auxiliary=True, factor=math.nan))


def test_a_model_without_a_mask_is_refused():
    message = "PruningSchedule found no mask of an active adapter in Module; put a PatConfig adapter on the model"
    with pytest.raises(MisconfigurationException, match=message):
        fit(runs.Module())


class TwoOptimizers(runs.Module):
    def __init__(self):
        super().__init__(config())
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1) for _ in range(2)]


def test_several_optimizers_are_refused():
    message = "PruningSchedule counts optimizer steps, and TwoOptimizers has several optimizers that step one by one"
    with pytest.raises(MisconfigurationException, match=message):
        fit(TwoOptimizers())


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from data()


def test_a_run_of_unknown_length_is_refused_unless_told_the_steps():
    loader = DataLoader(Endless(), batch_size=None)
    for unknown in ({"loader": loader}, {"epochs": -1}):
        with pytest.raises(MisconfigurationException, match="cannot tell how many optimizer steps the run will take"):
            fit(module(), **unknown)
    assert fit(module(), loader=loader, max_steps=7).hard_from == 3
    assert fit(module(total_steps=12), loader=loader, epochs=1, limit_train_batches=5).hard_from == 4


class Scored(runs.Module):
    """One score an epoch, the best before the mask is hard."""

    def __init__(self):
        super().__init__(config(total_steps=18, milestone=0.5))

    def validation_step(self, batch, index):
        self.log("score", (0.9, 0.5, 0.6)[self.current_epoch])


def test_the_best_adapter_is_one_that_can_be_pruned(tmp_path):
    task = Scored()
    export = ExportAdapter(tmp_path, monitor="score", mode="max")
    runs.trainer(export, PruningSchedule(), log_every_n_steps=1).fit(task, data(), data(16))
    loaded = load_adapter(tmp_path, runs.bert())
    assert loaded.base_model.mask().hard.sum() == KEPT
    run = load_run(tmp_path)
    assert run.metrics["score"] == pytest.approx(0.6)
    assert not [name for name in run.metrics if name.startswith("pat/")]
