"""Many tasks in one file, each as it was saved, and a model that becomes any of them by name."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn

from petune import BiAdapterConfig, BiLoraConfig
from petune.export import TaskStore, load_adapter, save_adapter, write_tasks
from petune.quantized.linear import PackedLinear, QuantizedLinear
from tests.adapters.cases import cases
from tests.families import FAMILIES

BERT = FAMILIES["bert"]


def base(labels=3, seed=0, family="bert"):
    model = FAMILIES[family].build(seed=seed, head="cls")
    if labels != 3:
        model.classifier = nn.Linear(model.config.hidden_size, labels)
        model.num_labels = model.config.num_labels = labels
    return model


def trained(config=None, seed=0, labels=3, family="bert", **fields):
    """A model that does something visible, and something else for each seed."""
    torch.manual_seed(seed)
    fields = {"r": 3, "init_weights": False, "task_type": "SEQ_CLS" if family == "bert" else None, **fields}
    model = get_peft_model(base(labels, family=family), config or BiLoraConfig(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "classifier.modules_to_save" in name:
                parameter.normal_()
    return model


def logits(model, family="bert"):
    with torch.no_grad():
        return model(**FAMILIES[family].inputs(batch_size=3)).logits


def store(path, **tasks):
    write_tasks(path / "tasks.safetensors", tasks)
    return TaskStore(path / "tasks.safetensors")


@pytest.fixture
def two(tmp_path):
    return store(tmp_path, one=trained(seed=1), two=trained(seed=2))


# --- what is stored is what is computed ------------------------------------------------------------------------------

TASKS = {
    "plain": {},
    "another seed": {"seed": 7},
    "rank": {"r": 5},
    "scale": {"scale": 3.0},
    "two bits": {"bits": 2, "r": 6},
    "a scale for each row": {"bits": 4, "granularity": "row"},
    "least squares": {"bits": 8, "codebook": "l2"},
    "labels": {"labels": 5},
    "latents": {"storage": "latent", "seed": 9},
    "full precision": {"bits": 32},
}


def test_one_model_becomes_every_task_bit_for_bit(tmp_path):
    models = {name: trained(**fields) for name, fields in TASKS.items()}
    tasks = store(tmp_path, **models)
    assert tasks.names == list(TASKS)
    model = tasks.attach(base())
    for name in [*TASKS, "plain", "labels", "rank"]:
        tasks.switch(model, name)
        assert torch.equal(logits(model), logits(models[name])), name


@cases(packed=True)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_every_packed_method_can_be_stored(tmp_path, case, family):
    if family not in case.families:
        pytest.fail(f"add a family that {case.name} works on")
    models = {}
    for name, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(seed)
        ranked = "r" in case.config_cls.__dataclass_fields__
        config = case.random_config(**({"r": 3 + seed} if ranked else {}))
        models[name] = get_peft_model(FAMILIES[family].build(), config).eval()
    batch, tasks = FAMILIES[family].inputs(), store(tmp_path, **models)
    model = tasks.attach(FAMILIES[family].build(), "two")
    for name in ("two", "one", "two"):
        tasks.switch(model, name)
        with torch.no_grad():
            assert torch.equal(model(**batch).last_hidden_state, models[name](**batch).last_hidden_state)


def test_a_bottleneck_adapter_moves_to_the_place_of_the_task(tmp_path):
    places = {"one": {}, "two": {"placement": "pfeiffer"}, "three": {"adapter_input": "ffn", "r": 5}}
    models = {name: trained(BiAdapterConfig(init_weights=False, **fields)) for name, fields in places.items()}
    tasks = store(tmp_path, **models)
    model = tasks.attach(base())
    for name in ("one", "two", "three", "two", "one"):
        tasks.switch(model, name)
        assert torch.equal(logits(model), logits(models[name])), name
    assert torch.equal(logits(model.unload()), logits(base()))


@pytest.mark.parametrize("labels", [3, 5])
def test_a_quantised_head_is_switched_whatever_its_labels(tmp_path, labels):
    fields = {"task_type": None, "bi_head": "classifier"}
    models = {"one": trained(seed=1, **fields), "two": trained(seed=2, labels=labels, **fields)}
    models["three"] = trained(seed=3, labels=labels, bits=2, **fields)
    tasks = store(tmp_path, **models)
    model = tasks.attach(base(), "two")
    for name in ("two", "one", "three", "one", "two"):
        tasks.switch(model, name)
        assert torch.equal(logits(model), logits(models[name])), name


def test_a_folder_is_stored_as_the_model_it_came_from(tmp_path):
    models = {"packed": trained(seed=1), "latent": trained(seed=2, storage="latent")}
    models["latent"].base_model.model.config.id2label = {0: "no", 1: "yes", 2: "maybe"}
    for name, model in models.items():
        save_adapter(model, tmp_path / name)
    tasks = store(tmp_path, **{name: tmp_path / name for name in models})
    model = tasks.attach(base())
    for name in models:
        tasks.switch(model, name)
        assert torch.equal(logits(model), logits(models[name]))
    assert model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert model.config.label2id["yes"] == 1


def test_a_folder_of_peft_or_transformers_alone_can_be_stored(tmp_path):
    model, native = trained(seed=1), base()
    model.save_pretrained(tmp_path / "peft")
    torch.manual_seed(2)
    native.add_adapter(BiLoraConfig(init_weights=False, r=3))
    native.save_pretrained(tmp_path / "native")
    wanted = logits(native.eval())
    tasks = store(tmp_path, peft=tmp_path / "peft", native=tmp_path / "native")
    assert torch.equal(logits(tasks.attach(base(), "peft")), logits(model))
    assert torch.equal(logits(tasks.attach(base(), "native")), wanted)


def test_several_adapters_of_one_model_are_several_tasks(tmp_path):
    model = get_peft_model(base(), BiLoraConfig(r=3, init_weights=False))
    model.add_adapter("second", BiLoraConfig(r=4, init_weights=False, scale=2.0))

    def pairs():
        for name in ("default", "second"):
            model.set_adapter(name)
            yield name, model

    write_tasks(tmp_path / "store", pairs())
    tasks = TaskStore(tmp_path / "store")
    for name in ("default", "second"):
        model.set_adapter(name)
        assert torch.equal(logits(tasks.attach(base(), name)), logits(model.eval()))


def test_an_attached_model_is_written_with_the_same_bytes(tmp_path, two):
    model = two.attach(base(), "two")
    write_tasks(tmp_path / "again", {"two": model})
    write_tasks(tmp_path / "once", {"two": trained(seed=2)})
    assert (tmp_path / "again").read_bytes() == (tmp_path / "once").read_bytes()


def test_an_attached_model_holds_bits_and_no_latents(two):
    model = two.attach(base())
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 8
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any("petune" in name for name, _ in model.named_parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_a_model_of_another_shape_is_frozen_and_in_eval_mode_as_well(tmp_path):
    tasks = store(tmp_path, one=trained(), other=trained(r=5))
    model = tasks.attach(base())
    tasks.switch(model, "other")
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_switch_between_tasks_of_one_shape_writes_in_place(two):
    model = two.attach(base())
    before = {name: buffer.data_ptr() for name, buffer in model.named_buffers() if "petune" in name}
    two.switch(model, "two")
    assert before == {name: buffer.data_ptr() for name, buffer in model.named_buffers() if "petune" in name}
    assert len(before) == 16


def test_what_is_attached_can_be_disabled_merged_and_unloaded(tmp_path):
    models = {"one": trained(seed=1, task_type=None), "two": trained(seed=2, r=5, task_type=None)}
    tasks = store(tmp_path, **models)
    model = tasks.attach(base())
    tasks.switch(model, "two")
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
    wanted = logits(models["two"])
    assert torch.allclose(logits(copy.deepcopy(model).merge_and_unload()), wanted, atol=1e-6)
    assert torch.equal(logits(model.unload()), logits(base()))


def test_the_labels_are_those_of_the_task_or_of_the_base(tmp_path):
    named = trained(labels=5)
    named.config.id2label = dict(enumerate("abcde"))
    trained(seed=2).save_pretrained(tmp_path / "unnamed")  # PEFT alone writes no labels
    tasks, own = store(tmp_path, named=named, unnamed=tmp_path / "unnamed"), base()
    own.config.id2label = {0: "x", 1: "y", 2: "z"}
    model = tasks.attach(own)
    assert (model.config.id2label[4], own.num_labels) == ("e", 5)
    head = model.get_submodule("base_model.model.classifier.modules_to_save.default")
    assert head.out_features == len(head.weight) == 5
    assert model(**BERT.inputs(batch_size=3), labels=torch.tensor([4, 3, 0])).loss.isfinite()
    tasks.switch(model, "unnamed")
    assert (model.config.id2label, own.num_labels) == ({0: "x", 1: "y", 2: "z"}, 3)


def test_a_base_of_fewer_digits_computes_as_the_stored_model(tmp_path):
    models = {"one": trained(seed=1).to(torch.bfloat16), "two": trained(seed=2, r=5).to(torch.bfloat16)}
    tasks = store(tmp_path, one=trained(seed=1), two=trained(seed=2, r=5))
    model = tasks.attach(base().to(torch.bfloat16))
    for name in models:
        tasks.switch(model, name)
        assert logits(model).dtype == torch.bfloat16
        assert torch.allclose(logits(model), logits(models[name]), atol=0.05)


# --- bytes -----------------------------------------------------------------------------------------------------------


class _Counted:
    """A safetensors file that counts the bytes it hands out."""

    def __init__(self, file):
        self.file, self.handed_out = file, 0

    def __getattr__(self, name):
        return getattr(self.file, name)

    def get_tensor(self, key):
        tensor = self.file.get_tensor(key)
        self.handed_out += tensor.nbytes
        return tensor


def test_a_switch_reads_the_bytes_of_one_task(tmp_path):
    tasks = store(tmp_path, **{f"task {index}": trained(seed=index, r=3 + index % 2) for index in range(9)})
    model = tasks.attach(base())
    tasks._file = counted = _Counted(tasks._file)
    for name in ("task 4", "task 5", "task 7"):
        counted.handed_out = 0
        tasks.switch(model, name)
        assert counted.handed_out == tasks.bytes(name).total < (tmp_path / "tasks.safetensors").stat().st_size / 9


def test_fifty_tasks_cost_little_more_than_their_weights(tmp_path):
    model = trained(r=4)
    report = write_tasks(tmp_path / "tasks", ((f"task-{index:02}", model) for index in range(50)))
    assert report.size == (tmp_path / "tasks").stat().st_size
    assert report.overhead < 620  # four tensors a task, and its line of the index
    assert len(TaskStore(tmp_path / "tasks").names) == 50


def test_the_report_counts_what_lies_in_the_file(tmp_path):
    report = write_tasks(tmp_path / "tasks", {"one": trained(r=3), "seven": trained(r=7, labels=5)})
    one = report.tasks["one"]
    assert one.codes == 4 * 2 * 12  # four layers, A and B of 32 · 3 bits
    assert one.statistics == 4 * 2 * 8
    assert one.other == 4 * (3 * 32 + 3)
    assert one.total == one.codes + one.statistics + one.other
    assert report.share("one") + report.share("seven") == pytest.approx(1)
    with safe_open(tmp_path / "tasks", framework="pt") as file:
        payload = sum(file.get_tensor(key).nbytes for key in list(file.keys()))
    assert payload == sum(task.total for task in report.tasks.values())
    assert 2 * report.overhead == report.size - payload
    text = str(report)
    assert f"2 tasks, {report.size:,} bytes" in text
    assert "96 codes, 64 statistics, 396 heads and other tensors" in text
    assert TaskStore(tmp_path / "tasks").bytes("seven") == report.tasks["seven"]


def test_an_attached_model_is_saved_as_the_folder_it_came_from(tmp_path, two):
    model = two.attach(base())
    trained(seed=1).save_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path / "second").eval()), logits(model))
    save_adapter(model, tmp_path / "third")
    assert torch.equal(logits(load_adapter(tmp_path / "third", base()).eval()), logits(model))


def test_an_attached_model_computes_where_the_fused_operator_cannot(two):
    model, batch = two.attach(base()), BERT.inputs(batch_size=3)
    wanted = logits(model)
    with torch.no_grad():
        assert torch.allclose(model(**batch, adapter_names=["default"] * 3).logits, wanted, atol=1e-6)
    layer = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    layer.base_layer.register_forward_hook(lambda *_: None)
    assert torch.allclose(logits(model), wanted, atol=1e-6)


def test_a_model_whose_inside_is_compiled_is_stored_alike(tmp_path):
    model = trained(seed=1)
    write_tasks(tmp_path / "plain", {"one": model})
    model.base_model.model = torch.compile(model.base_model.model, backend="eager")
    write_tasks(tmp_path / "compiled", {"one": model})
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "compiled").read_bytes()
