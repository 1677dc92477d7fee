"""A store that is asked for what it cannot do says so, and leaves the file and the model as they were."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from petune import BiAdapterConfig, BiLoraConfig
from petune.export import TaskStore, save_adapter, write_tasks
from tests.families import FAMILIES
from tests.test_store import base, logits, store, trained


@pytest.fixture
def two(tmp_path):
    return store(tmp_path, one=trained(seed=1), two=trained(seed=2))


# --- a failure leaves the old store ----------------------------------------------------------------------------------


def test_a_failure_leaves_the_old_store_whole(tmp_path, monkeypatch):
    tasks = store(tmp_path, old=trained())
    before = tasks.path.read_bytes()
    with pytest.raises(TypeError):
        write_tasks(tasks.path, {"new": trained(), "bad": nn.Linear(2, 2)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_tasks(tasks.path, {"new": trained()})
    assert tasks.path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [tasks.path]


def test_a_store_is_replaced_and_one_that_is_open_reads_on(tmp_path):
    old = trained(seed=1)
    tasks = store(tmp_path, old=old)
    write_tasks(tasks.path, {"new": trained(seed=2)})
    assert torch.equal(logits(tasks.attach(base(), "old")), logits(old))
    assert TaskStore(tasks.path).names == ["new"]


def test_a_file_of_something_else_is_not_replaced(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "notes.txt"):
        with pytest.raises(FileExistsError, match="exists and is no task store; name a new file, or an earlier store"):
            write_tasks(path, {"task": trained()})
    assert (tmp_path / "notes.txt").read_text() == "mine"


# --- bad input -------------------------------------------------------------------------------------------------------


def test_an_unknown_task_is_answered_with_the_closest(two):
    model = two.attach(base())
    for ask in (two.bytes, lambda name: two.attach(base(), name), lambda name: two.switch(model, name)):
        with pytest.raises(ValueError, match=r"no task 'tow' among its 2; the closest is 'two'\."):
            ask("tow")


@pytest.mark.parametrize("name", ["", "a/b", 3])
def test_a_name_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="must be a string that is not empty and has no '/'; choose another"):
        write_tasks(tmp_path / "tasks", {name: trained()})
    assert list(tmp_path.iterdir()) == []


def test_a_name_given_twice_and_no_task_at_all_are_refused(tmp_path):
    model = trained()
    with pytest.raises(ValueError, match="'same' was given twice; choose another"):
        write_tasks(tmp_path / "tasks", [("same", model), ("same", model)])
    with pytest.raises(ValueError, match="there is no task to write; pass at least one"):
        write_tasks(tmp_path / "tasks", {})
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_is_not_packed_is_refused_by_name(tmp_path):
    lora = get_peft_model(base(), LoraConfig(r=4, task_type="SEQ_CLS", init_lora_weights=False))
    save_adapter(lora, tmp_path / "lora")
    for source in (lora, tmp_path / "lora"):
        with pytest.raises(
            TypeError, match=r"'x' is an adapter of LoraConfig, .* a store holds those of .*BiLoraConfig"
        ):
            write_tasks(tmp_path / "tasks", {"x": source})
    with pytest.raises(TypeError, match="task 'x' is a Linear; pass a PeftModel or an adapter folder"):
        write_tasks(tmp_path / "tasks", {"x": nn.Linear(2, 2)})
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        write_tasks(tmp_path / "tasks", {"x": tmp_path / "nowhere"})


def test_a_task_that_is_not_finite_is_refused(tmp_path):
    latent, head = trained(), trained()
    next(p for n, p in latent.named_parameters() if "petune" in n).data[0, 0] = float("nan")
    next(p for n, p in head.named_parameters() if "modules_to_save" in n).data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="contains non-finite values"):
        write_tasks(tmp_path / "tasks", {"x": latent})
    with pytest.raises(ValueError, match=r"task 'x': .*classifier\.weight is not finite"):
        write_tasks(tmp_path / "tasks", {"x": head})
    assert latent.peft_config["default"].storage == "packed"


DIFFERENT = {
    "other layers": ({"target_modules": ["query", "key"]}, r"(adapts|does not adapt) .*self\.(key|value), unlike"),
    "another head": (
        {"task_type": None, "bi_head": "classifier"},
        "has task_type=None, and the model's task has 'SEQ",
    ),
    "no head": ({"task_type": None}, "has task_type=None"),
    "the pooler": ({"modules_to_save": ["pooler"]}, r"has modules_to_save=\['classifier', 'pooler', 'score'\], and"),
}


@pytest.mark.parametrize(("fields", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_a_task_that_differs_in_more_than_its_shape_is_refused(tmp_path, fields, message):
    one = trained(seed=1)
    tasks = store(tmp_path, one=one, other=trained(seed=2, **fields))
    model = tasks.attach(base(), "one")
    with pytest.raises(ValueError, match=rf"the task 'other' {message}.*attach it to a base of its own"):
        tasks.switch(model, "other")
    assert torch.equal(logits(model), logits(one))
    tasks.attach(base(), "other")  # which works


def test_two_methods_are_not_switched(tmp_path):
    other = trained(BiAdapterConfig(r=3, task_type="SEQ_CLS", init_weights=False))
    tasks = store(tmp_path, one=trained(), other=other)
    message = (
        "has peft_type='PETUNE_BIADAPTER', and the model's task has 'PETUNE_BILORA'; attach it to a base of its own"
    )
    with pytest.raises(ValueError, match=message):
        tasks.switch(tasks.attach(base()), "other")
    assert torch.equal(logits(tasks.attach(base(), "other")), logits(other))


def test_another_base_is_refused_and_left_as_it_was(tmp_path, two):
    trained(seed=1).save_pretrained(tmp_path / "peft")  # without a fingerprint
    plain = store(tmp_path, one=tmp_path / "peft")
    with pytest.raises(ValueError, match=r"the task 'one': the adapter was made for .* \(different weights\)"):
        two.attach(base(seed=8))
    wide = FAMILIES["bert"].build(head="cls").config
    wide.hidden_size = 64
    other = type(base())(wide).eval()
    before = logits(other)
    with pytest.raises(ValueError, match="different hidden_size"):
        two.attach(other)
    with pytest.raises(ValueError, match="adapter was made for model_type=bert, hidden_size=32"):
        plain.attach(other)
    assert torch.equal(logits(other), before)
    assert not any("petune" in name for name, _ in other.named_modules())
    both = store(tmp_path, one=trained(seed=1), far=get_peft_model(base(seed=8), BiLoraConfig(r=3)))
    with pytest.raises(ValueError, match=r"the task 'far': the adapter was made for .* \(different weights\)"):
        both.switch(both.attach(base()), "far")


def test_a_checkpoint_that_does_not_fit_leaves_the_base_as_it_was(tmp_path):
    model = trained(seed=1)
    model.save_pretrained(tmp_path / "cut")
    tensors = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    blob = "base_model.model.petune_bilora_bits"
    head = "base_model.model.classifier.weight"
    broken = {
        "cut blob": ({blob: tensors[blob][:-1].clone()}, "packed tensor has 95 bytes .* expected 96"),
        "wide head": (
            {head: torch.ones(3, 33)},
            r"classifier\.weight is stored with the shape \[3, 33\], and the model",
        ),
        "more": (
            {"base_model.model.score.weight": torch.ones(3, 32)},
            r"has no place for .*score\.weight; pass the base",
        ),
    }
    for name, (change, message) in broken.items():
        shutil.copytree(tmp_path / "cut", tmp_path / name)
        save_file({**tensors, **change}, tmp_path / name / "adapter_model.safetensors")
        tasks, plain = store(tmp_path, good=model, bad=tmp_path / name), base()
        with pytest.raises(ValueError, match=f"the task 'bad' cannot be put on the model: .*{message}"):
            tasks.attach(plain, "bad")
        assert torch.equal(logits(plain), logits(base()))
        assert list(plain.state_dict()) == list(base().state_dict())
        attached = tasks.attach(plain, "good")
        with pytest.raises(ValueError, match=message):
            tasks.switch(attached, "bad")
        assert torch.equal(logits(attached), logits(model))


def test_only_a_head_may_have_another_number_of_rows(tmp_path):
    trained(bits=32).save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    up = "base_model.model.bert.encoder.layer.1.attention.self.value.petune_bilora_b.weight"
    save_file({**tensors, up: torch.ones(33, 3)}, tmp_path / "plain" / "adapter_model.safetensors")
    tasks = store(tmp_path, plain=tmp_path / "plain")
    with pytest.raises(
        ValueError, match=r"b\.weight is stored with the shape \[33, 3\], and the model's has \[32, 3\]"
    ):
        tasks.attach(base())


def test_a_task_of_another_shape_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    trained(r=5).save_pretrained(tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "adapter_model.safetensors")
    blob = "base_model.model.petune_bilora_bits"
    save_file({**tensors, blob: tensors[blob][1:].clone()}, tmp_path / "bad" / "adapter_model.safetensors")
    tasks = store(tmp_path, good=trained(), bad=tmp_path / "bad")
    model = tasks.attach(base())
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="the task 'bad' cannot be put on the model: packed tensor has 159 bytes"):
        tasks.switch(model, "bad")
    assert [name for name, _ in model.named_modules()] == modules
    assert (list(model.peft_config), model.active_adapters) == (["default"], ["default"])
    assert torch.equal(logits(model), logits(trained()))


def test_packed_weights_of_other_modules_are_refused_whatever_their_number(tmp_path):
    trained(target_modules=["query"]).save_pretrained(tmp_path / "moved")
    config = tmp_path / "moved" / "adapter_config.json"
    config.write_text(config.read_text().replace("query", "value"))  # as many weights, of the same shapes
    tasks = store(tmp_path, moved=tmp_path / "moved")
    with pytest.raises(ValueError, match="it was made for modules of other names or shapes than this model's"):
        tasks.attach(base())


def test_only_an_attached_model_is_switched_and_only_a_base_is_attached_to(two):
    model = two.attach(base())
    with pytest.raises(TypeError, match=r"was not made by TaskStore\.attach"):
        two.switch(trained(), "one")
    for taken in (model, model.get_base_model(), trained()):
        with pytest.raises(TypeError, match=r"already carries an adapter; pass the base model, or use switch\(\)"):
            two.attach(taken)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_a_file_cut_short_is_refused(two, size):
    two.path.write_bytes(two.path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"is cut short or damaged, or no task store .*; copy or write it again"):
        TaskStore(two.path)


@pytest.mark.parametrize("position", [-3, 0.1, 0.3, 0.5, 0.9], ids=str)
def test_a_flipped_bit_is_noticed_before_the_model_is_touched(two, position):
    content, model = bytearray(two.path.read_bytes()), two.attach(base())
    content[position if position < 0 else int(position * len(content))] ^= 1
    (two.path.parent / "damaged").write_bytes(content)
    before = logits(model)

    def use_all():
        for name in (tasks := TaskStore(two.path.parent / "damaged")).names:
            tasks.bytes(name)
            tasks.switch(model, name)

    with pytest.raises(ValueError, match="damaged"):
        use_all()
    assert torch.equal(logits(model), before)  # the first task is the one it had


def test_what_is_no_store_is_refused(tmp_path, two):
    with pytest.raises(FileNotFoundError, match=r"no task store .*nowhere; pass a file that write_tasks wrote"):
        TaskStore(tmp_path / "nowhere")
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"x": torch.ones(2)}, tmp_path / "later", metadata={"petune_tasks": json.dumps({"format": 2})})
    for name, message in (("model.safetensors", "no task store"), ("later", "format 2, and this version reads 1")):
        with pytest.raises(ValueError, match=message):
            TaskStore(tmp_path / name)
