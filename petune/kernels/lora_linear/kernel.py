"""`lora_linear` on Triton: which kernels make y, ds, dA, dB and dx, and which variant of each.

Forward reads x twice (s, and the base product), backward reads dy twice (ds with dB, and the base product) and x once
(dA). Nothing of the size of x, y or dy is written beside y and dx, and x is never cast.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from petune.kernels.autograd import in_shape_of
from petune.kernels.chooser import Config, bucket, choose, known
from petune.kernels.dropout import Mask, mask_of
from petune.kernels.launch import INTERPRETED, MAX_RANK, capability, padded_rank
from petune.kernels.lora_linear import gemm, skinny

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

ADDMM = "addmm"
"""The low-rank term is written first and the base product added to it: cuBLAS with beta = 1. The default."""
BASE_FIRST = "base_first"
"""The base product is written first and the low-rank term added to it in one more pass."""


def unsupported(dtype: torch.dtype, rank: int) -> str | None:
    """Why these kernels cannot take products of this dtype and rank, or None."""
    if dtype not in _DTYPES:
        return f"{dtype} is none of {', '.join(map(str, _DTYPES))}"
    if rank > MAX_RANK:
        return f"rank {rank} is above {MAX_RANK}"
    return None if INTERPRETED else _unsupported_device(torch.cuda.current_device())


@cache
def _unsupported_device(index: int) -> str | None:
    if torch.version.hip:
        return "the kernels are checked on NVIDIA GPUs only"
    major, minor = capability(torch.device("cuda", index))
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor,
    scale: float, dropout_p: float, seed: Tensor | None, dtype: torch.dtype, rank_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = x Wᵀ + bias + scale/q · s Bᵀ,  s = (x ⊙ m) Aᵀ ⊙ rank_mask; both in `dtype`."""
    mask = mask_of(dropout_p, seed)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    s = _times(shrink(rows, a, mask=mask), rank_mask)
    bias = None if bias is None else bias.to(dtype)
    y = project(rows, weight.to(dtype), bias, s, b, scale / mask.keep_probability if mask else scale)
    return in_shape_of(x, y), s


def backward(
    dy: Tensor, x: Tensor | None, s: Tensor | None, weight: Tensor, a: Tensor, b: Tensor,
    scale: float, dropout_p: float, seed: Tensor | None, needs: Sequence[bool], rank_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """ds = scale/q · dy B ⊙ rank_mask,  dx = dy W + m ⊙ (ds A),  dA = dsᵀ (x ⊙ m),  dB = scale/q · dyᵀ s.

    `needs` says which of dx, dA and dB to compute; the others are empty. dA takes x, dB takes s or makes it from x.
    """
    needs_dx, needs_da, needs_db = needs
    mask = mask_of(dropout_p, seed)
    if mask:
        scale = scale / mask.keep_probability
    dy_rows = dy.reshape(-1, dy.shape[-1])
    rows = None if x is None else x.reshape(-1, x.shape[-1]).to(dy.dtype)
    dx, da, db = dy.new_empty(0), a.new_empty(0), b.new_empty(0)
    if needs_db:
        if s is None:
            assert rows is not None
            s = _times(shrink(rows, a, mask=mask), rank_mask)
        ds, db = dual(dy_rows, s, b, scale=scale)
    else:
        ds = shrink(dy_rows, b.T, scale=scale)
    ds = _times(ds, rank_mask)
    if needs_da:
        assert rows is not None
        da = outer(rows, ds, dtype=a.dtype, mask=mask)
    if needs_dx:
        dx = project_back(dy_rows, weight.to(dy.dtype), ds, a, mask).view(*dy.shape[:-1], weight.shape[1])
    return dx, da, db


def _times(s: Tensor, rank_mask: Tensor | None) -> Tensor:
    """s ⊙ rank_mask, into s: [tokens, rank] is a hundredth of what the passes around it move."""
    return s if rank_mask is None else s.mul_(rank_mask)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, scale: float) -> Tensor:
    """x Wᵀ + bias + scale · s Bᵀ, [tokens, out_features], by the variant that is fastest for these sizes."""
    return _product("project", x, weight, s, b, scale, bias, None)


def project_back(dy: Tensor, weight: Tensor, ds: Tensor, a: Tensor, mask: Mask | None) -> Tensor:
    """dy W + m ⊙ (ds A), [tokens, in_features], by the variant that is fastest for these sizes."""
    return _product("project_back", dy, weight.T, ds, a.T, 1.0, None, mask)


