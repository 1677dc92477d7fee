"""LISA, IST and FreezeByMotion under `transformers.Trainer` and TRL: who trains, what is restored and refused."""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from petune.adapters.pat import PatConfig
from petune.trainer_callbacks import (
    FreezeByMotionTrainerCallback,
    ISTTrainerCallback,
    LISATrainerCallback,
    ScheduledTrainer,
)
from tests.adapters.test_trainers import tokenizer
from tests.callbacks import runs, scheduled
from tests.feature_runs import family

SCHEDULES = {
    "IST": lambda **options: ISTTrainerCallback(**{"interval_steps": 2, **options}),
    "LISA": lambda **options: LISATrainerCallback(**{"layers": 1, "interval_steps": 2, **options}),
    "motion": lambda **options: FreezeByMotionTrainerCallback(**{"freeze_ratio": 0.75, **options}),
}
SAME = {  # as tests/callbacks/scheduled.py has them for Lightning
    "IST": lambda: ISTTrainerCallback(ratio=0.5, interval_steps=2),
    "LISA": lambda: LISATrainerCallback(layers=1, interval_steps=2),
    "motion": lambda: FreezeByMotionTrainerCallback(freeze_ratio=0.75),
}


def model(config=None, **sizes):
    bert = family("bert")
    base = type(bert)("bert", "bert", "encoder", bert.config | sizes)
    built = base.build(head="cls")
    torch.manual_seed(3)
    return get_peft_model(built, config or runs.lora())


def rows(count=22):
    return [{"input_ids": x, "labels": y} for x, y in zip(*runs.dataset(count).tensors, strict=True)]


def make(folder, *callbacks, net=None, trainer_cls=ScheduledTrainer, data=None, **options):
    """Four steps an epoch, of six rows, the last of four; evaluated on six."""
    fields = {"num_train_epochs": 2, "per_device_train_batch_size": 6, "learning_rate": 1e-2, "seed": 11}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    arguments = TrainingArguments(str(folder), **{**fields, **quiet, **options})
    given = {"train_dataset": data or rows(), "eval_dataset": rows(6)}
    return trainer_cls(net or model(), arguments, callbacks=list(callbacks), **given)


def schedule_of(trainer):
    """That which trained: a resumed Trainer may have made a new one."""
    return next(one for one in trainer.callback_handler.callbacks if hasattr(one, "history"))


def block_of(name):
    found = re.search(r"layers?\.(\d+)\.", name)
    return None if found is None else int(found[1])


def trainable(net):
    return [name for name, p in net.named_parameters() if p.requires_grad]


class Seen(TrainerCallback):
    """Blocks with gradients before each optimizer step, and what requires grad outside of batches."""

    def __init__(self):
        self.steps, self.outside = [], []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        with_gradient = {block_of(name) for name, p in model.named_parameters() if p.grad is not None}
        assert None in with_gradient  # the head
        self.steps.append(tuple(sorted(with_gradient - {None})))
        self.outside.append(trainable(model))

    def on_evaluate(self, args, state, control, model, **_):
        self.outside.append(trainable(model))


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_block_of_four_trains_in_a_step_and_all_come_up(name, tmp_path):
    net, seen, schedule = model(), Seen(), SCHEDULES[name]()
    trained, before = trainable(net), copy.deepcopy(net.state_dict())
    make(tmp_path, schedule, seen, net=net, num_train_epochs=6, eval_strategy="epoch").train()
    assert [len(blocks) for blocks in seen.steps] == [1] * 24
    assert schedule.history == seen.steps
    assert {block for blocks in seen.steps for block in blocks} == {0, 1, 2, 3}
    assert seen.outside == [trained] * 30
    assert trainable(net) == trained
    assert {n for n, value in net.state_dict().items() if not torch.equal(value, before[n])} == set(trained)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_selection_holds_for_all_batches_of_an_accumulation(name, tmp_path):
    seen, schedule = Seen(), SCHEDULES[name]()
    make(tmp_path, schedule, seen, per_device_train_batch_size=2, gradient_accumulation_steps=3).train()
    assert [len(blocks) for blocks in seen.steps] == [1] * 8
    assert schedule.history == seen.steps


