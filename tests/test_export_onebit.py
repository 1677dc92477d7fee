"""Adapters of few bits leave as they came: packed folders, plain LoRAs and merged models with the same outputs."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from petune import BiAdapterConfig, BiLoraConfig
from petune.convert import _alpha
from petune.export import TaskStore, export_lora, export_merged, load_adapter, load_run, save_adapter, write_tasks
from tests import fresh
from tests.families import FAMILIES

HEAD = {"task_type": None, "bi_head": "classifier"}
QUANTISED = {"1 bit": {}, "2 bits": {"bits": 2}, "rows": {"bits": 4, "granularity": "row"}, "32 bits": {"bits": 32}}


def base(family="bert", seed=0):
    return FAMILIES[family].build(seed=seed, head="cls")


def batch(family="bert"):
    return {k: v for k, v in FAMILIES[family].inputs(batch_size=3).items() if k != "labels"}


def logits(model, family="bert"):
    with torch.no_grad():
        return model(**batch(family)).logits


def trained(family="bert", model=None, **fields):
    """A model that has taken steps with a rate at which bits flip."""
    torch.manual_seed(1)
    fields = {"r": 3, "task_type": "SEQ_CLS" if family == "bert" else None, **fields}
    model = get_peft_model(model or base(family), BiLoraConfig(**fields))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(**batch(family), labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def named_base(tmp_path):
    """The folder of a base, for other processes."""
    base().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# --- a plain LoRA ----------------------------------------------------------------------------------------------------

ALONE = """
import sys, torch, transformers
from pathlib import Path
from peft import PeftModel
for case in sorted(path.parent for path in Path(sys.argv[1]).glob("*/batch")):
    inputs = torch.load(case / "batch")
    kind = "ImageClassification" if "pixel_values" in inputs else "SequenceClassification"
    auto = getattr(transformers, "AutoModelFor" + kind)
    if (case / "merged").exists():
        model = auto.from_pretrained(case / "merged").eval()
    else:
        model = PeftModel.from_pretrained(auto.from_pretrained(case / "base"), case / "lora").eval()
    with torch.no_grad():
        torch.save(model(**inputs).logits, case / "logits")
