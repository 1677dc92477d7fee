import json
import re
import subprocess
import sys
from typing import ClassVar

import lightning as L
import pytest
import torch
from huggingface_hub import constants
from jsonargparse import ArgumentParser
from peft import IA3Config, LoraConfig
from torch import nn

from petune.adapters.lora import FusedLoraConfig
from petune.tasks import AdapterTask, TextClassification, TextEmbedding
from petune.tasks.base import DEFAULT_ADAPTER
from petune.tasks.optim import adamw
from tests.tasks import tiny

LABELS = ["low", "high"]


def task_for(model_type: str = "bert", *, changes: dict | None = None, **arguments) -> TextClassification:
    return TextClassification(tiny.classifier(model_type, **(changes or {})), labels=LABELS, **arguments)


def optimizer_of(task: AdapterTask, folder, **changes) -> torch.optim.Optimizer:
    trainer = tiny.trainer(folder, max_steps=1, **changes)
    trainer.fit(task, tiny.labelled(16))
    return trainer.optimizers[0]


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Peak rates by group; the schedule has moved `lr` on."""
    return {group["name"].split("/")[0]: group["initial_lr"] for group in optimizer.param_groups}


# what trains


def test_only_the_adapter_and_the_head_train_and_the_base_stays_bit_identical(tmp_path):
    model = tiny.classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task = TextClassification(model, labels=LABELS, learning_rate=1e-2)
    tiny.trainer(tmp_path, max_epochs=1).fit(task, tiny.labelled(32))
    moved = [name for name, p in task.model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in moved)
    assert any(p.abs().sum() > 0 for name, p in task.model.named_parameters() if "lora_B" in name)
    after = {
        name.replace(".base_layer", "").replace(".original_module", ""): p for name, p in model.state_dict().items()
    }
    assert before.keys() <= after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_head_trains_the_head_and_all_trains_everything():
    head = task_for(train="head")
    head.build()
    assert {n for n, p in head.model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}
    everything = task_for(train="all")
    everything.build()
    assert all(parameter.requires_grad for parameter in everything.model.parameters())


def test_build_is_idempotent_and_model_says_so_before():
    task = task_for()
    with pytest.raises(AttributeError, match=r"TextClassification\.model is not loaded yet; call build\(\) first"):
        _ = task.model
    assert task.build() is task.build() is task.model


def test_the_configuration_that_was_given_is_not_written_to():
    given = LoraConfig(target_modules=["query"])
    task = task_for(adapter=given)
    task.build()
    assert given.task_type is None
    assert given.modules_to_save is None
    assert task.model.peft_config["default"].task_type == "SEQ_CLS"


# how it is optimised


def test_lora_plus_lets_b_learn_faster(tmp_path):
    optimizer = optimizer_of(task_for(learning_rate=1e-3, lora_plus_ratio=16), tmp_path)
    assert rates(optimizer) == {"rest": 1e-3, "up": pytest.approx(1.6e-2), "head": 1e-3}
    ups = next(group for group in optimizer.param_groups if group["name"] == "up")
    assert {parameter.shape[1] for parameter in ups["params"]} == {8}  # [out_features, rank]


def test_the_head_has_a_learning_rate_of_its_own(tmp_path):
    optimizer = optimizer_of(task_for(learning_rate=1e-3, head_learning_rate=5e-2), tmp_path)
    assert rates(optimizer) == {"rest": 1e-3, "up": 1e-3, "head": 5e-2}


def test_vectors_do_not_decay_and_only_trainable_parameters_are_optimised(tmp_path):
    task = task_for(train="all", weight_decay=0.1)
    optimizer = optimizer_of(task, tmp_path)
    for group in optimizer.param_groups:
        assert all((parameter.ndim > 1) == (group["weight_decay"] == 0.1) for parameter in group["params"])
    ia3 = task_for(adapter=IA3Config(), weight_decay=0.1)
    optimizer = optimizer_of(ia3, tmp_path)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in ia3.parameters() if p.requires_grad}
    assert [g["weight_decay"] for g in optimizer.param_groups if g["name"].startswith("rest")] == [0.0]


def test_the_default_is_fused_adamw_with_warm_up_and_linear_decay(tmp_path):
    class Rates(L.Callback):
        seen: ClassVar[list[float]] = []

        def on_train_batch_start(self, trainer, *_):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    watch = Rates()
    trainer = tiny.trainer(tmp_path, max_steps=10, max_epochs=-1, callbacks=[watch])
    trainer.fit(task_for(learning_rate=1.0, warmup_ratio=0.2), tiny.labelled(64))
    assert trainer.optimizers[0].defaults["fused"]
    assert watch.seen == pytest.approx([0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


@pytest.mark.parametrize(("name", "first", "last"), [("cosine", 1.0, 0.0), ("constant", 1.0, 1.0)])
def test_named_schedules(tmp_path, name, first, last):
    task = task_for(learning_rate=1.0, warmup_ratio=0.0, scheduler=name)
    trainer = tiny.trainer(tmp_path, max_steps=4, max_epochs=-1)
    trainer.fit(task, tiny.labelled(64))
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert schedule.base_lrs[0] == first
    assert schedule.get_last_lr()[0] == pytest.approx(last)


def test_optimizer_and_scheduler_classes_are_taken(tmp_path):
    task = task_for(
        learning_rate=1e-2,
        optimizer=torch.optim.SGD,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
    )
    trainer = tiny.trainer(tmp_path, max_epochs=2)
    trainer.fit(task, tiny.labelled(32))
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.25)


# modes, dtypes, checkpointing, compilation


def test_dropout_is_on_in_training_although_from_pretrained_gives_eval_mode(tmp_path):
    class Modes(L.Callback):
        seen: ClassVar[set[bool]] = set()

        def on_train_batch_start(self, trainer, pl_module, *_):
            self.seen.update(module.training for module in pl_module.modules() if isinstance(module, nn.Dropout))

    watch = Modes()
    task = TextClassification(tiny.save_body(tmp_path / "base"), labels=LABELS)
    trainer = tiny.trainer(tmp_path, max_epochs=2, callbacks=[watch])
    trainer.predict(task, tiny.labelled(4))
    task.eval()  # what a user leaves behind who looked at a few outputs in between
    trainer.fit(task, tiny.labelled(16), tiny.labelled(16))
    assert watch.seen == {True}


class Normalised(nn.Module):
    """A norm with running statistics in front of a Linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.norm = nn.BatchNorm1d(linear.in_features)
        self.linear = linear

    def forward(self, states):
        return self.linear(self.norm(states.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize(("train", "moves"), [("adapter", False), ("head", False), ("all", True)])
def test_a_frozen_batch_norm_keeps_its_running_statistics(tmp_path, train, moves):
    model = tiny.classifier()
    layer = model.bert.encoder.layer[0]
    layer.intermediate.dense = Normalised(layer.intermediate.dense)
    norm = layer.intermediate.dense.norm
    task = TextClassification(model, labels=LABELS, train=train, adapter=LoraConfig(target_modules=["query"]))
    tiny.trainer(tmp_path, max_epochs=2).fit(task, tiny.labelled(16), tiny.labelled(16))
    assert bool(norm.running_mean.abs().sum() > 0) is moves
    assert task.train().model.training
    assert norm.training is moves


def gradients(task: AdapterTask) -> dict[str, torch.Tensor | None]:
    batch = next(iter(tiny.labelled(8)))
    nn.functional.cross_entropy(task(batch), batch["labels"]).backward()
    return {name: p.grad for name, p in task.named_parameters() if p.requires_grad}


def test_gradient_checkpointing_gives_the_same_non_zero_gradients():
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    plain, checkpointed = task_for(changes=calm), task_for(changes=calm, gradient_checkpointing=True)
    plain.build()
    assert checkpointed.build().is_gradient_checkpointing
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)  # at its start of zero A has no gradient
    checkpointed.load_state_dict(plain.state_dict())
    wanted, found = gradients(plain), gradients(checkpointed)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_lets_gradients_through_a_frozen_embedding():
    task = task_for(gradient_checkpointing=True)
    embedding = task.build().get_base_model().get_input_embeddings()
    seen = []
    embedding.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    gradients(task)
    assert seen == [True]


def test_compile_keeps_the_checkpoint_keys_and_the_output():
    eager, compiled = task_for().eval(), task_for(compile={"backend": "aot_eager"}).eval()
    eager.build()
    assert compiled.build()._compiled_call_impl is not None
    assert list(compiled.state_dict()) == list(eager.state_dict())
    compiled.load_state_dict(eager.state_dict())
    wanted, found = gradients(eager), gradients(compiled)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("autocast", "adapter_dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_a_bf16_base_trains_with_the_adapter_dtype_that_is_asked_for(tmp_path, autocast, adapter_dtype):
    path = tiny.save_body(tmp_path / "base", dtype=torch.bfloat16)
    task = TextClassification(path, labels=LABELS, learning_rate=1e-2, autocast_adapter_dtype=autocast)
    trainer = tiny.trainer(tmp_path, max_epochs=6, precision="bf16-mixed")
    trainer.fit(task, tiny.labelled(160), tiny.labelled(40, seed=1))
    parameters = dict(task.model.named_parameters())
    assert {p.dtype for name, p in parameters.items() if "lora_" in name} == {adapter_dtype}
    assert {p.dtype for name, p in parameters.items() if "base_layer" in name} == {torch.bfloat16}
    assert trainer.callback_metrics["val/accuracy"] > 0.8


def test_dtype_of_the_base_can_be_chosen(tmp_path):
    path = tiny.save_body(tmp_path / "base")
    model = TextEmbedding(path, dtype="bfloat16").build()
    assert model.get_base_model().embeddings.word_embeddings.weight.dtype == torch.bfloat16


# checkpoints and descriptions


def test_hyperparameters_load_weights_only_and_rebuild_the_task(tmp_path):
    path = tiny.save_body(tmp_path / "base")
    task = TextClassification(path, labels=LABELS, adapter=LoraConfig(r=3, target_modules=["query", "value"]))
    trainer = tiny.trainer(tmp_path)
    trainer.fit(task, tiny.labelled(32))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = TextClassification.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert again.adapter == LoraConfig(r=3, target_modules=["query", "value"])
    batch = next(iter(tiny.labelled(8)))
    assert torch.equal(again.eval()(batch), task.eval()(batch))


def test_a_checkpoint_without_the_base_loads_and_one_without_the_adapter_does_not(tmp_path):
    task = task_for()
    task.build()
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    state = {name: tensor for name, tensor in task.state_dict().items() if name in trained}
    task.on_load_checkpoint({"state_dict": state})
    assert task.load_state_dict(state, strict=task.strict_loading).unexpected_keys == []
    lost = next(name for name in state if "lora_B" in name)
    del state[lost]
    with pytest.raises(ValueError, match=rf"lacks 1 of {len(trained)} trained parameters, {re.escape(lost)} first"):
        task.on_load_checkpoint({"state_dict": state})


def test_the_description_is_a_model_section_of_a_configuration(tmp_path):
    path = tiny.save_body(tmp_path / "base")
    task = TextClassification(
        path, labels=LABELS, adapter=IA3Config(feedforward_modules={"b", "a"}), learning_rate=0.1
    )
    described = json.loads(json.dumps(task.describe()))
    assert described["class_path"] == "petune.tasks.TextClassification"
    assert described["init_args"]["adapter"]["init_args"] == {"feedforward_modules": ["a", "b"]}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AdapterTask, "model")
    rebuilt = parser.instantiate_classes(parser.parse_object({"model": described})).model
    assert isinstance(rebuilt, TextClassification)
    assert rebuilt.describe() == task.describe()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], FusedLoraConfig()),
        (["--model.adapter.r=3"], FusedLoraConfig(r=3)),
        (["--model.adapter=peft.IA3Config"], IA3Config()),
    ],
    ids=["default", "one field", "another class"],
)
def test_the_command_line_takes_the_adapter_field_by_field(arguments, expected):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextClassification, "model")
    task = parser.instantiate_classes(parser.parse_args(["--model.model=base", *arguments])).model
    assert type(task.adapter) is type(expected)
    assert task.adapter == expected