@pytest.mark.parametrize("name", SAME)
def test_the_blocks_and_weights_are_those_of_the_lightning_callback(name, tmp_path):
    theirs, lightning = scheduled.fit(scheduled.SCHEDULES[name]())
    net = model(runs.lora(lora_dropout=0.0), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    options = {
        "per_device_train_batch_size": runs.BATCH,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
    }
    trainer = make(tmp_path, SAME[name](), net=net, data=rows(96), **options)
    trainer.optimizer, trainer.lr_scheduler = optimizer, constant
    trainer.train()
    assert schedule_of(trainer).history == lightning.history
    if name == "IST":
        assert schedule_of(trainer).importance == pytest.approx(lightning.importance, abs=1e-4)
    for n, p in theirs.model.named_parameters():
        assert torch.allclose(net.get_parameter(n), p, atol=1e-4), n


@pytest.mark.parametrize("restores", [False, True], ids=["as the Trainer does", "with callbacks restored"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_run_goes_on_as_one_in_one_go(tmp_path, name, restores):
    def run(folder, resume=None):
        options = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": restores}
        trainer = make(tmp_path / folder, SCHEDULES[name](), **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = run("resumed", str(checkpoint))
    assert schedule_of(resumed).history == schedule_of(whole).history[3:]
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert [n for n in theirs if not torch.equal(ours[n], theirs[n])] == []
    if name == "IST":
        assert schedule_of(resumed).importance == schedule_of(whole).importance
    stored = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]
    assert stored[type(schedule_of(whole)).__name__]["args"] == {
        option: getattr(schedule_of(whole), option) for option in stored[type(schedule_of(whole)).__name__]["args"]
    }


def test_a_second_train_begins_anew(tmp_path):
    trainer = make(tmp_path, LISATrainerCallback(layers=1, interval_steps=1), num_train_epochs=1)
    trainer.train()
    first = schedule_of(trainer).history
    trainer.train()
    assert schedule_of(trainer).history == first


@pytest.mark.parametrize("resets", [True, False])
def test_the_optimizer_forgets_blocks_whose_turn_is_over(resets, tmp_path):
    trainer = make(tmp_path, LISATrainerCallback(layers=1, interval_steps=2, reset_optimizer=resets))
    trainer.train()
    history = schedule_of(trainer).history
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    remembered = {block_of(names[parameter]) for parameter, state in trainer.optimizer.state.items() if state}
    assert len(set(history)) > 1
    assert remembered == {None, *(history[-1] if resets else (block for blocks in history for block in blocks))}


def test_an_exception_gives_back_all_that_was_frozen(tmp_path):
    class Fails(ScheduledTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            self.frozen = trainable(model)
            if self.state.global_step == 2:
                raise RuntimeError("in the step")
            return super().compute_loss(model, inputs, *args, **kwargs)

    net = model()
    trained = trainable(net)
    trainer = make(tmp_path, LISATrainerCallback(layers=1), net=net, trainer_cls=Fails)
    with pytest.raises(RuntimeError, match="in the step"):
        trainer.train()
    assert len(trainer.frozen) < len(trained)
    assert trainable(net) == trained


def test_importance_is_learned_from_losses_that_leave_no_trace(tmp_path):
    class Counts(ScheduledTrainer):
        calls = 0

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.calls += 1
            self.log({"mine": 1.0})
            return super().compute_loss(model, inputs, *args, **kwargs)

    schedule = ISTTrainerCallback(interval_steps=4)
    trainer = make(tmp_path, schedule, trainer_cls=Counts, num_train_epochs=3)
    trainer.train()
    assert any(schedule.importance.values())
    assert trainer.calls == 12 + 3 * 2  # three draws before steps 4 and 8
    assert sum("mine" in logs for logs in trainer.state.log_history) == 12
    assert trainer.model.training
    reference = make(tmp_path, ISTTrainerCallback(interval_steps=100), num_train_epochs=3)
    reference.train()
    ours, theirs = ([one["loss"] for one in t.state.log_history if "loss" in one][:4] for t in (trainer, reference))
    assert ours == theirs


# --- TRL ---


class ScheduledSFT(ScheduledTrainer, SFTTrainer):
    pass


def sft(folder, schedule, trainer_cls=ScheduledSFT, **options):
    llama = family("llama").build(head="lm")
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    fields = {"max_steps": 6, "per_device_train_batch_size": 2, "max_length": 16, "learning_rate": 5e-3, "bf16": False}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    texts = ["a b c d e", "b c d", "e f g h", "a i j", "c c a"]
    return trainer_cls(
        model=llama,
        args=SFTConfig(str(folder), **{**fields, **quiet, **options}),
        train_dataset=Dataset.from_dict({"text": texts}),
        eval_dataset=Dataset.from_dict({"text": texts[:2]}),
        peft_config=lora,
        processing_class=tokenizer(),
        callbacks=[schedule],
    )


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_trl_trains_the_chosen_blocks_alone_under_gradient_checkpointing(name, reentrant, tmp_path):
    schedule = SCHEDULES[name]()
    trainer = sft(tmp_path, schedule, max_steps=1, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {block_of(n) for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(schedule.history[0])
    assert len(changed) == 1


def test_importance_leaves_no_trace_in_trls_metrics(tmp_path):
    schedule = ISTTrainerCallback(interval_steps=2)
    trainer = sft(tmp_path, schedule)
    trainer.train()
    assert any(schedule.importance.values())
    assert not any(trainer._metrics["eval"].values())
    trained = [one["num_tokens"] for one in trainer.state.log_history if "num_tokens" in one]
    assert trained == sorted(trained)
    reference = sft(tmp_path, ISTTrainerCallback(interval_steps=100))
    reference.train()
    assert trained == [one["num_tokens"] for one in reference.state.log_history if "num_tokens" in one]


# --- what is refused ---


def test_a_trainer_that_is_not_scheduled_is_refused_before_it_has_trained(tmp_path):
    trainer = make(tmp_path, LISATrainerCallback(), trainer_cls=Trainer)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match=r"LISATrainerCallback lets blocks rest .*; train with .*ScheduledTrainer in"):
        trainer.train()
    assert all(torch.equal(value, before[n]) for n, value in trainer.model.state_dict().items())


def test_two_schedules_are_refused(tmp_path):
    trainer = make(tmp_path, LISATrainerCallback(), FreezeByMotionTrainerCallback())
    with pytest.raises(ValueError, match="LISATrainerCallback and FreezeByMotionTrainerCallback would choose"):
        trainer.train()


@pytest.mark.parametrize(
    ("kind", "wrapper", "flags", "message"),
    [
        ("FSDP", None, {}, "which FSDP cannot, because it groups, shards or copies them"),
        ("DEEPSPEED", None, {}, "which DEEPSPEED cannot"),
        ("NO", torch.nn.DataParallel, {}, "which DataParallel cannot"),
        (
            "MULTI_CPU",
            DistributedDataParallel,
            {"find_unused_parameters": False},
            "DDP waits for the gradient of each",
        ),
        (
            "MULTI_CPU",
            DistributedDataParallel,
            {"find_unused_parameters": True, "static_graph": True},
            "DDP waits for",
        ),
    ],
    ids=["fsdp", "deepspeed", "data-parallel", "ddp", "static-graph"],
)
def test_processes_that_cannot_have_parameters_rest_are_refused(kind, wrapper, flags, message, tmp_path):
    class Several(ScheduledTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            self.accelerator.state = SimpleNamespace(distributed_type=DistributedType(kind))
            if wrapper is not None:
                net = model
                model = object.__new__(wrapper)
                torch.nn.Module.__init__(model)
                model.module = net
                for flag, value in {"static_graph": False, **flags}.items():
                    setattr(model, flag, value)
            return super().training_step(model, inputs, num_items_in_batch)

    with pytest.raises(ValueError, match=message):
        make(tmp_path, LISATrainerCallback(), trainer_cls=Several).train()


def test_a_model_that_cannot_be_scheduled_is_refused(tmp_path):
    with pytest.raises(ValueError, match="LISATrainerCallback: min_layer=9 leaves no block to train"):
        make(tmp_path, LISATrainerCallback(min_layer=9)).train()


def test_importance_of_blocks_whose_adapters_share_state_is_refused(tmp_path):
    trainer = make(tmp_path, ISTTrainerCallback(), net=model(PatConfig(r=4, task_type="SEQ_CLS")))
    with pytest.raises(ValueError, match="ISTTrainerCallback: the response of one block's adapter cannot be"):
        trainer.train()


def test_a_checkpoint_of_other_blocks_is_refused(tmp_path):
    save = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(tmp_path, LISATrainerCallback(layers=1), **save).train()
    again = make(tmp_path, LISATrainerCallback(layers=1, min_layer=2), **{**save, "max_steps": 3})
    with pytest.raises(ValueError, match=r"scheduled blocks \[0, 1, 2, 3\] when .* that may train now are \[2, 3\]"):
        again.train(resume_from_checkpoint=True)


def test_a_compiled_model_is_warned_of(tmp_path):
    arguments = SimpleNamespace(torch_compile=True)
    state = SimpleNamespace(global_step=0, stateful_callbacks={})
    with pytest.warns(UserWarning, match="LISATrainerCallback: each new choice of blocks compiles the model anew"):
        LISATrainerCallback().on_train_begin(arguments, state, None, model=model())


def test_an_argument_out_of_range_is_refused_by_the_name_of_the_callback():
    for build, message in (
        (lambda: LISATrainerCallback(layers=0), "LISATrainerCallback.layers=0 lets no block train; use 1 or more"),
        (lambda: FreezeByMotionTrainerCallback(1.0), "FreezeByMotionTrainerCallback.freeze_ratio=1.0 is no share"),
        (lambda: ISTTrainerCallback(draws=1), "ISTTrainerCallback.draws=1 is out of range; use 2 or more"),
        (lambda: LISATrainerCallback(min_layer=-1), "LISATrainerCallback.min_layer=-1 is no block; use 0 or more"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            build()
