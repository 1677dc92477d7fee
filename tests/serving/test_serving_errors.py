"""A server that is asked for what it cannot do says so, and answers the next call."""

import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from petune import BiAdapterConfig, BiLoraConfig
from petune.export import TaskStore, save_adapter, write_tasks
from petune.serving import AdapterServer
from tests.families import FAMILIES
from tests.test_store import base, store, trained

BERT = FAMILIES["bert"]


@pytest.fixture
def two(tmp_path):
    return store(tmp_path, one=trained(seed=1), two=trained(seed=2, r=5))


def ask(server, *names, rows=None):
    return server.predict(BERT.inputs(batch_size=len(names) if rows is None else rows), names)


def works(server, name="one"):
    """Whether it still answers."""
    answer = ask(server, name, None)
    batch = BERT.inputs(batch_size=2)
    with torch.no_grad():
        wanted = server.store.attach(base(), name)(**batch).logits[0], base()(**batch).logits[1]
    return all(torch.allclose(*pair, atol=1e-5) for pair in zip(answer, wanted, strict=True))


def test_an_unknown_task_is_answered_with_the_closest(two):
    server = AdapterServer(base(), two)
    for request in (lambda: ask(server, "one", "tow"), lambda: server.activate(["tow"]), lambda: server.labels("tow")):
        with pytest.raises(ValueError, match=r"no task 'tow' among its 2; the closest is 'two'\."):
            request()
    assert (server.resident, server.loads) == ([], 0)
    assert works(server)


@pytest.mark.parametrize(("names", "rows"), [(["one"], 2), (["one", None, "two"], 2), ([], 2), ([], 0)])
def test_there_is_one_name_for_each_row(two, names, rows):
    server = AdapterServer(base(), two)
    message = f"adapter_names has {len(names)} entries for a batch of {rows} rows; pass one name for each row, None"
    with pytest.raises(ValueError, match=message):
        server.predict({"attention_mask": torch.ones(7, 3), "input_ids": torch.ones(rows, 3, dtype=torch.long)}, names)
    assert server.loads == 0
    assert works(server)


def test_labels_are_left_out(two):
    server = AdapterServer(base(), two)
    with pytest.raises(ValueError, match="gives answers and no loss; leave the labels out"):
        server.predict(BERT.inputs(batch_size=2, head="cls"), ["one", None])


def test_a_budget_that_is_too_small_loads_nothing(two):
    one, other = (two.bytes(name).total for name in two.names)
    server = AdapterServer(base(), two, budget_bytes=one)
    with pytest.raises(ValueError, match=rf"the task 'two' takes {other:,} bytes, and budget_bytes={one:,}; give the"):
        ask(server, "one", "two")
    assert (server.resident, server.loads) == ([], 0)
    server = AdapterServer(base(), two, budget_bytes=one + other - 1)
    both = rf"the 2 tasks of the batch take {one + other:,} bytes, and budget_bytes={one + other - 1:,}; .*fewer tasks"
    with pytest.raises(ValueError, match=both):
        ask(server, "one", "two", "one")
    assert (server.resident, server.loads) == ([], 0)
    assert works(server)
    assert works(server, "two")
    for budget in (0, -1):
        with pytest.raises(ValueError, match=f"budget_bytes={budget} is not positive; pass None for no limit"):
            AdapterServer(base(), two, budget_bytes=budget)


def damaged(tasks, name):
    """A copy of the store in which a bit of one task is another."""
    content = bytearray(tasks.path.read_bytes())
    codes = tasks.read(name).tensors["base_model.model.petune_bilora_bits"]
    content[content.rindex(bytes(codes.numpy())) + 4] ^= 1
    path = tasks.path.parent / "damaged"
    path.write_bytes(content)
    return path


def test_a_damaged_task_is_refused_by_name_and_the_others_go_on(two):
    server = AdapterServer(base(), damaged(two, "two"))
    for names in (["two"], ["one", "two", None]):
        with pytest.raises(ValueError, match="the task 'two' is damaged: it is not what was written; copy or write"):
            ask(server, *names)
    assert server.resident == ["one"]
    assert works(server)


def test_a_task_that_made_room_for_a_call_that_failed_is_let_go(tmp_path):
    tasks = store(tmp_path, **{name: trained(seed=seed) for seed, name in enumerate(("one", "two", "three", "bad"))})
    server = AdapterServer(base(), damaged(tasks, "bad"), budget_bytes=2 * tasks.bytes("one").total)
    ask(server, "one", "two")
    with pytest.raises(ValueError, match="the task 'bad' is damaged"):
        ask(server, "three", "bad")
    assert server.resident == ["two", "three"]
    assert list(server._active) == ["two"]  # whose views hold its memory
    assert works(server)


