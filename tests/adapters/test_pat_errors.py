"""Bad input to pruning-aware tuning: rows 22 to 28 of the error catalogue and every other refusal."""

import re
import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from petune.adapters.pat import PatConfig
from tests.adapters.harness import base_tensors, build, inputs, output
from tests.adapters.pat_models import adapted, config, masked, pat_train, shaken
from tests.adapters.test_contract_errors import refuses

# ------------------------------------------------------------------------------------------------- the config's fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_ratio": 0.0}, "target_ratio=0.0 must be above 0: with nothing to prune, use FusedLoraConfig."),
        ({"target_ratio": 1.0}, "target_ratio=1.0 must be a number in [0.0, 1.0)."),
        ({"target_ratio": -0.2}, "target_ratio=-0.2 must be a number in [0.0, 1.0)."),
        ({"target_ratio": "25 %"}, "target_ratio='25 %' must be a number in [0.0, 1.0)."),
        ({"target_dim": 0}, "target_dim=0 must be a positive integer."),
        ({"target_dim": 24.0}, "target_dim=24.0 must be a positive integer."),
        ({"round_to": 0}, "round_to=0 must be a positive integer."),
        ({"hsm_rank": 0}, "hsm_rank=0 must be a positive integer."),
        ({"total_steps": -3}, "total_steps=-3 must be a positive integer."),
        ({"variant": "codes"}, "variant='codes' must be one of 'code', 'paper'; the closest is 'code'."),
        ({"milestone": 0.0}, "milestone=0.0 must be a share of the steps in (0, 1]."),
        ({"milestone": 1.5}, "milestone=1.5 must be a share of the steps in (0, 1]."),
        ({"milestone": "1/3"}, "milestone='1/3' must be a number in [0.0, inf)."),
        ({"active_weight": -1.0}, "active_weight=-1.0 must be a number in [0.0, inf)."),
        ({"identity_weight": float("nan")}, "identity_weight=nan must be a number in [0.0, inf)."),
        ({"bimodal_weight": "a bit"}, "bimodal_weight='a bit' must be a number in [0.0, inf)."),
        ({"mask_lr_mult": 0.0}, "mask_lr_mult=0.0 must be above 0: the mask would not move."),
        ({"mask_lr_mult": None}, "mask_lr_mult=None must be a number in [0.0, inf)."),
        ({"lora_alpha": -1.0}, "lora_alpha=-1.0 must be a number in [0.0, inf)."),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 must be a number in [0.0, 1.0)."),
        ({"r": -1}, "r=-1 must be a positive integer."),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_field_out_of_range_is_refused_by_its_name(fields, message):
    with pytest.raises(ValueError, match=f"PatConfig.{re.escape(message)}$"):
        PatConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_dim": 32}, "target_dim=32 must be at least round_to=1 and below the width 32."),
        ({"target_dim": 99}, "target_dim=99 must be at least round_to=1 and below the width 32."),
        ({"target_dim": 4, "round_to": 8}, "target_dim=4 must be at least round_to=8 and below the width 32."),
        ({"target_dim": 20, "round_to": 8}, "target_dim=20 must be a multiple of round_to=8."),
        ({"target_ratio": 0.01}, "target_ratio=0.01 keeps 32 of 32 channels in multiples of round_to=1; change"),
        ({"target_ratio": 0.9, "round_to": 16}, "target_ratio=0.9 keeps 0 of 32 channels in multiples of round_to=16"),
    ],
    ids=str,
)
def test_a_target_that_the_width_does_not_allow_is_refused_and_the_model_untouched(fields, message):
    refuses(build("bert"), PatConfig(**fields), re.escape(f"PatConfig.{message}"))


# ----------------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("head", ["none", "cls"])
def test_a_stream_whose_width_changes_is_refused(head):
    message = r"PatConfig cannot locate residual writers with one width in Swin\w+: its blocks have 16, 32 channels"
    refuses(build("swin", head), config(), message)


