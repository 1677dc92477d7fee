"""`residual_low_rank`: the operator against float64, zeros of the gate, what it keeps for backward, and its errors."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from petune.kernels.residual_low_rank import residual_low_rank
from tests.conftest import TOLERANCE, relative_error
from tests.kernels.operands import fixed_dy, gradients, in_double, kept_tensors

OPS = torch.ops.petune
FEATURES, RANK = 17, 3


def operands(*lead: int, dtype=torch.float32, factor_dtype=None, gate_dtype=None) -> tuple[Tensor, ...]:
    """u, down, up and gate of odd sizes, an update as large as u, a gate with zeros and values above 1."""
    lead = lead or (13,)
    u = torch.randn(*lead, FEATURES).to(dtype)
    factors = torch.randn(RANK, FEATURES) * FEATURES**-0.5, torch.randn(FEATURES, RANK) * RANK**-0.5
    down, up = (t.to(factor_dtype or dtype) for t in factors)
    gate = (1.5 * torch.rand(FEATURES)).index_fill(0, torch.tensor([0, 5, 16]), 0.0).to(gate_dtype or dtype)
    return tuple(t.requires_grad_() for t in (u, down, up, gate))


def plain(u: Tensor, down: Tensor, up: Tensor, gate: Tensor) -> Tensor:
    return gate * (u + F.linear(F.linear(u, down), up))


# --- the formula ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (1,), (13,), (2, 5), (2, 3, 5), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradients_match_float64(lead, dtype):
    _, *rest = operands(dtype=dtype)
    tensors = (torch.randn(*lead, FEATURES, dtype=dtype, requires_grad=True), *rest)
    ours, peer = gradients(residual_low_rank, tensors), gradients(plain, tensors)
    for out, other, reference in zip(ours, peer, gradients(plain, in_double(tensors)), strict=True):
        assert out.dtype == dtype
        assert out.shape == reference.shape
        assert relative_error(out, reference) <= max(2 * TOLERANCE[dtype], 1.1 * relative_error(other, reference))


@pytest.mark.parametrize("trained", ["u", "d", "p", "g", "ud", "up", "ug", "dp", "dg", "pg", "dpg", "udpg"])
def test_gradcheck_in_double_of_every_subset(trained):
    tensors = operands(2, 5, dtype=torch.float64)
    for name, tensor in zip("udpg", tensors, strict=True):
        tensor.requires_grad_(name in trained)
    assert torch.autograd.gradcheck(residual_low_rank, tensors)


def test_a_gate_of_one_and_a_factor_of_zero_are_the_identity_to_the_bit():
    for dtype in (torch.float32, torch.bfloat16):
        u, down, up, gate = operands(dtype=dtype)
        assert torch.equal(residual_low_rank(u, down, up * 0, torch.ones_like(gate)), u)


def test_a_channel_whose_gate_is_zero_is_zero_and_passes_nothing_back_but_to_its_gate():
    u, down, up, gate = operands(31)
    z, du, ddown, dup, dgate = gradients(residual_low_rank, (u, down, up, gate))
    closed = gate == 0
    assert closed.sum() == 3
    assert z[:, closed].eq(0).all()
    assert dup[closed].eq(0).all()
    # the closed channels still reach the open ones through down
    assert du[:, closed].ne(0).all()
    assert ddown[:, closed].ne(0).all()
    assert dgate[closed].ne(0).all()


def test_a_gate_of_zeros_alone_gives_zeros_and_a_gradient_of_the_gate_alone():
    u, down, up, gate = operands()
    gate = torch.zeros_like(gate).requires_grad_()
    z, du, ddown, dup, dgate = gradients(residual_low_rank, (u, down, up, gate))
    assert not any(t.any() for t in (z, du, ddown, dup))
    assert relative_error(dgate, gradients(plain, (u, down, up, gate))[-1]) <= TOLERANCE[torch.float32]


def test_the_gradient_of_the_gate_is_right_where_the_update_cancels_u():
    u, _, _, gate = operands(40)
    basis = torch.linalg.qr(torch.randn(FEATURES, FEATURES))[0][:, :RANK].contiguous()
    tensors = (u, basis.T.contiguous().requires_grad_(), (-basis).requires_grad_(), gate)  # I − B Bᵀ, a projection
    for out, reference in zip(
        gradients(residual_low_rank, tensors), gradients(plain, in_double(tensors)), strict=True
    ):
        assert relative_error(out, reference) <= TOLERANCE[torch.float32]


def test_fp32_factors_and_gate_on_bf16_activations_get_fp32_gradients_nearer_than_bf16_ones():
    tensors = operands(512, dtype=torch.bfloat16, factor_dtype=torch.float32, gate_dtype=torch.float32)
    low = tuple(t.detach().bfloat16().requires_grad_() for t in tensors)
    ours, theirs = gradients(residual_low_rank, tensors), gradients(plain, low)
    assert [t.dtype for t in ours] == [torch.bfloat16] * 2 + [torch.float32] * 3
    for out, other, reference in zip(ours[2:], theirs[2:], gradients(plain, in_double(tensors))[2:], strict=True):
        assert relative_error(out, reference) < relative_error(other, reference)


@pytest.mark.parametrize(
    ("factor_dtype", "gate_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["factors", "gate"],
)
def test_the_factors_and_the_gate_may_differ_in_dtype(factor_dtype, gate_dtype):
    tensors = operands(64, dtype=torch.bfloat16, factor_dtype=factor_dtype, gate_dtype=gate_dtype)
    ours = gradients(residual_low_rank, tensors)
    assert [t.dtype for t in ours] == [torch.bfloat16] * 2 + [factor_dtype] * 2 + [gate_dtype]
    for out, reference in zip(ours, gradients(plain, in_double(tensors)), strict=True):
        assert relative_error(out, reference) <= 2 * TOLERANCE[torch.bfloat16]


def test_strided_inputs_are_kept_in_place_and_give_the_same_result():
    u, down, up, gate = operands(6, 4)
    strided = u.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    turned = (down.detach().T.contiguous().T.requires_grad_(), up.detach().T.contiguous().T.requires_grad_())
    wide = gate.detach().repeat_interleave(2)[::2].requires_grad_()
    assert not any(t.is_contiguous() for t in (strided, *turned, wide))
    ours, same = (gradients(residual_low_rank, t) for t in ((strided, *turned, wide), (u, down, up, gate)))
    for left, right in zip(ours, same, strict=True):
        assert relative_error(left, right) <= 1e-6
    kept = kept_tensors(lambda: residual_low_rank(strided, *turned, wide))
    assert strided.data_ptr() in {t.data_ptr() for t in kept}


@pytest.mark.parametrize(
    "dz", [torch.ones(()).expand(6, FEATURES), torch.randn(FEATURES, 6).T], ids=["sum", "columns"]
)
def test_a_gradient_of_any_strides_is_taken(dz):
    tensors = operands(6)
    for out, reference in zip(
        gradients(residual_low_rank, tensors, dz), gradients(plain, in_double(tensors), dz.double()), strict=True
    ):
        assert relative_error(out, reference) <= TOLERANCE[torch.float32]


def test_in_place_operators_may_follow():
    tensors = operands()
    z = residual_low_rank(*tensors)
    z += 1
    z.relu_().sum().backward()
    exact = torch.autograd.grad((plain(*tensors) + 1).relu().sum(), tensors)
    for tensor, reference in zip(tensors, exact, strict=True):
        assert relative_error(tensor.grad, reference) <= TOLERANCE[torch.float32]


# --- what is kept for backward -------------------------------------------------------------------------------------


def test_only_u_itself_and_a_product_of_rank_size_are_kept():
    tensors = operands(50)
    kept = kept_tensors(lambda: residual_low_rank(*tensors))
    own = {t.data_ptr() for t in tensors}
    assert tensors[0].data_ptr() in {t.data_ptr() for t in kept}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in own) == 50 * RANK * 4


def test_a_frozen_map_keeps_nothing_of_the_size_of_u():
    u, *rest = operands(50)
    for tensor in rest:
        tensor.requires_grad_(False)
    kept = kept_tensors(lambda: residual_low_rank(u, *rest))
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in rest}


def test_autocast_keeps_the_fp32_input_and_no_copy_of_it():
    tensors = operands(50)
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_tensors(lambda: residual_low_rank(*tensors))
    own = {t.data_ptr() for t in tensors}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in own) == 50 * RANK * 2


def test_nothing_is_kept_without_gradients():
    with torch.no_grad():
        assert kept_tensors(lambda: residual_low_rank(*operands())) == []


# --- torch's own machinery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_multiplies_in_its_dtype_and_leaves_the_stream_in_that_of_u(dtype, cast):
    tensors = operands(9, dtype=dtype, factor_dtype=torch.float32, gate_dtype=torch.float32)
    with torch.autocast("cpu", cast):
        z = residual_low_rank(*tensors)
        open_gate = residual_low_rank(*tensors[:2], torch.zeros_like(tensors[2]), torch.ones_like(tensors[3]))
    assert z.dtype == dtype
    assert torch.equal(open_gate, tensors[0])
    ours = [z, *torch.autograd.grad(z.sum(), tensors)]
    exact = gradients(plain, in_double(tensors), torch.ones(9, FEATURES, dtype=torch.float64))
    for out, tensor, reference in zip(ours, (tensors[0], *tensors), exact, strict=True):
        assert out.dtype == tensor.dtype
        assert relative_error(out, reference) <= 2 * max(TOLERANCE[cast], TOLERANCE[dtype])


def test_ops_pass_opcheck():
    u, down, up, gate = operands(2, 5)
    torch.library.opcheck(OPS.residual_low_rank_forward.default, (u, down, up, gate, torch.float32))
    u, down, up, gate = (t.detach() for t in (u, down, up, gate))
    z, s = OPS.residual_low_rank_forward(u, down, up, gate, torch.float32)
    for kept_u, kept_s, needs in (
        (u, s, [True] * 4),
        (None, None, [True, False, False, False]),
        (u, None, [False, True, False, False]),
        (None, s, [True, False, True, False]),
    ):
        arguments = (z, kept_u, kept_s, down, up, gate, torch.float32, needs)
        torch.library.opcheck(OPS.residual_low_rank_backward.default, arguments)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_into_one_graph(autocast):
    tensors = operands(2, 5)

    def step(*tensors):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return residual_low_rank(*tensors)

    compiled = gradients(torch.compile(step, backend="aot_eager", fullgraph=True), tensors)
    for out, reference in zip(compiled, gradients(step, tensors), strict=True):
        assert relative_error(out, reference) <= 1e-6


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(use_reentrant):
    tensors = operands()
    direct = gradients(residual_low_rank, tensors)
    z = checkpoint(residual_low_rank, *tensors, use_reentrant=use_reentrant)
    z.backward(fixed_dy(z))
    for out, reference in zip((z, *(t.grad for t in tensors)), direct, strict=True):
        assert torch.equal(out, reference)


def test_torch_func_differentiates_it_twice_and_per_sample():
    u, down, up, gate = (t.detach() for t in operands(dtype=torch.float64))

    def loss(function, gate, u):
        return function(u, down, up, gate).square().sum()

    for transform in (torch.func.hessian, lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(None, 0))):
        ours, exact = (transform(partial(loss, function))(gate, u) for function in (residual_low_rank, plain))
        assert relative_error(ours, exact) <= TOLERANCE[torch.float64]


def test_meta_tensors_give_shapes():
    z = residual_low_rank(*(t.detach().to("meta") for t in operands(2, 5)))
    assert (z.shape, z.device.type) == ((2, 5, FEATURES), "meta")


def test_flops_count_the_low_rank_products():
    u, down, up, gate = operands(13)
    product = 2 * 13 * FEATURES * RANK
    with FlopCounterMode(display=False) as counter:
        z = residual_low_rank(u, down, up, gate)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(z.sum(), (u, down, up, gate), retain_graph=True)
    assert counter.get_total_flops() == 4 * product
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(residual_low_rank(u.detach(), down, up.detach(), gate.detach()).sum(), down)
    assert counter.get_total_flops() == (2 + 2) * product


# --- errors --------------------------------------------------------------------------------------------------------


def test_a_second_derivative_is_refused_and_not_lost():
    tensors = operands()
    first = torch.autograd.grad(residual_low_rank(*tensors).sum(), tensors[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"residual_low_rank was asked for a second derivative"):
        first.square().sum().backward()


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("u", (4, 16)),
        ("u", ()),
        ("down", (3, 18)),
        ("down", (2, 17)),
        ("down", (17,)),
        ("up", (16, 3)),
        ("up", (17, 4)),
        ("gate", (16,)),
        ("gate", (1, 17)),
        ("gate", ()),
    ],
    ids=str,
)
def test_shapes_that_disagree_are_named(field, shape):
    tensors = dict(zip(("u", "down", "up", "gate"), operands(4), strict=True)) | {field: torch.randn(shape)}
    expected = rf"residual_low_rank: .*{field}\W+\(.*do not fit; pass \[\.\.\., features\]"
    with pytest.raises(ValueError, match=expected) as error:
        residual_low_rank(**tensors)
    assert f"{field} {tuple(shape)}" in str(error.value)


@pytest.mark.parametrize("moved", range(4))
def test_devices_that_disagree_are_named(moved):
    tensors = list(operands())
    tensors[moved] = tensors[moved].detach().to("meta")
    with pytest.raises(ValueError, match=r"cpu.*are not on one device; move the model"):
        residual_low_rank(*tensors)
