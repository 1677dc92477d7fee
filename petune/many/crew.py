"""Coroutines that take turns: each member runs until it asks for something, and only one of them, or the crew's
owner, runs at a time."""

import os
import random
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

_SEED = "PL_GLOBAL_SEED"  # where `lightning.seed_everything` leaves it, for callbacks to read


class RunStoppedError(Exception):
    """Raised inside a member that is told to end."""


class RandomState(NamedTuple):
    """The state of every global random generator, and the seed that Lightning says they had."""

    torch: Tensor
    cuda: list[Tensor]
    numpy: Any
    python: Any
    seed: str | None

    @classmethod
    def now(cls) -> "RandomState":
        numpy: Any = np.random.get_state()  # noqa: NPY002 - the global one is what code draws from
        return cls(torch.get_rng_state(), _cuda_states(), numpy, random.getstate(), os.environ.get(_SEED))

    def put(self) -> None:
        """Make it the state of the generators."""
        torch.set_rng_state(self.torch)
        torch.cuda.set_rng_state_all(self.cuda)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)
        if self.seed is None:
            os.environ.pop(_SEED, None)
        else:
            os.environ[_SEED] = self.seed


class SignalHandlers(NamedTuple):
    """Of the signals that trainers take; none outside of the main thread, where they take none."""

    handlers: dict[signal.Signals, Any]

    @classmethod
    def now(cls) -> "SignalHandlers":
        is_main = threading.current_thread() is threading.main_thread()
        return cls({one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM) if is_main})

    def put(self) -> None:
        """Make them the handlers."""
        for one, handler in self.handlers.items():
            signal.signal(one, handler)


class _Modes(NamedTuple):
    """What torch keeps for each thread of the system, and so for none of the members by itself."""

    grad: bool
    autocast: dict[str, tuple[bool, torch.dtype]]
    """By the kind of device."""

    @classmethod
    def now(cls) -> "_Modes":
        kinds = {"cpu", str(torch.accelerator.current_accelerator() or "cpu")}
        return cls(
            torch.is_grad_enabled(),
            {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds},
        )

    def put(self) -> None:
        """Make them what holds from now on."""
        torch.set_grad_enabled(self.grad)
        for kind, (enabled, dtype) in self.autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.clear_autocast_cache()  # it ends with the outermost context, which may be another member's


class Member:
    """Work that runs by turns with its owner's

    The owner calls `advance`, which returns when the work calls `pause` or ends. It is a coroutine, on a stack of its
    own in the owner's thread: nothing else runs in between, so the work needs no locks, and torch has one pool of
    threads for all, and one current device. Each member has its own state of the global random generators, so it draws
    what it would draw alone, and its own modes of autograd and autocast.

    Args:
        name: for messages.
        work: called with the member.
    """

    def __init__(self, name: str, work: Callable[["Member"], object]) -> None:
        self.name = name
        self.result: object = None
        """What the work returned."""
        self.error: BaseException | None = None
        """What ended the work before its time."""
        self._stack = greenlet(lambda _: work(self))
        self._random = RandomState.now()
        self._generator = torch.Generator()
        self._lent = False  # whether the generator is ahead of the state
        self._modes = _Modes.now()

    @property
    def finished(self) -> bool:
        return self._stack.dead

    @property
    def random(self) -> RandomState:
        """Of its generators, while it does not run."""
        if self._lent:
            self.random = self._random._replace(torch=self._generator.get_state())
        return self._random

    @random.setter
    def random(self, state: RandomState) -> None:
        self._random, self._lent = state, False

    @property
    def generator(self) -> torch.Generator:
        """Its generator on the CPU, for its owner to draw from while it does not run; not to be kept."""
        if not self._lent:
            self._generator.set_state(self._random.torch)
            self._lent = True
        return self._generator

    def advance(self, answer: object = None, refusal: BaseException | None = None) -> Any:
        """Let the work run until it pauses or ends.

        Args:
            answer: what its `pause` returns.
            refusal: what its `pause` raises instead.

        Returns:
            What it asks for; None when it has ended.

        Raises:
            KeyboardInterrupt: in the work.
        """
        assert not self.finished
        ours, modes, handlers = RandomState.now(), _Modes.now(), SignalHandlers.now()
        self.random.put()
        self._modes.put()
        self._stack.parent = getcurrent()
        try:
            found = self._stack.switch(answer) if refusal is None else self._stack.throw(refusal)
        except (Exception, SystemExit) as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # of which Lightning makes an exit
                raise KeyboardInterrupt from error
            self.error, found = error, None
        finally:
            self.random, self._modes = RandomState.now(), _Modes.now()
            ours.put()
            modes.put()
            if self._stack.dead:  # a trainer that ends puts back what others have put theirs in the place of
                handlers.put()
        if self._stack.dead:
            self.result, found = found, None
        return found

    def pause(self, request: object) -> Any:
        """Ask the owner for something; for the member's work.

        Raises:
            BaseException: what the owner answers with instead.
        """
        owner = self._stack.parent
        assert owner is not None
        return owner.switch(request)

    def stop(self) -> None:
        """End the work by an exception; what it asks for on its way out is refused as well."""
        while not self.finished:
            self.advance(refusal=RunStoppedError(f"{self.name} was stopped"))

    @contextmanager
    def generators(self) -> Generator[None]:
        """Inside, the owner draws from the member's random generators."""
        ours = RandomState.now()
        self.random.put()
        try:
            yield
        finally:
            self.random = RandomState.now()
            ours.put()

    @contextmanager
    def draws(self) -> Generator[None]:
        """As `generators`, of torch's alone, which takes microseconds."""
        ours = torch.get_rng_state(), _cuda_states()
        torch.set_rng_state(self.random.torch)
        torch.cuda.set_rng_state_all(self.random.cuda)
        try:
            yield
        finally:
            self.random = self.random._replace(torch=torch.get_rng_state(), cuda=_cuda_states())
            torch.set_rng_state(ours[0])
            torch.cuda.set_rng_state_all(ours[1])


def _cuda_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
