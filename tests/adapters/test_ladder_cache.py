"""Generation beside a ladder: its keys and values live in the model's own cache, its memory beside the encoder's."""

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, StaticCache

from petune.adapters.side import LadderModel
from tests.adapters.harness import build, inputs, output
from tests.adapters.ladder_models import adapted, beside, family, without
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES

EXACT = TOLERANCE[torch.float32]
WINDOW = 5  # shorter than the prompt
DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": WINDOW, "num_hidden_layers": 4},
    "phi3": {"sliding_window": WINDOW},
}
SEQ2SEQ = ("t5", "t5_gated", "bart", "whisper")


def decoder(name: str, blocks: int = 4, **fields: Any) -> PeftModel:
    return beside(family(name, blocks, **{**DECODERS.get(name, {}), **fields}).build(head="lm"))


def prompts(name: str, rows: int = 3) -> dict[str, Tensor]:
    """Prompts of several lengths, padded on the left where there is text."""
    batch = without(inputs(name, "lm", batch_size=rows), "labels")
    if name in DECODERS:
        mask = batch["attention_mask"].flip(1)
        return {"input_ids": batch["input_ids"].flip(1) * mask, "attention_mask": mask}
    return batch


def generate(model: PeftModel, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """(tokens, scores of every step) of eight new ones."""
    settings = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    out = model.generate(**batch, **settings, **options, output_scores=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.scores)


def assert_alike(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(left[0], right[0])
    finite = right[1].isfinite()  # a token that may not come yet has the score -inf
    assert torch.equal(left[1].isfinite(), finite)
    assert relative_error(left[1][finite], right[1][finite]) <= EXACT


# ----------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_tokens_and_scores_are_the_same_with_and_without_a_cache(name, beams):
    model, batch = decoder(name), prompts(name)
    cached = generate(model, batch, num_beams=beams, use_cache=True)
    assert_alike(cached, generate(model, batch, num_beams=beams, use_cache=False))
    with model.disable_adapter():
        base = generate(model, batch, num_beams=beams, use_cache=True)
    assert relative_error(cached[1].nan_to_num(neginf=0.0), base[1].nan_to_num(neginf=0.0)) > 1e-3


@pytest.mark.parametrize("name", [*DECODERS, "t5", "bart"])
def test_a_static_cache_gives_the_same(name):
    model, batch = decoder(name), prompts(name)
    expected = generate(model, batch)
    assert_alike(generate(model, batch, cache_implementation="static"), expected)
    assert_alike(generate(model, batch, cache_implementation="static"), expected)  # the cache is kept, and reset


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_masks_of_every_attention_are_read(name, attention):
    base = family(name, 4).build(head="lm")
    base.set_attn_implementation(attention)
    model, batch = beside(base), prompts(name)
    assert_alike(generate(model, batch), generate(decoder(name), batch, use_cache=False))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_padding_on_the_left_is_not_seen(name):
    model, batch = decoder(name), prompts(name)
    together = generate(model, batch)[0]
    for row, mask in enumerate(batch["attention_mask"].bool()):
        ids = batch["input_ids"][row : row + 1, mask]
        alone = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0]
        assert torch.equal(alone[0, -8:], together[row, -8:])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_prompt_may_come_in_pieces(name):
    model = decoder(name)
    ids = inputs(name, "lm")["input_ids"][:1]
    whole = output(model, {"input_ids": ids})
    cache = DynamicCache(config=model.config)
    pieces = [
        model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True).logits.detach()
        for start, end in ((0, 3), (3, 9), (9, 10), (10, 11))
    ]
    assert relative_error(torch.cat(pieces, dim=1), whole) <= EXACT


def test_the_side_network_keeps_further_layers_of_the_models_cache_as_small_as_it_is():
    model, batch = decoder("mistral"), prompts("mistral")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**batch, past_key_values=cache, use_cache=True)
    own, side = cache.layers[:4], cache.layers[4:]
    assert len(side) == 3  # the rungs of blocks 1 to 3
    assert {layer.sliding_window for layer in side} == {WINDOW}
    assert {layer.keys.shape[2] for layer in (*own, *side)} == {WINDOW - 1}
    assert {layer.keys.shape[1] * layer.keys.shape[3] for layer in side} == {8}  # the width


