"""The layers of pruning-aware tuning: linears with LoRA and a hybrid module, norms that look at kept channels only."""

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from petune.adapters.pat.config import PatConfig
from petune.adapters.pat.mask import ChannelMask
from petune.kernels.residual_low_rank import residual_low_rank
from petune.layer import AdapterLayer
from petune.low_rank import Factors, LowRankLayer, lora_factors


class Masks:
    """The masks of a model's adapters, as its layers see them: values that one forward computes once."""

    def __init__(self, modules: nn.ModuleDict) -> None:
        self.modules = modules
        self._values: dict[str, Tensor] = {}
        self._heads: dict[str, Tensor | None] = {}

    def mask(self, name: str) -> ChannelMask:
        """The mask of adapter `name`."""
        mask: Any = self.modules[name]
        return mask

    def refresh(self, name: str) -> None:
        """Compute the mask's value for a forward that begins, and keep it until the next one begins."""
        mask = self.mask(name)
        self._values, self._heads = {name: mask.value()}, {name: mask.head_value()}

    def forget(self) -> None:
        """Drop the values that were kept, of masks that have moved on."""
        self._values, self._heads = {}, {}

    def value(self, name: str) -> Tensor:
        """M of adapter `name`, [width]."""
        kept = self._values.get(name)
        if kept is not None and torch.is_grad_enabled():
            return kept
        return self.mask(name).value()  # generate() and the like, which begin below the tuner

    def heads(self, name: str, row: int) -> Tensor:
        """The gates of the heads of attention `row`, [heads]."""
        gates = self._heads.get(name)
        if gates is None or not torch.is_grad_enabled():
            gates = self.mask(name).head_value()
        assert gates is not None
        return gates[row]

    def rests(self, name: str) -> bool:
        """Whether the mask is 1 everywhere, and nobody asks for its gradient."""
        return not torch.is_grad_enabled() and self.mask(name).is_identity

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_values": {}, "_heads": {}}


