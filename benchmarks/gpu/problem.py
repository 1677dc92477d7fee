"""One row of a benchmark as tensors: frozen linear maps, the adapters on them, rotating inputs, the exact answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

SCALE = 2.0  # alpha = 2 r, and not 1, so that a lost scale shows
MIN_SETS = 4
CACHE_BYTES = 50 * 2**20  # L2 of an H100: what all sets read together is twice as much, or the cache is measured


class Row(NamedTuple):
    """What one row measures."""

    name: str
    batch: int
    length: int
    """Tokens a sequence; batch · length tokens in all."""
    in_features: int
    out_features: tuple[int, ...]
    """Of the linear maps that read one x; of an MLP its inner size alone."""
    rank: int = 16
    dropout: float = 0.0
    mlp: bool = False
    """down(silu(gate(x)) · up(x)) instead of maps side by side."""
    bias: bool = False
    backward: bool = True
    """False for decoding: forward only, under no_grad, the weights rotate as well."""
    compiled: tuple[str, ...] = ()
    """Which of PEFT's settings to run under torch.compile too."""
    variants: bool = False
    """Whether each variant of the chooser gets a column."""

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def label(self) -> str:
        shape = "×".join(map(str, (self.tokens, self.in_features))) + ">" + "+".join(map(str, self.out_features))
        return f"{self.name} {shape} r={self.rank} p={self.dropout:g}"


class Linears(nn.Module):
    """Linear maps that read one x: a single one, q/k/v or gate/up."""

    def __init__(self, in_features: int, out_features: Sequence[int], bias: bool) -> None:
        super().__init__()
        for index, size in enumerate(out_features):
            setattr(self, f"p{index}", nn.Linear(in_features, size, bias=bias))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(x) for linear in self.children())


class Inputs(NamedTuple):
    x: Tensor
    dys: tuple[Tensor, ...]


@dataclass
class Problem:
    """The tensors of one row; every side holds the same weights, adapters and inputs."""

    row: Row
    bases: list[nn.Module]
    """Frozen. One for all sets, or one a set where the weights must not stay in the cache."""
    adapters: list[tuple[Tensor, Tensor]]
    """(A, B) in fp32 for each linear map, in the order of named_linears."""
    sets: list[Inputs]


def named_linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def make(row: Row, device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
    """Random tensors in which |scale · s Bᵀ| is a quarter of |x Wᵀ|: with B = 0 a broken adapter would pass."""
    torch.manual_seed(seed)
    base = _base(row, device, dtype)
    weight_bytes = sum(p.numel() * p.element_size() for p in base.parameters())
    count = MIN_SETS if row.backward else max(MIN_SETS, math.ceil(2 * CACHE_BYTES / weight_bytes))
    if device.type == "cpu":
        count = 2
    bases = [base] if row.backward else [base, *(_base(row, device, dtype) for _ in range(count - 1))]
    sizes = (row.in_features,) if row.mlp else row.out_features
    sets: list[Inputs] = []
    for _ in range(count):
        x = torch.randn(row.batch, row.length, row.in_features, device=device, dtype=dtype)
        dys = tuple(torch.randn(row.batch, row.length, n, device=device, dtype=dtype) for n in sizes if row.backward)
        sets.append(Inputs(x.requires_grad_(row.backward), dys))
    adapters: list[tuple[Tensor, Tensor]] = []
    for linear in named_linears(base).values():
        a = torch.randn(row.rank, linear.in_features, device=device) / linear.in_features**0.5
        b = torch.randn(linear.out_features, row.rank, device=device) / (4 * SCALE * row.rank**0.5)
        adapters.append((a, b))
    return Problem(row, bases, adapters, sets)


def _base(row: Row, device: torch.device, dtype: torch.dtype) -> nn.Module:
    with torch.device(device):
        if row.mlp:
            config = LlamaConfig(hidden_size=row.in_features, intermediate_size=row.out_features[0])
            module: nn.Module = LlamaMLP(config)
        else:
            module = Linears(row.in_features, row.out_features, row.bias)
    module = module.to(dtype).requires_grad_(False)
    for linear in named_linears(module).values():
        linear.weight.normal_(std=linear.in_features**-0.5)
    return module


class Exact(NamedTuple):
    """Results in float64."""

    y: tuple[Tensor, ...]
    frozen: tuple[Tensor, ...]
    """y without the adapters."""
    dx: Tensor | None
    adapters: tuple[Tensor, ...]
    """dA and dB of each linear map in turn."""


def exact(
    problem: Problem, parameters: Sequence[Tensor], inputs: Inputs, masks: Sequence[Tensor] | None = None
) -> Exact:
    """The row in float64 from the tensors as they are held.

    Args:
        parameters: A and B of each linear map in turn, as a side holds them; none for the frozen base.
        masks: the 0/1 keep mask of each linear map, where the row has dropout.
    """
    row = problem.row
    leaves = [t.detach().double().requires_grad_(row.backward) for t in (inputs.x, *parameters)]
    linears = list(named_linears(problem.bases[0]).values())

    def project(index: int, x: Tensor, adapted: bool) -> Tensor:
        linear = linears[index]
        bias = cast("Tensor | None", linear.bias)
        y = F.linear(x, linear.weight.double(), None if bias is None else bias.double())
        if not (adapted and parameters):
            return y
        if masks is not None:
            x = x * masks[index] / (1 - row.dropout)
        return y + SCALE * (x @ leaves[1 + 2 * index].T) @ leaves[2 + 2 * index].T

    def forward(x: Tensor, adapted: bool) -> tuple[Tensor, ...]:
        if row.mlp:
            h = F.silu(project(0, x, adapted)) * project(1, x, adapted)
            return (project(2, h, adapted),)
        return tuple(project(index, x, adapted) for index in range(len(linears)))

    with torch.set_grad_enabled(row.backward):
        y = forward(leaves[0], True)
    with torch.no_grad():
        frozen = forward(leaves[0], False)
    if not row.backward:
        return Exact(y, frozen, None, ())
    gradients = torch.autograd.grad(y, leaves, [dy.double() for dy in inputs.dys])
    return Exact(tuple(t.detach() for t in y), frozen, gradients[0], gradients[1:])


def outputs(result: Any) -> tuple[Tensor, ...]:
    """What a module returned, always as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)
