"""Bad input to ladders: rows 14 to 18 of the error catalogue, every other refusal, and the guard of the saving."""

import copy
import re
import warnings
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments

from petune.adapters.side import LadderSideConfig
from petune.adapters.side.flow import Flow, Place, Step
from petune.frozen_block import Call
from tests.adapters.harness import base_tensors, build, gradients, inputs, output
from tests.adapters.ladder_models import adapted, beside, config, family
from tests.adapters.test_contract_errors import refuses
from tests.adapters.test_contract_training import rows

# ------------------------------------------------------------------------------------------------- the config's fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reduction_factor": 0}, "reduction_factor=0 must be a positive integer."),
        ({"reduction_factor": 4.0}, "reduction_factor=4.0 must be a positive integer."),
        ({"ffn_ratio": -1}, "ffn_ratio=-1 must be a positive integer."),
        ({"num_heads": 0}, "num_heads=0 must be a positive integer."),
        ({"bits": 3}, "bits=3 must be one of 1, 2, 4, 8, 32; the closest is '32'."),
        ({"block": "mirrors"}, "block='mirrors' must be one of 'generic', 'mirror'; the closest is 'mirror'."),
        ({"fusion": "merge"}, "fusion='merge' must be one of 'residual', 'replace', 'merge_last'; the closest is"),
        ({"start": "l2"}, "start='l2' must be one of 'random', 'l1', 'fisher'."),
        ({"start": "l1"}, "start='l1' cuts side blocks out of the model's own; set block='mirror'."),
        ({"gate_temperature": 0.0}, "gate_temperature=0.0 must be above 0: the gates would be hard, and not train."),
        ({"gate_temperature": -1.0}, "gate_temperature=-1.0 must be a number in [0.0, inf)."),
        ({"dropout": 1.0}, "dropout=1.0 must be a number in [0.0, 1.0)."),
        ({"side_layers": []}, "side_layers=[] names at least one block; leave it out for the default."),
        ({"side_layers": 3}, "side_layers=3 must be a list of the blocks' numbers."),
        ({"side_layers": [1, True]}, "side_layers=[1, True] must be a list of the blocks' numbers."),
        ({"side_layers": ["all"]}, "side_layers=['all'] must be a list of the blocks' numbers."),
        ({"layers_to_transform": [1]}, "layers_to_transform=[1] does not apply: the network runs beside all blocks"),
        ({"exclude_modules": ["0"]}, "exclude_modules={'0'} does not apply: the network runs beside all blocks"),
        ({"layers_pattern": "h"}, "layers_pattern='h' does not apply: the network runs beside all blocks; use side"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_field_out_of_range_is_refused_by_its_name(fields, message):
    with pytest.raises(ValueError, match=f"^LadderSideConfig.{re.escape(message)}"):
        LadderSideConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reduction_factor": 5}, "reduction_factor=5 does not divide hidden_size=32; use 2, 4, 8."),
        ({"reduction_factor": 64}, "reduction_factor=64 does not divide hidden_size=32; use 2, 4, 8."),
        ({"side_layers": [0, 2]}, "side_layers=[0, 2] names block 2, out of range 0..1."),
        ({"side_layers": [-1]}, "side_layers=[-1] names block -1, out of range 0..1."),
        ({"num_heads": 3}, "num_heads=3 does not divide the side network's width 8; use 1, 2, 4, 8."),
        (
            {"target_modules": ["layer.0"]},
            "target_modules={'layer.0'} is not for a side network, which stands beside all blocks; leave it out.",
        ),
        (
            {"target_modules": ["query"]},
            "target_modules={'query'} is not for a side network, which stands beside all blocks; leave it out.",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_refused_and_the_model_untouched(fields, message):
    refuses(build("bert"), config(**fields), f"^{re.escape(f'LadderSideConfig.{message}')}$")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("swin", {}, r"block='mirror' cannot slim a SwinLayer, .*; use block='generic'"),
        ("bert", {"reduction_factor": 16}, r"reduction_factor=16 does not divide .*, which block='mirror' needs"),
    ],
)
def test_a_mirror_that_cannot_be_made_leaves_the_model_untouched(name, fields, message):
    refuses(build(name), config(block="mirror", **fields), message)