class Hybrid(nn.Module):
    """z = gate ⊙ (u + L₁ L₀ u): the hybrid sparsification module behind one residual writer

    gate = w ⊙ M with a trained w [width] (variant "code"), or gate = M and L₁ diag(v) L₀ with a trained v [rank]
    (variant "paper"); either starts as the identity.
    """

    def __init__(self, config: PatConfig, width: int) -> None:
        super().__init__()
        rank = config.rank(width)
        self.variant = config.variant
        self.down = nn.Parameter(torch.empty(rank, width))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        if config.variant == "code":
            self.up, self.scale = nn.Parameter(torch.zeros(width, rank)), nn.Parameter(torch.ones(width))
        else:
            up = torch.empty(width, rank)
            self.up, self.scale = nn.Parameter(nn.init.orthogonal_(up)), nn.Parameter(torch.zeros(rank))
        if not config.init_weights:
            nn.init.normal_(self.scale, 1.0, 0.3)
            nn.init.normal_(self.up, 0.0, 0.3 / math.sqrt(rank))

    def forward(self, u: Tensor, mask: Tensor) -> Tensor:
        """Args: u [..., width]; mask M [width]."""
        up, gate = self.parts(mask)
        return residual_low_rank(u, self.down, up, gate)

    def parts(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(L₁ [width, rank], gate [width]) for the mask M."""
        if self.variant == "code":
            return self.up, self.scale * mask
        return self.up * self.scale, mask

    def identity_loss(self) -> Tensor:
        """How far L₀, and in the paper's variant L₁, is from orthonormal rows or columns."""
        eye = torch.eye(len(self.down), dtype=self.down.dtype, device=self.down.device)
        rows = self.down @ self.down.T - eye
        if self.variant == "code":
            return (rows**2).mean()
        return rows.norm() + (self.up.T @ self.up - eye).norm()


class PatSite(AdapterLayer):
    """What pruning-aware tuning wraps: a linear or a norm."""

    supports_mixed_batch = False  # rows of other masks would need norms of their own
    masks: Masks
    """Set by the tuner."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises NotImplementedError: a dense model's norms would average over the pruned channels as well."""
        raise NotImplementedError(
            f"{type(self).__name__}: a mask cannot be merged in place, because the norms of the dense model would "
            "count the pruned channels; merge_and_unload() gives the smaller model."
        )


class PatLinear(LowRankLayer, PatSite):
    """u = x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ, and on a residual writer gate ⊙ (u + L₁ L₀ u)

    Behind attentions whose heads are pruned, x is first multiplied by the gate of the head that wrote it.
    """

    adapter_layer_names = ("petune_pat_a", "petune_pat_b", "petune_pat_hybrid")
    other_param_names = ("scale", "dropout_p", "head_row")
    supports_mixed_batch = False

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.petune_pat_a = nn.ParameterDict()
        self.petune_pat_b = nn.ParameterDict()
        self.petune_pat_hybrid = nn.ModuleDict()
        self.scale: dict[str, float] = {}
        self.dropout_p: dict[str, float] = {}
        self.head_row: dict[str, int] = {}
        """Which row of the heads' gates is this linear's, of adapters that prune heads."""
        self.takes_lora = self.takes_hybrid = False
        """What the next adapter has here; set by the tuner."""
        self.takes_heads: int | None = None
        """The next adapter's `head_row`; set by the tuner."""

    def create(self, name: str, config: PatConfig) -> None:
        self.scale[name], self.dropout_p[name] = config.scale, config.lora_dropout
        if self.takes_lora:
            a, b = lora_factors(self.in_features, self.out_features, config.r, identity=bool(config.init_weights))
            self.petune_pat_a[name], self.petune_pat_b[name] = a, b
        if self.takes_hybrid:
            self.petune_pat_hybrid[name] = Hybrid(config, self.out_features)
        if self.takes_heads is not None:
            self.head_row[name] = self.takes_heads

    def factors(self, name: str) -> Factors:
        dropout_p = self.dropout_p[name] if self.training else 0.0
        return Factors(self.petune_pat_a[name], self.petune_pat_b[name], self.scale[name], dropout_p)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises NotImplementedError, as every site does."""
        PatSite.merge(self, safe_merge, adapter_names)

    def live_adapters(self) -> list[str]:
        return [name for name in super().live_adapters() if name in self.petune_pat_a]

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        live = [] if self.disable_adapters else self.active_adapters
        for name in live:
            if name in self.head_row:
                gates = self.masks.heads(name, self.head_row[name])
                x = x * gates.repeat_interleave(self.in_features // len(gates)).to(x.dtype)
        u = super().forward(x, *args, adapter_names=adapter_names, **kwargs)
        for name in live:
            if name in self.petune_pat_hybrid:
                u = self.petune_pat_hybrid[name](u, self.masks.value(name))
        return u


Kind = Literal["layer", "rms", "rms_plus_one"]


class PatNorm(PatSite):
    """A norm whose statistics are those of the kept channels, and whose output is zero on the others

    With mask M and n = Σ M: y = M ⊙ (g ⊙ (x − μ) / √(σ² + ε) + b), μ = Σ M x / n, σ² = Σ M (x − μ)² / n; of an RMS
    norm μ = 0. At M = 1 that is the norm itself, and at a hard mask it is the stock norm of the smaller model, gains
    and ε unchanged.
    """

    adapter_layer_names = ()
    other_param_names = ("names",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.names: dict[str, bool] = {}
        self.kind: Kind = norm_kind(base_layer)

    def create(self, name: str, config: PatConfig) -> None:
        self.names[name] = True

    def _get_available_adapters(self) -> set[str]:
        return set(self.names)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.names]
        # in training always the same formula: reentrant checkpointing runs it without gradients first
        if not names or (not self.training and self.masks.rests(names[0])):
            return self.base_layer(x, *args, **kwargs)
        return masked_norm(x, self.masks.value(names[0]), self.get_base_layer(), self.kind)


def masked_norm(x: Tensor, mask: Tensor, norm: nn.Module, kind: Kind) -> Tensor:
    """What `PatNorm` computes, in float32 or wider, as the dtype of x."""
    module: Any = norm
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide, mask = x.to(dtype), mask.to(dtype)
    count = mask.sum()
    with torch.autocast(x.device.type, enabled=False):
        if kind == "layer":
            wide = wide - (wide @ mask / count).unsqueeze(-1)
        variance = (wide**2 @ mask / count).unsqueeze(-1)
        weight = getattr(module, "weight", None)
        gain = mask if weight is None else mask * (weight.to(dtype) + (kind == "rms_plus_one"))
        y = wide * torch.rsqrt(variance + norm_epsilon(norm)) * gain
        bias = getattr(module, "bias", None)
        return (y if bias is None else y + mask * bias.to(dtype)).to(x.dtype)


def norm_epsilon(norm: nn.Module) -> float:
    """ε of a LayerNorm or RMSNorm of any library."""
    names = ("eps", "variance_epsilon", "epsilon")
    return float(next(getattr(norm, name) for name in names if getattr(norm, name, None) is not None))


def norm_kind(norm: nn.Module) -> Kind:
    """Which of the known forms a norm computes, found by trying: names do not say that Gemma's gain is 1 + weight.

    Raises:
        ValueError: none of them.
    """
    probe: Any = copy.deepcopy(norm).to_empty(device="cpu").float()
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.device("cpu"), torch.no_grad():  # also where a model is made on another, as an estimate's on meta
        for parameter in probe.parameters():
            parameter.uniform_(0.5, 1.5, generator=generator)
        x = torch.randn(2, probe.weight.numel(), generator=generator)
        found = probe(x)
        kinds: list[Kind] = ["layer", "rms", "rms_plus_one"]
        for kind in kinds:
            if torch.allclose(masked_norm(x, torch.ones(x.shape[-1]), probe, kind), found, rtol=1e-4, atol=1e-5):
                return kind
    raise ValueError(
        f"a {type(norm).__name__} is neither a LayerNorm nor an RMSNorm, so PatConfig cannot leave channels out of it."
    )