def test_the_command_line_takes_optimizer_and_scheduler_by_class(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AdapterTask, "model")
    arguments = [
        "--model=petune.tasks.TextClassification",
        f"--model.model={tiny.save_body(tmp_path / 'base')}",
        "--model.labels=[low,high]",
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.momentum=0.5",
        "--model.scheduler=torch.optim.lr_scheduler.StepLR",
        "--model.scheduler.step_size=1",
    ]
    parsed = parser.parse_args(arguments)
    again = parser.parse_string(parser.dump(parsed))
    optimizer = optimizer_of(parser.instantiate_classes(again).model, tmp_path)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["momentum"] == 0.5


def test_the_default_adapter_is_real_after_construction():
    task = task_for()
    assert task.adapter is not DEFAULT_ADAPTER
    assert type(task.adapter) is FusedLoraConfig


# errors


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("head_learning_rate", -1.0),
        ("lora_plus_ratio", 0.0),
        ("weight_decay", -0.1),
        ("warmup_ratio", 1.5),
    ],
)
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"TextEmbedding\.{name}={value} is out of range; use"):
        TextEmbedding("base", **{name: value})


def test_an_unknown_train_is_refused():
    with pytest.raises(ValueError, match="train='heads' is not known; use one of adapter, head, all"):
        TextEmbedding("base", train="heads")


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "a/b/c"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(FileNotFoundError, match=rf"model='{name}' is not a folder on this machine"):
        TextEmbedding(name).build()


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json; give the folder of a saved model"):
        TextEmbedding(tmp_path).build()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds an adapter, not a base model.*petune predict --adapter"):
        TextEmbedding(tmp_path).build()