def test_a_method_that_is_no_low_rank_update_is_refused(tmp_path):
    bottleneck = get_peft_model(base(), BiAdapterConfig(r=3, init_weights=False))
    server = AdapterServer(base(), store(tmp_path, one=trained(seed=1), other=bottleneck))
    with pytest.raises(TypeError, match="task 'other' is an adapter of BiAdapterConfig, which is no low-rank update"):
        ask(server, "one", "other")
    assert works(server)


def test_a_store_of_another_base_is_refused(tmp_path):
    far = get_peft_model(base(seed=8), BiLoraConfig(r=3))
    tasks = store(tmp_path, one=trained(seed=1), far=far)
    server = AdapterServer(base(), tasks)
    assert works(server)  # its config is known now, and "far" has the same layout
    with pytest.raises(ValueError, match=r"the task 'far': the adapter was made for .* \(different weights\)"):
        ask(server, "far")
    with pytest.raises(ValueError, match=r"the task 'one': the adapter was made for .* \(different weights\)"):
        ask(AdapterServer(base(seed=8), tasks), "one")
    assert works(server)


def test_a_base_that_carries_an_adapter_and_one_on_two_devices_are_refused(two):
    for taken in (trained(), trained().get_base_model(), two.attach(base())):
        with pytest.raises(TypeError, match="already carries an adapter; pass AdapterServer the base model"):
            AdapterServer(taken, two)
    split = base()
    split.classifier.to("meta")
    with pytest.raises(ValueError, match=r"the base is on .*, and tasks are kept on one device; move it"):
        AdapterServer(split, two)


def test_what_is_no_store_and_a_task_with_the_name_of_the_base_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no task store .*nowhere; pass a file that write_tasks wrote"):
        AdapterServer(base(), tmp_path / "nowhere")
    write_tasks(tmp_path / "tasks", {"__base__": trained()})
    with pytest.raises(ValueError, match="has a task '__base__', the name of the base alone; write it with another"):
        AdapterServer(base(), tmp_path / "tasks")


def changed(tmp_path, model, change):
    """A folder of the model's adapter with other tensors."""
    model.save_pretrained(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "bad" / "adapter_model.safetensors")
    return store(tmp_path, one=tmp_path / "good", bad=tmp_path / "bad")


HEAD, BLOB = "base_model.model.classifier.weight", "base_model.model.petune_bilora_bits"
CHANGES = {
    "a tensor less": (lambda tensors: tensors.pop(HEAD), "(lacks|needs).*classifier.weight"),
    "a tensor more": (lambda tensors: tensors.update({HEAD + "s": torch.ones(3)}), "has .*classifier.weights"),
    "a wide head": (lambda tensors: tensors.update({HEAD: torch.ones(3, 33)}), "stored with the shape"),
    "statistics cut": (
        lambda tensors: tensors.update({BLOB.replace("bits", "stats"): torch.ones(7, 2)}),
        "packed tensor has 96 bytes and 7 rows of statistics, expected 96 and 8",
    ),
    "codes cut": (lambda tensors: tensors.update({BLOB: tensors[BLOB][1:].clone()}), "has 95 bytes .* expected 96"),
}


@pytest.mark.parametrize("first", ["bad", "one"])
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_task_that_does_not_fit_is_refused_before_and_after_one_that_does(tmp_path, change, message, first):
    server = AdapterServer(base(), changed(tmp_path, trained(seed=1), change))
    if first == "one":
        assert works(server)
    with pytest.raises(ValueError, match=f"the task 'bad' cannot be (served|put on the model): .*{message}"):
        ask(server, "one", "bad")
    assert works(server)


def test_a_call_that_fails_in_the_model_leaves_the_server_usable(two):
    server = AdapterServer(base(), two)
    with pytest.raises(IndexError):
        server.predict({"input_ids": torch.full((2, 3), 1_000)}, ["one", "two"])
    assert server._current.batch is None
    assert works(server)


def test_an_output_without_logits_is_refused(tmp_path, two):
    class Pairs(type(base())):
        def forward(self, **inputs):
            return super().forward(**inputs).logits, 0

    with pytest.raises(ValueError, match=r"the model gives tuple, and neither logits nor last_hidden_state"):
        ask(AdapterServer(Pairs(base().config).eval(), store_without_fingerprint(tmp_path)), None)


def store_without_fingerprint(folder):
    trained(seed=1).save_pretrained(folder / "one")
    return store(folder, one=folder / "one")


