"""Calls of several runs put together and taken apart again; coroutines that take turns."""

import os
import random
import signal
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from petune.many.calls import JointOutput, Span, kind_of, merge, read_call
from petune.many.crew import Member, RunStoppedError
from petune.many.dropout import DropoutByRun


def model(input_ids=None, attention_mask=None, position_ids=None, labels=None, use_cache=None, **kwargs):
    raise AssertionError("only its signature is read")


def call(rows: int, length: int, **arguments: object):
    return read_call(model, (torch.ones(rows, length, dtype=torch.long),), arguments)


# ------------------------------------------------------------------------------------------------------------ calls


def test_sequences_of_other_lengths_are_padded_and_a_mask_hides_the_padding():
    arguments, spans = merge([call(2, 3), call(1, 5), call(3, 5, attention_mask=torch.zeros(3, 5, dtype=torch.long))])
    assert arguments["input_ids"].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[1] * 5] * 4
    assert arguments["attention_mask"].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[1] * 5] + [[0] * 5] * 3
    assert spans == [Span(0, 2, 3, 5), Span(2, 3, 5, 5), Span(3, 6, 5, 5)]
    assert arguments["use_cache"] is False


def test_one_call_is_left_as_it_is():
    arguments, spans = merge([call(2, 3)])
    assert "attention_mask" not in arguments
    assert spans == [Span(0, 2, 3, 3)]


@pytest.mark.parametrize(
    ("arguments", "alike"),
    [
        ({}, True),
        ({"attention_mask": torch.ones(2, 4)}, True),
        ({"labels": torch.zeros(2)}, False),  # a loss over all rows
        ({"position_ids": torch.zeros(2, 4)}, False),  # a packed text without a mask
        ({"position_ids": torch.zeros(1, 4)}, False),  # not made of rows
        ({"scale": 2.0}, False),
        ({"cache": object()}, False),
    ],
)
def test_calls_that_differ_in_more_than_rows_and_length_are_of_other_kinds(arguments, alike):
    assert (kind_of(call(2, 4, **arguments)) == kind_of(call(3, 6))) is alike


def test_images_are_alike_where_their_sizes_are():
    def image(rows: int, size: int):
        return read_call(lambda pixel_values: None, (torch.zeros(rows, 3, size, size),), {})

    assert kind_of(image(2, 8)) == kind_of(image(5, 8))
    assert kind_of(image(2, 8)) != kind_of(image(2, 9))
    merged, spans = merge([image(2, 8), image(1, 8)])
    assert merged["pixel_values"].shape == (3, 3, 8, 8)
    assert [(span.start, span.stop) for span in spans] == [(0, 2), (2, 3)]


def test_autocast_of_the_caller_is_part_of_the_call():
    with torch.autocast("cpu", torch.bfloat16):
        inside = call(2, 4)
    assert inside.autocast == torch.bfloat16
    assert kind_of(inside) != kind_of(call(2, 4))


def test_each_run_gets_its_rows_and_its_gradients_go_back_to_them():
    hidden = torch.randn(3, 5, 5, requires_grad=True)  # width and length alike, on purpose
    pooled = hidden[:, 0] * 2
    output = BaseModelOutputWithPooling(last_hidden_state=hidden * 1, pooler_output=pooled, attentions=None)
    joint = JointOutput(output, [Span(0, 2, 3, 5), Span(2, 3, 5, 5)])
    first, second = joint.parts
    assert isinstance(first, BaseModelOutputWithPooling)
    assert first.last_hidden_state.shape == (2, 3, 5)
    assert first.pooler_output.shape == (2, 5)
    assert second.last_hidden_state.shape == (1, 5, 5)
    first.last_hidden_state.sum().backward()
    (3 * second.pooler_output).sum().backward()
    joint.backward([True, True])
    assert hidden.grad[:2, :3].eq(1).all()
    assert hidden.grad[:2, 3:].eq(0).all()
    assert hidden.grad[2, 0].eq(6).all()
    assert hidden.grad[2, 1:].eq(0).all()


def test_the_gradients_of_a_run_that_failed_do_not_count():
    hidden = torch.randn(2, 4, requires_grad=True)
    joint = JointOutput((hidden * 1,), [Span(0, 1, 1, 1), Span(1, 2, 1, 1)])
    for (part,) in joint.parts:
        part.sum().backward()
    joint.backward([False, True])
    assert hidden.grad.tolist() == [[0.0] * 4, [1.0] * 4]


# ------------------------------------------------------------------------------------------------------------- crew


