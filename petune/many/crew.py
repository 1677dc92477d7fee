"""Threads that take turns: each member runs until it asks for something, and only one of them, or the crew's owner,
runs at a time."""

import os
import random
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
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


class Member:
    """Work that runs in a thread of its own, by turns with the owner's.

    The owner calls `advance`, which returns when the work calls `pause` or ends. Nothing else runs in between, so the
    work needs no locks. Each member has its own state of the global random generators, so it draws what it would draw
    alone, and, being a thread, its own modes of autograd and autocast. Torch has one thread in a member's, and all of
    them in the owner's: pools of threads that wait for work by turns take twice the time of one (2 cores, torch 2.13).

    Args:
        name: of the thread.
        work: called with the member.
    """

    def __init__(self, name: str, work: Callable[["Member"], object]) -> None:
        self.name = name
        self.result: object = None
        """What the work returned."""
        self.error: BaseException | None = None
        """What ended the work before its time."""
        self.finished = False
        self._work = work
        self._answer: Any = None
        self._refusal: BaseException | None = None
        self._request: Any = None
        self._turn, self._owners_turn = threading.Semaphore(0), threading.Semaphore(0)
        self.random = RandomState.now()
        """Of its generators, while it does not run."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def advance(self, answer: object = None, refusal: BaseException | None = None) -> Any:
        """Let the work run until it pauses or ends.

        Args:
            answer: what its `pause` returns.
            refusal: what its `pause` raises instead.

        Returns:
            What it asks for; None when it has ended.
        """
        assert not self.finished
        self._answer, self._refusal, self._request = answer, refusal, None
        ours, threads = RandomState.now(), torch.get_num_threads()
        self.random.put()
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._turn.release()
        try:
            self._owners_turn.acquire()
        except KeyboardInterrupt:
            self._owners_turn.acquire()  # two must never run at a time: let it come to its next pause
            raise
        finally:
            torch.set_num_threads(threads)
            self.random = RandomState.now()
            ours.put()
        if self.finished:
            self._thread.join()
        return self._request

    def pause(self, request: object) -> Any:
        """Ask the owner for something; for the member's own thread.

        Raises:
            BaseException: what the owner answers with instead.
        """
        self._request = request
        self._owners_turn.release()
        self._turn.acquire()
        torch.set_num_threads(1)
        if self._refusal is not None:
            raise self._refusal
        return self._answer

    def stop(self) -> None:
        """End the work by an exception; what it asks for on its way out is refused as well."""
        while not self.finished:
            if self._thread.ident is None:
                self.error, self.finished = RunStoppedError(), True
            else:
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

    def _run(self) -> None:
        torch.set_num_threads(1)
        try:
            self.result = self._work(self)
        except BaseException as error:  # whatever it is, the owner has to hear of it
            self.error = error
        self.finished = True
        self._owners_turn.release()


def _cuda_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
