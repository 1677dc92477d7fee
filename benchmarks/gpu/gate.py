"""Is a side right? Asked before it is timed: what computes something else, or half of it, has no speed.

Errors are ‖out − ref‖ / ‖ref‖ against float64 on the tensors that the side holds. The *update* y − x Wᵀ is compared
beside y: rounding of y hides a broken update. With dropout the mask that a side has drawn is read off its dX with
W = 0, which is zero exactly where x was dropped, and the same mask must then explain y, dX, dA and dB.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.peers import Side
from benchmarks.gpu.problem import Exact, Inputs, Problem, exact, named_linears

LIMIT = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}
"""Of y, dX, dA and dB of one linear map, for ours."""
PEER_SLACK = 2.0
"""Peers round x / (1 − p), a cast A or s · dY besides; what computes something else is wrong by 1e-1."""
TO_BEST = 1.1
"""How far our errors may exceed those of PEFT with adapters in the base's dtype (E3)."""
SIGMAS = 5.0
SEED = 20_000
POISON_BYTES = 4 * 2**30  # more than all outputs of a row
POISON = 0x7FC0  # NaN in bf16, in fp16, and, twice, in fp32


@dataclass
class Verdict:
    """Whether a side may be timed, and why not."""

    passed: bool
    reason: str
    errors: dict[str, float]
    limits: dict[str, float]
    keep_ratio: float | None = None
    """Share of x that was kept, where the row has dropout."""
    repeatable: bool | None = None
    """Whether two runs with one seed agree bit by bit."""
    to_fp32_adapters: dict[str, float] | None = None
    """E3 alone: its errors against the fp32 adapters that it holds rounded, the bound of ours with fp32 adapters."""

    def as_row(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}

    def bounds(self, parameters: Sequence[Tensor]) -> dict[str, float]:
        """What ours may be wrong by where this is the verdict on E3."""
        errors = (self.to_fp32_adapters or {}) if parameters[0].dtype == torch.float32 else self.errors
        return {key: TO_BEST * error for key, error in errors.items()}


def check(side: Side, problem: Problem, best: Verdict | None) -> Verdict:
    """Compare one run of the side with float64; `best` is the verdict on E3, whose errors ours may not exceed."""
    inputs, row = problem.sets[0], problem.row
    masks = _masks(side, problem, inputs) if row.dropout and side.parameters else None
    poison(inputs.x.device)
    got = _run(side, problem, inputs)
    reference = exact(problem, side.parameters, inputs, masks)
    errors, limits = _errors(got, reference), _limits(problem, reference)
    if side.ours:
        bounds = best.bounds(side.parameters) if best else {}
        limits = {key: min(limit, bounds.get(key, limit)) for key, limit in limits.items()}
    else:
        limits = {key: PEER_SLACK * limit for key, limit in limits.items()}
    # the negation: NaN is never below a limit
    broken = [f"{key} {error:.1e} > {limits[key]:.1e}" for key, error in errors.items() if not error <= limits[key]]
    keep_ratio = None
    if masks is not None:
        kept = torch.stack([mask.mean() for mask in masks])
        keep_ratio = kept.mean().item()
        tolerance = SIGMAS * (row.dropout * (1 - row.dropout) / masks[0].numel()) ** 0.5
        if not (kept - (1 - row.dropout)).abs().max().item() <= tolerance:
            broken.append(f"keeps {keep_ratio:.4f} of x at p={row.dropout}")
    again = _run(side, problem, inputs)
    repeatable = all(torch.equal(one, other) for one, other in zip(got, again, strict=True))
    verdict = Verdict(not broken, "; ".join(broken), errors, limits, keep_ratio, repeatable)
    if side.name == "E3":
        wide = exact(problem, [factor for pair in problem.adapters for factor in pair], inputs, masks)
        verdict.to_fp32_adapters = _errors(got, wide)
    return verdict


def poison(device: torch.device) -> None:
    """Fill the memory that the next tensors will take with NaN, so that an element that is not written shows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.full((POISON_BYTES // 2,), POISON, dtype=torch.int16, device=device)  # freed at once, then handed out


def _run(side: Side, problem: Problem, inputs: Inputs, only: int | None = None) -> tuple[Tensor, ...]:
    """y of each linear map, then dX, then dA and dB of each; always with the same seed."""
    torch.manual_seed(SEED)
    x = inputs.x.detach().clone().requires_grad_(problem.row.backward)
    with side.within(), torch.set_grad_enabled(problem.row.backward):
        y = side.run(problem, 0, x)
        if not problem.row.backward:
            return y
        dys = [dy if only in (None, index) else torch.zeros_like(dy) for index, dy in enumerate(inputs.dys)]
        return (*(t.detach() for t in y), *torch.autograd.grad(y, [x, *side.parameters], dys))


def _masks(side: Side, problem: Problem, inputs: Inputs) -> list[Tensor]:
    """The keep mask of each linear map: with W = 0 and one dy, dX is m ⊙ (ds A)/q."""
    linears = list(named_linears(problem.bases[0]).values())
    weights = [linear.weight.clone() for linear in linears]
    try:
        for linear in linears:
            linear.weight.zero_()
        count = len(inputs.dys)
        return [(_run(side, problem, inputs, only=index)[count] != 0).double() for index in range(count)]
    finally:
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight.copy_(weight)


def _errors(got: tuple[Tensor, ...], reference: Exact) -> dict[str, float]:
    """The largest error of each kind over the linear maps."""
    count = len(reference.y)
    errors = {"y": max(map(_error, got, reference.y))}
    if any(not torch.equal(y, frozen) for y, frozen in zip(reference.y, reference.frozen, strict=True)):
        triples = zip(got, reference.y, reference.frozen, strict=False)
        errors["update"] = max(_error(y.double() - frozen, exact_y - frozen) for y, exact_y, frozen in triples)
    if reference.dx is not None:
        errors["dx"] = _error(got[count], reference.dx)
        both = list(map(_error, got[count + 1 :], reference.adapters))
        errors.update({key: max(both[start::2]) for start, key in enumerate(("da", "db")) if both})
    return errors


def _error(out: Tensor, reference: Tensor) -> float:
    return ((out.double() - reference).norm() / reference.norm()).item()


def _limits(problem: Problem, reference: Exact) -> dict[str, float]:
    """LIMIT, times √n where n products follow or add up to each other and each is rounded."""
    row = problem.row
    limit = LIMIT[problem.sets[0].x.dtype]
    chain = 3**0.5 if row.mlp else 1.0
    summed = len(row.out_features) ** 0.5
    limits = {"y": chain * limit, "dx": chain * summed * limit, "da": chain * limit, "db": chain * limit}
    pairs = zip(reference.y, reference.frozen, strict=True)
    ratios = [(y.norm() / (y - frozen).norm()).item() for y, frozen in pairs if not torch.equal(y, frozen)]
    limits["update"] = limits["y"] * max(ratios, default=1.0)  # what rounding y alone does to the update
    return limits