def test_a_module_that_gives_no_tensor_is_not_joined(tmp_path):
    fields = {"task_type": None, "target_modules": ["layer.0.attention.self.query"]}
    whole = trained(seed=1, modules_to_save=["layer.1.attention"], **fields)
    server = AdapterServer(base(), store(tmp_path, one=trained(seed=2), whole=whole))
    with pytest.raises(TypeError, match=r"layer\.1\.attention gives a tuple, and rows of several tasks are joined of"):
        ask(server, "whole", None)
    assert works(server)


def test_a_layer_that_sees_other_rows_than_the_batch_is_refused(tmp_path):
    class Once(type(base())):
        """A model whose classifier sees one row more than the batch has."""

        def forward(self, **inputs):
            hidden = self.bert(**inputs).pooler_output
            return self.classifier(torch.cat([hidden, hidden[:1]]))[:-1]

    model = Once(base().config).eval()
    server = AdapterServer(model, store_without_fingerprint(tmp_path))
    with pytest.raises(
        ValueError, match="classifier is given 3 rows in a batch of 2, and which task each takes is not"
    ):
        ask(server, "one", None)
    assert len(ask(server, None, None)) == 2


def test_a_store_that_is_open_is_taken_as_it_is(two):
    assert AdapterServer(base(), two).store is two
    assert isinstance(AdapterServer(base(), str(two.path)).store, TaskStore)
    assert isinstance(AdapterServer(base(), two.path).store, TaskStore)


# --- folders ---------------------------------------------------------------------------------------------------------

LORAS = {
    "dora": ({"use_dora": True}, "is a DoraLinearVariant"),
    "bias": ({"lora_bias": True}, r"lora_bias=True"),
    "embedding": ({"target_modules": ["word_embeddings"]}, "it is peft's Embedding"),
    "tokens": ({"trainable_token_indices": [3, 4]}, "it is peft's TrainableTokensLayer"),
}


@pytest.mark.parametrize(("fields", "message"), LORAS.values(), ids=LORAS)
def test_a_lora_of_more_than_two_matrices_is_refused(tmp_path, two, fields, message):
    get_peft_model(base(), LoraConfig(task_type="SEQ_CLS", **fields)).save_pretrained(tmp_path / "lora")
    server = AdapterServer(base(), two)
    server.add("lora", tmp_path / "lora")
    with pytest.raises(
        ValueError, match=rf"lora: bert.* more than a LoRA of two matrices \(.*{message}.*; serve the ada"
    ):
        ask(server, "one", "lora")
    assert works(server)


def test_a_folder_that_cannot_be_served_is_refused_at_once(tmp_path, two):
    server = AdapterServer(base(), two)
    get_peft_model(base(), LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "lora")
    for name in ("one", "__base__"):
        with pytest.raises(ValueError, match=f"the name '{name}' is taken; choose another"):
            server.add(name, tmp_path / "lora")
    trained().save_pretrained(tmp_path / "packed")
    with pytest.raises(
        TypeError, match="is an adapter of BiLoraConfig, and beside a store's tasks only LoRA is served"
    ):
        server.add("packed", tmp_path / "packed")
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        server.add("nowhere", tmp_path / "nowhere")
    config = tmp_path / "lora" / "adapter_config.json"
    before = config.read_text()
    for field in ('"init_lora_weights": "pissa"', '"layer_replication": [[0, 2]]', '"bias": "all"'):
        name = field.split(":")[0]
        config.write_text(re.sub(rf'{name}: "?\w+"?', field, before))
        with pytest.raises(ValueError, match="which changes the base too; serve the adapter on a base of its own"):
            server.add("lora", tmp_path / "lora")
    assert server.names == ["one", "two"]
    assert works(server)


def test_a_folder_that_was_damaged_since_it_was_added_is_refused(tmp_path, two):
    save_adapter(get_peft_model(base(), LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)), tmp_path / "lora")
    server, weights = AdapterServer(base(), two), tmp_path / "lora" / "adapter_model.safetensors"
    server.add("lora", tmp_path / "lora")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: it is not the file that was exported"):
        ask(server, "one", "lora")
    assert works(server)


def test_a_lora_of_another_base_is_refused(tmp_path, two):
    save_adapter(
        get_peft_model(base(seed=8), LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)), tmp_path / "far"
    )
    get_peft_model(FAMILIES["vit"].build(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "vit")
    server = AdapterServer(base(), two)
    server.add("far", tmp_path / "far")
    server.add("vit", tmp_path / "vit")
    with pytest.raises(ValueError, match=r"far: the adapter was made for .* \(different weights\)"):
        ask(server, "far")
    with pytest.raises(ValueError, match="q_proj"):
        ask(server, "vit")
    assert works(server)
