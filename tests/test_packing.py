"""Codes as bytes, and latents rebuilt from them: exact, whatever the size, the bits and the distribution."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petune.quantized.packing import Entry, decode, encode, pack, packed_bytes, rebuild, unpack
from petune.quantized.quantizer import Quantization, statistics

FEW = [1, 2, 4, 8]


def entry(shape: tuple[int, ...], bits: int = 1, granularity: str = "tensor", name: str = "w") -> Entry:
    return Entry(name, torch.Size(shape), Quantization(bits, granularity=granularity))


def zeros(of: Entry) -> torch.Tensor:
    return torch.zeros(of.rows, 4)


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    """A few weights lie far out: the codes then have a smaller deviation than the weights."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(*shape, generator=rng) * 0.04 + 0.001
    return w + 3.0 * (torch.rand(*shape, generator=rng) > 0.98) * torch.randn(*shape, generator=rng)


def released(w: torch.Tensor, bits: int) -> bytes:
    """The format of the paper's released files: codes byte by byte, then mean and deviation."""
    quantization = Quantization(bits)
    z = (w - w.mean()) / (w.std() + 1e-5)
    codes = (z.reshape(-1, 1) - quantization.values()).abs().argmin(1).tolist()
    a_byte = 8 // bits
    packed = bytes(
        sum(code << (bits * i) for i, code in enumerate(codes[at : at + a_byte]))
        for at in range(0, len(codes), a_byte)
    )
    return packed + struct.pack("ff", w.mean().item(), w.std().item())


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(FEW), data=st.data())
def test_unpacking_gives_the_codes_back(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))
    packed = pack(torch.tensor(codes), bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(len(codes), bits) == -(-len(codes) * bits // 8)
    assert unpack(packed, bits, len(codes)).tolist() == codes


def test_the_first_code_lies_in_the_lowest_bits():
    assert pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1]), 1).tolist() == [0b1000_0001, 1]
    assert pack(torch.tensor([3, 0, 1, 2, 1]), 2).tolist() == [0b10_01_00_11, 1]
    assert pack(torch.tensor([5, 10]), 4).tolist() == [0xA5]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_bytes_and_statistics_are_those_of_the_released_format(bits):
    w = torch.randn(8, 24) * 0.05 + 0.01
    blob, table = encode([entry((8, 24), bits)], [w], [torch.zeros(1, 4)])
    assert bytes(blob.tolist()) + struct.pack("ff", *table[0].tolist()) == released(w, bits)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("make", [torch.randn, heavy], ids=["normal", "heavy-tailed"])
@pytest.mark.parametrize("bits", FEW)
def test_a_rebuilt_latent_has_the_same_weights_and_packs_to_the_same_bytes(bits, make, granularity):
    item = entry((5, 41), bits, granularity)
    blob, table = encode([item], [make(5, 41)], [zeros(item)])
    ((packed, stats),) = decode([item], blob, table)
    latent, anchor = rebuild(item, packed, stats)
    assert torch.equal(statistics(latent, item.rows, anchor), stats)
    again = encode([item], [latent], [anchor])
    assert torch.equal(again[0], blob)
    assert torch.equal(again[1], table)


@settings(max_examples=80, deadline=None)
@given(bits=st.sampled_from(FEW), size=st.integers(2, 90), seed=st.integers(0, 999), scale=st.floats(1e-7, 1e4))
def test_any_weight_survives_any_number_of_rounds(bits, size, seed, scale):
    item = entry((1, size), bits)
    latent, anchor = heavy(1, size, seed=seed) * scale, torch.zeros(1, 4)
    first = encode([item], [latent], [anchor])
    for _ in range(3):
        latent, anchor = rebuild(item, *decode([item], *first)[0])
        again = encode([item], [latent], [anchor])
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


def test_a_normal_latent_is_rebuilt_with_its_own_statistics():
    item = entry((16, 64))
    w = torch.randn(16, 64) * 0.05
    stats = statistics(w, 1)
    latent, anchor = rebuild(item, pack(item.quantization.codes(w, stats).flatten(), 1), stats)
    # so that the quantiser goes on as it was: only rounding is left to the anchor
    assert torch.allclose(anchor[:, :2], anchor[:, 2:], rtol=1e-6, atol=1e-8)
    assert torch.equal(latent >= latent.mean(), w >= w.mean())


def test_weights_whose_codes_would_move_stand_in_the_middle_of_their_cells():
    item = entry((1, 4001), bits=8)
    w = heavy(1, 4001)
    stats = statistics(w, 1)
    codes = item.quantization.codes(w, stats)
    latent, anchor = rebuild(item, pack(codes.flatten(), 8), stats)
    assert not torch.allclose(anchor[:, 1], anchor[:, 3], rtol=1e-3)  # the deviation of the codes is another one
    assert torch.equal(item.quantization.codes(latent, stats), codes)


def test_zeros_stay_zeros():
    item = entry((3, 5))
    blob, table = encode([item], [torch.zeros(3, 5)], [zeros(item)])
    latent, anchor = rebuild(item, *decode([item], blob, table)[0])
    assert torch.equal(latent, torch.zeros(3, 5))
    assert torch.equal(item.quantization.quantized(latent, statistics(latent, 1, anchor)), torch.zeros(3, 5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    w = torch.randn(3, 7)
    w[1, 2] = value
    with pytest.raises(ValueError, match=r"w2 contains non-finite values .* train it again"):
        encode([entry((3, 7), name="w1"), entry((3, 7), name="w2")], [torch.randn(3, 7), w], [torch.zeros(1, 4)] * 2)


@pytest.mark.parametrize(("granularity", "rows"), [("tensor", 1), ("row", 3)])
def test_a_constant_weight_is_refused(granularity, rows):
    item = entry((3, 7), granularity=granularity)
    with pytest.raises(ValueError, match=rf"the weight of w has zero variance in {rows} of {rows} rows .* quantised"):
        encode([item], [torch.full((3, 7), 0.5)], [zeros(item)])


@pytest.mark.parametrize("change", [-1, 1])
def test_a_blob_of_another_length_is_refused_with_both_lengths(change):
    items = [entry((3, 7)), entry((5, 4))]
    blob, table = encode(items, [torch.randn(3, 7), torch.randn(5, 4)], [torch.zeros(1, 4)] * 2)
    wrong = blob[:-1] if change < 0 else torch.cat([blob, blob[:1]])
    message = rf"packed tensor has {len(wrong)} bytes and 2 rows of statistics, expected 6 and 2 \(bits=1, 2 tensors\)"
    with pytest.raises(ValueError, match=message):
        decode(items, wrong, table)
    with pytest.raises(ValueError, match="6 bytes and 1 rows of statistics, expected 6 and 2"):
        decode(items, blob, table[:1])


def test_damaged_statistics_are_refused():
    item = entry((3, 7))
    blob, table = encode([item], [torch.randn(3, 7)], [zeros(item)])
    table[0, 1] = float("nan")
    with pytest.raises(ValueError, match="statistics are not finite"):
        decode([item], blob, table)


def test_a_latent_of_too_few_digits_is_refused():
    item = entry((40, 50), bits=8)
    w = torch.randn(40, 50) * 0.01 + 5.0  # bf16 has 8 bits for numbers that all begin with the same 8
    stats = statistics(w, 1)
    packed = pack(item.quantization.codes(w, stats).flatten(), 8)
    with pytest.raises(ValueError, match=r"8-bit codes cannot be held by a latent of torch.bfloat16; .*autocast"):
        rebuild(item, packed, stats, torch.bfloat16)
