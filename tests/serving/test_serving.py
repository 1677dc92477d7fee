"""One model answers a batch whose rows take different tasks, as each of these tasks alone would."""

import threading

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from petune import BiLoraConfig
from petune.export import save_adapter
from petune.quantized.linear import PackedLinear
from petune.serving import AdapterServer
from petune.serving.layers import ServedLinear, ServedModule
from petune.serving.layout import Layout, Update
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES
from tests.test_store import _Counted, base, logits, store, trained

BERT = FAMILIES["bert"]


def alone(tasks, name, batch, family="bert"):
    """Logits of a batch whose rows all take one task."""
    model = base(family=family)
    model = model if name is None else tasks.attach(model, name)
    with torch.no_grad():
        return model(**batch).logits


def check(server, names, family="bert", dtype=torch.float32):
    batch = FAMILIES[family].inputs(batch_size=len(names))
    answers = server.predict(batch, names)
    assert len(answers) == len(names)
    for row, (name, answer) in enumerate(zip(names, answers, strict=True)):
        wanted = alone(server.store, None if name == "__base__" else name, batch, family)[row]
        assert answer.shape == wanted.shape, (row, name)
        assert relative_error(answer, wanted) < TOLERANCE[dtype], (row, name)
    return answers


# --- the answers -----------------------------------------------------------------------------------------------------

SHAPES = {
    "one bit": {"seed": 1},
    "the same again": {"seed": 2},
    "rank": {"seed": 3, "r": 5, "scale": 3.0},
    "four bits": {"seed": 4, "bits": 4, "r": 6},
    "a scale for each row": {"seed": 5, "bits": 2, "granularity": "row"},
    "trained with dropout": {"seed": 6, "dropout": 0.5},
}
ROWS = ["four bits", None, "one bit", "rank", "one bit", "a scale for each row", "__base__", "the same again"]


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_every_row_is_answered_as_by_its_task_alone(tmp_path, family):
    tasks = store(tmp_path, **{name: trained(family=family, **fields) for name, fields in SHAPES.items()})
    server = AdapterServer(base(family=family), tasks)
    answers = check(server, [*ROWS, "trained with dropout"], family)
    assert not torch.allclose(answers[2], answers[7], atol=1e-2)
    check(server, ["rank"], family)
    check(server, [None, None], family)


def test_packed_factors_stay_packed(tmp_path, monkeypatch):
    server = AdapterServer(base(), store(tmp_path, one=trained(seed=1), two=trained(seed=2, bits=4, r=5)))
    monkeypatch.setattr(Update, "dense", lambda _: pytest.fail("was unpacked"))
    check(server, ["two", "one", None])


def test_float_factors_and_fused_parts_are_served_beside_packed_ones(tmp_path):
    fields = {"one": {}, "float": {"bits": 32, "seed": 2}, "whole": {"fused_parts": "all", "seed": 3, "r": 4}}
    tasks = store(tmp_path, **{name: trained(family="gpt2", **more) for name, more in fields.items()})
    server = AdapterServer(base(family="gpt2"), tasks)
    check(server, ["one", "whole", None, "float", "one"], "gpt2")  # "one" updates queries and values alone
    check(server, ["whole", None, "whole"], "gpt2")
    check(server, ["one", None], "gpt2")


def test_tasks_may_adapt_different_layers(tmp_path):
    fields = {"all": ["query", "key", "value", "dense"], "first": ["layer.0.attention.self.key"], "default": None}
    models = {name: trained(seed=len(name), target_modules=targets) for name, targets in fields.items()}
    server = AdapterServer(base(), store(tmp_path, **models))
    for names in (["first", None], ["default", "all", "first"], ["first", "default", None, "all", "default"]):
        check(server, names)


def test_a_base_without_a_head_answers_with_its_last_hidden_states(tmp_path):
    models, plain = {}, BERT.build()
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        models[name] = get_peft_model(BERT.build(), BiLoraConfig(r=3, init_weights=False)).eval()
    server, batch = AdapterServer(plain, store(tmp_path, **models)), BERT.inputs(batch_size=3)
    answers = server.predict(batch, ["two", None, "one"])
    with torch.no_grad():
        wanted = [model(**batch).last_hidden_state for model in (models["two"], plain, models["one"])]
    for row, answer in enumerate(answers):
        assert relative_error(answer, wanted[row][row]) < TOLERANCE[torch.float32]


class Mean(type(BERT.build())):
    """A model that returns no output of transformers' own."""

    def forward(self, **inputs):
        return super().forward(**inputs).last_hidden_state.mean(1)


