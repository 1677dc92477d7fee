"""A low-rank residual map with a gate on its channels as one operator: the sparsification module of PAT."""

from petune.kernels.residual_low_rank.op import residual_low_rank

__all__ = ["residual_low_rank"]
