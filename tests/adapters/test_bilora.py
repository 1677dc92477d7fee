"""Bi-LoRA: the paper's formula, its bytes, and a packed checkpoint that is exact."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, ViTConfig, ViTModel

import petune.low_rank
from petune import BiLoraConfig
from petune.adapters.onebit import BiLoraLayer
from petune.quantized.linear import QuantizedLinear
from tests.adapters.harness import assert_same_tensors, build, inputs, output, snapshot, train
from tests.conftest import relative_error

WEIGHTS = "adapter_model.safetensors"
FEW = [1, 2, 4, 8]


def bilora(family: str = "bert", *, dropout: float = 0.0, **fields: object) -> PeftModel:
    """In eval mode, with an update that shows."""
    torch.manual_seed(1)
    start = {"init_weights": False, "r": 4, **fields}
    return get_peft_model(build(family), BiLoraConfig(dropout=dropout, **start)).eval()


def layers(model: nn.Module) -> list[BiLoraLayer]:
    return [module for module in model.modules() if isinstance(module, BiLoraLayer)]


def loaded(folder: Path, family: str = "bert", **options: object) -> PeftModel:
    return PeftModel.from_pretrained(build(family), folder, **options).eval()


# --------------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize("bits", [*FEW, 32])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_layer_is_the_papers_formula(family, bits):
    layer = layers(bilora(family, bits=bits, scale=3.0, fused_parts="all"))[0]
    a, b = layer.petune_bilora_a["default"].quantized(), layer.petune_bilora_b["default"].quantized()
    x = torch.randn(2, 5, layer.in_features)
    expected = layer.base_layer(x) + 3.0 * F.linear(F.linear(x, a), b)
    assert relative_error(layer(x), expected) <= 1e-6
    assert relative_error(layer(x), layer.base_layer(x)) > 1e-2


def test_the_paper_drops_elements_of_the_bottleneck_and_not_of_the_input():
    layer = layers(bilora(dropout=0.5, r=8).train())[0]
    a, b = layer.petune_bilora_a["default"].quantized(), layer.petune_bilora_b["default"].quantized()
    x = torch.randn(64, layer.in_features)
    update = layer(x) - layer.base_layer(x)
    s = update @ torch.linalg.pinv(b).T  # B has full column rank
    ratio = s / F.linear(x, a)
    assert ((ratio.abs() < 1e-2) | ((ratio - 2.0).abs() < 1e-2)).float().mean() > 0.95
    assert 0.4 < (ratio.abs() < 1e-2).float().mean() < 0.6


def test_dropout_of_the_input_is_that_of_lora(monkeypatch):
    seen: list[tuple[float, object]] = []
    operator = petune.low_rank.lora_linear
    monkeypatch.setattr(
        petune.low_rank, "lora_linear", lambda *args: (seen.append((args[6], args[7])), operator(*args))[1]
    )
    output(bilora(dropout=0.25, dropout_position="input").train(), inputs("bert"))
    assert seen == [(0.25, None)] * 4
    output(bilora(dropout=0.25).train(), inputs("bert"))
    assert [(p, mask.shape[1]) for p, mask in seen[4:]] == [(0.0, 4)] * 4
    seen.clear()
    output(bilora(dropout=0.25), inputs("bert"))
    assert seen == [(0.0, None)] * 4


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_the_default_start_changes_nothing_and_the_papers_changes_little(family):
    batch = inputs(family)
    expected = output(build(family), batch)
    fresh = bilora(family, init_weights=True)
    assert torch.equal(output(fresh, batch), expected)
    assert all(not layer.petune_bilora_b["default"].weight.any() for layer in layers(fresh))
    paper = output(bilora(family, init_weights="paper"), batch)
    assert 0 < relative_error(paper, expected) < 1e-2


@pytest.mark.parametrize("bits", FEW)
def test_training_reaches_both_factors_from_the_default_start(bits):
    model = bilora(init_weights=True, bits=bits, target_modules="all-linear", scale=4.0)
    before = [(m.weight.clone(), m.quantized().clone()) for m in model.modules() if isinstance(m, QuantizedLinear)]
    losses = train(model, inputs("bert"), steps=12, lr=1e-2)
    assert losses[-1] < losses[0] - 1e-2
    after = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert all(not torch.equal(m.quantized(), quantized) for m, (_, quantized) in zip(after, before, strict=True))


@pytest.mark.parametrize(("family", "keys"), [("gpt2", slice(32, 64)), ("phi3", slice(32, 48))])
def test_of_a_fused_projection_queries_and_values_take_the_update(family, keys):
    model = bilora(family)
    for layer in layers(model):
        assert layer.parts["default"]
        delta = layer.get_delta_weight("default")
        assert not delta[keys].any()
        rest = torch.cat([delta[: keys.start], delta[keys.stop :]])
        assert (rest.abs().sum(1) > 0).all()
        assert len(layer.petune_bilora_b["default"].weight) == len(rest)
    whole = bilora(family, fused_parts="all")
    assert all(layer.get_delta_weight("default")[keys].any() for layer in layers(whole))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_the_fused_operator_runs_and_gives_what_plain_torch_gives(family, monkeypatch):
    model, batch = bilora(family), inputs(family)
    calls: list[int] = []
    operator = petune.low_rank.lora_linear
    monkeypatch.setattr(petune.low_rank, "lora_linear", lambda *args: (calls.append(1), operator(*args))[1])
    fused = output(model, batch)
    assert len(calls) == len(layers(model))
    monkeypatch.setattr(petune.low_rank, "uncovered_base", lambda _: "for this test")
    assert relative_error(output(model, batch), fused) <= 1e-6
    assert len(calls) == len(layers(model))


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("bits", [*FEW, 32])
def test_merging_is_exact(bits, granularity):
    model, batch = bilora("gpt2", bits=bits, granularity=granularity), inputs("gpt2")
    expected = output(model, batch)
    layer = layers(model)[0]
    delta = layer.get_delta_weight("default").T  # Conv1D keeps its weights the other way round
    before = layer.base_layer.weight.clone()
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, before + delta)
    assert relative_error(output(model.merge_and_unload(), batch), expected) <= 1e-5


# ---------------------------------------------------------------------------------------------------------- the bytes


@pytest.mark.parametrize(("r", "limit"), [(32, 148_100), (1, 5_300)])
def test_vit_b_takes_the_promised_bytes(r, limit, tmp_path):
    model = get_peft_model(ViTModel(ViTConfig()), BiLoraConfig(r=r))
    model.save_pretrained(tmp_path)
    size = (tmp_path / WEIGHTS).stat().st_size
    payload = 12 * 2 * (2 * (768 * r // 8) + 2 * 8)
    assert payload < size <= limit
    tensors = load_file(tmp_path / WEIGHTS)
    assert {name.rpartition(".")[2] for name in tensors} == {"petune_bilora_bits", "petune_bilora_stats"}


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_reloaded_adapter_is_the_same_and_is_saved_with_the_same_bytes(family, bits, granularity, tmp_path):
    batch = inputs(family)
    model = bilora(family, init_weights=True, r=3, bits=bits, granularity=granularity)
    train(model, batch)
    expected, before = output(model, batch), None
    model.save_pretrained(tmp_path / "0")
    for round_ in range(1, 3):
        model = loaded(tmp_path / str(round_ - 1), family)
        assert torch.equal(output(model, batch), expected)
        model.save_pretrained(tmp_path / str(round_))
        found = (tmp_path / str(round_) / WEIGHTS).read_bytes()
        assert found == (before or (tmp_path / "0" / WEIGHTS).read_bytes())
        before = found


def test_a_fresh_adapter_is_saved_and_is_still_a_no_op(tmp_path):
    bilora(init_weights=True).save_pretrained(tmp_path)
    assert torch.equal(output(loaded(tmp_path), inputs("bert")), output(build("bert"), inputs("bert")))


def test_adapters_of_different_bits_live_side_by_side(tmp_path):
    model, batch = bilora(), inputs("bert")
    model.add_adapter("wide", BiLoraConfig(r=7, bits=4, init_weights=False, dropout=0.0))
    expected = {}
    for name in ("default", "wide"):
        model.set_adapter(name)
        expected[name] = output(model, batch)
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    again.load_adapter(tmp_path / "wide", "wide")
    for name in ("default", "wide"):
        again.set_adapter(name)
        assert torch.equal(output(again, batch), expected[name])


def test_a_cast_base_keeps_the_stored_weights(tmp_path):
    bilora().save_pretrained(tmp_path)
    weights = [m.quantized() for m in loaded(tmp_path).modules() if isinstance(m, QuantizedLinear)]
    model = PeftModel.from_pretrained(build("bert", dtype=torch.bfloat16), tmp_path)
    cast = [m.quantized() for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert all(torch.equal(left, right) for left, right in zip(weights, cast, strict=True))


def test_a_packed_adapter_that_trains_on_warns_that_latents_are_not_stored(tmp_path, recwarn):
    model, batch = bilora(init_weights=True), inputs("bert")
    train(model, batch)
    model.save_pretrained(tmp_path)
    loaded(tmp_path)
    assert not [w for w in recwarn if "latents" in str(w.message)]
    with pytest.warns(UserWarning, match=r"latents are not stored .* storage='latent' to continue exactly"):
        again = loaded(tmp_path, is_trainable=True)
    # approximately: the quantiser stands where it stood
    assert train(again, batch, steps=1) == train(model, batch, steps=1)
    assert train(again, batch, steps=3) == pytest.approx(train(model, batch, steps=3), abs=0.02)


def test_latent_storage_continues_exactly(tmp_path):
    model, batch = bilora(init_weights=True, storage="latent"), inputs("bert")
    train(model, batch)
    model.save_pretrained(tmp_path)
    assert not any("bits" in name for name in load_file(tmp_path / WEIGHTS))
    again = loaded(tmp_path, is_trainable=True)
    assert train(again, batch) == train(model, batch)
    assert_same_tensors(get_peft_model_state_dict(again), get_peft_model_state_dict(model))


def test_a_packed_adapter_can_be_saved_with_latents_without_moving(tmp_path):
    bilora().save_pretrained(tmp_path / "packed")
    model = loaded(tmp_path / "packed")
    model.peft_config["default"].storage = "latent"
    model.save_pretrained(tmp_path / "latent")
    batch = inputs("bert")
    assert torch.equal(output(loaded(tmp_path / "latent"), batch), output(model, batch))


# -------------------------------------------------------------------------------------------------------- the head


def headed(**fields: object) -> PeftModel:
    return bilora(bi_head="classifier", **fields)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_a_quantised_head_replaces_the_classifier_and_is_packed_with_the_rest(task_type, tmp_path):
    batch = inputs("bert")
    model = headed(task_type=task_type, init_weights=True)
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert head.bias is None
    start = head.weight.clone()
    train(model, batch)
    assert not torch.equal(head.weight, start)
    expected = output(model, batch)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / WEIGHTS)) == 2
    again = loaded(tmp_path)
    assert torch.equal(output(again, batch), expected)
    hidden = again.base_model.model.classifier.modules_to_save["default"]
    assert len(hidden.quantized().unique()) == 2
    with model.disable_adapter():
        assert torch.equal(output(model, batch), output(build("bert"), batch))


def test_a_head_that_is_not_quantised_is_saved_too(tmp_path):
    batch = inputs("bert")
    model = headed(bits=32, task_type="SEQ_CLS")
    train(model, batch)
    expected = output(model, batch)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(loaded(tmp_path), batch), expected)


@pytest.mark.parametrize("storage", ["packed", "latent"])
def test_adapters_switch_their_heads_with_them(storage, tmp_path):
    batch = inputs("bert")
    model = headed(storage=storage)
    first = output(model, batch)
    torch.manual_seed(5)
    model.add_adapter("second", BiLoraConfig(r=4, init_weights=False, bi_head="classifier", storage=storage))
    assert torch.equal(output(model, batch), first)
    model.set_adapter("second")
    second = output(model, batch)
    assert relative_error(second, first) > 1e-2
    model.save_pretrained(tmp_path)
    model.delete_adapter("default")
    assert torch.equal(output(model, batch), second)
    assert not any("default" in name for name in model.state_dict())
    again = loaded(tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    assert torch.equal(output(again, batch), first)
    again.set_adapter("second")
    assert torch.equal(output(again, batch), second)


def test_a_merged_head_is_a_plain_linear_layer():
    batch = inputs("bert")
    model = headed()
    expected = output(model, batch)
    merged = model.merge_and_unload()
    assert type(merged.classifier) is nn.Linear
    assert relative_error(output(merged, batch), expected) <= 1e-5


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (
            "bert",
            {"bi_head": "clasifier"},
            r"bi_head='clasifier' names 0 modules of the model; similar names: .*class",
        ),
        ("bert", {"bi_head": "dense"}, r"bi_head='dense' names \d+ modules"),
        ("roberta", {"bi_head": "classifier"}, r"is a RobertaClassificationHead, .* name classifier\.out_proj"),
        ("roberta", {"bi_head": "classifier.out_proj", "task_type": "SEQ_CLS"}, "is trained in another way already"),
        ("bert", {"bi_head": "query"}, r"names 2 modules"),
        ("bert", {"bi_head": "classifier", "target_modules": ["query", "classifier"]}, "trained in another way"),
    ],
)
def test_a_head_that_cannot_be_quantised_is_refused(family, fields, message):
    base = build(family)
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, BiLoraConfig(r=4, **fields))
    assert_same_tensors(snapshot(base), before)


def test_a_checkpoint_without_the_head_is_refused(tmp_path):
    bilora(storage="latent").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "bi_head": "classifier"}))
    with pytest.raises(ValueError, match=r"lacks the quantised head .*classifier.*without bi_head"):
        loaded(tmp_path)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3}, r"BiLoraConfig\.bits=3 must be one of 1, 2, 4, 8, 32"),
        ({"r": 0}, r"BiLoraConfig\.r=0 must be a positive integer"),
        ({"dropout": 1.0}, r"dropout=1\.0 must be a number in \[0"),
        ({"codebook": "l3"}, r"codebook='l3' must be one of 'l1', 'l2'"),
        ({"granularity": "rows"}, r"granularity='rows' must be one of 'tensor', 'row'; the closest is 'row'"),
        ({"granularity": "row", "r": 1}, r"granularity='row' needs r >= 2"),
        ({"storage": "bits"}, r"storage='bits' must be one of 'packed', 'latent'"),
        ({"init_weights": "Paper"}, r"init_weights='Paper' must be one of True, False, 'paper'; .*'paper'"),
        ({"dropout_position": "start"}, r"dropout_position='start' must be one of 'middle', 'input'"),
        ({"fused_parts": "q"}, r"fused_parts='q' must be one of 'qv', 'all'"),
    ],
)
def test_a_field_out_of_range_is_named_with_what_it_may_be(fields, message):
    with pytest.raises(ValueError, match=message):
        BiLoraConfig(**fields)


@pytest.mark.parametrize("storage", ["packed", "latent"])
def test_an_adapter_that_is_not_finite_is_not_saved(storage, tmp_path):
    model = bilora(storage=storage)
    with torch.no_grad():
        layers(model)[1].petune_bilora_a["default"].weight[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"layer\.0.*value\.petune_bilora_a.* non-finite|non-finite values in .*value"
    ):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / WEIGHTS).exists()
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()


def test_a_weight_without_variance_is_not_saved(tmp_path):
    model = bilora()
    with torch.no_grad():
        layers(model)[0].petune_bilora_a["default"].weight.fill_(0.5)
    with pytest.raises(ValueError, match=r"query\.petune_bilora_a has zero variance .* cannot be quantised"):
        model.save_pretrained(tmp_path)


def tampered(folder: Path, **changes: torch.Tensor) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: changes.get(name.rpartition("_")[2], t) for name, t in tensors.items()}, folder / WEIGHTS)


@pytest.mark.parametrize("change", ["truncated", "over-long"])
def test_a_blob_of_the_wrong_length_is_refused(change, tmp_path):
    bilora().save_pretrained(tmp_path)
    blob = load_file(tmp_path / WEIGHTS)["base_model.model.petune_bilora_bits"]
    tampered(tmp_path, bits=blob[:-3] if change == "truncated" else torch.cat([blob, blob]))
    message = (
        rf"packed tensor has \d+ bytes and 8 rows of statistics, expected {len(blob)} and 8 \(bits=1, 8 tensors\)"
    )
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path)
    model = bilora()
    expected = output(model, inputs("bert"))
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "second")
    assert torch.equal(output(model, inputs("bert")), expected)


def test_a_blob_for_modules_of_other_names_is_refused(tmp_path):
    bilora(target_modules=["query", "value"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["query", "key"]}))
    with pytest.raises(ValueError, match="made for modules of other names or shapes"):
        loaded(tmp_path)


def test_transformers_own_loader_refuses_a_packed_adapter_and_takes_latents(tmp_path):
    build("bert").save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    packed = get_peft_model(copy.deepcopy(base), BiLoraConfig(r=4, init_weights=False))
    packed.save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"transformers' own loader cannot read a packed adapter; .*storage='latent'"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    native = copy.deepcopy(base)
    native.add_adapter(BiLoraConfig(r=4, init_weights=False))
    native.save_pretrained(tmp_path / "native")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    again.load_adapter(tmp_path / "native")
    assert torch.equal(output(again.eval(), inputs("bert")), output(native.eval(), inputs("bert")))
    with pytest.raises(ValueError, match=r"bi_head='classifier' needs a PeftModel"):
        copy.deepcopy(base).add_adapter(BiLoraConfig(bi_head="classifier"))
