"""Bad input to the pyramid beside a ViT, each with its sentence: rows 17 to 21 of the error catalogue and its own."""

import re

import pytest
import torch
from peft import get_peft_model
from transformers import (
    CLIPConfig,
    CLIPModel,
    DeiTForImageClassificationWithTeacher,
    ViTMAEConfig,
    ViTMAEModel,
)

from tests.adapters.hside_models import PAPER, adapted, beside, config, held, pictures, tuner, vit
from tests.adapters.ladder_models import family
from tests.adapters.test_contract_errors import refuses
from tests.families import FAMILIES

BLOCK = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dims": [8, 8, 8]}, "dims=[8, 8, 8] must be 4 positive integers."),
        ({"dims": [8, 8, 8, 0]}, "dims=[8, 8, 8, 0] must be 4 positive integers."),
        ({"heads": [1, 1, 1, True]}, "must be 4 positive integers."),
        ({"heads": [2, 5, 4, 5]}, "has 5 for a stage of width 12, which they do not divide; use 1, 2, 3, 4, 6, 12."),
        ({"block_indices": [0, 2, 2, 3]}, "must be 4 increasing indices, the last block of each stage."),
        ({"block_indices": [-1, 0, 1, 2]}, "must be 4 increasing indices, the last block of each stage."),
        ({"block_indices": [0, 1, 2]}, "must be 4 increasing indices, the last block of each stage."),
        ({"meta_tokens": 0, "detach": False}, "meta_tokens=0 must be a positive integer."),
        ({"meta_tokens": 2}, "meta_tokens=2 are learned through the blocks; set detach=False."),
        ({"drop_path": 1.0}, "drop_path=1.0 must be a number in [0.0, 1.0)."),
        ({"fusion": "merge"}, "fusion='merge' must be one of 'residual', 'replace'"),
        ({"fusion": "replace", "head_norm": "group"}, "head_norm='group' must be one of 'batch', 'layer'"),
        ({"head_norm": "layer"}, "head_norm='layer' is of the adapter's own head; set fusion='replace'."),
        ({"fusion": "replace", "bi_head": "classifier"}, "would not be used, since the adapter has a head of its own"),
        ({"layers_to_transform": [1]}, "the network runs beside all blocks; use block_indices."),
        ({"bits": 3}, "bits=3 must be one of 1, 2, 4, 8, 32"),
    ],
)
def test_a_field_out_of_range_is_named_with_what_is_possible(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**fields)


@pytest.mark.parametrize("name", ["swin", "bert", "whisper", "llama"])
def test_what_is_no_plain_vit_is_refused_and_pointed_to_the_ladder(name):
    head = "cls" if "cls" in FAMILIES[name].heads else "lm"
    message = r"HierarchicalSideConfig needs a plain ViT, .* is none; use LadderSideConfig"
    refuses(FAMILIES[name].build(head=head), config(), message)


def test_a_model_of_two_towers_is_no_plain_vit():
    clip = CLIPModel(CLIPConfig(text_config=BLOCK, vision_config={**BLOCK, "image_size": 32, "patch_size": 8}))
    refuses(clip, config(), "CLIPModel is none; use LadderSideConfig")


def test_stages_that_the_model_has_no_blocks_for_are_refused():
    refuses(vit(blocks=5), config(block_indices=[1, 2, 3, 5]), r"names block 5, out of range 0\.\.4")


def test_targets_that_are_not_all_blocks_are_refused():
    refuses(vit(), config(target_modules=["layers.0", "layers.1"]), "stands beside all blocks")


def test_blocks_that_would_be_unused_are_warned_of():
    message = r"block_indices=\[2, 5, 8, 11\] leaves blocks 12\.\.13 computed but unused; leave it out to spread all"
    with pytest.warns(UserWarning, match=message):
        beside(vit(blocks=14), block_indices=[2, 5, 8, 11])


@pytest.mark.parametrize("kind", ["no head", "two heads", "an MLP"])
def test_a_head_of_its_own_needs_one_linear_classifier_to_stand_in_for(kind):
    if kind == "no head":
        base, count = family("vit", 4).build(), 0
    elif kind == "two heads":
        base, count = DeiTForImageClassificationWithTeacher(vit("deit").config), 2
    else:
        base, count = vit(), 2
        base.classifier = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    message = rf"fusion='replace' needs a model with one linear classifier .* has {count}; use 'residual'"
    refuses(base, config(fusion="replace"), message)


def test_a_classifier_that_is_not_asked_is_not_trained_beside_the_adapters_own():
    refuses(vit(), config(fusion="replace", modules_to_save=["classifier"]), "modules_to_save=.* would not be used")


# -------------------------------------------------------------------------------------------------- while it runs


def test_a_batch_of_one_is_refused_by_the_batch_norm_of_the_head_alone():
    one = pictures(batch=1)
    with pytest.raises(ValueError, match=r"head_norm='batch' got a batch of size 1 in training; .* head_norm='layer'"):
        adapted(fusion="replace").train()(**one)
    adapted(fusion="replace").eval()(**one)
    adapted(fusion="replace", head_norm="layer").train()(**one).loss.backward()
    adapted().train()(**one).loss.backward()  # the stem's batch norm has pixels enough


