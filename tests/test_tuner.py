"""PetuneTuner: which modules are adapted, and weighted sums of adapters."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from petune.layer import PetuneLayer
from petune.tuner import base_shape
from tests.adapters.cases import BY_NAME
from tests.adapters.dense_delta import DenseDeltaConfig
from tests.adapters.harness import adapted, build, inputs, output
from tests.conftest import TOLERANCE, relative_error

DENSE = BY_NAME["densedelta"]


def wrapped(model: nn.Module, **fields: object) -> list[str]:
    adapted_model = get_peft_model(model, DenseDeltaConfig(**fields)).get_base_model()
    return [name for name, module in adapted_model.named_modules() if isinstance(module, PetuneLayer)]


def test_all_linear_leaves_the_head_alone():
    names = wrapped(build("bert"), target_modules="all-linear")
    assert len(names) == 13  # six in each of two blocks, and the pooler
    assert not any("classifier" in name for name in names)


def test_layers_to_transform_counts_blocks_for_defaults_and_for_all_linear():
    for fields, count in (({}, 2), ({"target_modules": "all-linear"}, 6)):
        names = wrapped(build("bert"), layers_to_transform=1, **fields)
        assert len(names) == count
        assert all(".layer.1." in name for name in names)


def test_exclude_modules_and_expressions_narrow_the_targets():
    assert wrapped(build("gpt2"), target_modules=r".*h\.0.*c_fc") == ["transformer.h.0.mlp.c_fc"]
    names = wrapped(build("bert"), target_modules=["query", "key"], exclude_modules=r".*layer\.0.*")
    assert names == [f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "key")]


def test_a_second_adapter_may_sit_on_other_modules():
    model = adapted(DENSE, "bert", target_modules=["query"])
    first = output(model, inputs("bert"))
    model.add_adapter("second", DenseDeltaConfig(target_modules=["key"], init_weights=False))
    model.set_adapter("second")
    second = output(model, inputs("bert"))
    model.base_model.set_adapter(["default", "second"])
    assert relative_error(output(model, inputs("bert")), first) > 1e-3
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(output(model, inputs("bert")), second)


def test_another_methods_layer_is_wrapped_as_it_stands():
    base = build("bert")
    base.add_adapter(BY_NAME["peft_lora"].random_config(target_modules=["query"]), adapter_name="lora")
    batch = inputs("bert")
    expected = output(base.eval(), batch)
    model = get_peft_model(base, DenseDeltaConfig(target_modules=["query"])).eval()
    assert torch.equal(output(model, batch), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default"], [1.0, 2.0], "sum"), "1 adapters, but 2 weights"),
        (([], [], "sum"), "0 adapters"),
        ((["nobody"], [1.0], "sum"), r"no adapter 'nobody'; there are \['default', 'second'\]"),
        ((["default"], [1.0], "second"), "'second' exists"),
        ((["default", "second"], [1.0, 1.0], "sum"), "differ in scale"),
    ],
)
def test_a_weighted_sum_that_has_no_meaning_is_refused(arguments, message):
    model = adapted(DENSE, "bert", target_modules=["query"])
    model.add_adapter("second", DENSE.random_config(scale=3.0, target_modules=["query"]))
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(*arguments)
    assert set(model.state_dict()) == names
    assert set(model.peft_config) == {"default", "second"}


def test_a_weighted_sum_is_saved_and_loaded_as_any_adapter(tmp_path):
    model = adapted(DENSE, "bert", target_modules=["query"])
    model.base_model.add_weighted_adapter(["default"], [2.0], "twice")
    model.set_adapter("twice")
    expected = output(model, inputs("bert"))
    model.save_pretrained(tmp_path, selected_adapters=["twice"])
    model.load_adapter(tmp_path / "twice", "again")
    model.set_adapter("again")
    assert relative_error(output(model, inputs("bert")), expected) <= TOLERANCE[torch.float32]


def test_the_shape_of_a_base_is_what_its_config_says():
    assert base_shape(build("bert")) == {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2}
    assert base_shape(nn.Linear(2, 2)) == {}
    config = get_peft_model(build("t5"), DenseDeltaConfig()).peft_config["default"]
    assert config.base_shape == base_shape(build("t5"))


def test_a_head_without_a_weight_of_its_own_is_unloaded():
    """RoBERTa's head is a module of two linears; PEFT's own unloading asks it for `weight`."""
    model, batch = adapted(DENSE, "roberta", task_type="SEQ_CLS"), inputs("roberta")
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].dense.weight.add_(1.0)
    trained = output(model, batch)
    merged = model.merge_and_unload()
    assert type(merged.classifier).__name__ == "RobertaClassificationHead"
    assert relative_error(output(merged, batch), trained) <= TOLERANCE[torch.float32]
