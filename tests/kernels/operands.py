"""What the tests of the operators share: gradients of any operator, their inputs in double, what backward keeps."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradients(function: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor | None], dy=None):
    """Every output of function(*inputs), then the gradient of every input that asks for one.

    The same dy for every dtype, unless it is given: values that bf16, fp16, fp32 and float64 hold exactly.
    """
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    dy = [fixed_dy(y) for y in outputs] if dy is None else dy
    return [*outputs, *torch.autograd.grad(outputs, wanted, dy)]


def fixed_dy(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel(), device=y.device).bfloat16().to(y.dtype).view(y.shape)


def in_double(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The same values as leaves of float64."""
    return tuple(None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors)


def kept_tensors(function: Callable[[], object]) -> list[Tensor]:
    """The tensors that function keeps for backward."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return kept