def test_a_width_that_the_config_does_not_take_is_told_before_the_training():
    message = r"LlamaConfig cannot express the pruned model \(.*\), so its export will be compact; for a stock one set"
    with pytest.warns(UserWarning, match=message):
        model = get_peft_model(shaken("llama", "lm"), config(target_dim=21))
    model.base_model.finalize()
    assert hasattr(model.merge_and_unload(), "petune_pruned")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(shaken("llama", "lm"), config(target_dim=20))
        get_peft_model(shaken("bert"), config(target_dim=21))  # compact whatever the width


def test_an_unknown_architecture_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    refuses(model, config(), "PatConfig cannot locate the residual writers of Sequential: ")


def test_targets_without_a_match_are_refused_though_the_writers_are_there():
    refuses(build("llama"), config(target_modules=["query"]), r"no module matched target_modules=\{'query'\} in Llama")


def test_a_norm_as_a_target_is_refused():
    message = r"'model\.norm' is a LlamaRMSNorm; PatModel supports Linear"
    refuses(build("llama"), config(target_modules=["q_proj", "model.norm"]), message)


def test_transformers_own_add_adapter_refuses_the_shared_mask():
    model = build("llama", "lm")
    with pytest.raises(ValueError, match=r"[Ss]hared"):
        model.add_adapter(config(), adapter_name="mine")


def test_two_masks_cannot_be_active_together():
    model = adapted("llama", "lm")
    model.add_adapter("second", config(init_weights=False))
    before = output(model, inputs("llama", "lm"))
    message = r"\['default', 'second'\] cannot be active together: a residual stream has one mask"
    with pytest.raises(ValueError, match=message):
        model.base_model.set_adapter(["default", "second"])
    assert model.base_model.active_adapters == ["default"]
    assert torch.equal(output(model, inputs("llama", "lm")), before)


def test_a_mask_is_not_merged_in_place():
    model, batch = masked("llama", "lm"), inputs("llama", "lm")
    before, tensors = output(model, batch), base_tensors(model)
    message = r"a mask cannot be merged in place.*merge_and_unload\(\) gives the smaller model"
    with pytest.raises(NotImplementedError, match=message):
        model.merge_adapter()
    layer = model.get_base_model().model.layers[0]
    for site in (layer.self_attn.o_proj, layer.input_layernorm):
        with pytest.raises(NotImplementedError, match=message):
            site.merge()
    assert torch.equal(output(model, batch), before)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in base_tensors(model).items())


# --------------------------------------------------------------------------------------------------------- the way out


@pytest.mark.parametrize(("step", "count"), [(0, 0), (4, 32)], ids=["fresh", "soft"])
def test_a_soft_mask_is_not_folded(step, count):
    model, batch = adapted("bert"), inputs("bert")
    model.base_model.mask().advance(step)
    before = output(model, batch)
    message = rf"{count} of 32 mask values are not binary at step {step}.*call finalize\(\) on model\.base_model"
    with pytest.raises(RuntimeError, match=message):
        model.merge_and_unload()
    assert torch.equal(output(model, batch), before)
    model.base_model.finalize()
    assert model.merge_and_unload().bert.embeddings.word_embeddings.weight.shape[1] == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"export": "onnx"}, r"merge_and_unload\(export='onnx'\) must be one of auto, stock, compact\."),
        ({"adapter_names": ["nobody"]}, r"by the mask of one adapter, but was asked for \['nobody'\]\."),
        ({"adapter_names": ["default", "second"]}, r"of one adapter, but was asked for \['default', 'second'\]\."),
        ({"adapter_names": []}, r"of one adapter, but was asked for \[\]\."),
    ],
    ids=str,
)
def test_an_export_that_cannot_be_is_refused_and_the_model_left_adapted(arguments: dict[str, Any], message: str):
    model, batch = masked("llama", "lm"), inputs("llama", "lm")
    before = output(model, batch)
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload(**arguments)
    assert torch.equal(output(model, batch), before)


def test_a_safe_merge_refuses_weights_that_are_not_finite():
    for family in ("llama", "bert"):
        model = masked(family)
        hybrid = next(m for m in model.modules() if hasattr(m, "identity_loss"))
        with torch.no_grad():
            hybrid.scale[model.base_model.mask().hard.nonzero()[0]] = float("inf")
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights: .*\.weight\. The adapter seems"):
            model.merge_and_unload(safe_merge=True)
        assert model.base_model.mask().is_final