def test_offline_the_error_says_what_was_looked_for_and_how_to_give_a_path():
    message = r"'some/model' was looked for as a local folder.*HF_HUB_OFFLINE is set.*--model\.model=\./some/model"
    with pytest.raises(FileNotFoundError, match=message):
        TextEmbedding("some/model").build()


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused at once
    with pytest.raises(FileNotFoundError, match=r"http://127\.0\.0\.1:9 does not answer"):
        TextEmbedding("some/model").build()
    assert constants.HF_HUB_OFFLINE is False


def test_an_adapter_that_matches_nothing_names_the_closest_modules():
    task = task_for(adapter=LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"LoraConfig\.target_modules=\['q_proj'\] matches no module.*closest are.*query"
    ):
        task.build()


def test_a_task_type_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="task_type='CAUSAL_LM' does not fit TextClassification; use 'SEQ_CLS'"):
        task_for(adapter=LoraConfig(task_type="CAUSAL_LM")).build()


def test_nothing_to_train_is_refused(tmp_path):
    task = task_for()
    task.build().requires_grad_(False)
    with pytest.raises(ValueError, match="TextClassification has no trainable parameter; choose an adapter"):
        tiny.trainer(tmp_path).fit(task, tiny.labelled(16))


def test_lora_plus_without_a_b_is_refused(tmp_path):
    task = task_for(adapter=IA3Config(), lora_plus_ratio=16)
    with pytest.raises(ValueError, match="lora_plus_ratio=16 needs an adapter with an up-projection B"):
        tiny.trainer(tmp_path).fit(task, tiny.labelled(16))


