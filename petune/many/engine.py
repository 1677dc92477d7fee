"""Rounds of joint training steps: which runs take part, the joint forward, and the joint backward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from petune.many.backbone import JointBackbone
from petune.many.calls import Call, JointOutput, Span, forward_of, kind_of, merge, read_call
from petune.many.crew import Member
from petune.many.plan import Part, Plan

_FULL = {"cpu": 512}
"""Tokens of one batch from which on it fills a device: benchmarks/many.py."""
_FULL_GPU = 8192
"""Not measured."""


class Forward(NamedTuple):
    """A member asks for the output of its backbone."""

    call: Call
    alone: Callable[..., Any]
    """The forward of its own model's backbone."""


class Backward(NamedTuple):
    """A member has propagated its loss to the backbone's output."""


class _Part(NamedTuple):
    """Part of an output."""

    output: JointOutput
    plan: Plan | None
    """Of the joint call; None where the run's own model made it."""
    index: int


@dataclass(eq=False)
class Trainee:
    """A member in training."""

    member: Member
    request: Forward | Backward | None = None
    """What it waits for; None when it has ended."""
    steps: int = 0
    """Rounds that it took part in."""
    outputs: list[_Part] = field(default_factory=lambda: list[_Part]())
    """What it was given in this round."""

    @property
    def name(self) -> str:
        return self.member.name

    def generators(self) -> Any:
        return self.member.generators()

    def advance(self, answer: object = None, refusal: BaseException | None = None) -> None:
        self.request = self.member.advance(answer, refusal)


class Engine:
    """Trains members together

    A round is one training step of each member that takes part: joint forward calls until each of them has its loss,
    one backward through all of them, and then each goes on alone (clipping, optimizer, logs, checkpoints, validation)
    until it asks for its next batch's output.

    Args:
        tokens_per_step: that the members of a round may bring together; None for no limit. Who has taken part least
            comes first; one member's batch is never cut.
    """

    def __init__(self, tokens_per_step: int | None = None) -> None:
        self.tokens_per_step = tokens_per_step
        self.joint: JointBackbone | None = None
        self.members: list[Trainee] = []
        self.largest_round = 0
        """Members in the largest round so far."""

    def ask(
        self, member: Member, body: nn.Module, alone: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The backbone's output for a member's batch; for the member's work.

        Args:
            alone: the backbone's own forward.
        """
        return member.pause(Forward(read_call(forward_of(body), args, kwargs), alone))

    def start(self, member: Member) -> Trainee:
        """Let a member run to its first training step."""
        trainee = Trainee(member)
        self.members.append(trainee)
        trainee.advance()
        self._let_go([trainee])
        return trainee

    def round(self) -> list[Trainee]:
        """One training step of the members that fit into the budget.

        Returns:
            Those that ended in it.
        """
        chosen = self._choose()
        self.largest_round = max(self.largest_round, len(chosen))
        large = [one for one in chosen if self._fills(one)]
        for trainee in large:  # one after the other, so that the activations of one alone are in memory
            self._step([trainee])
        self._step([one for one in chosen if one not in large])
        return self._let_go(chosen)

    def stop(self) -> None:
        """End all members."""
        for trainee in self.members:
            trainee.member.stop()
        self.members.clear()

    def _fills(self, trainee: Trainee) -> bool:
        """Whether a member's batch fills the machine by itself, and gains nothing by the company of others."""
        assert isinstance(trainee.request, Forward)
        assert self.joint is not None
        call = trainee.request.call
        return not self.joint.deviates and call.tokens >= _FULL.get(call.device.type, _FULL_GPU)

    def _step(self, members: Sequence[Trainee]) -> None:
        while asking := [one for one in members if isinstance(one.request, Forward)]:
            for group in _by_kind(asking):
                self._forward(group)
        self._backward([one for one in members if isinstance(one.request, Backward)])
        for trainee in members:
            trainee.steps += 1
            trainee.outputs.clear()
            if isinstance(trainee.request, Backward):
                trainee.advance()

    def _let_go(self, trainees: Sequence[Trainee]) -> list[Trainee]:
        ended = [one for one in trainees if one.member.finished]
        for one in ended:
            self.members.remove(one)
            if self.joint is not None:
                self.joint.remove(one.member)
        return ended

    def _choose(self) -> list[Trainee]:
        order = sorted(self.members, key=lambda one: one.steps)  # sorted is stable: else in the order of their start
        chosen: list[Trainee] = []
        tokens = 0
        for trainee in order:
            assert isinstance(trainee.request, Forward)
            tokens += trainee.request.call.tokens
            if chosen and self.tokens_per_step is not None and tokens > self.tokens_per_step:
                break
            chosen.append(trainee)
        return chosen

    def _forward(self, group: Sequence[Trainee]) -> None:
        states = [trainee.member.random for trainee in group]
        try:
            output = self._output(group)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # no run's own fault, and nothing that one run less would mend for sure
        except Exception as error:
            if len(group) == 1:
                group[0].advance(refusal=error)
                return
            for trainee, state in zip(group, states, strict=True):  # whoever is at fault fails alone
                trainee.member.random = state
                self._forward([trainee])
            return
        for trainee, part in zip(group, output.parts, strict=True):
            trainee.advance(part)

    def _output(self, group: Sequence[Trainee]) -> JointOutput:
        assert self.joint is not None
        requests = [trainee.request for trainee in group if isinstance(trainee.request, Forward)]
        call, *others = calls = [request.call for request in requests]
        plan = None
        if others or self.joint.deviates:
            arguments, spans = merge(calls)
            plan = Plan([Part(trainee.member, span) for trainee, span in zip(group, spans, strict=True)])
            forward, context = self.joint.model, self.joint.running(plan)
        else:  # nobody to share a pass with: the run's own model takes it as fast as it trains alone
            arguments, spans = call.arguments, [Span.of(call)]
            forward, context = requests[0].alone, group[0].generators()
        with context, torch.autocast(call.device.type, call.autocast) if call.autocast else nullcontext():
            output = JointOutput(forward(**arguments), spans)
        for index, trainee in enumerate(group):
            trainee.outputs.append(_Part(output, plan, index))
        return output

    def _backward(self, trainees: Sequence[Trainee]) -> None:
        assert self.joint is not None
        found: dict[JointOutput, tuple[Plan | None, list[bool]]] = {}
        for trainee in trainees:
            for output, plan, index in trainee.outputs:
                _, wanted = found.setdefault(output, (plan, [False] * len(output.spans)))
                wanted[index] = True
        for output, (plan, wanted) in found.items():
            # activation checkpointing runs layers again
            with nullcontext() if plan is None else self.joint.running(plan):
                output.backward(wanted)


def _by_kind(trainees: Sequence[Trainee]) -> Iterator[list[Trainee]]:
    kinds: dict[Any, list[Trainee]] = {}
    for trainee in trainees:
        assert isinstance(trainee.request, Forward)
        kinds.setdefault(kind_of(trainee.request.call), []).append(trainee)
    yield from kinds.values()