def test_members_run_by_turns_and_answers_reach_them():
    said = []

    def work(member):
        said.append(("asked", member.name, member.pause(1)))
        return member.pause(2)

    members = [Member(name, work) for name in "ab"]
    assert [member.advance() for member in members] == [1, 1]
    assert [member.advance(f"for {member.name}") for member in members] == [2, 2]
    assert said == [("asked", "a", "for a"), ("asked", "b", "for b")]
    for member in members:
        assert member.advance("end") is None
        assert (member.finished, member.result, member.error) == (True, "end", None)


def test_each_member_draws_from_generators_of_its_own():
    def draws() -> tuple[float, float, float]:
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    def work(member):
        torch.manual_seed(member.seed)
        np.random.seed(member.seed)  # noqa: NPY002
        random.seed(member.seed)
        os.environ["PL_GLOBAL_SEED"] = str(member.seed)
        found = []
        for _ in range(3):
            found.append(draws())
            member.pause(None)
        return found, os.environ["PL_GLOBAL_SEED"]

    def run(seeds):
        members = [Member(str(seed), work) for seed in seeds]
        for member, seed in zip(members, seeds, strict=True):
            member.seed = seed
        while not all(member.finished for member in members):
            for member in members:
                member.advance()
                draws()  # the owner's own, in between
        return [member.result for member in members]

    before = os.environ.get("PL_GLOBAL_SEED")
    together = run([3, 4])
    assert together == [*run([3]), *run([4])]
    assert together[0][0] != together[1][0]
    assert os.environ.get("PL_GLOBAL_SEED") == before


def test_the_owner_draws_from_a_member_s_generator_between_what_the_member_draws():
    def work(member):
        torch.manual_seed(5)
        found = [torch.rand(1)]
        for _ in range(2):
            member.pause(None)
            found.append(torch.rand(1))
        return found

    member = Member("a", work)
    member.advance()
    drawn = [torch.rand(1, generator=member.generator) for _ in range(2)]
    with member.draws():
        drawn.append(torch.rand(1))
    drawn.append(torch.rand(1, generator=member.generator))
    member.advance()
    before = member.random
    drawn.append(torch.rand(1, generator=member.generator))
    member.random = before
    assert torch.equal(torch.rand(1, generator=member.generator), drawn[-1])
    member.random = before
    member.advance()
    torch.manual_seed(5)
    first, *others = (torch.rand(1) for _ in range(7))
    assert torch.equal(torch.cat([member.result[0], *drawn[:4], member.result[1]]), torch.cat([first, *others[:5]]))
    assert torch.equal(member.result[2], others[5])
    assert torch.equal(drawn[4], others[5])


def test_a_member_that_is_stopped_cleans_up_whatever_it_asks_for_on_its_way():
    seen = []

    def work(member):
        try:
            member.pause("first")
        finally:
            seen.append("cleaned")
            member.pause("once more")

    member = Member("a", work)
    member.advance()
    member.stop()
    assert seen == ["cleaned"]
    assert isinstance(member.error, RunStoppedError)
    Member("never started", work).stop()


def test_each_member_has_modes_of_autograd_and_autocast_of_its_own():
    def modes() -> tuple[bool, bool, torch.dtype]:
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def work(member):
        found = [modes()]
        with torch.no_grad(), torch.autocast("cpu", member.dtype):
            for _ in range(2):
                found.append(modes())
                member.pause(None)
        return [*found, modes()]

    before = modes()
    members = [Member(str(dtype), work) for dtype in (torch.bfloat16, torch.float16)]
    for member, dtype in zip(members, (torch.bfloat16, torch.float16), strict=True):
        member.dtype = dtype
    while not all(member.finished for member in members):
        for member in members:
            member.advance()
            assert modes() == before
    for member in members:
        inside = (False, True, member.dtype)
        assert member.result == [before, inside, inside, before]


def test_what_autocast_has_cast_for_one_member_is_not_taken_after_its_weights_have_moved():
    weight = torch.ones(2, 2, requires_grad=True)

    def product():
        return (torch.ones(1, 2) @ weight).sum().item()

    def work(member):
        with torch.autocast("cpu", torch.bfloat16):
            found = [product()]
            member.pause(None)
            return [*found, product()]

    member = Member("a", work)
    member.advance()
    with torch.no_grad():
        weight.mul_(2)
    member.advance()
    assert member.result == [4.0, 8.0]


