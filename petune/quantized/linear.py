"""Linear maps of a few bits a weight: with a latent to train, or the bits alone."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from petune.kernels.packed_lora import unpacked
from petune.quantized.packing import packed_bytes
from petune.quantized.quantizer import Quantization, statistics, straight_through

_steps_taken = 0  # by every optimizer of the process


class QuantizedLinear(nn.Linear):
    """y = x Ŵᵀ + b, Ŵ the quantised latent: the parametrisation that every method of few bits shares

    `weight` is the latent W, which trains; `quantized()` is Ŵ, for layers that hand it to an operator of their own.
    Adapters made of such modules are saved in packed form by `petune.quantized.tuner.PackedTuner`.

    Attributes:
        anchor: float32, [rows, 4]; ties the statistics of a loaded latent to the stored ones
            (`petune.quantized.quantizer.statistics`). Zero until a packed checkpoint is loaded.
    """

    anchor: Tensor

    def __init__(
        self, in_features: int, out_features: int, quantization: Quantization, *, bias: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, **kwargs)
        self.quantization = quantization
        if quantization.active:
            rows = quantization.rows(self.weight.shape)
            device = self.weight.device
            self.register_buffer("anchor", torch.zeros(rows, 4, dtype=torch.float32, device=device))
        self._cache: _Cached | None = None

    def quantized(self) -> Tensor:
        """Ŵ, [out_features, in_features], float32, with the quantiser's gradient; W itself at 32 bits.

        In training the values are computed once between two optimizer steps, however often the layer runs: under
        activation checkpointing and gradient accumulation only the gradient is computed more than once.
        """
        if not self.quantization.active:
            return self.weight
        values, stats = self._values()
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return straight_through(self.weight, values, stats, self.anchor)
        return values

    def statistics(self) -> Tensor:
        """(μ, σ) of each row, float32, [rows, 2]."""
        return statistics(self.weight, len(self.anchor), self.anchor)

    def forward(self, input: Tensor) -> Tensor:
        bias = self._parameters["bias"]
        return F.linear(input, self.quantized().to(input.dtype), None if bias is None else bias.to(input.dtype))

    def train(self, mode: bool = True) -> "QuantizedLinear":
        if not mode:
            self._cache = None
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.quantization.bits}"

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        before = self._buffers.get("anchor")
        super()._apply(fn, recurse)
        _keep_float32(self, "anchor", before)
        return self

    def _values(self) -> tuple[Tensor, Tensor]:
        # Outside of training every call computes: weights are swapped in and out there in ways that leave no trace.
        # A traced or captured call must compute inside of its graph.
        weight = self.weight
        if not (self.training and weight.requires_grad) or _is_recorded(weight):
            return self._compute()
        # FSDP writes into a parameter's storage with its version kept, hence the count of steps
        version = (weight._version, self.anchor._version, weight.data_ptr(), _steps_taken)
        held = self._cache
        if held is None or held.weight is not weight or held.version != version:
            held = self._cache = _Cached(weight, version, *self._compute())
        return held.values, held.stats

    @torch.no_grad()
    def _compute(self) -> tuple[Tensor, Tensor]:
        stats = self.statistics()
        return self.quantization.quantized(self.weight, stats), stats

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}


class PackedLinear(nn.Module):
    """y = x Ŵᵀ of stored codes: the form for inference, 32 times smaller than a float32 weight at 1 bit

    Attributes:
        bits: uint8; codes as `petune.quantized.packing.pack` writes them.
        stats: (μ, σ) of each row, float32, [rows, 2].
    """

    bits: Tensor
    stats: Tensor

    def __init__(self, in_features: int, out_features: int, quantization: Quantization) -> None:
        super().__init__()
        self.in_features, self.out_features, self.quantization = in_features, out_features, quantization
        size = packed_bytes(in_features * out_features, quantization.bits)
        rows = quantization.rows((out_features, in_features))
        self.register_buffer("bits", torch.zeros(size, dtype=torch.uint8))
        self.register_buffer("stats", torch.zeros(rows, 2))

    def levels(self) -> Tensor:
        """The values a weight can take, float32, [rows, 2**bits]."""
        return self.quantization.levels(self.stats)

    def quantized(self) -> Tensor:
        """Ŵ, [out_features, in_features], float32."""
        shape = (self.out_features, self.in_features)
        return unpacked(self.bits, self.levels(), shape, self.quantization.bits)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.quantized().to(input.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        before = self.stats
        super()._apply(fn, recurse)
        _keep_float32(self, "stats", before)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.quantization.bits}"


class _Cached(NamedTuple):
    weight: Tensor
    version: tuple[int, int, int, int]
    values: Tensor
    stats: Tensor


def _keep_float32(module: nn.Module, name: str, before: Tensor | None) -> None:
    """Undo a cast to another dtype, as of `model.half()`: statistics are stored to the bit."""
    after = module._buffers.get(name)
    if before is not None and after is not None and after.dtype != before.dtype:
        module._buffers[name] = before.to(after.device)


def _is_recorded(weight: Tensor) -> bool:
    """Whether what runs now is written down to run again, by torch.compile or as a CUDA graph."""
    return torch.compiler.is_compiling() or (weight.is_cuda and torch.cuda.is_current_stream_capturing())


def _count_step(*_: Any) -> None:
    global _steps_taken
    _steps_taken += 1


register_optimizer_step_post_hook(_count_step)
