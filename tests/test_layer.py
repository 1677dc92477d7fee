"""PetuneLayer on one linear map: the arithmetic of forward, merge and unmerge."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from petune.layer import linear_shape
from tests.adapters.dense_delta import DenseDeltaConfig, DenseDeltaLayer
from tests.adapters.relu_delta import ReluDeltaConfig, ReluDeltaLayer
from tests.conftest import TOLERANCE, relative_error

IN, OUT = 7, 5  # odd on purpose, and different


def layer(base: nn.Module | None = None, *names: str) -> DenseDeltaLayer:
    made = DenseDeltaLayer(base or nn.Linear(IN, OUT))
    for number, name in enumerate(names or ("default",)):
        made.update_layer(name, DenseDeltaConfig(scale=0.5 + number, init_weights=False))
    made.set_adapter(list(names or ("default",)))
    return made


@pytest.mark.parametrize("base", [nn.Linear(IN, OUT), Conv1D(OUT, IN)], ids=["Linear", "Conv1D"])
def test_forward_is_the_formula_and_merge_its_inverse(base):
    adapted, x = layer(base, "a", "b"), torch.randn(3, 2, IN)
    before = base.weight.clone()
    a, b = (adapted.get_delta_weight(name) for name in ("a", "b"))
    expected = base(x) + x @ (a + b).T
    assert relative_error(adapted(x), expected) <= TOLERANCE[torch.float32]
    adapted.merge(safe_merge=True)
    assert adapted.merged_adapters == ["a", "b"]
    moved = (a + b).T if isinstance(base, Conv1D) else a + b
    assert relative_error(base.weight, before + moved) <= TOLERANCE[torch.float32]
    assert base.weight.is_contiguous()
    assert relative_error(adapted(x), expected) <= TOLERANCE[torch.float32]
    adapted.unmerge()
    assert relative_error(base.weight, before) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_float32_adapter_on_a_low_precision_base_returns_the_dtype_of_the_base(dtype):
    adapted = layer(nn.Linear(IN, OUT).to(dtype))
    adapted.petune_densedelta_d["default"].data = torch.randn(OUT, IN)
    x = torch.randn(4, IN, dtype=dtype)
    assert adapted(x).dtype == dtype
    weight = adapted.get_base_layer().weight.double() + adapted.get_delta_weight("default").double()
    adapted.merge()
    assert adapted.get_base_layer().weight.dtype == dtype
    assert torch.equal(adapted.get_base_layer().weight, weight.to(dtype))  # rounded once, from the wide sum


def test_a_float64_base_loses_nothing_to_a_merge():
    adapted = layer(nn.Linear(IN, OUT).double())
    expected = adapted.get_base_layer().weight + adapted.get_delta_weight("default").double()
    adapted.merge()
    assert torch.equal(adapted.get_base_layer().weight, expected)


def test_live_adapters_are_none_when_disabled_or_merged_and_skip_what_the_layer_lacks():
    adapted = layer(None, "a", "b")
    assert adapted.live_adapters() == ["a", "b"]
    adapted._active_adapter = ["b", "elsewhere"]
    assert adapted.live_adapters() == ["b"]
    adapted.merge(adapter_names=["a"])
    assert adapted.live_adapters() == []
    adapted.enable_adapters(False)
    assert adapted.live_adapters() == []
    assert not adapted.merged  # a disabled layer is the base again


def test_a_layer_without_adapters_is_its_base():
    adapted, x = layer(), torch.randn(2, IN)
    adapted.delete_adapter("default")
    assert torch.equal(adapted(x), adapted.get_base_layer()(x))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_safe_merge_stops_before_the_weight_is_touched(broken):
    adapted = layer()
    before = adapted.get_base_layer().weight.clone()
    adapted.petune_densedelta_d["default"].data[0, 0] = broken
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        adapted.merge(safe_merge=True)
    assert torch.equal(adapted.get_base_layer().weight, before)
    assert adapted.merged_adapters == []


def test_merging_an_update_that_is_no_weight_says_what_to_do():
    adapted = ReluDeltaLayer(nn.Linear(IN, OUT))
    adapted.update_layer("default", ReluDeltaConfig())
    adapted.set_adapter("default")
    with pytest.raises(NotImplementedError, match=r"ReluDeltaLayer: .*'default' is no weight.*use unload\(\)"):
        adapted.merge()
    assert not adapted.supports_lora_conversion()
    assert layer().supports_lora_conversion()


def test_a_mixed_batch_checks_its_length_and_gives_the_base_when_disabled():
    adapted, x = layer(None, "a", "b"), torch.randn(3, IN)
    rows = ["b", "__base__", "a"]
    mixed = adapted(x, adapter_names=rows)
    for i, name in enumerate(rows):
        update = 0 if name == "__base__" else adapted.delta(name, x[i])
        assert relative_error(mixed[i], adapted.get_base_layer()(x[i]) + update) <= TOLERANCE[torch.float32]
    with pytest.raises(ValueError, match="adapter_names has 2 entries for a batch of 3 rows"):
        adapted(x, adapter_names=["a", "b"])
    adapted.enable_adapters(False)
    assert torch.equal(adapted(x, adapter_names=rows), adapted.get_base_layer()(x))


def test_the_shape_of_what_is_no_linear_layer_is_refused():
    assert linear_shape(Conv1D(OUT, IN)) == linear_shape(nn.Linear(IN, OUT)) == (IN, OUT)
    with pytest.raises(TypeError, match=r"a Conv2d is no linear layer; .* wrap Linear and Conv1D"):
        linear_shape(nn.Conv2d(1, 1, 1))


def test_a_layer_prints_as_ours():
    assert repr(layer()).startswith("petune.DenseDeltaLayer(")