def test_a_model_that_returns_a_tensor_is_answered_by_its_rows(tmp_path):
    torch.manual_seed(0)
    plain, batch = BERT.build(), BERT.inputs(batch_size=2)
    mean = Mean(plain.config).eval()
    mean.load_state_dict(plain.state_dict())
    one = get_peft_model(plain, BiLoraConfig(r=3, init_weights=False)).eval()
    answers = AdapterServer(mean, store(tmp_path, one=one)).predict(batch, [None, "one"])
    with torch.no_grad():
        wanted = [mean(**batch)[0], one(**batch).last_hidden_state.mean(1)[1]]
    for answer, row in zip(answers, wanted, strict=True):
        assert relative_error(answer, row) < TOLERANCE[torch.float32]


def test_a_base_of_fewer_digits_answers_to_its_precision(tmp_path):
    fields = {"one": {}, "two": {"seed": 2, "r": 5, "bits": 4}, "float": {"seed": 3, "bits": 32, "labels": 5}}
    tasks = store(tmp_path, **{name: trained(**more) for name, more in fields.items()})
    server, batch = AdapterServer(base().to(torch.bfloat16), tasks), BERT.inputs(batch_size=4)
    for names in (["one", "two", None, "two"], ["float", "two", None, "one"]):
        for row, (name, answer) in enumerate(zip(names, server.predict(batch, names), strict=True)):
            assert answer.dtype == torch.bfloat16
            assert torch.allclose(answer.float(), alone(tasks, name, batch)[row], atol=0.05)


