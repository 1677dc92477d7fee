"""A quantised base in the tasks and on the command line: loaded, trained, recorded, loaded again; or refused."""

import importlib.util
import json

import pytest
import torch
import yaml
from peft.tuners.lora import LoraLayer
from torch import nn

import petune
from petune.adapters.pat import PatConfig
from petune.cli import main
from petune.cli.estimate import estimate_task
from petune.fsdp2 import check_shardable
from petune.tasks import TextClassification
from petune.tasks.quantization import quantization_config
from tests.quantised.bases import BASES, SIZES
from tests.tasks import tiny

LABELS = ["low", "high"]
FORMS = {base.name: base.library for base in BASES if base.device == "cpu" and base.name != "hqq"}


@pytest.fixture
def path(tmp_path):
    return tiny.save_body(tmp_path / "base")


@pytest.fixture(params=FORMS)
def form(request):
    pytest.importorskip(FORMS[request.param], reason=f"{FORMS[request.param]} is not installed")
    return request.param


def task_for(path, form, **options):
    return TextClassification(path, labels=LABELS, quantization=form, **options)


def test_the_linears_of_the_blocks_are_quantised_and_nothing_else(path, form):
    task = task_for(path, form)
    task.build()
    base = task.model.get_base_model()
    plain = tiny.classifier(num_labels=2)
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            found = base.get_submodule(name)
            found = found.get_base_layer() if isinstance(found, LoraLayer) else found
            is_plain = type(found) is nn.Linear and type(found.weight) is nn.Parameter
            is_plain |= hasattr(found, "modules_to_save")
            assert is_plain == ("encoder.layer" not in name), name


def test_a_run_on_it_learns_with_checkpointed_blocks(tmp_path, path, form):
    task = task_for(path, form, learning_rate=1e-2, gradient_checkpointing=True)
    trainer, held_out = tiny.trainer(tmp_path, max_epochs=4), tiny.labelled(60, seed=1)
    trainer.fit(task, tiny.labelled(160), held_out)
    assert trainer.callback_metrics["val/accuracy"] > 0.8  # always the larger class: 0.533


def test_norms_and_embeddings_of_a_half_precision_base_go_to_float32_beside_bitsandbytes(path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    task = task_for(path, "nf4", dtype="bfloat16")
    task.build()
    assert {p.dtype for name, p in task.model.named_parameters() if "Norm" in name} == {torch.float32}
    assert (
        task.model.get_base_model().bert.encoder.layer[0].attention.self.key.base_layer.compute_dtype == torch.bfloat16
    )
    loss = task.training_step(next(iter(tiny.labelled(8))), 0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.requires_grad)


@pytest.mark.parametrize("form", ["nf4", "int8_weight_only"])
def test_predict_loads_the_base_as_fit_did(tmp_path, path, form):
    pytest.importorskip(FORMS[form], reason=f"{FORMS[form]} is not installed")
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"w{number} w{number + 1},{number % 2}\n" for number in range(24)))
    fit = ["fit", "-c", "text_classification", "-c", "bilora", f"--model.model={path}", f"--data.train_file={rows}"]
    run = [
        f"--model.quantization={form}",
        "--data.max_length=8",
        "--trainer.max_steps=2",
        f"--output={tmp_path / 'run'}",
    ]
    assert main([*fit, *run]) == 0
    adapter = tmp_path / "run" / "adapter"
    written = yaml.safe_load((adapter / "petune.yaml").read_text())
    assert written["config"]["model"]["init_args"]["quantization"] == form
    predict = ["predict", "--adapter", str(adapter), "--input", str(rows), "--output", str(tmp_path / "out.jsonl")]
    assert main(predict) == 0
    found = [json.loads(line)["probabilities"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    loaded = petune.load_adapter(adapter).eval()
    query = loaded.get_base_model().bert.encoder.layer[0].attention.self.query.get_base_layer()
    assert type(query) is not nn.Linear or type(query.weight) is not nn.Parameter
    tokens = tiny.tokenizer()(["w0 w1", "w1 w2"], return_tensors="pt")
    with torch.no_grad():
        expected = loaded(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits.softmax(-1)
    shown = [list(row.values()) if isinstance(row, dict) else row for row in found[:2]]
    torch.testing.assert_close(torch.tensor(shown), expected, rtol=1e-3, atol=1e-3)
    plain = petune.load_adapter(adapter, quantization_config=None)
    assert type(plain.get_base_model().bert.encoder.layer[0].attention.self.key.weight) is nn.Parameter


def test_the_estimate_counts_the_weights_as_they_will_be_stored(tmp_path, form):
    path = tiny.save_body(tmp_path / "large", **SIZES)
    plain = estimate_task(TextClassification(path, labels=LABELS), batch_size=2, tokens=8)
    small = estimate_task(task_for(path, form), batch_size=2, tokens=8)
    linears = SIZES["num_hidden_layers"] * (4 * 128 * 128 + 2 * 128 * 256)
    bits = {"nf4": 4.5, "fp4": 4.5, "int8": 8, "int8_weight_only": 8}[form]
    assert plain.weight_bytes - small.weight_bytes == linears * (32 - bits) / 8
    assert plain.trainable == small.trainable


def test_all_linear_finds_layers_that_are_no_nn_linear():
    pytest.importorskip("hqq", reason="hqq is not installed")
    model = tiny.classifier(num_labels=2, **SIZES)
    from tests.quantised.bases import with_hqq

    task = TextClassification(with_hqq(model), labels=LABELS)
    task.build()
    layers = [name for name, module in task.model.named_modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 12


# ---- refused


def test_a_library_that_is_missing_is_named(path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(
        ImportError, match=r"quantization=nf4 needs bitsandbytes, .*; run pip install bitsandbytes, or"
    ):
        task_for(path, "nf4").build()


def test_training_all_of_a_frozen_base_is_refused(path):
    with pytest.raises(ValueError, match="quantization=nf4 freezes the base's weights, which train=all trains; use"):
        task_for(path, "nf4", train="all")


def test_a_model_that_is_loaded_already_is_refused():
    with pytest.raises(
        ValueError, match=r"quantization=nf4 .* a BertForSequenceClassification was given; load it with"
    ):
        TextClassification(tiny.classifier(), quantization="nf4")


def test_a_method_of_float_weights_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="quantization=int8 leaves no float weights, with which PatConfig computes"):
        task_for("nowhere", "int8", adapter=PatConfig())


@pytest.mark.parametrize(("form", "family"), [("int8_weight_only", "gpt2"), ("int4_weight_only", "bert")])
def test_blocks_without_a_layer_that_can_be_quantised_are_refused(form, family):
    pytest.importorskip("torchao", reason="torchao is not installed")
    auto_class = TextClassification.auto_class
    with pytest.raises(
        ValueError, match=rf"quantization={form} quantises nn\.Linear .*have none; use one of nf4, fp4, int8"
    ):
        quantization_config(form, auto_class, tiny.config(family, num_labels=2), "auto")


def test_fsdp2_refuses_it(path):
    with pytest.raises(ValueError, match="the base is quantised, and fsdp2 cuts up float weights; use strategy: ddp"):
        check_shardable(task_for(path, "nf4"))