assert not any(name.split(".")[0] == "petune" for name in sys.modules)
"""


def run_alone(folder):
    """Have a process that knows transformers and peft, and not PETune, write the logits of every case."""
    done = fresh.run(ALONE, folder, cwd=folder)
    assert done.code == 0, done.errors


LORAS = {
    "default": ("bert", {}),
    "bits and rows": ("bert", {"bits": 2, "granularity": "row", "scale": 0.7, "r": 7}),
    "full precision": ("bert", {"bits": 32}),
    "quantised head": ("bert", HEAD),
    "fused and transposed": ("gpt2", {}),
    "all of a fused layer": ("gpt2", {"fused_parts": "all"}),
    "every linear": ("gpt2", {"target_modules": "all-linear", "r": 2}),
    "images": ("vit", {**HEAD, "scale": 10.0}),
}


def test_peft_alone_computes_what_was_trained(tmp_path):
    wanted = {}
    for name, (family, fields) in LORAS.items():
        model = trained(family, **fields)
        wanted[name] = logits(model, family)
        assert export_lora(model, tmp_path / name / "lora").relative_error == 0
        assert torch.equal(logits(model, family), wanted[name])  # it was left as it is
        base(family).save_pretrained(tmp_path / name / "base")
        torch.save(batch(family), tmp_path / name / "batch")
    run_alone(tmp_path)
    for name, (family, _) in LORAS.items():
        found = torch.load(tmp_path / name / "logits")
        assert (found - logits(base(family), family)).abs().max() > 1e-3, name
        assert (found - wanted[name]).abs().max() < 1e-6, name


def test_the_lora_has_the_factors_and_their_scale(tmp_path):
    model = trained(scale=0.7, r=5)
    export_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["use_rslora"]) == ("LORA", 5, False)
    assert config["lora_alpha"] / config["r"] == 0.7
    assert config["modules_to_save"] == ["classifier", "score"]
    assert config["rank_pattern"] == {}
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    path = "base_model.model.bert.encoder.layer.0.attention.self.query"
    factors = model.get_submodule(path).factors("default")
    assert torch.equal(written[f"{path}.lora_A.weight"], factors.a)
    assert torch.equal(written[f"{path}.lora_B.weight"], factors.b)
    assert len(factors.a.unique()) == len(factors.b.unique()) == 2


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.7, 1 / 3, 100.0, 1.9999999999999998])
@pytest.mark.parametrize("rank", [1, 3, 32])
def test_alpha_gives_the_scale_to_the_bit(scale, rank):
    alpha = _alpha(scale, rank)
    assert alpha / rank == pytest.approx(scale, rel=3e-16, abs=0)
    assert torch.tensor(alpha / rank, dtype=torch.float32) == torch.tensor(scale, dtype=torch.float32)
    assert isinstance(_alpha(1.0, rank), int)


def test_layers_of_other_rank_and_scale_are_written_as_patterns(tmp_path):
    model = get_peft_model(base(), BiLoraConfig(r=3, init_weights=False, target_modules=["query", "value"]))
    layer = model.get_submodule("base_model.model.bert.encoder.layer.1.attention.self.value")
    layer.update_layer("default", BiLoraConfig(r=6, scale=0.25, init_weights=False))
    wanted = logits(model.eval())
    assert export_lora(model, tmp_path / "lora").relative_error == 0
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert config.rank_pattern == {"^bert.encoder.layer.1.attention.self.value": 6}
    assert config.alpha_pattern == {"^bert.encoder.layer.1.attention.self.value": 1.5}
    assert (logits(PeftModel.from_pretrained(base(), tmp_path / "lora").eval()) - wanted).abs().max() < 1e-6


@pytest.mark.filterwarnings("error:fan_in_fan_out")
def test_a_transposed_base_is_declared_as_one(tmp_path):
    export_lora(trained("gpt2"), tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_a_rank_asks_for_an_approximation(tmp_path):
    model = trained(r=6)
    assert export_lora(model, tmp_path / "lora", rank=2).relative_error > 0.01
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 2
    assert export_lora(model, tmp_path / "all", rank=6).relative_error < 1e-5


def test_folders_and_attached_tasks_are_exported_as_well(tmp_path, named_base):
    model = trained(model=AutoModelForSequenceClassification.from_pretrained(named_base))
    save_adapter(model, tmp_path / "adapter")
    write_tasks(tmp_path / "tasks", {"one": model})
    attached = TaskStore(tmp_path / "tasks").attach(base())
    for source in (tmp_path / "adapter", attached):
        assert export_lora(source, tmp_path / "lora").relative_error == 0
        plain = PeftModel.from_pretrained(base(), tmp_path / "lora").eval()
        assert (logits(plain) - logits(model)).abs().max() < 1e-6


# --- merged ----------------------------------------------------------------------------------------------------------


MERGED = {
    "bert": ("bert", {}),
    "bert, quantised head": ("bert", {"bi_head": "classifier"}),
    "gpt2": ("gpt2", {}),
    "gpt2, quantised head": ("gpt2", {"bi_head": "score"}),  # the model's own has no bias, the others' have one
    "vit, quantised head": ("vit", {"bi_head": "classifier"}),
}


def test_transformers_alone_computes_what_was_merged(tmp_path):
    wanted = {}
    for name, (family, fields) in MERGED.items():
        model = trained(family, task_type=None, **fields)
        wanted[name] = logits(model, family)
        export_merged(model, tmp_path / name / "merged")
        assert torch.equal(logits(model, family), wanted[name])
        base(family).save_pretrained(tmp_path / "base")
        stock, merged = (
            load_file(path / "model.safetensors") for path in (tmp_path / "base", tmp_path / name / "merged")
        )
        assert merged.keys() == stock.keys(), name  # what is not there is started anew, at random
        torch.save(batch(family), tmp_path / name / "batch")
    run_alone(tmp_path)
    for name in MERGED:
        assert (torch.load(tmp_path / name / "logits") - wanted[name]).abs().max() < 1e-6, name


def test_the_bottleneck_adapter_is_neither_a_lora_nor_merged(tmp_path):
    model = get_peft_model(base(), BiAdapterConfig(r=3, init_weights=False)).eval()
    with pytest.raises(
        TypeError, match=r"layers of PETUNE_BIADAPTER do not support LoRA conversion: .*; keep the adapter"
    ):
        export_lora(model, tmp_path / "lora")
    with pytest.raises((NotImplementedError, ValueError), match="cannot be merged"):
        export_merged(model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    report = save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(tmp_path / "adapter", base()).eval()), logits(model))
    assert report.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


# --- packed folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["packed", "latent"])
@pytest.mark.parametrize("fields", [*QUANTISED.values(), HEAD], ids=[*QUANTISED, "quantised head"])
def test_what_is_loaded_is_what_was_trained_bit_for_bit(tmp_path, fields, storage):
    model = trained(**fields, storage=storage)
    report = save_adapter(model, tmp_path / "adapter")
    assert report.dead == ()
    loaded = load_adapter(tmp_path / "adapter", base()).eval()
    assert torch.equal(logits(loaded), logits(model))
    save_adapter(loaded, tmp_path / "again")
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("fields", [*QUANTISED.values(), {"storage": "latent"}], ids=[*QUANTISED, "latent"])
def test_an_untrained_adapter_is_reported_dead(tmp_path, fields):
    model = get_peft_model(base(), BiLoraConfig(task_type="SEQ_CLS", r=3, **fields))
    with pytest.warns(UserWarning, match="petune_bilora_b is zero in every layer"):
        report = save_adapter(model, tmp_path / "adapter")
    assert report.dead == ("petune_bilora_b",)
    with pytest.warns(UserWarning, match="petune_bilora_b is zero in every layer"):  # nor does a round trip revive it
        save_adapter(load_adapter(tmp_path / "adapter", base()), tmp_path / "again")


def test_one_layer_that_was_trained_is_alive(tmp_path):
    model = get_peft_model(base(), BiLoraConfig(task_type="SEQ_CLS", r=3))
    layer = model.get_submodule("base_model.model.bert.encoder.layer.1.attention.self.value")
    nn.init.normal_(layer.petune_bilora_b["default"].weight)
    assert save_adapter(model, tmp_path / "adapter").dead == ()


@pytest.mark.parametrize("storage", ["packed", "latent"])
@pytest.mark.parametrize("fields", [*QUANTISED.values(), HEAD], ids=[*QUANTISED, "quantised head"])
def test_the_report_and_the_card_count_weights_and_not_bytes(tmp_path, fields, storage):
    model = trained(**fields, storage=storage)
    report = save_adapter(model, tmp_path / "adapter")
    assert report.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert load_run(tmp_path / "adapter").adapter["parameters"] == report.parameters
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"({report.parameters:,} parameters in the adapter)" in card
    assert "petune_bilora" in card


def test_a_folder_of_transformers_own_methods_is_loaded(tmp_path):
    torch.manual_seed(1)
    native = base()
    native.add_adapter(BiLoraConfig(r=3, init_weights=False))
    native.save_pretrained(tmp_path / "native")
    assert torch.equal(logits(load_adapter(tmp_path / "native", base()).eval()), logits(native.eval()))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_adapter(trained(), tmp_path / "adapter")
    (tmp_path / "adapter" / "petune.yaml").unlink()  # with it, the hash of the file and of the base come first
    return tmp_path / "adapter"


BLOB, TABLE = (f"base_model.model.petune_bilora_{part}" for part in ("bits", "stats"))
BROKEN = {
    "cut blob": (
        {BLOB: lambda blob: blob[:-1].clone()},
        "packed tensor has 95 bytes .* expected 96 .*it is cut short",
    ),
    "long blob": ({BLOB: lambda blob: torch.cat([blob, blob])}, "packed tensor has 192 bytes .* expected 96"),
    "cut table": (
        {TABLE: lambda table: table[:-1].clone()},
        "packed tensor has 96 bytes and 7 rows of statistics, expected 96 and 8",
    ),
    "not finite": ({TABLE: lambda table: table * float("nan")}, "statistics are not finite; it was damaged"),
    "no blob": ({BLOB: None}, "lacks"),
    "no head": (
        {"base_model.model.classifier.weight": None},
        r"lacks base_model\.model\.classifier\.weight; export it again",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BROKEN.values(), ids=BROKEN)
def test_a_damaged_packed_adapter_is_refused(folder, changes, message):
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, change in changes.items():
        tensor = tensors.pop(key)
        if change is not None:
            tensors[key] = change(tensor)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(folder, base())
    assert "\n" not in str(caught.value)


def test_another_base_is_refused(folder):
    config = base().config
    config.hidden_size = 64
    with pytest.raises(
        ValueError, match=r"adapter was made for model_type=bert, hidden_size=32.* this model has .*64"
    ):
        load_adapter(folder, type(base())(config))


def test_a_latent_that_is_not_finite_is_not_saved_and_the_old_folder_stays(tmp_path):
    model = trained()
    save_adapter(model, tmp_path / "adapter")
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    next(p for name, p in model.named_parameters() if "petune_bilora_a" in name).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="contains non-finite values"):
        save_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_transformers_own_loader_refuses_a_packed_folder_and_takes_latents(tmp_path, named_base):
    for storage in ("packed", "latent"):
        model = trained(model=AutoModelForSequenceClassification.from_pretrained(named_base), storage=storage)
        save_adapter(model, tmp_path / storage)
        if storage == "packed":
            for load in (AutoModelForSequenceClassification.from_pretrained, base().load_adapter):
                with pytest.raises(ValueError, match="transformers' own loader cannot read a packed adapter; load it"):
                    load(tmp_path / storage)
        else:
            native = AutoModelForSequenceClassification.from_pretrained(tmp_path / storage)
            assert torch.equal(logits(native.eval()), logits(model))
