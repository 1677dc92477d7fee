"""`QuantizedLinear` and `PackedLinear`: what is computed when, and that nothing stale is ever used."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from petune.quantized.linear import PackedLinear, QuantizedLinear
from petune.quantized.packing import Entry, encode, pack, rebuild
from petune.quantized.quantizer import Quantization, statistics
from tests.conftest import relative_error


def linear(bits: int = 1, granularity: str = "tensor", bias: bool = False) -> QuantizedLinear:
    torch.manual_seed(3)
    return QuantizedLinear(13, 7, Quantization(bits, granularity=granularity), bias=bias)


@pytest.fixture
def counted(monkeypatch):
    """How often values were computed."""
    calls: list[int] = []
    compute = QuantizedLinear._compute

    def count(self):
        calls.append(1)
        return compute(self)

    monkeypatch.setattr(QuantizedLinear, "_compute", count)
    return calls


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_map_is_linear_in_the_quantised_weight(bits, granularity):
    layer, x = linear(bits, granularity, bias=True), torch.randn(4, 13)
    expected = layer.quantization.quantized(layer.weight.detach(), layer.statistics())
    assert torch.equal(layer(x), F.linear(x, expected, layer.bias))
    assert len(expected.unique()) <= (7 if granularity == "row" else 1) * 2**bits


def test_thirty_two_bits_are_an_ordinary_linear_layer():
    layer, x = linear(32, bias=True), torch.randn(4, 13)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert dict(layer.named_buffers()) == {}
    assert layer.state_dict().keys() == nn.Linear(13, 7).state_dict().keys()


def test_values_are_computed_once_a_step_under_accumulation(counted):
    layer = linear()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(3):
        before = layer.quantized().detach().clone()
        for _ in range(4):
            layer(torch.randn(2, 13)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert len(counted) == step + 1
        assert not torch.equal(layer.eval().quantized(), before)
        counted.pop()  # the look just above
        layer.train()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_computes_no_values_again(counted, reentrant):
    layer, x = linear(), torch.randn(2, 13, requires_grad=True)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert len(counted) == 1
    gradient = layer.weight.grad
    layer.weight.grad = None
    layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, gradient)


def test_accumulated_gradients_add_up():
    layer, rows = linear(), torch.randn(6, 13)
    layer(rows).square().sum().backward()
    whole = layer.weight.grad.clone()
    layer.weight.grad = None
    for part in rows.split(2):
        layer(part).square().sum().backward()
    assert relative_error(layer.weight.grad, whole) <= 1e-6


def change_in_place(layer):
    with torch.no_grad():
        layer.weight.neg_()


def load_other_weights(layer):
    layer.load_state_dict({"weight": -layer.weight.detach(), "anchor": layer.anchor})


def put_another_parameter(layer):
    layer.weight = nn.Parameter(-layer.weight.detach())


def assign_data(layer):
    layer.weight.data = -layer.weight.data


def move_the_anchor(layer):
    layer.anchor.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def write_unseen_and_step(layer):
    """As FSDP does: the storage is written with the version kept, between two steps of an optimizer."""
    with torch.autograd._unsafe_preserve_version_counter(layer.weight), torch.no_grad():
        layer.weight.neg_()
    other = nn.Parameter(torch.zeros(1))
    other.grad = torch.ones(1)
    torch.optim.SGD([other], lr=1.0).step()


CHANGES = [
    *(change_in_place, load_other_weights, put_another_parameter, assign_data, move_the_anchor),
    write_unseen_and_step,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_change_of_the_latent_is_missed(change):
    layer = linear()
    before = layer.quantized().detach().clone()
    change(layer)
    found = layer.quantized().detach()
    assert not torch.equal(found, before)
    assert torch.equal(found, copy.deepcopy(layer).eval().quantized())


def test_outside_of_training_every_call_looks_at_the_latent(counted):
    layer = linear().eval()
    first = layer.quantized().detach()
    layer.weight.data.neg_()  # leaves no trace: an exponential moving average is swapped in like this
    assert not torch.equal(layer.quantized(), first)
    assert len(counted) == 2


def test_a_frozen_latent_is_looked_at_in_every_call():
    layer = linear().requires_grad_(False)
    first = layer.quantized()
    layer.weight.data.neg_()
    assert not torch.equal(layer.quantized(), first)


def test_values_are_let_go_at_the_end_of_training():
    layer = linear()
    layer.quantized()
    assert layer._cache is not None
    assert layer.eval()._cache is None


def test_copies_and_pickles_take_no_values_along():
    layer = linear()
    layer.quantized()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin._cache is None
        with torch.no_grad():
            twin.weight.neg_()
        assert not torch.equal(twin.quantized(), layer.quantized())


def test_a_cast_leaves_the_statistics_in_float32():
    layer = linear()
    layer.anchor.copy_(torch.tensor([[0.1, 1.1, 0.3, 1.3]]))
    before = layer.anchor.clone()
    assert torch.equal(layer.to(torch.bfloat16).anchor, before)
    assert layer.weight.dtype == torch.bfloat16
    packed = PackedLinear(13, 7, Quantization())
    packed.stats.copy_(torch.tensor([[0.1, 1.1]]))
    assert torch.equal(packed.half().stats, torch.tensor([[0.1, 1.1]]))
    assert packed.bits.dtype == torch.uint8


def test_a_compiled_layer_quantises_inside_of_its_graph():
    layer, x = linear(2), torch.randn(3, 13)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(3):
        compiled(x).square().sum().backward()
        gradient = layer.weight.grad.clone()
        layer.weight.grad = None
        layer(x).square().sum().backward()
        assert relative_error(gradient, layer.weight.grad) <= 1e-6
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_packed_layer_computes_the_same_and_holds_only_bits(bits, granularity):
    layer, x = linear(bits, granularity), torch.randn(4, 13)
    blob, table = encode([Entry("w", layer.weight.shape, layer.quantization)], [layer.weight], [layer.anchor])
    packed = PackedLinear(13, 7, layer.quantization)
    packed.load_state_dict({"bits": blob, "stats": table})
    assert torch.equal(packed.quantized(), layer.eval().quantized())
    assert torch.equal(packed(x), layer(x))
    assert sum(tensor.numel() * tensor.element_size() for tensor in packed.buffers()) == len(blob) + 8 * len(table)
    assert list(packed.parameters()) == []


def test_a_rebuilt_latent_trains_on_as_the_one_it_was_made_from():
    torch.manual_seed(0)
    layer = linear()
    entry = Entry("w", layer.weight.shape, layer.quantization)
    stats = statistics(layer.weight, 1)
    latent, anchor = rebuild(entry, pack(layer.quantization.codes(layer.weight, stats).flatten(), 1), stats)
    twin = linear()
    twin.load_state_dict({"weight": latent, "anchor": anchor})
    assert torch.equal(twin.quantized(), layer.quantized())
    x, g = torch.randn(5, 13), torch.randn(5, 7)
    for module in (layer, twin):
        module(x).backward(g)
    # straight through is the same; only (W − m) / s in the gradient of σ knows the latent itself
    assert relative_error(twin.weight.grad, layer.weight.grad) <= 0.2