# ---------------------------------------------------------------------------------------------------- while it trains


@pytest.mark.parametrize("term", ["active", "bimodal", "identity", "task"])
def test_a_loss_that_is_not_finite_names_its_term(term):
    model, batch = adapted("llama", "lm").train(), inputs("llama", "lm")
    tuner = model.base_model
    model(**batch)
    tuner.advance()
    tuner.terms[term] = torch.tensor(float("nan"))
    with pytest.raises(FloatingPointError, match=rf"not finite at step 1, because its term '{term}' is nan; lower"):
        tuner.advance()
    assert tuner.mask().now == 1
    model(**batch)
    tuner.advance()
    assert tuner.mask().now == 2


def test_the_term_of_a_broken_parameter_is_found():
    model, batch = adapted("llama", "lm").train(), inputs("llama", "lm")
    with torch.no_grad():
        model.base_model.petune_pat_entry["default"].down[0, 0] = float("inf")
    model(**batch)
    with pytest.raises(FloatingPointError, match=r"its term 'identity' is (inf|nan)"):
        model.base_model.advance()
    model = adapted("llama", "lm").train()
    with torch.no_grad():
        model.get_base_model().lm_head.weight[0, 0] = float("inf")
    model(**batch)
    with pytest.raises(FloatingPointError, match=r"its term 'task' is (inf|nan)"):
        model.base_model.advance()


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("round_to", [1, 4])
def test_a_mask_that_collapses_stops_with_the_reason(variant, round_to):
    model = adapted("llama", "lm", variant=variant, round_to=round_to)
    mask = model.base_model.mask()
    with torch.no_grad():
        mask.logits.fill_(-11.0 / mask.speed)
        mask.logits[:round_to] = 0.0
    model.base_model.advance()  # as many as round_to are open
    with torch.no_grad():
        mask.logits[0] = -11.0 / mask.speed
    message = (
        rf"the mask has collapsed at step 1: {round_to - 1} of 32 channels are still open, fewer than "
        rf"round_to={round_to}, so nothing comes through; lower mask_lr_mult=10.0, or raise active_weight\."
    )
    with pytest.raises(RuntimeError, match=message):
        model.base_model.advance()
    assert mask.now == 1


def test_a_mask_that_collapses_in_training_is_seen_at_its_next_step():
    torch.manual_seed(1)
    model = get_peft_model(shaken("llama", "lm"), config(mask_lr_mult=1e4, active_weight=0.0, bimodal_weight=0.0))
    torch.nn.init.constant_(model.base_model.mask().logits, -2e-3)  # σ(−20): the gradient is gone already
    with pytest.raises(RuntimeError, match="the mask has collapsed at step"):
        pat_train(model, inputs("llama", "lm"), 8)


def test_a_hard_mask_is_not_called_collapsed():
    model = masked("llama", "lm")
    with torch.no_grad():
        model.base_model.mask().logits.fill_(-100.0)
    model.base_model.advance()


def test_advancing_without_the_length_of_the_training_says_how_to_give_it():
    model = adapted("llama", "lm", total_steps=None)
    message = r"the length of the training is not known, .*PatConfig\.total_steps, .*PruningSchedule callback"
    with pytest.raises(RuntimeError, match=message):
        model.base_model.advance()


def test_a_mask_that_nobody_advances_is_reminded_of_once():
    model, batch = adapted("vit", "cls").train(), inputs("vit", "cls", batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(99):
            model(**batch)
        model.eval()
        model(**batch)
        model.train()
    with pytest.warns(UserWarning, match=r"'default' has seen 100 training steps and was never advanced.*advance\(\)"):
        model(**batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(101):
            model(**batch)


def test_a_mask_that_is_advanced_hears_no_reminder():
    model, batch = adapted("vit", "cls").train(), inputs("vit", "cls", batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(101):
            model(**batch)
            model.base_model.advance(1)
    assert model.base_model.mask().now == 1
