"""The shared mask: its way from 1 to hard, its losses, the exact number it keeps, and what stops it."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from petune.adapters.pat import ChannelMask, PatConfig
from tests.conftest import relative_error


def mask_of(m: Tensor, s0: int = 10_000, **fields: Any) -> ChannelMask:
    """A mask of logits m / mask_lr_mult with its milestone at s0."""
    options = {"target_dim": max(1, len(m) // 2), "total_steps": 2 * s0, "milestone": 0.5, **fields}
    mask = ChannelMask(PatConfig(**options), len(m)).to(m.dtype)
    with torch.no_grad():
        mask.logits.copy_(m / mask.speed)
    return mask


def at(mask: ChannelMask, step: int) -> ChannelMask:
    mask.advance(step)
    return mask


def reference(m: Tensor, step: int, s0: int, variant: str) -> Tensor:
    """M as section 3.3 of the paper has it, or as the authors' code computes it."""
    shift = 0.5 - step / s0 if step < s0 / 2 else 0.0
    if variant == "code" and step >= 0.8 * s0:
        m, step = m.detach(), int(0.8 * s0)
    tau = 1 / (
        1 - math.log(max(step, 1)) / math.log(s0) + 1e-6 * (step > 0)
    )  # the code's; of no weight to the paper's
    if variant == "paper":
        return torch.sigmoid(tau * m) + shift
    return 1 / (1 + torch.exp(torch.minimum(-tau * m, torch.tensor(10.0, dtype=m.dtype)))) + shift


# ------------------------------------------------------------------------------------------------------- its value


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, (0.878, 1.0, 1.122)),
        (1000, (0.519, 0.9, 1.281)),
        (2000, (0.354, 0.8, 1.246)),
        (5000, (0.001, 0.5, 0.999)),
        (7000, (4.5e-5, 0.5, 1.0)),
        (9999, (4.5e-5, 0.5, 1.0)),
    ],
)
def test_the_mask_of_the_authors_code_takes_the_values_that_it_was_seen_to_take(step, expected):
    mask = at(mask_of(torch.tensor([-0.5, 0.0, 0.5])), step)
    assert mask.value().tolist() == pytest.approx(expected, abs=6e-4)
    assert (mask.value()[0].item() == pytest.approx(4.54e-5, rel=1e-3)) == (step >= 7000)


@pytest.mark.parametrize("step", [0, 1, 10, 999, 4999, 5001, 7999, 8000, 9500])
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_value_and_gradient_are_those_of_the_equations(variant, step):
    m = torch.randn(17, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mask = at(mask_of(m, variant=variant, mask_lr_mult=7.0), step)
    logits = (m / 7.0).requires_grad_()
    expected = reference(logits * 7.0, step, 10_000, variant)
    assert relative_error(mask.value(), expected) <= 1e-12
    weights = torch.linspace(1, 2, 17, dtype=torch.float64)
    if variant == "code" and step >= 8000:
        assert not mask.value().requires_grad
        return
    (mask.value() * weights).sum().backward()
    (expected * weights).sum().backward()
    assert mask.logits.grad.norm() > 0
    assert relative_error(mask.logits.grad, logits.grad) <= 1e-12


def test_a_fresh_mask_is_one_and_needs_no_length_of_the_training():
    mask = ChannelMask(PatConfig(target_dim=5), 13)
    assert torch.equal(mask.value(), torch.ones(13))
    assert mask.is_identity
    mask.value().sum().backward()
    assert torch.equal(mask.logits.grad, torch.full((13,), 0.25 * mask.speed))


def test_adam_moves_the_mask_faster_by_the_multiplier():
    def moved(speed: float) -> float:
        mask = ChannelMask(PatConfig(target_dim=5, mask_lr_mult=speed), 13)
        optimizer = torch.optim.Adam(mask.parameters(), lr=0.01)
        (mask.value() ** 2).sum().backward()
        optimizer.step()
        return (mask.logits * mask.speed)[0].item()

    assert moved(1.0) == pytest.approx(-0.01, rel=1e-3)
    assert moved(25.0) == pytest.approx(-0.25, rel=1e-3)


def test_the_code_gives_no_gradient_below_its_floor_and_the_paper_does():
    for variant, flows in (("code", False), ("paper", True)):
        mask = at(mask_of(torch.tensor([-1.0, 0.1], dtype=torch.float64), variant=variant), 5000)  # τ m = −13
        mask.value().sum().backward()
        assert bool(mask.logits.grad[0] != 0) == flows
        assert mask.logits.grad[1] > 0


def test_the_code_lets_its_mask_rest_from_four_fifths_of_the_milestone():
    before, after = (at(mask_of(torch.tensor([0.1, -0.1]), s0=100), step) for step in (79, 80))
    assert before.value().requires_grad
    assert not after.value().requires_grad
    assert torch.equal(after.value(), at(after, 99).value())
    tau = 1 / (1 - math.log(80) / math.log(100) + 1e-6)
    assert torch.allclose(after.value(), torch.sigmoid(torch.tensor([0.1, -0.1]) * tau))


def test_backward_may_go_through_one_value_several_times():
    mask = at(mask_of(torch.randn(7)), 100)
    whole = mask.value()
    (whole.sum() + (whole * 3).sum()).backward()
    expected, mask.logits.grad = mask.logits.grad, None
    shared = mask.value()
    for part in (shared.sum(), (shared * 3).sum()):  # reentrant checkpointing: one backward per block
        part.backward()
    assert torch.allclose(mask.logits.grad, expected)


# ------------------------------------------------------------------------------------------------------ getting hard


@pytest.mark.parametrize(
    ("width", "fields", "kept"),
    [
        (32, {"target_ratio": 0.3}, 22),
        (33, {"target_ratio": 0.25}, 25),
        (64, {"target_ratio": 0.25, "round_to": 5}, 50),
        (100, {"target_ratio": 0.4, "round_to": 8}, 64),
        (13, {"target_dim": 1}, 1),
        (64, {"target_dim": 40, "round_to": 8}, 40),
    ],
)
def test_the_hard_mask_keeps_exactly_the_target_of_the_largest_logits(width, fields, kept):
    mask = ChannelMask(PatConfig(**fields), width)
    torch.nn.init.normal_(mask.logits)
    mask.finalize()
    value = mask.value()
    assert value.sum() == kept
    assert set(value.tolist()) == {0.0, 1.0}
    assert mask.logits[mask.hard].min() > mask.logits[~mask.hard].max()


def test_of_equal_logits_the_first_channels_are_kept():
    mask = mask_of(torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]), target_dim=4)
    mask.finalize()
    assert mask.hard.nonzero().flatten().tolist() == [0, 1, 2, 4]


