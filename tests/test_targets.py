"""From roles to the target lists and patterns PEFT takes, and the names an error proposes."""

import re
from dataclasses import replace

import pytest
from peft import LoraConfig, get_peft_model

from petune.topology import closest_modules, resolve_targets, target_pattern
from tests.families import FAMILIES


def test_targets_of_several_roles_come_once_each_in_model_order_and_without_the_head():
    model = FAMILIES["bert"].build(head="cls")
    block = "bert.encoder.layer.0"
    names = resolve_targets(model, ["ffn_out", "attention_qv", "linears"])
    assert names[:3] == [f"{block}.attention.self.{name}" for name in ("query", "key", "value")]
    assert len(names) == len(set(names)) == 12
    assert "classifier" not in names
    assert resolve_targets(model, "head") == ["classifier"]


def test_an_unknown_or_absent_role_is_refused_with_the_ones_there_are():
    model = FAMILIES["bert"].build()
    with pytest.raises(ValueError, match="unknown role 'ffn_output', did you mean 'ffn_out'"):
        resolve_targets(model, "ffn_output")
    with pytest.raises(ValueError, match=r"no module of BertModel has the role 'head' .*it has blocks, attention_in"):
        resolve_targets(model, ["ffn_out", "head"])


@pytest.mark.parametrize("role", ["attention_qv", "ffn_out", "linears", "residual_writers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pattern_makes_peft_adapt_exactly_the_named_modules(family: str, role: str):
    model = FAMILIES[family].build()
    names = resolve_targets(model, role)
    pattern = target_pattern(model, names)
    assert [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)] == names
    if role != "residual_writers":  # LoRA has no position tables of every kind
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=pattern))
        assert adapted.base_model.targeted_module_names == names


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"], r"encoder\.layer\.\d+\.output\.dense"),
        (["encoder.layer.1.output.dense"], r"encoder\.layer\.1\.output\.dense"),
        (
            ["encoder.layer.0.output.dense", "encoder.layer.1.intermediate.dense"],
            r"encoder\.layer\.0\.output\.dense|encoder\.layer\.1\.intermediate\.dense",
        ),
        (
            ["encoder.layer.1.attention.self.query", "encoder.layer.1.attention.self.value"],
            r"encoder\.layer\.1\.attention\.self\.(?:query|value)",
        ),
    ],
    ids=["all layers", "one layer", "two kinds", "two names"],
)
def test_a_pattern_is_short_and_leaves_bert_attention_output_out(names: list[str], pattern: str):
    assert target_pattern(FAMILIES["bert"].build(), names) == pattern


def test_a_pattern_does_not_grow_with_the_number_of_layers():
    shallow = FAMILIES["qwen2"]
    deep = replace(shallow, config=dict(shallow.config) | {"num_hidden_layers": 12})
    patterns = [target_pattern(model, resolve_targets(model, "linears")) for model in (shallow.build(), deep.build())]
    assert patterns[0] == patterns[1]


def test_a_pattern_that_would_match_too_much_falls_back_to_the_names_themselves():
    names = ["encoder.layers.0.blocks.1.mlp.fc1", "encoder.layers.1.blocks.0.mlp.fc1"]
    assert target_pattern(FAMILIES["swin"].build(), names) == "|".join(map(re.escape, names))


def test_a_pattern_for_nothing_or_for_an_unknown_name_is_refused():
    model = FAMILIES["bert"].build()
    with pytest.raises(ValueError, match=r"no module 'encoder\.layer\.0\.output\.dens'; the closest are encoder"):
        target_pattern(model, ["encoder.layer.0.output.dens"])
    with pytest.raises(ValueError, match="no module names were given"):
        target_pattern(model, [])


@pytest.mark.parametrize(
    ("family", "wanted", "first"),
    [
        ("vit", "query", "layers.0.attention.q_proj"),
        ("vit", ["attention.output.dense"], "layers.0.attention.o_proj"),
        ("bert", "q_proj", "encoder.layer.0.attention.self.query"),
        ("llama", "fc2", "layers.0.mlp.down_proj"),
        ("gpt2", "mlp.c_porj", "h.0.mlp.c_proj"),
        ("bert", "encoder.layer.7.output.dense", "encoder.layer.0.output.dense"),
        ("bert", "encoder.layer.7.output.LayerNorm", "encoder.layer.0.output.LayerNorm"),
    ],
)
def test_the_closest_module_is_the_one_meant(family: str, wanted: str | list[str], first: str):
    names = closest_modules(FAMILIES[family].build(), wanted)
    assert names[0] == first
    assert len(names) == len({re.sub(r"\d+", "N", name) for name in names}) <= 5


def test_as_many_close_modules_come_as_are_asked_for():
    assert len(closest_modules(FAMILIES["bert"].build(), "dense", n=2)) == 2
