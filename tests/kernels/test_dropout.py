"""The dropout mask: its share, its independence, and Philox against published vectors."""

import pytest
import torch

from petune.kernels.dropout import LANES, keep_mask, mask_of, philox_lanes
from petune.kernels.lora_linear import lora_linear


def cpu_mask(tokens: int, features: int, dropout_p: float) -> torch.Tensor:
    mask = mask_of(dropout_p, torch.randint(2**63 - 1, (1,)))
    assert mask is not None
    return keep_mask(tokens, features, mask, torch.float32)


def philox_mask(tokens: int, features: int, dropout_p: float) -> torch.Tensor:
    mask = mask_of(dropout_p, torch.randint(2**63 - 1, (1,)))
    assert mask is not None
    return philox_lanes(tokens, features, mask.seed).ge(mask.threshold).float()


@pytest.mark.parametrize("make", [cpu_mask, philox_mask])
def test_a_mask_keeps_its_share_and_its_elements_are_independent(make):
    tokens, features, p = 400, 501, 0.05
    mask = make(tokens, features, p)
    assert mask.shape == (tokens, features)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert abs(mask.mean().item() - (1 - p)) < 5 * (p * (1 - p) / mask.numel()) ** 0.5
    for pairs in (mask[1:] * mask[:-1], mask[:, 1:] * mask[:, :-1], mask[:, 8:] * mask[:, :-8]):
        assert abs(pairs.mean().item() - (1 - p) ** 2) < 5 * (p / mask.numel()) ** 0.5


@pytest.mark.parametrize("make", [cpu_mask, philox_mask])
def test_two_seeds_give_two_masks_and_one_seed_gives_one(make):
    torch.manual_seed(1)
    first, second = make(40, 50, 0.5), make(40, 50, 0.5)
    torch.manual_seed(1)
    assert torch.equal(first, make(40, 50, 0.5))
    assert 0.4 < (first == second).float().mean().item() < 0.6


def test_what_is_kept_is_scaled_up_to_the_same_mean():
    p, eye = 0.05, torch.eye(501)
    kept = lora_linear(torch.ones(400, 501), eye * 0, None, eye, eye, 1.0, p)
    assert abs(kept.mean().item() - 1) < 5 * (p / kept.numel()) ** 0.5


@pytest.mark.parametrize("dropout_p", [1e-9, 1 / 3, 0.999999])
def test_the_probability_is_realised_in_steps_of_a_lane_and_never_drops_all(dropout_p):
    mask = mask_of(dropout_p, torch.tensor([0]))
    assert mask is not None
    assert abs(mask.keep_probability - (1 - dropout_p)) <= 1 / LANES
    assert mask.keep_probability > 0


def test_no_seed_is_no_mask():
    assert mask_of(0.5, None) is None


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**62 + 12345678901, 2**63 - 1])
def test_lanes_are_those_of_philox_4x32(seed):
    # word for word by Python's own integers, at counters (feature // 8, token, 0, 0)
    lanes = philox_lanes(3, 20, torch.tensor([seed]))
    for token in range(3):
        for group in range(3):
            words = philox_words((group, token, 0, 0), (seed % 2**32, seed >> 32))
            halves = [half for word in words for half in (word % 2**16, word >> 16)]
            expected = lanes[token, 8 * group : 8 * group + 8].tolist()
            assert expected == halves[: len(expected)]


def philox_words(counter: tuple[int, ...], key: tuple[int, int], rounds: int = 7) -> tuple[int, ...]:
    """Salmon et al. 2011, section 3.3: (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)) a round."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 % 2**32, p0 >> 32 ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def test_the_check_itself_gives_the_published_vector_of_ten_rounds():
    # Random123's known answers for philox4x32-10: counter and key all ones, and the digits of pi
    ones = 0xFFFFFFFF
    assert philox_words((ones,) * 4, (ones, ones), 10) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox_words(pi, (0xA4093822, 0x299F31D0), 10) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
