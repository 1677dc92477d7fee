"""The two linear layers of a routed feed-forward, for inference: products of the chosen pairs of token and expert."""

from petune.kernels.expert_linear.op import expert_in, expert_out
from petune.kernels.expert_linear.reference import Assignment, assign

__all__ = ["Assignment", "assign", "expert_in", "expert_out"]
