"""The dropout mask as a function of a seed: nothing is kept, backward makes it again."""

from typing import NamedTuple

import torch
from torch import Tensor

LANES = 1 << 16  # random words are read in 16-bit lanes, so dropout_p is rounded to 1/65536
ROUNDS = 7  # the fewest with which Philox-4x32 passes BigCrush (Salmon et al. 2011, table 2)

_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WORD = 0xFFFFFFFF


class Mask(NamedTuple):
    """Which elements are dropped: all that a kernel needs to make the same mask in every tiling."""

    seed: Tensor
    """int64 [1], on the device of the activations; read there, never on the host."""
    threshold: int
    """An element is dropped if its 16-bit lane is below this, 0..65535."""

    @property
    def keep_probability(self) -> float:
        """1 − dropout_p as the mask realises it, never 0."""
        return 1.0 - self.threshold / LANES


def mask_of(dropout_p: float, seed: Tensor | None) -> Mask | None:
    """The mask of a seed; None where there is no seed, which is no dropout."""
    return None if seed is None else Mask(seed, min(round(dropout_p * LANES), LANES - 1))


def keep_mask(tokens: int, features: int, mask: Mask, dtype: torch.dtype) -> Tensor:
    """1 where an element stays, 0 where it is dropped, [tokens, features]; the same seed gives the same mask.

    A CPU draws its words from torch's own generator, which takes a tenth of the time of Philox in torch operators;
    every other device makes the mask that the Triton kernels make.
    """
    if not mask.seed.is_cpu:
        return philox_lanes(tokens, features, mask.seed).ge_(mask.threshold).to(dtype)
    generator = torch.Generator("cpu").manual_seed(int(mask.seed))
    # 64 random bits serve four elements: 0.65 ms for a million of them on one core, where bernoulli_ takes 3.8 ms
    words = torch.empty((tokens * features + 3) // 4, dtype=torch.int64)
    lanes = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: tokens * features]
    return lanes.view(tokens, features).ge_(mask.threshold - LANES // 2).to(dtype)


def philox_lanes(tokens: int, features: int, seed: Tensor) -> Tensor:
    """16-bit lanes of Philox-4x32 (Salmon et al. 2011), int64 [tokens, features] with values 0..65535.

    The counter is (feature // 8, token, 0, 0) and the key is the seed: lane 2w + h of a counter's eight is half h, low
    half first, of its word w.
    """
    groups = torch.arange((features + 7) // 8, device=seed.device).unsqueeze(0)
    rows = torch.arange(tokens, device=seed.device).unsqueeze(1)
    c0, c1, c2, c3 = groups, rows, torch.zeros_like(seed), torch.zeros_like(seed)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # int64 wraps around, and its bit pattern is right
        c0, c1, c2, c3 = (odd >> 32) & _WORD ^ c1 ^ k0, odd & _WORD, (even >> 32) & _WORD ^ c3 ^ k1, even & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    words = torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(tokens, -1)[:, :features]