def test_an_interrupt_in_the_work_reaches_the_owner_as_one_and_an_exit_is_an_error():
    def interrupted(_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # as Lightning does

    with pytest.raises(KeyboardInterrupt):
        Member("a", interrupted).advance()
    member = Member("b", lambda _: sys.exit(2))
    assert member.advance() is None
    assert isinstance(member.error, SystemExit)


def test_signal_handlers_of_the_others_outlive_a_member_that_puts_back_those_before_its_own():
    def handler(*_: object) -> None:
        raise AssertionError

    def work(member):
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        member.pause(None)
        signal.signal(signal.SIGTERM, before)

    at_first = signal.getsignal(signal.SIGTERM)
    try:
        member = Member("a", work)
        member.advance()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        signal.signal(signal.SIGTERM, handler)
        member.advance()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, at_first)


# ---------------------------------------------------------------------------------------------------------- dropout


class Own:
    """A run's generator, for one run."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)


def test_rows_drop_what_they_drop_alone_whatever_they_are_padded_to():
    x = torch.rand(3, 7, 6) + 1
    parts = [(Own(1), Span(0, 2, 5, 7)), (Own(2), Span(2, 3, 7, 7))]
    with DropoutByRun(parts):
        mixed = F.dropout(x, 0.4)
    torch.manual_seed(1)
    assert torch.equal(mixed[:2, :5], F.dropout(x[:2, :5], 0.4))
    assert mixed[:2, 5:].eq(0).all()
    torch.manual_seed(2)
    assert torch.equal(mixed[2:], F.dropout(x[2:], 0.4))


def test_attention_drops_what_it_drops_alone():
    q, k, v = torch.randn(3, 3, 2, 7, 4).unbind(0)
    mask = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    mask[:2, :, :, 5:] = False
    parts = [(Own(1), Span(0, 2, 5, 7)), (Own(2), Span(2, 3, 7, 7))]
    with DropoutByRun(parts):
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.3)
    torch.manual_seed(1)
    own = F.scaled_dot_product_attention(*(t[:2, :, :5] for t in (q, k, v)), mask[:2, :, :5, :5], dropout_p=0.3)
    torch.testing.assert_close(mixed[:2, :, :5], own)  # a weight that is dropped or not is some hundredths
    torch.manual_seed(2)
    own = F.scaled_dot_product_attention(q[2:], k[2:], v[2:], mask[2:], dropout_p=0.3)
    torch.testing.assert_close(mixed[2:], own)


@pytest.mark.parametrize(
    "given",
    [
        {"is_causal": True},
        {"scale": 0.3},
        {"enable_gqa": True},
        {"attn_mask": torch.zeros(2, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)},
        {},
    ],
    ids=lambda given: next(iter(given), "plain"),
)
def test_attention_is_torch_s(given):
    q, k, v = (torch.randn(2, heads, 5, 8, requires_grad=True) for heads in (4, 2, 2))
    if not given.get("enable_gqa"):
        k, v = (t.detach().repeat(1, 2, 1, 1).requires_grad_() for t in (k, v))
    with DropoutByRun([(Own(1), Span(0, 1, 5, 5)), (Own(2), Span(1, 2, 5, 5))]):
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, **given)
    own = []
    for row in (0, 1):
        torch.manual_seed(row + 1)
        rows = {**given, "attn_mask": mask[row : row + 1]} if (mask := given.get("attn_mask")) is not None else given
        own.append(F.scaled_dot_product_attention(*(t[row : row + 1] for t in (q, k, v)), dropout_p=0.3, **rows))
    for ours, theirs in zip(
        (mixed, *torch.autograd.grad(mixed.square().sum(), (q, k, v))),
        (alone := torch.cat(own), *torch.autograd.grad(alone.square().sum(), (q, k, v))),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_token_that_may_attend_to_nothing_is_no_nan():
    q, k, v = torch.randn(3, 2, 1, 4, 4, requires_grad=True).unbind(0)
    mask = torch.ones(4, 4).tril(-1).bool()
    with DropoutByRun([(Own(1), Span(0, 1, 4, 4)), (Own(2), Span(1, 2, 4, 4))]):
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.3)
    assert torch.autograd.grad(mixed.sum(), q)[0].isfinite().all()


def test_what_is_not_made_of_the_rows_is_left_to_torch():
    x = torch.rand(4, 6)
    with DropoutByRun([(Own(1), Span(0, 3, 1, 1))]):
        torch.manual_seed(5)
        mixed = F.dropout(x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(mixed, F.dropout(x, 0.5))