def _product(
    site: str, x: Tensor, weight: Tensor, s: Tensor, b: Tensor, scale: float, bias: Tensor | None, mask: Mask | None
) -> Tensor:
    operands = (x, weight, s, b, scale, bias, mask)
    if len(x) == 0:
        return _low_rank_first(*operands)
    rank_block = padded_rank(s.shape[1])
    key = (
        *(site, bucket(len(x)), *weight.shape, rank_block, str(x.dtype)),
        *(("bias",) if bias is not None else ()),
        *(("mask",) if mask is not None else ()),
    )
    name = known(key, ADDMM, x.device) or choose(key, variants(*operands), ADDMM, x.device)
    if name == BASE_FIRST:
        return _base_first(*operands)
    config = _fused_table(x.dtype, rank_block, capability(x.device)).get(name)
    if config is None or not gemm.eligible(config, x, weight):  # these sizes were timed with other strides
        return _low_rank_first(*operands)
    return gemm.gemm(x, weight, s, b, scale=scale, bias=bias, mask=mask, config=config)


def variants(
    x: Tensor, weight: Tensor, s: Tensor, b: Tensor, scale: float, bias: Tensor | None, mask: Mask | None
) -> dict[str, Callable[[], Tensor]]:
    """Every way to x weightᵀ + m ⊙ (scale · s bᵀ) + bias that these operands allow, by name."""
    operands = (x, weight, s, b, scale, bias, mask)
    calls = {ADDMM: partial(_low_rank_first, *operands), BASE_FIRST: partial(_base_first, *operands)}
    for name, config in _fused_table(x.dtype, padded_rank(s.shape[1]), capability(x.device)).items():
        if gemm.eligible(config, x, weight):
            calls[name] = partial(gemm.gemm, x, weight, s, b, scale=scale, bias=bias, mask=mask, config=config)
    return calls


@cache
def _fused_table(dtype: torch.dtype, rank_block: int, capability: tuple[int, int]) -> dict[str, Config]:
    return {label(config): config for config in gemm.configs(dtype, rank_block, capability)}


def _low_rank_first(
    x: Tensor, weight: Tensor, s: Tensor, b: Tensor, scale: float, bias: Tensor | None, mask: Mask | None
) -> Tensor:
    return expand(s, b, scale=scale, bias=bias, mask=mask).addmm_(x, weight.T)


def _base_first(
    x: Tensor, weight: Tensor, s: Tensor, b: Tensor, scale: float, bias: Tensor | None, mask: Mask | None
) -> Tensor:
    return expand(s, b, scale=scale, mask=mask, out=F.linear(x, weight, bias), accumulate=True)


def label(config: Config) -> str:
    """A config as one word of the table on disk."""
    blocks = "x".join(str(size) for size in (config.block_tokens, config.block_features, config.block_inner) if size)
    tile = f"{blocks}_w{config.num_warps}_s{config.num_stages}" if blocks else ""
    return "_".join(filter(None, (config.form, tile)))


def shrink(x: Tensor, a: Tensor, *, scale: float = 1.0, mask: Mask | None = None, out: Tensor | None = None) -> Tensor:
    """scale · (x ⊙ m) Aᵀ, [tokens, rank], in the dtype of x."""
    call = partial(skinny.shrink, x, a, scale=scale, mask=mask, out=out)
    return call(config=_config("shrink", x, a.shape[0], mask, call))


def dual(dy: Tensor, s: Tensor, b: Tensor, *, scale: float, out_ds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(scale · dy B, scale · dyᵀ s) in one read of dy: [tokens, rank] and [out_features, rank]."""
    call = partial(skinny.dual, dy, s, b, scale=scale, out_ds=out_ds)
    return call(config=_config("dual", dy, s.shape[1], None, call))


def outer(x: Tensor, ds: Tensor, *, dtype: torch.dtype, mask: Mask | None = None) -> Tensor:
    """dsᵀ (x ⊙ m), [rank, in_features], in `dtype`."""
    call = partial(skinny.outer, x, ds, dtype=dtype, mask=mask)
    return call(config=_config("outer", x, ds.shape[1], mask, call))


def expand(
    s: Tensor, b: Tensor, *, scale: float = 1.0, bias: Tensor | None = None, mask: Mask | None = None,
    out: Tensor | None = None, accumulate: bool = False,
) -> Tensor:  # fmt: skip
    """(out) + m ⊙ (scale · s bᵀ) + bias, [tokens, features]."""
    # not timed: a trial would add to `out` again, and every config writes at the speed of memory
    return skinny.expand(s, b, scale=scale, bias=bias, mask=mask, out=out, accumulate=accumulate)


def _config(kernel: str, x: Tensor, rank: int, mask: Mask | None, call: Callable[..., object]) -> Config | None:
    if len(x) == 0:
        return None
    rank_block = padded_rank(rank)
    table = _table(kernel, x.dtype, rank_block, capability(x.device))
    default = next(iter(table))
    key = (kernel, bucket(len(x)), x.shape[1], rank_block, str(x.dtype), mask is not None)
    name = known(key, default, x.device)
    if name is None:
        trials = {name: partial(call, config=config) for name, config in table.items()}
        name = choose(key, trials, default, x.device)
    return table[name]


@cache
def _table(kernel: str, dtype: torch.dtype, rank_block: int, capability: tuple[int, int]) -> dict[str, Config]:
    return {label(config): config for config in skinny.configs(kernel, dtype, rank_block, capability)}
