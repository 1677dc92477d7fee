"""`fuse` and `unfuse`: what they change, what they report, and that `unfuse` leaves nothing behind."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import LlamaConfig, LlamaModel

import petune
from petune import FusedLoraConfig, fuse, unfuse
from petune.adapters.lora import FusedLoraLinear
from petune.adapters.lora.mlp import FusedGatedMlp
from tests.adapters.lora_models import BERT, LLAMA, adapted, layers, output, with_two
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES


def state_of(model):
    """Class, attributes and hooks of every module: all that `fuse` may change and `unfuse` must restore."""
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            {key: list(value) for key, value in module.__dict__.items() if "_hooks" in key and value is not None},
        )
        for name, module in model.named_modules()
    }


# --- restoring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "t5_gated", "bart", "gpt2"])
def test_unfuse_restores_every_class_attribute_and_hook(family):
    model = adapted(LoraConfig, FAMILIES[family])
    before, expected = state_of(model), output(model, FAMILIES[family])
    fuse(model)
    assert state_of(model) != before
    unfuse(model)
    assert state_of(model) == before
    assert torch.equal(output(model, FAMILIES[family]), expected)


def test_unfuse_leaves_the_users_own_hooks():
    model, seen = adapted(LoraConfig, LLAMA), []
    attention = next(module for module in model.modules() if type(module).__name__ == "LlamaAttention")
    attention.register_forward_hook(lambda *_: seen.append("before"), always_call=True)
    fuse(model)
    attention.register_forward_pre_hook(lambda *_: seen.append("after"))
    unfuse(model)
    output(model, LLAMA)
    assert seen == ["after", "before"]
    assert len(attention._forward_hooks_always_called) == 1


def test_unfuse_works_on_a_copy_and_leaves_the_original_fused():
    model = adapted(LoraConfig, LLAMA)
    before = state_of(model)
    fuse(model)
    fused, twin = state_of(model), copy.deepcopy(model)
    unfuse(twin)
    assert state_of(twin) == before
    assert state_of(model) == fused


def test_unfuse_turns_the_configs_layers_into_pefts_and_is_idempotent():
    model = adapted(FusedLoraConfig, LLAMA)
    for _ in range(2):
        unfuse(model)
        assert {type(layer) for layer in layers(model)} == {LoraLinear}


def test_unfuse_cleans_a_model_whose_adapter_was_merged_and_unloaded():
    base = LLAMA.build()
    before = state_of(base)
    model = adapted(LoraConfig, LLAMA)
    fuse(model)
    merged = model.merge_and_unload()
    assert state_of(merged) != before
    unfuse(merged)
    assert state_of(merged) == before


# --- fusing again --------------------------------------------------------------------------------------------------


def test_fuse_is_idempotent():
    model = adapted(LoraConfig, LLAMA)
    report = fuse(model)
    assert str(fuse(model)) == str(report) == "fused: 14/14 layers, 4 groups, 2 gated MLPs"
    for module in model.modules():
        assert (
            len(module._forward_hooks)
            == len(module._forward_pre_hooks)
            == hasattr(module, "q_proj") + hasattr(module, "gate_proj")
        )


def test_fuse_takes_in_layers_that_a_later_adapter_added():
    model = with_two(LoraConfig, target_modules=["query"])
    assert str(fuse(model)) == "fused: 2/2 layers"
    model.add_adapter("third", LoraConfig(r=2, target_modules=["query", "key"], init_lora_weights=False))
    report = fuse(model)
    assert (report.fused, report.groups) == (4, 2)
    reference = copy.deepcopy(model)
    unfuse(reference)
    for name in ("default", "third"):
        for twin in (model, reference):
            twin.set_adapter(name)
        assert relative_error(output(model), output(reference)) <= TOLERANCE[torch.float32]


def test_group_false_fuses_layers_alone_and_undoes_groups():
    model = adapted(LoraConfig, LLAMA)
    alone = fuse(model, group=False)
    assert str(alone) == "fused: 14/14 layers"
    before = state_of(model)
    fuse(model)
    assert str(fuse(model, group=False)) == str(alone)
    assert state_of(model) == before
    assert not [module for module in model.modules() if isinstance(module, FusedGatedMlp)]


def test_unfuse_and_fuse_forget_why_a_group_was_given_up():
    model = adapted(LoraConfig, BERT)
    fuse(model)
    layers(model, FusedLoraLinear)[0].group.off = "on purpose"
    assert "1 left apart" in str(fuse(model))
    unfuse(model)
    assert str(fuse(model)) == "fused: 13/13 layers, 2 groups"


# --- saving --------------------------------------------------------------------------------------------------------


def test_a_grouped_model_saves_what_peft_saves(tmp_path):
    model = adapted(LoraConfig, LLAMA)
    expected = output(model, LLAMA)
    keys = list(model.state_dict())
    fuse(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    assert relative_error(output(loaded, LLAMA), expected) <= TOLERANCE[torch.float32]
    assert fuse(loaded).groups == 4
    assert relative_error(output(loaded, LLAMA), expected) <= TOLERANCE[torch.float32]


# --- the report ----------------------------------------------------------------------------------------------------


def llama(**config):
    base = LlamaModel(LlamaConfig(**(dict(LLAMA.config) | config)))
    return get_peft_model(base, LoraConfig(target_modules="all-linear"))


def test_the_report_names_an_activation_that_is_not_known():
    report = fuse(llama(hidden_act="relu"))
    assert (report.groups, report.mlps) == (4, 0)
    assert str(report) == (
        "fused: 14/14 layers, 4 groups; 2 left apart (base_model.model.layers.0.mlp, …): its activation is torch's "
        "ReLU"
    )


def test_the_report_names_an_mlp_of_another_form():
    report = fuse(adapted(LoraConfig, FAMILIES["t5_gated"]))
    assert set(report.apart.values()) == {"its forward is not down(activation(gate(x)) * up(x))"}
    assert [name.rpartition(".")[2] for name in report.apart] == ["DenseReluDense"] * 4


def test_the_report_names_a_parent_whose_source_cannot_be_read():
    namespace = {}
    exec("def forward(self, x):\n    return self.q(x) + self.k(x)", namespace)
    parent = type("Parent", (nn.Module,), {"forward": namespace["forward"]})()
    parent.q, parent.k = nn.Linear(5, 3), nn.Linear(5, 3)
    report = fuse(get_peft_model(parent, LoraConfig(target_modules=["q", "k"])))
    assert report.apart == {"base_model.model": "the source of its forward cannot be read"}


def test_a_replaced_forward_of_an_mlp_is_reported_and_left():
    model = llama()
    mlp = model.base_model.model.layers[1].mlp
    mlp.forward = lambda x: torch.zeros_like(x)
    report = fuse(model)
    assert report.mlps == 1
    assert report.apart == {"base_model.model.layers.1.mlp": "its forward is replaced"}


def test_an_mlp_that_is_no_longer_covered_gets_its_class_back():
    model = llama()
    before = state_of(model)
    fuse(model)
    for layer in model.base_model.model.layers:
        layer.mlp.act_fn = nn.ReLU()
    assert fuse(model).mlps == 0
    unfuse(model)
    assert [kind for kind, *_ in state_of(model).values()] != [kind for kind, *_ in before.values()]  # the ReLU
    assert not [module for module in model.modules() if isinstance(module, FusedGatedMlp)]


def test_a_class_that_was_made_of_ours_is_not_stripped():
    model = llama()
    fuse(model)
    mlp = model.base_model.model.layers[0].mlp
    wrapped = []
    for module in (mlp, mlp.down_proj):  # as FSDP2's fully_shard does
        module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})
        wrapped.append(type(module))
    assert str(fuse(model)) == "fused: 14/14 layers, 4 groups, 2 gated MLPs"
    unfuse(model)
    assert [type(mlp), type(mlp.down_proj)] == wrapped


def test_an_mlp_without_lora_gets_its_class_back_when_fused_again():
    model = llama()
    fuse(model)
    mlp = model.base_model.model.layers[0].mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(mlp, name, getattr(mlp, name).base_layer)
    report = fuse(model)
    assert str(report) == "fused: 11/11 layers, 3 groups, 1 gated MLP"
    assert not isinstance(mlp, FusedGatedMlp)
    assert not mlp._forward_hooks


def test_a_group_holds_four_layers_at_most():
    class Five(nn.Module):
        def __init__(self):
            super().__init__()
            for name in "abcde":
                setattr(self, name, nn.Linear(5, 3))

        def forward(self, x):
            return self.a(x) + self.b(x) + self.c(x) + self.d(x) + self.e(x)

    model = get_peft_model(Five(), LoraConfig(target_modules=list("abcde"), init_lora_weights=False))
    x = torch.randn(2, 5)
    expected = model(x)
    assert fuse(model).groups == 1
    assert model.base_model.model.d.group.names == ("a", "b", "c", "d")
    assert relative_error(model(x), expected) <= TOLERANCE[torch.float32]


# --- the ways in ---------------------------------------------------------------------------------------------------


def test_unfuse_is_a_public_name():
    assert petune.unfuse is unfuse
    assert "unfuse" in petune.__all__
