# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# Triton types a kernel's pointers and constants as what they are inside of it, not as what a launch takes
"""`residual_low_rank` on Triton: one read of u or dz for the product of rank size, and one more pass for all else.

The gate goes into up where it meets a product, and on the tile in registers everywhere else; the sum u + s upᵀ is not
made again backward, for  Σ_tokens dz ⊙ (s upᵀ) = Σ_rank up ⊙ (dzᵀ s).  Of [tokens, features] are read and written

forward     u for s;  u, z                  3 passes, 6 bytes an element of 16 bits
composed    u;  t = s upᵀ;  u, t, v = u + t;  v, z      7 passes, 14 bytes
backward    dz for ds;  dz, u, du           4 passes, 8 bytes
composed    dz, dv;  dz, v, dz ⊙ v, its sum;  dv twice;  u;  ds down;  dv, ds down, du      13 passes, 26 bytes

8192 tokens of 4096 features are 67 MB a pass: 470 MB for a step where gate * (u + linear(linear(u))) moves 1342, and
67 MB less are kept. The sums over tokens are split in four there, which writes and reads 0.26 MB a rank more. Above
rank 64, and above 32 before sm_90, two of them do not fit the registers, and ddown takes a fifth pass, over u.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from petune.kernels.chooser import Config
from petune.kernels.launch import (
    FUSED,
    blocks_of,
    capability,
    padded_rank,
    precision,
    split,
    upcasts,
)
from petune.kernels.lora_linear.kernel import outer, shrink, unsupported
from petune.kernels.lora_linear.sums import add_up

__all__ = ["backward", "forward", "unsupported"]

# Triton would compile a kernel more for each of these that is 1 or a multiple of 16, and no load is wider for it
_PLAIN = ["tokens", "blocks_per_chunk"]


@triton.jit(do_not_specialize=_PLAIN)
def _residual_expand_kernel(
    u_ptr, s_ptr, up_ptr, gate_ptr, z_ptr, tokens, features, rank,
    stride_ut, stride_uf, stride_pf, stride_pr, stride_zt,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """z = gate ⊙ (u + s upᵀ); a program owns one tile of z, neighbours one row of tiles."""
    compute: tl.constexpr = tl.float32 if UPCAST else s_ptr.dtype.element_ty
    blocks = tl.cdiv(features, BLOCK_F)
    t = tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)  # [BLOCK_T, 1]
    f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)[None, :].to(tl.int64)  # [1, BLOCK_F]
    r = tl.arange(0, BLOCK_R)
    inside = (t < tokens) & (f < features)
    s_mask = (t < tokens) & (r[None, :] < rank)
    s = tl.load(s_ptr + t * rank + r[None, :], mask=s_mask, other=0.0).to(compute)  # [BLOCK_T, BLOCK_R]
    up_mask = (f < features) & (r[:, None] < rank)
    up = tl.load(up_ptr + f * stride_pf + r[:, None] * stride_pr, mask=up_mask, other=0.0).to(compute)
    u = tl.load(u_ptr + t * stride_ut + f * stride_uf, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + f, mask=f < features, other=0.0).to(tl.float32)
    z = gate * (u + tl.dot(s, up, input_precision=PRECISION))  # [BLOCK_T, BLOCK_R] [BLOCK_R, BLOCK_F]
    tl.store(z_ptr + t * stride_zt + f, z.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_PLAIN)
def _residual_backward_kernel(
    dz_ptr, u_ptr, s_ptr, ds_ptr, down_ptr, gate_ptr, du_ptr, ddown_ptr, p_ptr, dots_ptr,
    tokens, features, rank, blocks_per_chunk,
    stride_zt, stride_zf, stride_ut, stride_uf, stride_df, stride_dr, stride_ot, stride_cc, stride_cf, stride_cr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """du = gate ⊙ dz + ds down,  and of one chunk of tokens  ddown[c] = uᵀ ds,  p[c] = dzᵀ s,  dots[c] = Σ dz ⊙ u;
    a program owns BLOCK_F features of one chunk, and computes what has a pointer.

    Features are the long axis of every tile, so that one load of dz or u serves all, and a wgmma's 64 rows are full.
    """
    compute: tl.constexpr = tl.float32 if UPCAST else ds_ptr.dtype.element_ty
    chunk = tl.program_id(1)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[:, None].to(tl.int64)  # [BLOCK_F, 1]
    r = tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
    first = chunk * blocks_per_chunk * BLOCK_T
    last = tl.minimum(first + blocks_per_chunk * BLOCK_T, tokens)
    f_mask, factor_mask = f < features, (f < features) & (r < rank)
    if du_ptr is not None:
        gate = tl.load(gate_ptr + f, mask=f_mask, other=0.0).to(tl.float32)
        down = tl.load(down_ptr + f * stride_df + r * stride_dr, mask=factor_mask, other=0.0).to(compute)
    if ddown_ptr is not None:
        ddown = tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32)
    if p_ptr is not None:
        p = tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32)
    if dots_ptr is not None:
        dots = tl.zeros((BLOCK_F, BLOCK_T), dtype=tl.float32)

    for start in range(first, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        inside = f_mask & (t[None, :] < tokens)
        rank_mask = (t[:, None] < tokens) & (r < rank)
        dz = tl.load(dz_ptr + f * stride_zf + t[None, :] * stride_zt, mask=inside, other=0.0)  # [BLOCK_F, BLOCK_T]
        ds = tl.load(ds_ptr + t[:, None] * rank + r, mask=rank_mask, other=0.0).to(compute)  # [BLOCK_T, BLOCK_R]
        if u_ptr is not None:
            u = tl.load(u_ptr + f * stride_uf + t[None, :] * stride_ut, mask=inside, other=0.0)
        if ddown_ptr is not None:
            ddown = tl.dot(u.to(compute), ds, ddown, input_precision=PRECISION)
        if p_ptr is not None:
            s = tl.load(s_ptr + t[:, None] * rank + r, mask=rank_mask, other=0.0).to(compute)
            p = tl.dot(dz.to(compute), s, p, input_precision=PRECISION)
        if dots_ptr is not None:
            dots += dz.to(tl.float32) * u.to(tl.float32)
        if du_ptr is not None:
            du = tl.dot(down, tl.trans(ds), input_precision=PRECISION) + gate * dz.to(tl.float32)
            du_ptrs = du_ptr + f + t[None, :] * stride_ot
            tl.store(du_ptrs, du.to(du_ptr.dtype.element_ty), mask=inside)

    row = chunk.to(tl.int64) * features + f  # of p and dots, which are contiguous
    if ddown_ptr is not None:
        ddown_ptrs = ddown_ptr + chunk.to(tl.int64) * stride_cc + f * stride_cf + r * stride_cr
        tl.store(ddown_ptrs, ddown.to(ddown_ptr.dtype.element_ty), mask=factor_mask)
    if p_ptr is not None:
        tl.store(p_ptr + row * rank + r, p, mask=factor_mask)
    if dots_ptr is not None:
        tl.store(dots_ptr + row, tl.sum(dots, axis=1, keep_dims=True), mask=f_mask)


def forward(u: Tensor, down: Tensor, up: Tensor, gate: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """z = gate ⊙ (u + s upᵀ) in the dtype of u, and s = u downᵀ in `dtype`."""
    rows = u.reshape(-1, u.shape[-1])
    s = shrink(rows.to(dtype), down)
    z = u.new_empty(u.shape)  # no view of it comes out: autograd would let nothing be done to that in place
    expand(rows, s, up, gate, out=z.view(rows.shape))
    return z, s


def backward(
    dz: Tensor, u: Tensor | None, s: Tensor | None, down: Tensor, up: Tensor, gate: Tensor,
    dtype: torch.dtype, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """ds = dz (gate ⊙ up),  du = gate ⊙ dz + ds down,  ddown = dsᵀ u,  and with p = dzᵀ s
    dup = gate ⊙ p,  dgate = Σ_tokens dz ⊙ u + Σ_rank up ⊙ p.

    `needs` says which of du, ddown, dup and dgate to compute; the others are empty.
    """
    needs_du, needs_ddown, needs_dup, needs_dgate = needs
    rows = dz.reshape(-1, dz.shape[-1])
    u_rows = None if u is None else u.reshape(rows.shape)
    wide_up, wide_gate = up.float(), gate.float()
    ds = shrink(rows.to(dtype), (wide_gate[:, None] * wide_up).T)
    parts = (needs_du, needs_ddown, needs_dup or needs_dgate, needs_dgate)
    du, ddown, p, dots = gradients(rows, u_rows, s, ds, down, gate, needs=parts)
    # [features, rank] is a hundredth of what the passes move: plain torch
    dup = (wide_gate[:, None] * p).to(up.dtype) if needs_dup else up.new_empty(0)
    dgate = ((wide_up * p).sum(1) + dots).to(gate.dtype) if needs_dgate else gate.new_empty(0)
    return du.view(dz.shape if needs_du else 0), ddown, dup, dgate


def expand(
    u: Tensor, s: Tensor, up: Tensor, gate: Tensor, *, out: Tensor | None = None, config: Config | None = None
) -> Tensor:
    """z = gate ⊙ (u + s upᵀ) in one read of u and one write of z.

    Args:
        u: [tokens, features]; fp32, fp16 or bf16, any strides.
        s: [tokens, rank]; fp32, fp16 or bf16, in which the product runs.
        up: [features, rank], any strides and floating dtype; rank 1..256.
        gate: [features], any floating dtype.
        out: where to write z, with a unit inner stride.
        config: a row of `configs`; the default for the dtype and rank.

    Returns:
        z, [tokens, features], dtype of u where `out` does not say.
    """
    tokens, features = u.shape
    z = u.new_empty(tokens, features) if out is None else out
    if not z.numel():
        return z
    rank_block = padded_rank(s.shape[1])
    config = config or configs("expand", s.dtype, rank_block, capability(u.device))
    _residual_expand_kernel[blocks_of(tokens, config.block_tokens) * blocks_of(features, config.block_features),](
        u_ptr=u, s_ptr=s.contiguous(), up_ptr=up, gate_ptr=gate.contiguous(), z_ptr=z, tokens=tokens,
        features=features, rank=s.shape[1], stride_ut=u.stride(0), stride_uf=u.stride(1), stride_pf=up.stride(0),
        stride_pr=up.stride(1), stride_zt=z.stride(0), **_constants(config, rank_block, s.dtype),
    )  # fmt: skip
    return z


def gradients(
    dz: Tensor, u: Tensor | None, s: Tensor | None, ds: Tensor, down: Tensor, gate: Tensor, *,
    needs: Sequence[bool], out: Tensor | None = None, config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """du = gate ⊙ dz + ds down,  ddown = dsᵀ u,  p = dzᵀ s,  dots = Σ_tokens dz ⊙ u  in one read of dz and of u.

    Args:
        dz: [tokens, features]; fp32, fp16 or bf16, any strides.
        u: as dz; None where neither ddown nor dots is needed.
        s: [tokens, rank], dtype of ds; None where p is not needed.
        ds: [tokens, rank]; fp32, fp16 or bf16, in which the products run.
        down: [rank, features], any strides and floating dtype; rank 1..256.
        gate: [features], any floating dtype.
        needs: which of the four to compute; the others are empty.
        out: where to write du, with a unit inner stride.
        config: a row of `configs`; the default for the dtype and rank.

    Returns:
        du, [tokens, features], dtype of dz; ddown, [rank, features], dtype of down; p, [features, rank], and dots,
        [features], in fp32.
    """
    needs_du, needs_ddown, needs_p, needs_dots = needs
    features, rank = dz.shape[1], ds.shape[1]
    du = dz.new_empty(dz.shape if needs_du else 0) if out is None else out
    ddown = down.new_empty(down.shape if needs_ddown else 0)
    p = dz.new_empty((features, rank) if needs_p else 0, dtype=torch.float32)
    if not dz.numel():
        return du, ddown.zero_(), p.zero_(), dz.new_zeros(features if needs_dots else 0, dtype=torch.float32)
    config = config or configs("backward", ds.dtype, padded_rank(rank), capability(dz.device))
    if config.form == APART and needs_ddown:
        assert u is not None
        ddown = outer(u.to(ds.dtype), ds, dtype=down.dtype)
    totals = (ddown.T if needs_ddown and config.form != APART else None, p if needs_p else None)
    return du, ddown, p, _launch(dz, u, s, ds, down, gate, du if needs_du else None, totals, needs_dots, config)


def _launch(
    dz: Tensor, u: Tensor | None, s: Tensor | None, ds: Tensor, down: Tensor, gate: Tensor, du: Tensor | None,
    totals: tuple[Tensor | None, Tensor | None], needs_dots: bool, config: Config,
) -> Tensor:  # fmt: skip
    """Writes du and the totals (ddownᵀ, p), each where it is there, and returns dots."""
    (tokens, features), rank = dz.shape, ds.shape[1]
    blocks = blocks_of(features, config.block_features)
    chunks, blocks_per_chunk = split(blocks, blocks_of(tokens, config.block_tokens), dz.device)
    dots = dz.new_empty(chunks, features if needs_dots else 0, dtype=torch.float32)
    columns, p = (
        dz.new_empty(chunks, features, rank, dtype=torch.float32) if total is not None and chunks > 1 else total
        for total in totals
    )
    u_like, columns_like = dz if u is None else u, dz if columns is None else columns
    _residual_backward_kernel[blocks, chunks](
        dz_ptr=dz, u_ptr=u, s_ptr=None if s is None else s.contiguous(), ds_ptr=ds.contiguous(), down_ptr=down,
        gate_ptr=gate.contiguous(), du_ptr=du, ddown_ptr=columns, p_ptr=p, dots_ptr=dots if needs_dots else None,
        tokens=tokens, features=features, rank=rank, blocks_per_chunk=blocks_per_chunk,
        stride_zt=dz.stride(0), stride_zf=dz.stride(1), stride_ut=u_like.stride(0), stride_uf=u_like.stride(1),
        stride_df=down.stride(1), stride_dr=down.stride(0), stride_ot=0 if du is None else du.stride(0),
        stride_cc=columns_like.stride(0), stride_cf=columns_like.stride(-2), stride_cr=columns_like.stride(-1),
        **_constants(config, padded_rank(rank), ds.dtype),
    )  # fmt: skip
    if chunks > 1:
        pairs = zip((columns, p), totals, strict=True)
        add_up(*((part, total) for part, total in pairs if part is not None and total is not None))
    return dots.sum(0)


def _constants(config: Config, rank_block: int, dtype: torch.dtype) -> dict[str, object]:
    return {
        "BLOCK_T": config.block_tokens,
        "BLOCK_F": config.block_features,
        "BLOCK_R": rank_block,
        "PRECISION": precision(dtype),
        "UPCAST": upcasts(dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **FUSED,
    }


APART = "apart"
"""The form of a row whose ddown is made by `outer`, in one more read of u: two sums in registers would spill."""

# (kernel, bytes of an element): the largest padded rank that a row serves, and the row. None spills, or takes more
# than the 99 KiB that a block may have on every chip.
# fp32 has at most 32 rows a product: with 64, Triton 3.6 multiplies in TF32 on sm_100 whatever it is asked for
_TABLES: dict[tuple[str, int], dict[int, Config]] = {
    ("expand", 2): {128: Config(64, 128, 8, 1), 256: Config(64, 64, 8, 1)},
    ("expand", 4): {64: Config(32, 64, 8, 1), 256: Config(32, 32, 8, 1)},
    ("backward", 2): {
        16: Config(64, 64, 8, 3),
        32: Config(32, 64, 8, 3),
        64: Config(32, 64, 8, 3, form=APART),
        128: Config(16, 64, 8, 3, form=APART),
        256: Config(16, 64, 8, 2, form=APART),
    },
    ("backward", 4): {16: Config(32, 32, 8, 2), 64: Config(16, 32, 8, 2), 256: Config(16, 32, 8, 1, form=APART)},
}

# What takes its place where a product reads its operands from shared memory: sm_90 and sm_100
_LARGE: dict[int, Config] = {
    64: Config(32, 64, 8, 3),
    128: Config(32, 64, 8, 3, form=APART),
    256: Config(16, 64, 8, 2, form=APART),
}
_BLACKWELL = _LARGE | {256: Config(16, 64, 8, 1, form=APART)}  # the second stage spills an fp32 stream there


def configs(kernel: str, dtype: torch.dtype, rank_block: int, capability: tuple[int, int]) -> Config:
    """The compiled form of "expand" or "backward" for a dtype and a padded rank."""
    rows = _TABLES[kernel, dtype.itemsize]
    if kernel == "backward" and dtype.itemsize == 2:
        rows = {9: _LARGE, 10: _BLACKWELL}.get(capability[0], rows)
    return next(config for largest, config in rows.items() if rank_block <= largest)
