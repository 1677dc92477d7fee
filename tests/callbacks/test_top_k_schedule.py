"""TopKSchedule: the value at every step, in routers and configs, and the same after resuming."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from peft import PeftModel

from petune.adapters.emoe import EmoeConfig
from petune.callbacks import TopKSchedule
from tests.callbacks import routed, runs
from tests.families import FAMILIES


class Seen(Callback):
    """top_k of every router and of the config, in each batch."""

    def __init__(self):
        self.steps = []

    def on_before_backward(self, trainer, pl_module, loss):
        values = {router.top_k for router in routed.routers(pl_module).values()}
        self.steps.append((*values, pl_module.model.peft_config["default"].top_k))

    @property
    def top_k(self):
        assert all(len(values) == 2 and values[0] == values[1] for values in self.steps)
        return [values[0] for values in self.steps]


def fit(schedule, task=None, batches=4, epochs=2, **options):
    seen, task = Seen(), task or routed.Task()
    runs.trainer(schedule, seen, epochs=epochs, **options).fit(task, routed.loader(routed.batches(batches)))
    return seen.top_k


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ({"start": 1}, [1, 1, 2, 2, 3, 3, 4, 4]),
        ({"start": 2, "end": 3}, [2, 2, 2, 2, 3, 3, 3, 3]),
        ({"start": 3, "end": 3}, [3] * 8),
        ({"start": 2, "ratio": 0.5}, [2, 2, 3, 4, 4, 4, 4, 4]),
        ({"start": 1, "end": 2, "steps": 5}, [1, 1, 1, 2, 2, 2, 2, 2]),
    ],
    ids=str,
)
def test_each_value_has_an_equal_share_of_the_growth(schedule, wanted):
    task = routed.Task()
    assert fit(TopKSchedule(**schedule), task) == wanted
    assert {router.top_k for router in routed.routers(task).values()} == {wanted[-1]}


def test_steps_are_those_of_the_optimizer():
    assert fit(TopKSchedule(1, 2), accumulate_grad_batches=2) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert fit(TopKSchedule(1, 2), max_steps=4) == [1, 1, 2, 2]


def test_a_run_shorter_than_the_growth_still_ends_at_the_end():
    task = routed.Task()
    assert fit(TopKSchedule(1), task, batches=2, epochs=1) == [1, 3]
    assert task.model.peft_config["default"].top_k == routed.EXPERTS


def test_what_is_saved_in_the_middle_routes_as_it_did_then(tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                pl_module.model.save_pretrained(tmp_path)

    task = routed.Task()
    runs.trainer(TopKSchedule(1), Save(), epochs=2).fit(task, routed.loader(routed.batches(4)))
    loaded = PeftModel.from_pretrained(FAMILIES["bert"].build(head="cls"), tmp_path)
    assert {router.top_k for router in routed.routers(loaded).values()} == {3}
    assert {router.top_k for router in routed.routers(task).values()} == {4}


def test_routers_of_other_adapters_are_left_alone():
    task = routed.Task()
    task.model.add_adapter("other", EmoeConfig(num_experts=6, top_k=5, layers="all"))
    runs.trainer(TopKSchedule(1), epochs=1).fit(task, routed.loader(routed.batches(2)))
    values = {path.rpartition(".")[2]: router.top_k for path, router in routed.routers(task).items()}
    assert values == {"default": 4, "other": 5}
    assert task.model.peft_config["other"].top_k == 5


@pytest.mark.parametrize("step", [4, 6, 10], ids=["inside an epoch", "at its end", "inside the next"])
def test_a_resumed_run_goes_on_as_one_in_one_go(tmp_path, step):
    def run(folder, resume=None):
        seen = Seen()
        config = EmoeConfig(num_experts=4, top_k=2, layers="all", router="random", r=4, task_type="SEQ_CLS")
        module = runs.Module(config)
        callbacks = [TopKSchedule(1), seen]
        return runs.fit(
            tmp_path / folder, every_steps=2, module=module, callbacks=callbacks, resume=resume
        ), seen.top_k

    reference, values = run("reference")
    assert values == [1 + 4 * one // 18 for one in range(18)]
    resumed, rest = run("resumed", tmp_path / "reference" / f"step={step}.ckpt")
    assert rest == values[step:]
    assert resumed.losses == reference.losses[step:]
    ours, theirs = resumed.state_dict(), reference.state_dict()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0}, "start=0 leaves a token no expert; use 1 or more"),
        ({"start": 3, "end": 2}, "end=2 is below start=3"),
        ({"start": 1, "ratio": 0.0}, "ratio=0.0 is no share of the run"),
        ({"start": 1, "ratio": 1.5}, "ratio=1.5 is no share of the run"),
        ({"start": 1, "steps": 0}, "steps=0 is no length"),
    ],
    ids=str,
)
def test_an_argument_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=f"TopKSchedule.{message}"):
        TopKSchedule(**options)


@pytest.mark.parametrize(("options", "name"), [((5,), "start=5"), ((2, 7), "end=7")])
def test_more_experts_than_there_are_is_refused(options, name):
    message = f"TopKSchedule.{name} is more than the num_experts=4 of the model's routers; use 1 to 4"
    with pytest.raises(MisconfigurationException, match=message):
        fit(TopKSchedule(*options))


def test_a_model_without_routers_is_refused():
    with pytest.raises(MisconfigurationException, match="TopKSchedule found no router of an active adapter in PeftM"):
        runs.trainer(TopKSchedule(1)).fit(runs.Module(), torch.utils.data.DataLoader(runs.dataset(), runs.BATCH))


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield routed.batches(1)[0]


def test_a_run_of_unknown_length_is_refused_unless_told_the_steps():
    def run(schedule, **options):
        task, loader = routed.Task(), torch.utils.data.DataLoader(Endless(), batch_size=None)
        trainer = runs.trainer(schedule, **options)
        trainer.fit(task, loader)
        return task.model.peft_config["default"].top_k

    with pytest.raises(MisconfigurationException, match="cannot tell how many optimizer steps the run will take"):
        run(TopKSchedule(1), epochs=2)
    assert run(TopKSchedule(1), epochs=2, max_steps=3) == 4
    assert run(TopKSchedule(1, steps=8), epochs=1, limit_train_batches=3) == 2
