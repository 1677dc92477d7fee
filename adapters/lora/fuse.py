"""`fuse` puts the fused layers, groups and MLPs into a loaded PEFT LoRA model; `unfuse` takes them out."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn

from petune.adapters.lora.group import Group, detach
from petune.adapters.lora.layer import FusedLoraLinear, uncovered_adapter
from petune.adapters.lora.mlp import FusedGatedMlp, fused_class, uncovered_mlp
from petune.adapters.lora.source import gated_form, shared_inputs
from petune.four_bits import keep_form
from petune.low_rank import class_name, uncovered_base

_LARGEST_GROUP = 4  # what `lora_group` takes
_GATED_NAMES = ({"gate_proj", "up_proj"}, {"wi_0", "wi_1"}, {"w1", "w3"})


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` found: print it."""

    fused: int
    """LoRA layers that now run the operator."""
    total: int
    """LoRA layers of the model."""
    left: dict[str, str]
    """Layer name to the reason why it stays PEFT's own."""
    groups: int = 0
    """Groups of layers that are computed together because they read one input."""
    mlps: int = 0
    """Gated MLPs that make their product inside the operator of the down projection."""
    apart: dict[str, str] = field(default_factory=dict[str, str])
    """Module name to the reason why its layers are not grouped, or why it is no fused MLP though it looks like one."""

    def __str__(self) -> str:
        found = ((self.groups, "group"), (self.mlps, "gated MLP"))
        counts = [f"fused: {self.fused}/{self.total} layers"]
        counts += [f"{count} {what}{'s' if count > 1 else ''}" for count, what in found if count]
        return "; ".join(
            [", ".join(counts), *_by_reason("left to PEFT", self.left), *_by_reason("left apart", self.apart)]
        )


def fuse(model: nn.Module, *, group: bool = True) -> FuseReport:
    """Let every plain LoRA layer of a loaded PEFT model run the fused operator, in place.

    Parameters, keys and results stay (up to float rounding, and to the mask of dropout). What the operator does not
    cover is left alone and reported. Call it again after adapters were added.

    Args:
        model: any model with LoRA layers of PEFT.
        group: compute layers that read one input together, and gated MLPs without keeping their product. It is done
            where the source of the parent's forward proves it right; False undoes it.

    Raises:
        ValueError: the model has no LoRA layer.
    """
    fused, left = 0, dict[str, str]()
    keep_form(model)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        reason = _why_not(cast("nn.Module", layer))
        if reason:
            left[name] = reason
            continue
        fused += 1
        if type(layer) is LoraLinear:
            _become(layer, FusedLoraLinear)
    if not fused and not left:
        raise ValueError(f"fuse found no LoRA layer in {type(model).__name__}; add or load a LoRA adapter first.")
    groups, mlps, apart = 0, 0, dict[str, str]()
    for name, parent in model.named_modules():
        if not group:
            _separate(parent)
            continue
        found, reason = _group(parent)
        groups += found
        is_mlp, mlp_reason = _gate(parent)
        mlps += is_mlp
        if reason or mlp_reason:
            apart[name] = reason or mlp_reason
    return FuseReport(fused, fused + len(left), left, groups, mlps, apart)


def unfuse(model: nn.Module) -> None:
    """Give every module that was fused the class that it had in PEFT or transformers, and remove the groups' hooks."""
    for module in model.modules():
        _separate(module)
        if type(module) is FusedLoraLinear:
            _become(module, LoraLinear)


def _separate(module: nn.Module) -> None:
    detach(module)
    if _is_fused_mlp(module):
        _become(module, _source_class(module))


def _why_not(layer: nn.Module) -> str:
    if type(layer) is not LoraLinear and not isinstance(layer, FusedLoraLinear):
        return f"it is {class_name(layer)}"
    reasons = [uncovered_adapter(layer, name) for name in layer.lora_A]
    return uncovered_base(layer.base_layer) or (reasons[0] if reasons and all(reasons) else "")


def _group(parent: nn.Module) -> tuple[int, str]:
    """(groups made of the parent's children, why there is one less)."""
    features = {name: child.in_features for name, child in _fused_children(parent)}
    earlier = {group.names: group for group in detach(parent)}
    if len(features) == len(set(features.values())):
        return 0, ""
    sharing = shared_inputs(_source_class(parent))
    if sharing is None:
        return 0, "the source of its forward cannot be read"
    reasons: list[str] = []
    for names in sharing:
        members = [name for name in names if name in features][:_LARGEST_GROUP]
        if len(members) < 2 or len({features[name] for name in members}) > 1:
            continue
        group = earlier.get(tuple(members)) or Group(tuple(members))
        group.attach(parent)
        reasons.append(group.off)
    return reasons.count(""), next(filter(None, reasons), "")


def _gate(parent: nn.Module) -> tuple[bool, str]:
    """(whether the parent now is a fused MLP, why it is none although it looks like one)."""
    original, names = _source_class(parent), {name for name, _ in _fused_children(parent)}
    form = gated_form(original) if names else None
    if form is not None:
        reason = uncovered_mlp(parent, form) or ("its forward is replaced" if "forward" in parent.__dict__ else "")
    else:
        reason = "its forward is not down(activation(gate(x)) * up(x))" if _alike(names) else ""
    fuses = form is not None and not reason
    if type(parent) is original or _is_fused_mlp(parent):  # a class that FSDP made of ours stays
        _become(parent, (fused_class(original) if fuses else None) or original)
    return fuses, reason


def _alike(names: set[str]) -> bool:
    return any(pair <= names for pair in _GATED_NAMES)


def _is_fused_mlp(module: nn.Module) -> bool:
    return isinstance(module, FusedGatedMlp) and type(module) is fused_class(module.original)


def _fused_children(parent: nn.Module) -> Iterator[tuple[str, FusedLoraLinear]]:
    for name, child in parent.named_children():
        if type(child) is FusedLoraLinear:
            yield name, child


def _source_class(module: nn.Module) -> type[nn.Module]:
    return module.original if isinstance(module, FusedGatedMlp) else type(module)


def _become(module: Any, cls: type[nn.Module]) -> None:
    module.__class__ = cls


def _by_reason(what: str, reasons: dict[str, str]) -> Iterator[str]:
    names = dict[str, list[str]]()
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    for reason, some in names.items():
        yield f"{len(some)} {what} ({some[0]}{', …' if len(some) > 1 else ''}): {reason}"