def test_a_learning_rate_for_the_optimizer_itself_is_refused(tmp_path):
    task = task_for(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.3))
    with pytest.raises(ValueError, match=r"SGD was given lr=0.3, which the task's groups override; set learning_rate"):
        tiny.trainer(tmp_path).fit(task, tiny.labelled(16))


def test_a_schedule_without_a_known_length_is_refused(tmp_path):
    trainer = tiny.trainer(tmp_path, max_epochs=-1)
    with pytest.raises(ValueError, match=r"scheduler='linear' .* needs the length of the run.*set trainer\.max_steps"):
        trainer.fit(task_for(), tiny.labelled(16))


def test_a_model_object_without_a_name_has_no_tokenizer():
    with pytest.raises(ValueError, match="its tokenizer is not known; pass tokenizer= as well"):
        _ = task_for().tokenizer


def test_an_unregistered_adapter_class_in_a_checkpoint_is_not_imported():
    described = {"class_path": "os.system", "init_args": {"command": "true"}}
    with pytest.raises(ValueError, match=r"adapter class 'os\.system' is not registered with PEFT"):
        TextEmbedding("base", adapter=described)


def test_adamw_is_not_fused_where_a_device_does_not_offer_it():
    assert adamw([nn.Parameter(torch.zeros(2))]).defaults["fused"]
    assert not adamw([nn.Parameter(torch.zeros(2, device="meta"))]).defaults["fused"]


def test_the_folder_explains_a_wrong_import_name():
    code = (
        "import importlib.util as u, pathlib, petune; p = pathlib.Path(petune.__file__).parent / 'tasks/__init__.py'; "
    )
    code += "s = u.spec_from_file_location('tasks', p); s.loader.exec_module(u.module_from_spec(s))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: This folder is installed as petune.tasks" in done.stderr
