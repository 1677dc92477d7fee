"""What `grouped_lora` and its rows refuse, each with one sentence that says what to do."""

import pytest
import torch

from petune.kernels.grouped_lora import RowGroups, grouped_lora
from tests.kernels.grouped import ROWS, SCALES, Batch, batch, detached, grouped


def test_a_second_derivative_is_refused_and_not_lost():
    tensors = batch(7, 2)
    first = torch.autograd.grad(grouped(tensors, ROWS["sorted"]).sum(), tensors.x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"grouped_lora was asked for a second derivative"):
        first.square().sum().backward()


@pytest.mark.parametrize(
    ("ids", "fault"),
    [
        ([0, 5], r"row 1 asks for adapter 5 of 5; pass 0\.\.4, or -1"),
        ([-2], "row 0 asks for adapter -2"),
        (torch.tensor([0, 9]), "row 1 asks for adapter 9"),
        ([0, "b"], r"the id 'b' is no integer; pass the adapter's position"),
        ([0.0], r"the id 0\.0 is no integer"),
        (torch.zeros(2), r"ids \(2,\) torch\.float32 are not one integer a row; pass int32 or int64"),
        (torch.zeros(1, 2, dtype=torch.int64), r"ids \(1, 2\) torch\.int64 are not"),
    ],
    ids=str,
)
def test_ids_that_name_no_adapter_are_refused(ids, fault):
    with pytest.raises(ValueError, match=rf"RowGroups: {fault}"):
        RowGroups.of(ids, 5)


def test_no_adapters_are_refused():
    with pytest.raises(ValueError, match="adapters=0 is not positive; call the base layer"):
        RowGroups.of([-1], 0)


@pytest.mark.parametrize(("lead", "ids"), [((8,), (0,) * 7), ((3,), (0,) * 7), ((2, 3), ())], ids=str)
def test_tokens_that_do_not_divide_into_rows_are_refused(lead, ids):
    with pytest.raises(ValueError, match=rf"tokens, which do not divide into {len(ids)} rows; pass one id"):
        grouped(batch(*lead), ids)


@pytest.mark.parametrize("field", ["a", "b", "scales", "dropout_p", "seeds"])
def test_lists_of_another_length_are_refused(field):
    x, weight, bias, a, b = batch(7)
    named = {"a": a, "b": b, "scales": SCALES, "dropout_p": [0.1] * 5, "seeds": [0] * 5}
    named[field] = named[field][:4]
    with pytest.raises(ValueError, match=rf"4 {field}.*for 5 adapters; pass one of each for every adapter"):
        grouped_lora(x, weight, bias, groups=RowGroups.of(ROWS["sorted"], 5), **named)


@pytest.mark.parametrize(
    ("field", "shape", "fault"),
    [
        ("x", (7, 16), "do not fit"),
        ("x", (), "do not fit"),
        ("weight", (23, 16), "do not fit"),
        ("bias", (22,), "do not fit"),
        ("a", (8, 18), "do not fit"),
        ("a", (17,), "do not fit"),
        ("b", (22, 8), "do not fit"),
        ("b", (23, 7), "do not fit"),
        ("a", (0, 17), "rank 0; leave out an adapter"),
    ],
    ids=str,
)
def test_shapes_that_disagree_are_named(field, shape, fault):
    x, weight, bias, a, b = batch(7)
    named = {"x": x, "weight": weight, "bias": bias, "a": a, "b": b}
    if field in "ab":
        named[field] = [*named[field][:2], torch.randn(shape), *named[field][3:]]
        field += r"\[2\]"
    else:
        named[field] = torch.randn(shape)
    with pytest.raises(ValueError, match=rf"grouped_lora: .*{field}\W+\(.*{fault}") as error:
        grouped_lora(**named, scales=SCALES, groups=RowGroups.of(ROWS["sorted"], 5))
    assert str(tuple(shape)) in str(error.value)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, float("nan"), (0.1, 0.1, 1.5, 0.1, 0.1)], ids=str)
def test_dropout_out_of_range_is_refused(dropout_p):
    with pytest.raises(ValueError, match=r"dropout_p=.* is not in \[0, 1\)"):
        grouped(batch(7), ROWS["sorted"], dropout_p=dropout_p)


@pytest.mark.parametrize(
    ("seed", "fault"), [(torch.arange(2), r"\(2,\)"), (torch.zeros(1), "float32"), (torch.zeros(1).to("meta"), "meta")]
)
def test_seeds_that_are_no_single_integer_are_refused(seed, fault):
    with pytest.raises(ValueError, match=rf"seeds\[2\] .*{fault}.* is no integer of one element on cpu; pass an int"):
        grouped(batch(7), ROWS["sorted"], dropout_p=0.1, seeds=[1, 2, seed, 4, 5])


@pytest.mark.parametrize(
    ("index", "fault"),
    [
        (torch.arange(6), r"\(6,\) .*do not fit; pass int32 or int64 \[tokens\] = \[7\]"),
        (torch.zeros(7), "torch.float32 cpu do not fit"),
        (torch.arange(7).to("meta"), "meta do not fit"),
        (torch.arange(7) - 3, "token_index has -3; count the tokens of every adapter from 0"),
    ],
    ids=["short", "float", "meta", "negative"],
)
def test_a_token_index_that_does_not_fit_is_refused(index, fault):
    with pytest.raises(ValueError, match=fault):
        grouped(batch(7), ROWS["sorted"], dropout_p=0.1, token_index=index)


@pytest.mark.parametrize(
    ("mask", "fault"),
    [
        (
            torch.ones(7, 5),
            r"\(7, 5\) .*do not fit; pass a floating-point rank_mask \[tokens, largest rank\] = \[7, 24\]",
        ),
        (torch.ones(7, 24, dtype=torch.bool), "torch.bool cpu do not fit"),
        (torch.ones(7, 24, device="meta"), "meta do not fit"),
        (torch.ones(7, 24, requires_grad=True), "rank_mask asks for a gradient"),
    ],
    ids=["narrow", "bool", "meta", "gradient"],
)
def test_a_rank_mask_that_does_not_fit_is_refused(mask, fault):
    with pytest.raises(ValueError, match=fault):
        grouped(batch(7), ROWS["sorted"], rank_mask=mask)


def test_dtypes_of_the_base_that_disagree_are_refused_outside_of_autocast():
    x, weight, bias, a, b = batch(7)
    with pytest.raises(ValueError, match=r"weight \(23, 17\) torch.bfloat16.*differ in the dtype of the base"):
        grouped(Batch(x, weight.bfloat16(), bias, a, b), ROWS["sorted"])


@pytest.mark.parametrize("field", ["x", "weight", "bias", "a", "b"])
def test_devices_that_disagree_are_named(field):
    named = detached(batch(7))._asdict()
    moved = named[field]
    named[field] = [*moved[:4], moved[4].to("meta")] if field in "ab" else moved.to("meta")
    with pytest.raises(ValueError, match=r"meta.*are not on one device; move the model"):
        grouped(Batch(**named), ROWS["sorted"])


def test_ids_on_another_device_are_refused():
    groups = RowGroups(torch.zeros(7, dtype=torch.int64, device="meta"), 5)
    with pytest.raises(
        ValueError, match="x is on cpu and the ids of its rows are on meta; make them on the device of x"
    ):
        grouped(batch(7), groups)