@pytest.mark.parametrize(("height", "width"), [(16, 16), (18, 18), (2, 64)])
def test_an_image_too_small_for_four_scales_is_refused_with_the_least_size(height, width):
    model = adapted("dinov2") if min(height, width) > 8 else beside(vit(patch_size=2, image_size=(2, 64)))
    message = rf"image of {height} x {width} pixels is too small .*; the least is 19 for the longer side and 3 for"
    with pytest.raises(ValueError, match=message):
        model(**pictures(height, width))
    with model.disable_adapter():
        model(**pictures(height, width))
    if width < 64:
        model(**pictures(19, 19))


@pytest.mark.parametrize("fields", [{}, PAPER], ids=["ours", "paper"])
def test_a_call_without_pixels_is_refused(fields):
    model = adapted(**fields)
    message = "was called without pixel_values, from which the side network starts; pass them"
    for call in (model, model.get_base_model(), tuner(model).features):
        with pytest.raises(ValueError, match=message):
            call()
    sound = beside(family("ast", 4).build(head="cls"))
    with pytest.raises(ValueError, match="without input_values"):
        sound(labels=torch.zeros(2, dtype=torch.long))


def test_maps_are_refused_without_an_adapter():
    model = adapted()
    with model.disable_adapter(), pytest.raises(ValueError, match="called with no adapter on"):
        tuner(model).features(pictures()["pixel_values"])


def test_an_attention_mask_and_learned_tokens_do_not_go_together():
    mask = torch.zeros(3, 1, 17, 17)
    assert torch.isfinite(adapted()(**pictures(), attention_mask=mask).logits).all()
    with pytest.raises(ValueError, match=r"detach=False puts tokens before those that the attention_mask is for"):
        adapted(detach=False)(**pictures(), attention_mask=mask)


def test_a_model_that_drops_patches_is_refused_in_its_first_forward():
    sizes = {**BLOCK, "image_size": 32, "patch_size": 8, "mask_ratio": 0.5}
    model = beside(ViTMAEModel(ViTMAEConfig(**sizes)))
    with pytest.raises(RuntimeError, match=r"block 0 gave 9 tokens for 4 x 4 patches; .* without masking or dropping"):
        model(pixel_values=pictures()["pixel_values"])


def test_blocks_without_their_pixels_are_refused():
    model = adapted("dinov2")
    hidden = torch.randn(2, 17, 32)
    with pytest.raises(RuntimeError, match="ran without the model's patch convolution before them"):
        model.get_base_model().dinov2.encoder(hidden)
    with pytest.raises(RuntimeError, match="block 1 ran where the side network awaited block None"):
        model.get_base_model().dinov2.encoder.layer[1](hidden)


def test_a_block_that_is_skipped_is_refused_and_the_next_forward_works():
    model = adapted()
    expected = model(**pictures()).logits
    layers = model.get_base_model().vit.layers
    skipped = layers[2]
    layers[2] = torch.nn.Identity()
    layers[2].forward = lambda hidden, *_, **__: hidden
    with pytest.raises(RuntimeError, match="block 3 ran where the side network awaited block 2"):
        model(**pictures())
    assert held(model) == []
    layers[2] = skipped
    assert torch.equal(model(**pictures()).logits, expected)


def test_a_model_that_returns_early_is_refused():
    model = adapted()
    layers = model.get_base_model().vit.layers
    last = layers[4]
    layers[4] = torch.nn.Identity()
    layers[4].forward = lambda hidden, *_, **__: hidden
    for call in (lambda: model(**pictures()), lambda: tuner(model).features(pictures()["pixel_values"])):
        with pytest.raises(RuntimeError, match="the model returned before block 4, so the side network's output went"):
            call()
    layers[4] = last
    assert torch.isfinite(model(**pictures()).logits).all()


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_with_what_to_do(merge):
    with pytest.raises(NotImplementedError, match=r"side network, .* cannot be merged; use unload\(\)"):
        getattr(adapted(), merge)()


def test_two_adapters_are_not_active_together():
    model = adapted()
    model.add_adapter("second", config())
    with pytest.raises(ValueError, match="exactly one active adapter"):
        model.base_model.set_adapter(["default", "second"])


def test_a_weighted_sum_of_side_networks_is_refused():
    with pytest.raises(NotImplementedError, match="weighted sum"):
        adapted().base_model.add_weighted_adapter(["default"], [1.0], "sum")


def test_rows_of_other_adapters_are_refused():
    with pytest.raises(ValueError, match="adapter_names is not supported"):
        adapted()(**pictures(), adapter_names=["default"] * 3)


def test_an_adapter_of_another_vit_is_refused_by_its_sizes(tmp_path):
    adapted(blocks=5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter was made for .*num_hidden_layers=5, this model has .*_layers=6"):
        get_peft_model(vit(blocks=6), config()).load_adapter(tmp_path, "other")