def test_a_cropped_cache_goes_on_from_where_it_was_cut():
    model = decoder("llama")
    ids = inputs("llama", "lm")["input_ids"][:1]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.crop(-5)
        again = model(input_ids=ids[:, 6:], past_key_values=cache, use_cache=True).logits
    assert relative_error(again, output(model, {"input_ids": ids})[:, 6:]) <= EXACT


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_assisted_generation_gives_the_tokens_of_the_model_alone(name):
    model = decoder(name)
    ids = inputs(name, "lm")["input_ids"][:1]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = generate(model, batch)[0]
    assistant = family(name, 1, **DECODERS[name]).build(head="lm")
    assert torch.equal(generate(model, batch, assistant_model=assistant)[0], expected)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_cache_filled_without_the_adapter_is_refused(static):
    model = decoder("llama")
    ids = inputs("llama", "lm")["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        with model.disable_adapter():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match=r"holds 11 tokens of the model, but 0 of the side.*with the adapter on"):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert torch.isfinite(output(model, {"input_ids": ids})).all()


# ------------------------------------------------------------------------------------------- encoders and their memory


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_outputs_may_be_passed_as_often_as_wanted(name):
    model, batch = adapted(name), inputs(name, "lm")
    expected = output(model, batch)
    source = without(batch, "labels", "decoder_input_ids")
    with torch.no_grad():
        encoded = model.get_base_model().get_encoder()(**source)
    rest = without(batch, "input_ids", "input_features")
    for _ in range(2):
        assert torch.equal(output(model, {**rest, "encoder_outputs": encoded}), expected)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_encoder_outputs_of_elsewhere_are_refused_and_the_next_forward_works(name):
    model, batch = adapted(name), inputs(name, "lm")
    expected = output(model, batch)
    source = without(batch, "labels")
    with torch.no_grad(), model.disable_adapter():
        encoded = model.get_base_model().get_encoder()(**{key: value.flip(0) for key, value in source.items()})
    rest = without(batch, "input_ids", "input_features")
    with pytest.raises(RuntimeError, match=r"not those of the last forward of the encoder .* run the encoder anew"):
        output(model, {**rest, "encoder_outputs": encoded})
    assert torch.equal(output(model, batch), expected)


def test_what_an_encoder_gave_beside_another_adapter_is_refused():
    model, batch = adapted("t5"), inputs("t5", "lm")
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    with torch.no_grad():
        encoded = model.get_base_model().get_encoder()(**without(batch, "labels"))
    model.set_adapter("second")
    with pytest.raises(RuntimeError, match="not those of the last forward of the encoder with this adapter on"):
        output(model, {**without(batch, "input_ids"), "encoder_outputs": encoded})


def test_the_memory_of_the_encoder_matters():
    model, batch = adapted("t5", blocks=3), inputs("t5", "lm")
    expected = output(model, batch)
    with torch.no_grad():
        model.get_base_model().encoder.block[-1].petune_ladder_exit["default"].norm.weight.zero_()  # nothing arrives
    assert relative_error(output(model, batch), expected) > 1e-4


# --------------------------------------------------------------------------------------------- forwards that break off


class BrokenError(Exception):
    pass


def test_two_forwards_after_an_exception_in_the_middle_are_right():
    model, batch = adapted("llama", blocks=4), inputs("llama", "lm")
    expected = output(model, batch)
    with model.disable_adapter():
        base = output(model, batch)

    def break_off(*_: Any) -> None:
        raise BrokenError

    handle = model.get_base_model().model.layers[2].register_forward_hook(break_off)
    with pytest.raises(BrokenError):
        output(model, batch)
    handle.remove()
    with model.disable_adapter():
        assert torch.equal(output(model, batch), base)
    for _ in range(2):
        assert torch.equal(output(model, batch), expected)


def test_a_model_that_returns_early_is_refused_and_the_next_forward_works():
    model, batch = adapted("bert", "cls", blocks=4), inputs("bert")
    expected = output(model, batch)
    encoder = model.get_base_model().bert.encoder
    blocks = encoder.layer
    encoder.layer = blocks[:3]
    with pytest.raises(RuntimeError, match=r"the model returned before block 3, so .*disable_adapter\(\)"):
        output(model, batch)
    with model.disable_adapter():
        output(model, batch)  # the base alone may
    encoder.layer = blocks
    assert torch.equal(output(model, batch), expected)


@pytest.mark.parametrize(("skipped", "ran"), [(0, 1), (2, 3)])
def test_a_skipped_block_is_refused_and_the_next_forward_works(skipped, ran):
    model, batch = adapted("bert", "cls", blocks=4), inputs("bert")
    expected = output(model, batch)
    encoder = model.get_base_model().bert.encoder
    blocks = encoder.layer
    encoder.layer = torch.nn.ModuleList(block for i, block in enumerate(blocks) if i != skipped)
    with pytest.raises(RuntimeError, match=f"block {ran} ran where the side network awaited block {skipped}"):
        output(model, batch)
    encoder.layer = blocks
    assert torch.equal(output(model, batch), expected)


def test_a_copy_has_a_flow_of_its_own():
    model, batch = adapted("t5"), inputs("t5", "lm")
    expected = output(model, batch)
    twin = copy.deepcopy(model)
    left, right = model.base_model, twin.base_model
    assert isinstance(left, LadderModel)
    assert isinstance(right, LadderModel)
    assert left.flow is not right.flow
    assert {id(block.flow) for block in twin.get_base_model().encoder.block} == {id(right.flow)}
    assert torch.equal(output(twin, batch), expected)


@pytest.mark.parametrize("name", [name for name, one in FAMILIES.items() if one.kind == "image"])
def test_a_model_without_tokens_has_no_cache_and_needs_none(name):
    assert torch.isfinite(output(beside(build(name, "cls")), inputs(name, "cls"))).all()