def test_a_hard_mask_stays_whatever_happens_to_its_logits():
    mask = mask_of(torch.arange(7.0))
    mask.finalize()
    before = mask.value().clone()
    torch.nn.init.normal_(mask.logits)
    mask.finalize()
    mask.advance(10**6)
    assert torch.equal(mask.value(), before)
    assert mask.now == 10**6


@pytest.mark.parametrize(("share", "total", "milestone"), [(1 / 3, 30, 10), (0.5, 7, 4), (1.0, 9, 9), (0.1, 3, 2)])
def test_the_mask_gets_hard_at_the_milestone_and_not_before(share, total, milestone):
    mask = ChannelMask(PatConfig(target_dim=5, total_steps=total, milestone=share), 13)
    assert mask.milestone == milestone
    for step in range(1, milestone + 1):
        assert not mask.is_final
        mask.advance(step)
        assert bool(torch.isfinite(mask.value()).all())
    assert mask.is_final


def test_what_was_loaded_is_seen_at_once():
    trained, fresh = (mask_of(torch.arange(7.0), s0=10) for _ in range(2))
    trained.advance(4)
    assert fresh.now == 0
    fresh.load_state_dict(trained.state_dict())
    assert (fresh.now, fresh.is_final) == (4, False)
    trained.finalize()
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.value(), trained.value())
    assert copy.deepcopy(fresh).is_final


def test_a_mask_that_does_not_know_the_length_of_the_training_says_so():
    mask = ChannelMask(PatConfig(target_dim=5), 13)
    message = r"length of the training is not known.*PatConfig\.total_steps.*PruningSchedule"
    with pytest.raises(RuntimeError, match=message):
        mask.advance(1)
    assert mask.now == 0
    mask.total_steps = 12  # as a callback does
    mask.advance(1)
    assert mask.now == 1


# ------------------------------------------------------------------------------------------------------- its losses


def test_the_losses_of_a_fresh_mask_are_finite():
    for variant in ("code", "paper"):
        mask = ChannelMask(PatConfig(target_dim=5, variant=variant), 13)
        losses = mask.losses()
        torch.stack(list(losses.values())).sum().backward()
        assert all(bool(torch.isfinite(loss)) for loss in losses.values())
        assert bool(torch.isfinite(mask.logits.grad).all())
        assert losses.keys() == ({"active", "bimodal"} if variant == "code" else {"active"})


@pytest.mark.parametrize("kept", [2, 4, 6])
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_the_active_loss_is_the_distance_of_the_count_to_the_target(variant, kept):
    m = torch.tensor([-0.4, 0.3, 0.0, 0.2, -0.1, 0.6, 0.1])
    mask = mask_of(m, target_dim=kept, variant=variant)
    loss = mask.losses()["active"]
    count = int((m >= 0).sum() if variant == "code" else (m > 0).sum())
    factor = 10 / kept if variant == "code" else 1.0
    assert loss.item() == pytest.approx(factor * abs(count - kept), abs=1e-5)
    loss.backward()
    sign = (count > kept) - (count < kept)
    assert torch.allclose(mask.logits.grad, torch.full((7,), factor * sign * mask.speed))


def test_the_bimodal_loss_pulls_logits_to_half_and_minus_half():
    m = torch.tensor([-0.4, 0.3, 0.0, 0.2, -0.1, 0.6, 0.1])
    mask = mask_of(m)
    up, down = m[m > 0], m[m < 0]
    expected = ((up - 0.5) ** 2).mean() + ((down + 0.5) ** 2).mean()
    loss = mask.losses()["bimodal"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    gradient = torch.where(m > 0, 2 * (m - 0.5) / len(up), 2 * (m + 0.5) / len(down)) * (m != 0) * mask.speed
    assert torch.allclose(mask.logits.grad, gradient, atol=1e-6)


def test_a_hard_mask_has_met_its_target_and_still_gives_its_logits_a_gradient():
    mask = mask_of(torch.randn(7))
    mask.finalize()
    losses = mask.losses()
    assert {name: loss.item() for name, loss in losses.items()} == {"active": 0.0}
    losses["active"].backward()
    assert not mask.logits.grad.any()


# ---------------------------------------------------------------------------------------------------- open channels


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_a_channel_is_shut_where_its_gate_is_below_that_of_minus_ten(variant):
    mask = mask_of(torch.tensor([-20.0, -9.0, -6.0, 0.0, 3.0, math.nan]), variant=variant)
    assert mask.open_channels() == 5  # NaN is for the loss to report
    tau = 1 / (1 - math.log(500) / math.log(10_000))
    assert tau * 6.0 > 10 > tau * 3.0
    assert at(mask, 500).open_channels() == 3
