"""`assign`, `expert_in` and `expert_out`: against one pair after another, what is refused, torch's own machinery."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from petune.kernels.expert_linear import Assignment, assign, expert_in, expert_out, reference
from tests.conftest import TOLERANCE, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EXPERTS, SIZE, WIDTH = 7, 5, 11
# (tokens, experts, k): no token, one, one expert of each, all of them, more experts than pairs
CASES = [(0, 7, 3), (1, 7, 3), (1, 1, 1), (13, 7, 1), (13, 7, 7), (13, 7, 3), (3, 65, 2), (129, 6, 2)]


@pytest.fixture
def buffer_elements(request, monkeypatch):
    monkeypatch.setattr(reference, "BUFFER_ELEMENTS", request.param)


def both_sums(test):
    """The test with the products in a buffer, and without."""
    sizes = pytest.mark.parametrize(
        "buffer_elements", [2**22, 0], ids=["one sum", "a sum by each expert"], indirect=True
    )
    return sizes(pytest.mark.usefixtures("buffer_elements")(test))


def choose(tokens: int, experts: int, k: int) -> Tensor:
    return torch.rand(tokens, experts).topk(k, dim=1).indices.sort(dim=1).values


def operands(tokens: int, experts: int, k: int, dtype=torch.float32):
    """x, h, weight, the bias of each expert, the bias of the output, and the chosen experts."""
    shapes = (tokens, WIDTH), (tokens * k, SIZE), (experts, SIZE, WIDTH), (experts, SIZE), (WIDTH,)
    return *(torch.randn(shape).to(dtype) for shape in shapes), choose(tokens, experts, k)


def pairs_of(chosen: Tensor) -> list[tuple[int, int]]:
    """(expert, token) of each pair in order, by the definition."""
    return sorted((expert, token) for token, experts in enumerate(chosen.tolist()) for expert in experts)


def exact_in(x: Tensor, weight: Tensor, bias: Tensor, chosen: Tensor) -> Tensor:
    x, weight, bias = x.double(), weight.double(), bias.double()
    rows = [x[token] @ weight[expert].T + bias[expert] for expert, token in pairs_of(chosen)]
    return torch.stack(rows) if rows else x.new_empty(0, weight.shape[1])


def exact_out(h: Tensor, weight: Tensor, bias: Tensor, chosen: Tensor) -> Tensor:
    y = bias.double().repeat(len(chosen), 1)
    for row, (expert, token) in zip(h.double(), pairs_of(chosen), strict=True):
        y[token] += row @ weight[expert].double()
    return y


# --- the pairs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "experts", "k"), CASES, ids=str)
def test_pairs_are_sorted_by_expert_and_then_by_token(tokens, experts, k):
    chosen = choose(tokens, experts, k)
    assignment = assign(chosen, experts)
    pairs = pairs_of(chosen)
    assert assignment.tokens.tolist() == [token for _, token in pairs]
    assert assignment.offsets.tolist() == [sum(e < expert for e, _ in pairs) for expert in range(experts + 1)]
    places = [[pairs.index((expert, token)) for expert in row] for token, row in enumerate(chosen.tolist())]
    assert assignment.places.tolist() == places
    assert (assignment.k, assignment.places.shape) == (k, (tokens, k))


@pytest.mark.parametrize(
    "chosen",
    [torch.zeros(4, dtype=torch.int64), torch.zeros(4, 2), torch.zeros(4, 2).int(), torch.zeros(4, 0).long()],
    ids=["no k", "float", "int32", "no experts"],
)
def test_a_choice_that_is_none_is_refused(chosen):
    with pytest.raises(
        ValueError, match=rf"chosen .*{chosen.dtype} does not give .* pass int64 \[tokens, k\], k in 1"
    ):
        assign(chosen, 3)


def test_more_experts_of_a_token_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"chosen \(4, 3\) .* some of 2 experts; pass .* k in 1\.\.2"):
        assign(choose(4, 5, 3), 2)


# --- the formula ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "experts", "k"), CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_gets_the_rows_of_its_expert(dtype, tokens, experts, k):
    x, _, weight, bias, _, chosen = operands(tokens, experts, k, dtype)
    h = expert_in(x, weight, bias, assign(chosen, experts))
    assert (h.shape, h.dtype) == ((tokens * k, SIZE), dtype)
    assert relative_error(h, exact_in(x, weight, bias, chosen)) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("tokens", "experts", "k"), CASES, ids=str)
@both_sums
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_token_gets_the_sum_of_its_pairs(dtype, tokens, experts, k):
    _, h, weight, _, bias, chosen = operands(tokens, experts, k, dtype)
    y = expert_out(h, weight, bias, assign(chosen, experts))
    assert (y.shape, y.dtype) == ((tokens, WIDTH), dtype)
    # a product and the sum are each rounded to the dtype
    assert relative_error(y, exact_out(h, weight, bias, chosen)) <= 2 * TOLERANCE[dtype]


def test_together_they_are_the_masked_dense_layers():
    x, _, weight, bias, out_bias, chosen = operands(13, EXPERTS, 3)
    second = torch.randn(EXPERTS, SIZE, WIDTH)
    assignment = assign(chosen, EXPERTS)
    y = expert_out(torch.relu(expert_in(x, weight, bias, assignment)), second, out_bias, assignment)
    mask = torch.zeros(13, EXPERTS).scatter_(1, chosen, 1.0).repeat_interleave(SIZE, dim=1)
    dense = torch.relu(torch.nn.functional.linear(x, weight.flatten(0, 1), bias.flatten()) * mask)
    assert relative_error(y, dense @ second.flatten(0, 1) + out_bias) <= TOLERANCE[torch.float32]


def test_no_bias_is_a_bias_of_zeros():
    x, h, weight, bias, out_bias, chosen = operands(13, EXPERTS, 3)
    assignment = assign(chosen, EXPERTS)
    pairs = expert_in(x, weight, None, assignment)
    assert relative_error(pairs, expert_in(x, weight, bias * 0, assignment)) <= TOLERANCE[torch.float32]
    sums = expert_out(h, weight, None, assignment)
    assert torch.equal(sums, expert_out(h, weight, out_bias * 0, assignment))


@both_sums
def test_many_products_of_16_bits_are_added_in_fp32():
    h, weight = torch.ones(5 * 65, 1).bfloat16(), torch.ones(65, 1, 3).bfloat16()
    weight[0] = 256.0
    y = expert_out(h, weight, None, assign(choose(5, 65, 65), 65))
    assert torch.equal(y, torch.full((5, 3), 320.0).bfloat16())  # in bf16 256 + 1 is 256


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_in_a_buffer_are_added_in_the_order_of_those_that_are_not(dtype, monkeypatch):
    _, h, weight, _, bias, chosen = operands(67, EXPERTS, 5, dtype)
    y = expert_out(h, weight, bias, assign(chosen, EXPERTS))
    monkeypatch.setattr(reference, "BUFFER_ELEMENTS", 0)
    assert torch.equal(y, expert_out(h, weight, bias, assign(chosen, EXPERTS)))


def test_a_token_alone_has_the_result_that_it_has_among_others():
    x, _, weight, bias, out_bias, chosen = operands(67, EXPERTS, 3)
    assignment = assign(chosen, EXPERTS)
    together = expert_out(expert_in(x, weight, bias, assignment), weight, out_bias, assignment)
    for token in (0, 31, 66):
        alone = assign(chosen[token : token + 1], EXPERTS)
        y = expert_out(expert_in(x[token : token + 1], weight, bias, alone), weight, out_bias, alone)
        assert relative_error(y[0], together[token]) <= TOLERANCE[torch.float32]


def test_what_is_not_finite_reaches_its_token_and_no_other():
    x, _, weight, bias, out_bias, chosen = operands(13, EXPERTS, 3)
    x[4, 2] = torch.nan
    assignment = assign(chosen, EXPERTS)
    y = expert_out(expert_in(x, weight, bias, assignment), weight, out_bias, assignment)
    assert y[4].isnan().all()
    assert y[torch.arange(13) != 4].isfinite().all()


def test_strided_operands_give_the_same_result():
    x, h, weight, bias, out_bias, chosen = operands(13, EXPERTS, 3)
    assignment = assign(chosen, EXPERTS)
    transposed = weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    every_second = torch.stack((bias, bias), dim=2).flatten(1)[:, ::2]
    same = expert_in(x.T.contiguous().T, transposed, every_second, assignment)
    assert relative_error(same, expert_in(x, weight, bias, assignment)) <= TOLERANCE[torch.float32]
    same = expert_out(h.T.contiguous().T, transposed, out_bias, assignment)
    assert relative_error(same, expert_out(h, weight, out_bias, assignment)) <= TOLERANCE[torch.float32]


# --- torch's own machinery -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_linear_does(dtype):
    x, h, weight, bias, out_bias, chosen = operands(13, EXPERTS, 3)
    assignment = assign(chosen, EXPERTS)
    with torch.autocast(x.device.type, dtype):
        pairs, y = expert_in(x, weight, bias, assignment), expert_out(h, weight, out_bias, assignment)
    assert pairs.dtype == y.dtype == dtype
    assert relative_error(pairs, exact_in(x, weight, bias, chosen)) <= 3 * TOLERANCE[dtype]
    assert relative_error(y, exact_out(h, weight, out_bias, chosen)) <= 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_the_ops_pass_opcheck(with_bias):
    x, h, weight, bias, out_bias, chosen = operands(13, EXPERTS, 3)
    if not with_bias:
        bias = out_bias = None
    tokens, offsets, places = assign(chosen, EXPERTS)
    op = torch.ops.petune
    torch.library.opcheck(op.expert_in.default, (x, weight, bias, tokens, offsets, torch.float32))
    torch.library.opcheck(op.expert_out.default, (h, weight, out_bias, tokens, offsets, places, torch.float32))


def test_they_compile_into_one_graph_with_the_assignment():
    x, _, weight, bias, out_bias, chosen = operands(13, EXPERTS, 3)

    def layers(x: Tensor, chosen: Tensor) -> Tensor:
        assignment = assign(chosen, EXPERTS)
        return expert_out(expert_in(x, weight, bias, assignment), weight, out_bias, assignment)

    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, chosen), layers(x, chosen))


def test_meta_tensors_give_shapes():
    x, h, weight, bias, out_bias, chosen = (t.to("meta") for t in operands(13, EXPERTS, 3))
    assignment = assign(chosen, EXPERTS)
    pairs, y = expert_in(x, weight, bias, assignment), expert_out(h, weight, out_bias, assignment)
    assert (pairs.shape, pairs.device.type) == ((39, SIZE), "meta")
    assert (y.shape, y.device.type) == ((13, WIDTH), "meta")


def test_flops_count_the_chosen_pairs_alone():
    x, h, weight, bias, out_bias, chosen = operands(13, EXPERTS, 3)
    assignment = assign(chosen, EXPERTS)
    for call in (partial(expert_in, x, weight, bias), partial(expert_out, h, weight, out_bias)):
        with FlopCounterMode(display=False) as counter:
            call(assignment)
        assert counter.get_total_flops() == 2 * 13 * 3 * SIZE * WIDTH


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls():
    """By name, the operator and its operands by name."""
    x, h, weight, bias, out_bias, chosen = operands(13, EXPERTS, 3)
    shared = {"weight": weight, "assignment": assign(chosen, EXPERTS)}
    return {
        "expert_in": (expert_in, {"x": x, "bias": bias, **shared}),
        "expert_out": (expert_out, {"h": h, "bias": out_bias, **shared}),
    }


def fields(*, of_in: list[str], of_out: list[str]):
    return pytest.mark.parametrize(
        ("name", "field"), [("expert_in", f) for f in of_in] + [("expert_out", f) for f in of_out]
    )


@fields(of_in=["x", "weight", "bias"], of_out=["h", "weight", "bias"])
def test_a_call_that_needs_a_gradient_is_refused_and_one_that_does_not_is_not(calls, name, field):
    call, named = calls[name]
    named[field].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"{name} was asked for the gradient of {field} and.*torch\.no_grad"):
        call(**named)
    with torch.no_grad():
        assert not call(**named).requires_grad


@fields(of_in=["x", "weight", "bias"], of_out=["h", "weight", "bias"])
@pytest.mark.parametrize(
    "change",
    [lambda t: t[..., :-1], lambda t: t[:-1], lambda t: t.unsqueeze(0)],
    ids=["last axis", "first axis", "one axis more"],
)
def test_shapes_that_disagree_are_named(calls, name, field, change):
    call, named = calls[name]
    wrong = change(named[field])
    with pytest.raises(ValueError, match=rf"{name}: .*do not fit; pass \[.* and the assignment of these") as error:
        call(**named | {field: wrong})
    assert f"{field} {tuple(wrong.shape)}" in str(error.value)


@fields(of_in=["assignment"], of_out=["assignment"])
@pytest.mark.parametrize("part", ["tokens", "offsets", "places"])
def test_an_assignment_of_other_tokens_or_experts_is_refused(calls, name, field, part):
    call, named = calls[name]
    own: Assignment = named[field]
    with pytest.raises(ValueError, match=rf"{name}: .*{part} .*do not fit; pass .* the assignment of these tokens"):
        call(**named | {field: own._replace(**{part: getattr(own, part)[:-1]})})


@fields(of_in=["x", "weight", "bias"], of_out=["h", "weight", "bias"])
def test_devices_that_disagree_are_named(calls, name, field):
    call, named = calls[name]
    with pytest.raises(ValueError, match=rf"{name}: .*meta.*; move the model"):
        call(**named | {field: named[field].to("meta")})


@fields(of_in=["weight", "bias"], of_out=["weight", "bias"])
def test_dtypes_that_disagree_are_refused_outside_of_autocast(calls, name, field):
    call, named = calls[name]
    with pytest.raises(ValueError, match=rf"{field} \(.*\) torch.bfloat16.*differ in the dtype of the base"):
        call(**named | {field: named[field].bfloat16()})
