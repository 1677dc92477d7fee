"""What the grouped kernels launch on a GPU, for `test_aot.py`: 8 adapters, one of which has half the rank."""

from collections.abc import Callable

import torch
from torch import Tensor

from petune.kernels.chooser import Config
from petune.kernels.grouped_lora import packed_skinny as packed
from petune.kernels.grouped_lora import skinny
from petune.kernels.grouped_lora.layout import Dropped, Layout

Launches = dict[str, Callable[[], object]]

ADAPTERS, TOKENS, IN, OUT = 8, 8192, 4096, 1024
FP32 = torch.float32


def of(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layout(rank: int, rows: int = 16) -> Layout:
    order, offsets = of(rows, dtype=torch.int64), of(ADAPTERS + 1, dtype=torch.int64)
    return Layout.of(order, offsets, (*(rank,) * (ADAPTERS - 1), max(1, rank // 2)))


def ranks(rank: int) -> int:
    return sum(layout(rank).ranks)


SCALES = of(ADAPTERS, dtype=FP32)
MASKS = Dropped(of(ADAPTERS, dtype=torch.int64), of(ADAPTERS, dtype=torch.int32), None)
INDEXED = MASKS._replace(token_index=of(TOKENS, dtype=torch.int64))


def of_shrink(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    x, odd = of(TOKENS, IN, dtype=dtype), of(777, 333, dtype=dtype)
    a, odd_a = of(ranks(rank), IN, dtype=FP32), of(ranks(rank - 1), 333, dtype=dtype)
    return {
        "masked": lambda: skinny.shrink(x, a, layout(rank), masks=MASKS, config=config),
        "odd": lambda: skinny.shrink(odd, odd_a, layout(rank - 1, 777), scales=SCALES, config=config),
    }


def of_expand(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    s, y, odd = of(TOKENS, rank, dtype=dtype), of(TOKENS, IN, dtype=dtype), of(777, 333, dtype=dtype)
    a, odd_s, odd_a = (
        of(ranks(rank), IN, dtype=FP32),
        of(777, rank - 1, dtype=dtype),
        of(ranks(rank - 1), 333, dtype=dtype),
    )
    return {
        "masked": lambda: skinny.expand(s, a, layout(rank), out=y, masks=MASKS, config=config),
        "odd": lambda: skinny.expand(odd_s, odd_a, layout(rank - 1, 777), out=odd, scales=SCALES, config=config),
    }


def of_dual(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    dy, s, odd = of(TOKENS, OUT, dtype=dtype), of(TOKENS, rank, dtype=dtype), of(777, 333, dtype=dtype)
    b, odd_s, odd_b = (
        of(OUT, ranks(rank), dtype=FP32),
        of(777, rank - 1, dtype=dtype),
        of(333, ranks(rank - 1), dtype=dtype),
    )
    fixed = {"scales": SCALES, "dtype": FP32, "config": config}
    return {
        "fp32 b": lambda: skinny.dual(dy, s, b, layout(rank), **fixed),
        "odd": lambda: skinny.dual(odd, odd_s, odd_b, layout(rank - 1, 777), **fixed),
    }


def of_outer(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    x, ds, odd = of(TOKENS, IN, dtype=dtype), of(TOKENS, rank, dtype=dtype), of(777, 333, dtype=dtype)
    odd_ds = of(777, rank - 1, dtype=dtype)
    return {
        "masked": lambda: skinny.outer(x, ds, layout(rank), dtype=FP32, masks=INDEXED, config=config),
        "odd": lambda: skinny.outer(odd, odd_ds, layout(rank - 1, 777), dtype=FP32, config=config),
    }


def factors(rank: int, bits: int) -> packed.Factors:
    facts = of(5 * ADAPTERS, dtype=torch.int64)
    return packed.Factors(of(1 << 20, dtype=torch.uint8), of(ADAPTERS * rank * 2**bits, dtype=FP32), facts)


def of_packed_shrink(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    x, odd = of(TOKENS, IN, dtype=dtype), of(777, 333, dtype=dtype)
    return {
        "8 bits": lambda: packed.shrink(x, factors(rank, 8), layout(rank), 8, config=config),
        "odd": lambda: packed.shrink(odd, factors(rank - 1, 1), layout(rank - 1, 777), 1, config=config),
    }


def of_packed_expand(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    s, y = of(TOKENS, rank, dtype=dtype), of(TOKENS, OUT, dtype=dtype)
    odd_s, odd_y, fixed = (
        of(777, rank - 1, dtype=dtype),
        of(777, 333, dtype=dtype),
        {"scales": SCALES, "config": config},
    )
    return {
        "8 bits": lambda: packed.expand(s, factors(rank, 8), layout(rank), 8, out=y, **fixed),
        "odd": lambda: packed.expand(odd_s, factors(rank - 1, 1), layout(rank - 1, 777), 1, out=odd_y, **fixed),
    }


LAUNCHES = {
    "grouped_shrink": of_shrink,
    "grouped_expand": of_expand,
    "grouped_dual": of_dual,
    "grouped_outer": of_outer,
    "grouped_packed_shrink": of_packed_shrink,
    "grouped_packed_expand": of_packed_expand,
}


def configs(op: str, dtype: torch.dtype, rank: int) -> tuple[Config, ...]:
    """Those of the table, but fp32 for rank 16, which has the rows of rank 64, and two reads of dy once."""
    kernel = op.removeprefix("grouped_")
    if dtype == FP32 and rank == 16:
        return ()
    if kernel.startswith("packed_"):
        return packed.configs(kernel.removeprefix("packed_"), dtype)
    once = dtype == torch.bfloat16 and rank == 64
    return tuple(config for config in skinny.configs(kernel, dtype, rank) if once or config.form != "two_reads")
