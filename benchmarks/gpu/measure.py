"""Times and memory of the sides of a row, in eager launches and as CUDA graphs."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.harness import Clock, Plan, interleaved
from benchmarks.gpu.peers import Side
from benchmarks.gpu.problem import Problem

GRAPH_WARM_UP = 3


def eager(sides: list[Side], problem: Problem, plan: Plan, device: torch.device) -> dict[str, dict[str, Any]]:
    """Per side forward, backward and both, launched one by one from an idle device: what users get."""
    clock = Clock(device)
    pristine = [inputs.x.detach().clone() for inputs in problem.sets]

    def sampler(side: Side) -> Callable[[int], Mapping[str, float]]:
        def sample(step: int) -> dict[str, float]:
            inputs = problem.sets[step % len(problem.sets)]
            if side.overwrites_x:
                with torch.no_grad():
                    inputs.x.copy_(pristine[step % len(pristine)])
            with side.within(), torch.set_grad_enabled(problem.row.backward):
                clock.settle()
                start = clock.mark()
                y = side.run(problem, step)
                middle = clock.mark()
                if problem.row.backward:
                    torch.autograd.grad(y, [inputs.x, *side.parameters], inputs.dys)
                end = clock.mark()
                clock.settle()
            times = {"forward": clock.between_us(start, middle)}
            if problem.row.backward:
                times |= {"backward": clock.between_us(middle, end), "both": clock.between_us(start, end)}
            return times

        return sample

    times = interleaved({side.name: sampler(side) for side in sides}, plan)
    with torch.no_grad():
        for inputs, x in zip(problem.sets, pristine, strict=True):
            inputs.x.copy_(x)
    return times


def graphed(
    sides: list[Side], problem: Problem, plan: Plan, device: torch.device
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Per side forward and both as CUDA graphs over all sets, a set: the GPU's own time; and why a side has none.

    Backward alone is the difference of the medians. A side that writes over x runs on what its last backward left.
    """
    clock, pool = Clock(device), torch.cuda.graph_pool_handle()
    graphs, failed = dict[str, dict[str, torch.cuda.CUDAGraph]](), dict[str, str]()
    for side in sides:
        try:
            graphs[side.name] = {
                quantity: _capture(side, problem, quantity == "both", pool)
                for quantity in (("forward", "both") if problem.row.backward else ("forward",))
            }
        except Exception as error:  # whatever a peer raises is its result
            failed[side.name] = f"{type(error).__name__}: {error}".splitlines()[0]

    def sampler(captured: Mapping[str, torch.cuda.CUDAGraph]) -> Callable[[int], Mapping[str, float]]:
        def sample(_: int) -> dict[str, float]:
            times: dict[str, float] = {}
            for quantity, graph in captured.items():
                clock.settle()
                start = clock.mark()
                graph.replay()
                end = clock.mark()
                clock.settle()
                times[quantity] = clock.between_us(start, end) / len(problem.sets)
            return times

        return sample

    count = len(problem.sets)  # of calls that one replay makes
    replays = plan._replace(warm_up=math.ceil(plan.warm_up / count), timed=math.ceil(plan.timed / count))
    samplers = {name: sampler(graph) for name, graph in graphs.items()}
    times: dict[str, dict[str, Any]] = interleaved(samplers, replays)
    for quantities in times.values():
        if "both" in quantities:
            difference = quantities["both"]["median_us"] - quantities["forward"]["median_us"]
            quantities["backward"] = {"median_us": difference}
    return times, failed


def _capture(side: Side, problem: Problem, backward: bool, pool: Any) -> torch.cuda.CUDAGraph:
    def run() -> None:
        for step, inputs in enumerate(problem.sets):
            with torch.set_grad_enabled(problem.row.backward):
                y = side.run(problem, step)
                if backward:
                    torch.autograd.grad(y, [inputs.x, *side.parameters], inputs.dys)

    with side.within():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(GRAPH_WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run()
        return graph


def peak_mib(side: Side, problem: Problem) -> float:
    """Peak of what four calls keep and their backwards need on top, as four layers in a row do, without the inputs."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept: list[tuple[Tensor, ...]] = []
    with side.within(), torch.set_grad_enabled(problem.row.backward):
        for step in range(4):
            kept.append(side.run(problem, step))
        while problem.row.backward and kept:
            inputs = problem.sets[(len(kept) - 1) % len(problem.sets)]
            torch.autograd.grad(kept.pop(), [inputs.x, *side.parameters], inputs.dys)
    peak = torch.cuda.max_memory_allocated() - before
    torch.cuda.synchronize()
    return peak / 2**20