def test_a_layer_that_the_operator_cannot_read_is_computed_task_by_task(tmp_path):
    tasks, own = store(tmp_path, one=trained(seed=1), two=trained(seed=2, r=5, scale=3.0)), base()
    for module in own.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_: None)
    check(AdapterServer(own, tasks), ["two", "one", None, "two"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_answers_as_the_cpu(tmp_path):
    tasks = store(tmp_path, **{name: trained(**fields) for name, fields in [*SHAPES.items(), *HEADS.items()]})
    batch, names = BERT.inputs(batch_size=9), [*ROWS, "quantised"]
    wanted = AdapterServer(base(), tasks).predict(batch, names)
    for row, answer in zip(wanted, AdapterServer(base().cuda(), tasks).predict(batch, names), strict=True):
        assert answer.is_cuda
        assert relative_error(answer.cpu(), row) < TOLERANCE[torch.float32]


# --- heads -----------------------------------------------------------------------------------------------------------

HEADS = {
    "five": {"seed": 1, "labels": 5},
    "three": {"seed": 2},
    "quantised": {"seed": 3, "task_type": None, "bi_head": "classifier", "labels": 4},
    "four quantised bits": {"seed": 4, "task_type": None, "bi_head": "classifier", "bits": 4},
    "the base's": {"seed": 5, "task_type": None},
    "a pooler": {"seed": 6, "modules_to_save": ["pooler"], "labels": 2},
}


def test_an_answer_has_the_labels_of_its_task(tmp_path):
    server = AdapterServer(base(), store(tmp_path, **{name: trained(**fields) for name, fields in HEADS.items()}))
    answers = check(server, ["five", "the base's", *HEADS, None, "quantised"])
    assert [len(answer) for answer in answers] == [5, 3, 5, 3, 4, 3, 3, 2, 3, 4]
    assert not any(answer.isnan().any() for answer in answers)
    for names in (["five", "five"], ["the base's", "a pooler"], [None, "three"], ["quantised", None]):
        check(server, names)


def test_quantised_heads_of_one_config_may_have_different_labels(tmp_path):
    for labels in (3, 5):
        fields = {"task_type": None, "bi_head": "classifier", "storage": "latent"}  # whose config has no layout
        trained(seed=labels, labels=labels, **fields).save_pretrained(tmp_path / str(labels))
    tasks = store(tmp_path, three=tmp_path / "3", five=tmp_path / "5")
    check(AdapterServer(base(), tasks), ["three", "five", None])


def nested(seed, labels=3, **fields):
    torch.manual_seed(seed)
    model = FAMILIES["roberta"].build(head="cls")
    model.classifier.out_proj = torch.nn.Linear(32, labels)
    model = get_peft_model(model, BiLoraConfig(r=3, init_weights=False, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize("order", [("inner", "whole", "adapted"), ("adapted", "whole", "inner")], ids="-".join)
def test_a_task_may_have_whole_what_another_one_changes_inside(tmp_path, order):
    models = {
        "inner": nested(1, 5, bi_head="classifier.out_proj"),
        "whole": nested(2, 4, modules_to_save=["classifier"]),
        "adapted": nested(3, target_modules=["query", "classifier.dense", "classifier.out_proj"]),
    }
    roberta, tasks = FAMILIES["roberta"], store(tmp_path, **models)
    server = AdapterServer(nested(3).unload(), tasks)
    names = [*order, None, "whole", "inner"]
    batch = roberta.inputs(batch_size=len(names))
    for asked in ([order[0]] * len(names), names):
        for row, (name, answer) in enumerate(zip(asked, server.predict(batch, asked), strict=True)):
            model = nested(3).unload() if name is None else tasks.attach(nested(3).unload(), name)
            with torch.no_grad():
                wanted = model(**batch).logits[row]
            assert answer.shape == wanted.shape
            assert relative_error(answer, wanted) < TOLERANCE[torch.float32], name


def test_one_task_may_adapt_the_layer_that_another_has_whole(tmp_path):
    models = {
        "whole": trained(seed=1, task_type=None, modules_to_save=["pooler.dense"]),
        "adapted": trained(seed=2, task_type=None, target_modules=["query", "pooler.dense"]),
    }
    for order in (["whole", "adapted"], ["adapted", "whole"]):
        server = AdapterServer(base(), store(tmp_path, **models))
        for names in (order[:1], [*order, None]):
            check(server, names)


def test_the_labels_are_those_of_the_task_or_of_the_base(tmp_path):
    named = trained(labels=5)
    named.config.id2label = dict(enumerate("abcde"))
    trained(seed=2).save_pretrained(tmp_path / "unnamed")
    own = base()
    own.config.id2label = {0: "x", 1: "y", 2: "z"}
    server = AdapterServer(own, store(tmp_path, named=named, unnamed=tmp_path / "unnamed"))
    assert server.names == ["named", "unnamed"]
    assert server.labels("named") == dict(enumerate("abcde"))
    assert server.labels("unnamed") == server.labels(None) == {0: "x", 1: "y", 2: "z"}


# --- float LoRA ------------------------------------------------------------------------------------------------------

LORAS = {
    "plain": {"r": 4},
    "five labels": {"r": 3, "labels": 5, "use_rslora": True},
    "several ranks": {
        "r": 2,
        "rank_pattern": {"layer.1.attention.self.query": 7},
        "target_modules": ["query", "dense"],
    },
    "conv1d": {"r": 4, "family": "gpt2", "task_type": None, "target_modules": ["c_attn", "c_proj"]},
}


def lora(seed=0, labels=3, family="bert", **fields):
    torch.manual_seed(seed)
    fields = {"task_type": "SEQ_CLS", "init_lora_weights": False, "lora_dropout": 0.3, **fields}
    model = get_peft_model(base(labels, family=family), LoraConfig(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize("name", LORAS)
@pytest.mark.parametrize("save", [save_adapter, PeftModel.save_pretrained], ids=["petune", "peft"])
def test_a_float_lora_is_served_beside_packed_tasks(tmp_path, name, save):
    family = LORAS[name].get("family", "bert")
    one, model = trained(seed=1, family=family), lora(seed=2, **LORAS[name])
    save(model, tmp_path / "lora")
    server = AdapterServer(base(family=family), store(tmp_path, one=one))
    server.add("lora", tmp_path / "lora")
    assert server.names == ["one", "lora"]
    batch, names = FAMILIES[family].inputs(batch_size=4), ["lora", "one", None, "lora"]
    wanted = [logits_of(each, batch)[row] for row, each in enumerate((model, one, base(family=family), model))]
    for answer, row in zip(server.predict(batch, names), wanted, strict=True):
        assert answer.shape == row.shape
        assert relative_error(answer, row) < TOLERANCE[torch.float32]
    named = model.config.id2label if save is save_adapter and family == "bert" else base().config.id2label
    assert server.labels("lora") == named


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_a_lora_that_was_evicted_is_read_from_its_folder_again(tmp_path):
    lora(seed=2, r=4).save_pretrained(tmp_path / "lora")
    tasks = store(tmp_path, one=trained(seed=1))
    size = (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size
    server = AdapterServer(base(), tasks, budget_bytes=size)
    server.add("lora", tmp_path / "lora")
    batch = BERT.inputs(batch_size=2)
    first = server.predict(batch, ["lora", None])
    assert server.resident_bytes == size
    check(server, ["one", None])
    assert server.resident == ["one"]
    assert torch.equal(server.predict(batch, ["lora", None])[0], first[0])
    assert (server.resident, server.loads, server.evictions) == (["lora"], 3, 2)


# --- what is resident ------------------------------------------------------------------------------------------------


@pytest.fixture
def nine(tmp_path):
    return store(tmp_path, **{f"task {index}": trained(seed=index, r=3 + index % 2) for index in range(9)})


def test_the_least_recently_used_task_makes_room(nine):
    size = {name: nine.bytes(name).total for name in nine.names}
    server = AdapterServer(base(), nine, budget_bytes=size["task 0"] + size["task 1"] + size["task 2"])
    check(server, ["task 0", "task 1", "task 2"])
    assert (server.resident, server.loads, server.evictions) == (["task 0", "task 1", "task 2"], 3, 0)
    check(server, ["task 0", None])
    assert server.resident == ["task 1", "task 2", "task 0"]
    check(server, ["task 4"])  # as large as those with r=3
    assert (server.resident, server.loads, server.evictions) == (["task 2", "task 0", "task 4"], 4, 1)
    check(server, ["task 1", "task 2"])  # the larger one takes the place of one of two: 2 is in the batch and stays
    assert server.resident == ["task 4", "task 1", "task 2"]
    assert server.resident_bytes == size["task 1"] + size["task 2"] + size["task 4"] <= server.budget_bytes
    check(server, ["task 1", "task 4", "task 2"])
    assert (server.loads, server.evictions) == (5, 2)


def test_without_a_budget_everything_stays_and_is_read_once(nine):
    nine._file = counted = _Counted(nine._file)
    server = AdapterServer(base(), nine)
    server.activate(nine.names[:1])  # the first of its config is read once more, for its layout
    server.activate(nine.names[1:2])
    counted.handed_out = 0
    for _ in range(3):
        server.activate(nine.names)
    assert counted.handed_out == sum(nine.bytes(name).total for name in nine.names[2:])
    assert server.resident_bytes == sum(nine.bytes(name).total for name in nine.names)
    assert (server.resident, server.loads, server.evictions) == (nine.names, 9, 0)


def test_a_batch_of_the_same_tasks_uses_the_same_views(nine, monkeypatch):
    server, made, original = AdapterServer(base(), nine), [], Layout.activate
    monkeypatch.setattr(Layout, "activate", lambda self, tensors: made.append(1) or original(self, tensors))
    for names in (["task 0", "task 1"], ["task 1", None], ["task 1", "task 2"], ["task 2", "task 1"]):
        server.predict(BERT.inputs(batch_size=2), names)
    assert len(made) == 3


def test_answers_take_no_gradient(nine):
    embeddings = torch.randn(2, 5, 32, requires_grad=True)
    answers = AdapterServer(base(), nine).predict({"inputs_embeds": embeddings}, ["task 0", None])
    assert not any(answer.requires_grad for answer in answers)


def test_a_task_costs_no_module(nine):
    server = AdapterServer(base(), nine)
    server.activate(["task 0"])
    before = [type(module) for module in server._model.modules()]
    assert before.count(ServedLinear) == 4
    assert before.count(ServedModule) == 1
    server.activate(nine.names)
    assert [type(module) for module in server._model.modules()] == before
    assert not any(isinstance(module, PackedLinear) for module in server._model.modules())


# --- the base, and threads -------------------------------------------------------------------------------------------


def test_the_base_is_not_changed_and_its_memory_is_shared(nine):
    own = base().train()
    wanted, modules = logits(base()), [(name, type(module)) for name, module in own.named_modules()]
    with AdapterServer(own, nine) as server:
        assert {p.data_ptr() for p in server._model.parameters()} == {p.data_ptr() for p in own.parameters()}
        check(server, ["task 0", None])
        assert own.training
        assert all(parameter.requires_grad for parameter in own.parameters())
    assert [(name, type(module)) for name, module in own.named_modules()] == modules
    assert torch.equal(logits(own.eval()), wanted)
    with pytest.raises(RuntimeError, match="the AdapterServer is closed; make another one"):
        server.predict(BERT.inputs(batch_size=1), [None])
    assert (server.resident, server.resident_bytes) == ([], 0)
    server.close()


def test_threads_get_the_answers_of_their_own_rows(nine):
    server = AdapterServer(base(), nine, budget_bytes=3 * nine.bytes("task 1").total)
    batch = BERT.inputs(batch_size=2)
    wanted = {name: alone(nine, name, batch) for name in nine.names}
    wrong, start = [], threading.Barrier(4)

    def ask(thread):
        start.wait()
        for step in range(12):
            names = [nine.names[(thread + step) % 9], nine.names[(3 * thread + 2 * step) % 9]]
            answers = server.predict(batch, names)
            for row, (name, answer) in enumerate(zip(names, answers, strict=True)):
                if not relative_error(answer, wanted[name][row]) < TOLERANCE[torch.float32]:
                    wrong.append((thread, step, name))

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert server.evictions > 9
    assert server.resident_bytes <= server.budget_bytes
