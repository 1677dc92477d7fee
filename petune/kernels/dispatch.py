"""Which implementation of an operator runs: its Triton kernels on a GPU, else its reference in plain torch."""

import importlib
import logging
import os
from contextlib import nullcontext
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_MODES = ("auto", "reference", "triton")


class Dispatcher:
    """Runs a function of `petune.kernels.<name>.kernel` where Triton covers the case, else that of the reference.

    `PETUNE_KERNELS` is auto (Triton on CUDA), reference, or triton, which makes every uncovered case an error. What
    cannot be imported, compiled or launched is named in one warning, and the reference runs from then on.
    """

    def __init__(self, name: str, reference: ModuleType) -> None:
        self.name = name
        self.reference = reference
        self._kernel: ModuleType | None = None
        self._broken = ""
        self._warned = set[str]()

    def run(self, function: str, args: tuple[object, ...], *, dtype: torch.dtype, rank: int) -> tuple[Tensor, ...]:
        """`function(*args)` of the chosen implementation, outside of autocast: the operators cast by themselves.

        Args:
            function: forward or backward.
            args: its arguments; the first is a tensor on the device that decides, or a list of such.
            dtype: of the products.
            rank: of all adapters together.

        Raises:
            RuntimeError: PETUNE_KERNELS=triton and the case is not covered.
            ValueError: PETUNE_KERNELS is none of its values.
        """
        mode = os.environ.get("PETUNE_KERNELS", "auto")
        if mode not in _MODES:
            raise ValueError(f"PETUNE_KERNELS={mode!r} is not one of {', '.join(_MODES)}; unset it for auto.")
        first = args[0][0] if isinstance(args[0], list) else args[0]
        assert isinstance(first, Tensor)
        kind = first.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            if mode == "reference" or (mode == "auto" and kind != "cuda"):
                return getattr(self.reference, function)(*args)
            if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
                raise RuntimeError(
                    f"PETUNE_KERNELS=triton, but the tensors of {self.name} are on the {kind}; move them to a CUDA "
                    "device, or unset it."
                )
            # Triton launches on the current device, and a model may lie on several
            with torch.cuda.device(first.device) if kind == "cuda" else nullcontext():
                return self._run(function, args, mode, dtype, rank)

    def _run(
        self, function: str, args: tuple[object, ...], mode: str, dtype: torch.dtype, rank: int
    ) -> tuple[Tensor, ...]:
        reason = self._why_not(dtype, rank)
        if not reason:
            try:
                return getattr(self._kernel, function)(*args)
            except Exception as error:  # no C compiler, a driver too old for the PTX, too little shared memory …
                if mode == "triton" or not _is_ours_to_survive(error):
                    raise
                reason = self._broken = f"its Triton kernels fail here ({_in_one_line(error)})"
        if mode == "triton":
            raise RuntimeError(
                f"PETUNE_KERNELS=triton, but {self.name} cannot run on Triton: {reason}; unset it, or set it to "
                "reference."
            )
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning("%s runs its slower plain torch reference: %s", self.name, reason)
        return getattr(self.reference, function)(*args)

    def _why_not(self, dtype: torch.dtype, rank: int) -> str:
        """Why the Triton kernels cannot take this case, or ""."""
        if self._broken:
            return self._broken
        if self._kernel is None:
            # imported on the first CUDA call: a machine without a GPU never loads triton
            if find_spec("triton") is None:
                self._broken = "Triton is not installed"
                return self._broken
            try:
                self._kernel = importlib.import_module(f"petune.kernels.{self.name}.kernel")
            except Exception as error:  # a broken install fails with whatever its first broken import raises
                self._broken = f"Triton cannot be imported ({_in_one_line(error)})"
                return self._broken
        return self._kernel.unsupported(dtype, rank) or ""


def _is_ours_to_survive(error: Exception) -> bool:
    """Whether plain torch may succeed where the kernel failed; not when memory or the CUDA context is gone."""
    return not isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError))


def _in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