def test_seeing_that_a_mirror_can_be_made_moves_no_random_number():
    model = adapted("bert", block="mirror")
    blocks = [(name, model.get_base_model().get_submodule(name)) for name in model.base_model.topology.blocks]
    before = torch.get_rng_state()
    model.base_model.check_targets(model.peft_config["default"], model.get_base_model(), blocks)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_second_ladder_that_does_not_fit_leaves_the_first_as_it_was():
    model, batch = adapted("bert", "cls"), inputs("bert")
    expected = output(model, batch)
    with pytest.raises(ValueError, match="does not divide hidden_size=32"):
        model.add_adapter("second", config(reduction_factor=5))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output(model, batch), expected)


def test_side_layers_count_in_the_encoder_and_in_the_decoder():
    with pytest.raises(ValueError, match=r"names block 3, out of range 0\.\.2"):
        beside(family("t5", 3).build(head="lm"), side_layers=[1, 3])
    assert beside(family("t5", 3).build(head="lm"), side_layers=[2]).base_model.read_blocks == {2, 5}


def test_a_model_of_two_towers_is_refused_with_their_names_and_one_of_them_works():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    clip = CLIPConfig(
        text_config={**sizes, "vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = CLIPModel(clip).eval()
    refuses(
        model, config(), r"CLIPModel has the stacks text_model\S+, vision_model\S+, which do not follow one another"
    )
    tower = get_peft_model(model.vision_model, config(init_weights=False)).eval()
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    found = output(tower, pixels)
    with tower.disable_adapter():
        assert not torch.equal(output(tower, pixels), found)


# ------------------------------------------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_with_the_way_out_and_changes_nothing(merge):
    model, batch = adapted("bert", "cls"), inputs("bert")
    before, expected = base_tensors(model), output(model, batch)
    message = r"adapter 'default' is a side network, .* cannot be merged; use unload\(\) for the base model, or keep"
    with pytest.raises(NotImplementedError, match=message):
        getattr(model, merge)()
    assert torch.equal(output(model, batch), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base_tensors(model).items())


def test_two_active_ladders_are_refused_and_the_first_stays_active():
    model, batch = adapted("bert", "cls"), inputs("bert")
    model.add_adapter("second", config(init_weights=False))
    expected = output(model, batch)
    message = r"\['default', 'second'\] cannot be active together: exactly one active adapter is possible"
    with pytest.raises(ValueError, match=message):
        model.base_model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default"]
    assert torch.equal(output(model, batch), expected)


def test_transformers_own_add_adapter_is_refused():
    model = build("bert")
    with pytest.raises(
        ValueError, match=r"uses shared state stored on the tuner\. Please use `get_peft_model` instead"
    ):
        model.add_adapter(config())
    assert output(model, inputs("bert")).isfinite().all()


def test_unload_takes_every_hook_away():
    base = build("t5", "lm")
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.modules()]
    beside(base).unload()
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.modules()] == hooks


def step(mask: Any, *, is_causal: bool = True) -> Step:
    place = Place(0, 1, 4, 0, is_causal=is_causal, reads_memory=False, fuses=True)
    return Step(place, Call(torch.zeros(2, 3, 8), {"attention_mask": mask}), Flow())


def test_a_mask_of_an_unknown_kind_is_refused_with_what_to_load():
    with pytest.raises(
        ValueError, match=r"attention mask that is a dict; load the model with attn_implementation='sdpa'"
    ):
        step({"full": None}).self_mask(3, 3)
    with pytest.raises(ValueError, match="attention mask that is a Tensor"):
        step(torch.ones(3)).self_mask(3, 3)


def test_flash_attentions_mask_of_padding_is_read_with_causality():
    padding = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    seen, causal = step(padding).self_mask(3, 4)
    expected = padding.bool()[:, None, None, :] & torch.ones(3, 4).tril(1).bool()
    assert torch.equal(seen, expected)
    assert not causal
    assert torch.equal(step(padding).self_mask(1, 4)[0], padding.bool()[:, None, None, :])
    assert torch.equal(step(padding, is_causal=False).self_mask(4, 4)[0], padding.bool()[:, None, None, :])


def test_without_a_mask_the_blocks_own_causality_counts():
    assert step(None, is_causal=False).self_mask(3, 3) == (None, False)
    assert step(None).self_mask(3, 3) == (None, True)
    assert step(None).self_mask(1, 5) == (None, False)
    assert torch.equal(step(None).self_mask(2, 5)[0], torch.ones(2, 5).tril(3).bool())


# ----------------------------------------------------------------------------------------------------------- the guard


