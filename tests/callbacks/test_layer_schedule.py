"""ISTCallback, LISACallback and FreezeByMotion: who trains in each step, what is restored, resumed and refused."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from petune.adapters.onebit import BiLoraConfig
from petune.adapters.pat import PatConfig
from petune.callbacks import FreezeByMotion, ISTCallback, LISACallback, PruningSchedule
from petune.tasks import TextClassification
from tests.callbacks import runs, scheduled
from tests.feature_runs import family
from tests.tasks import tiny

SCHEDULES = {
    "IST": lambda **options: ISTCallback(**{"interval_steps": 2, **options}),
    "LISA": lambda **options: LISACallback(**{"layers": 1, "interval_steps": 2, **options}),
    "motion": lambda **options: FreezeByMotion(**{"freeze_ratio": 0.75, **options}),
}


def base(seed=123):
    torch.manual_seed(seed)
    return family("bert").build(head="cls")


def module(config=None):
    torch.manual_seed(3)
    return runs.Module(config or runs.lora(), base=base())


class Whole(runs.Module):
    """Full fine-tuning."""

    def __init__(self):
        super().__init__(base=base())
        self.model = base()


def block_of(name):
    parts = name.split(".")
    return next((int(part) for part, before in zip(parts[1:], parts, strict=False) if before == "layer"), None)


class Seen(Callback):
    """Blocks with gradients before each optimizer step, and what requires grad outside of batches."""

    def __init__(self):
        self.steps, self.outside = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        with_gradient = {block_of(name) for name, p in pl_module.named_parameters() if p.grad is not None}
        assert None in with_gradient  # the head
        self.steps.append(tuple(sorted(with_gradient - {None})))

    def on_validation_start(self, trainer, pl_module):
        self.outside.append([name for name, p in pl_module.named_parameters() if p.requires_grad])


def fit(schedule, task=None, epochs=3, validation=None, extra=(), **options):
    seen, task = Seen(), task or module()
    L.seed_everything(7, verbose=False)
    loader = DataLoader(runs.dataset(), runs.BATCH, shuffle=True)
    runs.trainer(schedule, seen, *extra, epochs=epochs, **options).fit(task, loader, validation)
    return task, seen


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_block_of_four_trains_in_a_step_and_all_come_up(name):
    task = module()
    before = {n: p.detach().clone() for n, p in task.named_parameters()}
    trained = [n for n, p in task.named_parameters() if p.requires_grad]
    schedule = SCHEDULES[name]()
    _, seen = fit(schedule, task, validation=DataLoader(runs.dataset(16), 16))
    assert [len(blocks) for blocks in seen.steps] == [1] * 18
    assert schedule.history == seen.steps
    assert {block for blocks in seen.steps for block in blocks} == {0, 1, 2, 3}
    assert seen.outside == [trained] * 4  # with the sanity check: validation sees the model whole
    assert [n for n, p in task.named_parameters() if p.requires_grad] == trained
    changed = [n for n, p in task.named_parameters() if not torch.equal(p, before[n])]
    assert changed == trained
    assert task.losses[-1] < task.losses[0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_selection_holds_for_all_batches_of_an_accumulation(name):
    _, seen = fit(SCHEDULES[name](), accumulate_grad_batches=3)
    assert [len(blocks) for blocks in seen.steps] == [1] * 6


@pytest.mark.parametrize(
    "config", [BiLoraConfig(r=4, task_type="SEQ_CLS"), PatConfig(r=4, task_type="SEQ_CLS")], ids=["bilora", "pat"]
)
def test_other_methods_are_scheduled_and_the_mask_of_pat_trains_on(config):
    task = module(config)
    extra = [PruningSchedule()] if isinstance(config, PatConfig) else []
    before = {n: p.detach().clone() for n, p in task.named_parameters() if "mask" in n}
    _, seen = fit(LISACallback(layers=1, interval_steps=1), task, epochs=2, extra=extra)
    assert [len(blocks) for blocks in seen.steps] == [1] * 12
    if extra:
        moved = [n for n in before if not torch.equal(task.get_parameter(n), before[n])]
        assert moved == list(before)
        assert moved


def test_full_fine_tuning_keeps_embeddings_and_head_on_and_forgets_moments():
    class Moments(Callback):
        def __init__(self):
            self.blocks = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            names = {parameter: name for name, parameter in pl_module.named_parameters()}
            self.blocks.append({block_of(names[one]) for one, state in optimizer.state.items() if state})

    def moments(**options):
        callback, task = Moments(), Whole()
        schedule = LISACallback(layers=1, interval_steps=3, **options)
        before = task.model.bert.embeddings.word_embeddings.weight.detach().clone()
        fit(schedule, task, extra=[callback])
        assert not torch.equal(task.model.bert.embeddings.word_embeddings.weight, before)
        assert all(parameter.requires_grad for parameter in task.parameters())
        return callback.blocks, schedule.history

    blocks, history = moments()
    for step in range(1, 18):  # before step s, what step s − 1 left, without the blocks whose turn is over
        assert blocks[step] == {None, *(set(history[step - 1]) & set(history[step]))}
    kept, history = moments(reset_optimizer=False)
    assert kept[17] == {None, *(block for step in history[:17] for block in step)}


def test_no_block_below_min_layer_trains():
    task = module()
    before = {n: p.detach().clone() for n, p in task.named_parameters()}
    _, seen = fit(LISACallback(layers=2, interval_steps=1, min_layer=1), task)
    assert {block for blocks in seen.steps for block in blocks} == {1, 2, 3}
    changed = {block_of(n) for n, p in task.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {1, 2, 3, None}


def test_importance_is_learned_from_losses_that_are_not_logged():
    task, schedule = module(), ISTCallback(interval_steps=4)
    task, _ = fit(schedule, task)
    assert any(schedule.importance.values())
    assert len(task.losses) == 18 + 3 * 4  # three draws before steps 4, 8, 12 and 16
    reference, _ = fit(ISTCallback(interval_steps=100))
    assert task.losses[:4] == reference.losses[:4]
    assert task.training is reference.training


class Fails(runs.Module):
    def training_step(self, batch, index):
        if index == 3:
            raise RuntimeError("in the step")
        return super().training_step(batch, index)


def test_an_exception_gives_back_all_that_was_frozen():
    task = Fails(base=base())
    trained = [p.requires_grad for p in task.parameters()]
    with pytest.raises(RuntimeError, match="in the step"):
        fit(LISACallback(layers=1), task)
    assert [p.requires_grad for p in task.parameters()] == trained


@pytest.mark.parametrize("step", [4, 6, 9], ids=["inside an epoch", "at its end", "inside a turn"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_run_goes_on_as_one_in_one_go(tmp_path, name, step):
    def run(folder, resume=None):
        schedule = SCHEDULES[name]()
        task = runs.fit(
            tmp_path / folder, every_steps=1, module=module(), callbacks=[schedule], resume=resume, epochs=2
        )
        return task, schedule

    reference, whole = run("reference")
    resumed, rest = run("resumed", tmp_path / "reference" / f"step={step}.ckpt")
    assert rest.history == whole.history[step:]
    ours, theirs = resumed.state_dict(), reference.state_dict()
    assert [n for n in theirs if not torch.equal(ours[n], theirs[n])] == []
    if name == "IST":
        assert rest.importance == whole.importance


def test_a_resumed_full_fine_tuning_has_all_blocks_in_its_checkpoint(tmp_path):
    def run(folder, resume=None):
        schedule = LISACallback(layers=1, interval_steps=2)
        return runs.fit(
            tmp_path / folder, every_steps=1, module=Whole(), callbacks=[schedule], resume=resume, epochs=2
        )

    reference = run("reference")
    resumed = run("resumed", tmp_path / "reference" / "step=5.ckpt")
    ours, theirs = resumed.state_dict(), reference.state_dict()
    assert [n for n in theirs if not torch.equal(ours[n], theirs[n])] == []


def test_a_second_fit_begins_anew():
    schedule = LISACallback(layers=1, interval_steps=1)
    fit(schedule, epochs=1)
    first = schedule.history
    fit(schedule, epochs=1)
    assert schedule.history == first


def test_a_task_of_the_project_is_scheduled(tmp_path):
    task = TextClassification(tiny.classifier(num_hidden_layers=4), learning_rate=2e-2, tokenizer=tiny.tokenizer())
    schedule, seen = ISTCallback(ratio=0.5, interval_steps=2), Seen()
    trainer = tiny.trainer(tmp_path, max_epochs=8, callbacks=[schedule, seen])
    trainer.fit(task, tiny.labelled(), tiny.labelled(seed=1))
    assert [len(blocks) for blocks in seen.steps] == [2] * 32
    assert trainer.callback_metrics["val/accuracy"] > 0.9


# --- what is refused ---


class Endless(L.LightningModule):
    """Two optimizers."""

    def __init__(self):
        super().__init__()
        self.model, self.automatic_optimization = base(), False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

    def training_step(self, batch, index):
        return None


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("ddp", "DDP waits for the gradient of each; train with strategy='ddp_find_unused_parameters_true'"),
        (
            FSDPStrategy(),
            "which FSDPStrategy cannot, because it groups or shards them once; train with strategy='ddp_",
        ),
        (ModelParallelStrategy(), "which ModelParallelStrategy cannot, because it groups or shards them once"),
        (object.__new__(DeepSpeedStrategy), "which DeepSpeedStrategy cannot"),
    ],
    ids=["ddp", "fsdp", "model_parallel", "deepspeed"],
)
def test_a_strategy_that_cannot_have_parameters_rest_is_refused(strategy, message):
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, barebones=False)
    if strategy != "ddp":
        trainer._accelerator_connector.strategy = strategy
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        LISACallback().setup(trainer, module(), "fit")
    LISACallback().setup(trainer, module(), "validate")


def test_several_optimizers_are_refused():
    with pytest.raises(MisconfigurationException, match="counts optimizer steps, and Endless has several optimizers"):
        fit(LISACallback(), Endless())


def test_importance_of_blocks_whose_adapters_share_state_is_refused():
    with pytest.raises(MisconfigurationException, match="ISTCallback: the response of one block's adapter cannot be"):
        fit(ISTCallback(), module(PatConfig(r=4, task_type="SEQ_CLS")), extra=[PruningSchedule()])


def test_importance_without_a_loss_is_refused():
    class Silent(runs.Module):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return None if self.trainer.global_step else loss

    with pytest.raises(MisconfigurationException, match="rates blocks by the loss, and training_step gave NoneType"):
        fit(ISTCallback(interval_steps=1), Silent(base=base()))


def test_a_model_that_cannot_be_scheduled_is_refused():
    with pytest.raises(MisconfigurationException, match="LISACallback: min_layer=9 leaves no block to train"):
        fit(LISACallback(min_layer=9))


def test_a_checkpoint_of_other_blocks_is_refused(tmp_path):
    def run(min_layer, resume=None):
        schedule = LISACallback(layers=1, min_layer=min_layer)
        return runs.fit(tmp_path, every_steps=3, module=module(), callbacks=[schedule], resume=resume, epochs=1)

    run(0)
    message = (
        r"scheduled blocks \[0, 1, 2, 3\] when the checkpoint was written, and those that may train now are \[2, 3\]"
    )
    with pytest.raises(MisconfigurationException, match=message):
        run(2, tmp_path / "step=3.ckpt")


def test_a_compiled_model_is_warned_of():
    task = module()
    task.model.compile(backend="eager")
    with pytest.warns(UserWarning, match="LISACallback: each new choice of blocks compiles the model anew"):
        LISACallback().on_train_start(type("Trainer", (), {"optimizers": ()})(), task)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LISACallback(min_layer=-1), "LISACallback.min_layer=-1 is no block; use 0 or more"),
        (lambda: LISACallback(layers=0), "LISACallback.layers=0 lets no block train; use 1 or more"),
        (lambda: LISACallback(interval_steps=0), "LISACallback.interval_steps=0 is no length; use 1 or more"),
        (lambda: FreezeByMotion(1.0), "FreezeByMotion.freeze_ratio=1.0 is no share of the blocks that can rest"),
        (lambda: ISTCallback(ratio=0.0), "ISTCallback.ratio=0.0 is out of range; use a share above 0 and at most 1"),
        (lambda: ISTCallback(suppressed_ratio=1.1), "ISTCallback.suppressed_ratio=1.1 is out of range"),
        (lambda: ISTCallback(suppression=2.0), "ISTCallback.suppression=2.0 is out of range; use 0 to 1"),
        (lambda: ISTCallback(draws=1), "ISTCallback.draws=1 is out of range; use 2 or more"),
        (lambda: ISTCallback(importance_rate=0.0), "ISTCallback.importance_rate=0.0 is out of range"),
        (lambda: ISTCallback(interval_steps=0), "ISTCallback.interval_steps=0 is out of range; use 1 or more"),
    ],
)
def test_an_argument_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# --- two processes ---


@pytest.mark.slow
def test_two_processes_choose_alike_and_learn_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    command = [sys.executable, "-m", "tests.callbacks.scheduled", str(tmp_path)]
    root = Path(__file__).parents[2]
    both = [
        subprocess.Popen(
            command, cwd=root, env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE
        )
        for rank in "01"
    ]
    errors = [process.communicate(timeout=240)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in "01")
    assert first == second
    for name, make in scheduled.SCHEDULES.items():
        task, schedule = scheduled.fit(make())
        assert [tuple(blocks) for blocks in first[name]["history"]] == schedule.history
        for parameter, values in first[name]["weights"].items():
            ours = task.get_parameter(parameter).flatten()[:8]
            assert torch.allclose(ours, torch.tensor(values), atol=1e-4), (name, parameter)