def said(model: nn.Module, batch: Any, steps: int = 2) -> list[str]:
    """Warnings about the memory saving in some forwards."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            model(**batch)
    return [str(one.message) for one in caught if "memory saving" in str(one.message)]


def unfrozen(model: PeftModel) -> str:
    model.get_base_model().bert.encoder.layer[1].base_layer.output.dense.weight.requires_grad_(True)
    return "'bert.encoder.layer.1.output.dense.weight' requires grad"


def with_input_gradients(model: PeftModel) -> str:
    model.enable_input_require_grads()
    return "the input of block 'bert.encoder.layer.0' requires grad"


def with_trained_embeddings(model: PeftModel) -> str:
    model.get_base_model().bert.embeddings.LayerNorm.weight.requires_grad_(True)
    return "the input of block 'bert.encoder.layer.0' requires grad"


@pytest.mark.parametrize("change", [unfrozen, with_input_gradients, with_trained_embeddings])
def test_what_makes_the_saving_void_is_named_once_and_gets_its_gradient(change):
    model, batch = adapted("bert", "cls").train(), inputs("bert")
    assert said(model, batch) == []
    frozen = {name for name, p in model.named_parameters() if p.requires_grad}
    name = change(model)
    found = said(model, batch)
    assert len(found) == 1
    assert re.match(
        rf"memory saving inactive: {name}, so the backbone from there on is recorded for backward; ", found[0]
    )
    assert said(model, batch) == []  # once
    grads = gradients(model, lambda: model(**batch).loss)
    more = {name for name, p in model.named_parameters() if p.requires_grad} - frozen
    assert all(grads[name].any() for name in more)


def test_lora_below_a_ladder_is_named_and_trained_through():
    base, batch = build("bert"), inputs("bert")
    inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["value"]), base, "below")
    model = beside(base).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "lora_" in name)
    (found,) = said(model, batch)
    assert "'bert.encoder.layer.0.attention.self.value.lora_A.below.weight' requires grad" in found
    grads = gradients(model, lambda: model(**batch).loss)
    assert all(grad.any() for name, grad in grads.items() if "lora_B" in name)
    assert sum("lora_B" in name for name in grads) == 2


def test_the_gradient_of_an_unfrozen_parameter_is_the_slope_of_the_loss():
    model, batch = adapted("bert", "cls").double(), inputs("bert")
    weight = model.get_base_model().bert.encoder.layer[0].base_layer.output.dense.weight.requires_grad_(True)
    model(**batch).loss.backward()
    shift, losses = 1e-4 * torch.randn_like(weight), []
    with torch.no_grad():
        for direction in (shift, -2 * shift):
            weight.add_(direction)
            losses.append(model(**batch).loss.item())
    assert (losses[0] - losses[1]) / 2 == pytest.approx((weight.grad * shift).sum().item(), rel=1e-4)


def test_nothing_is_said_in_evaluation_nor_of_what_stands_behind_the_blocks():
    batch = inputs("bert")
    model = adapted("bert", "cls")
    unfrozen(model)
    assert said(model.eval(), batch) == []
    with torch.no_grad():
        assert said(model.train(), batch) == []
    behind = get_peft_model(build("bert"), config(modules_to_save=["classifier", "pooler"])).train()
    behind.get_base_model().bert.pooler.modules_to_save["default"].requires_grad_(True)
    assert said(behind, batch) == []


def test_the_input_of_a_model_in_evaluation_may_be_differentiated():
    model = adapted("vit", "cls")
    pixels = inputs("vit")["pixel_values"].requires_grad_(True)
    assert said(model, {"pixel_values": pixels}) == []
    model(pixel_values=pixels).logits.sum().backward()
    assert pixels.grad.any()


def test_trainers_gradient_checkpointing_says_what_to_do_and_trains_the_same(tmp_path):
    finals: list[dict[str, torch.Tensor]] = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = get_peft_model(build("bert"), config())
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            gradient_checkpointing=checkpointing,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Trainer(model=model, args=arguments, train_dataset=rows()).train()
        found = [str(one.message) for one in caught if "memory saving inactive" in str(one.message)]
        assert len(found) == checkpointing
        assert not checkpointing or "leave gradient checkpointing off" in found[0]
        finals.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert max((finals[0][name] - finals[1][name]).abs().max() for name in finals[0]) <= 1e-6


def test_a_copied_model_warns_on_its_own():
    model, batch = adapted("bert", "cls").train(), inputs("bert")
    twin = copy.deepcopy(model)
    unfrozen(model)
    assert len(said(model, batch)) == 1
    assert said(twin, batch) == []
    unfrozen(twin)
    assert len(said(twin, batch)) == 1
