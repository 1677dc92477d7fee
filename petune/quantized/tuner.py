"""What methods of few bits share: the fields of their configs, and checkpoints of one blob and one table."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from petune.config import PetuneConfig
from petune.layer import AdapterLayer
from petune.quantized.head import QuantizedHead, is_wrapped
from petune.quantized.linear import PackedLinear, QuantizedLinear
from petune.quantized.packing import Entry, decode, encode, rebuild
from petune.quantized.quantizer import BITS, CODEBOOKS, GRANULARITIES, Quantization
from petune.state import plain_name
from petune.topology import closest_modules
from petune.tuner import PetuneTuner

_PARTS = {False: ("weight", "anchor"), True: ("bits", "stats")}  # of a quantised weight, with latents or packed
_ROOT = "base_model.model."  # of every name in a PEFT checkpoint


@dataclass
class QuantizedConfig(PetuneConfig):
    """Fields of every method whose weights can be quantised."""

    bits: int = field(default=1, metadata={"help": "Bits a weight: 1, 2, 4, 8, or 32 for the full-precision method."})
    codebook: Literal["l1", "l2"] = field(
        default="l1", metadata={"help": "Least absolute error of a normal weight (the paper's), or least squared."}
    )
    granularity: Literal["tensor", "row"] = field(
        default="tensor", metadata={"help": "One mean and scale a weight, or one for each of its rows."}
    )
    storage: Literal["packed", "latent"] = field(
        default="packed",
        metadata={"help": "Save the bits, or the float32 latents, from which an optimizer resumes exactly."},
    )
    bi_head: str | None = field(
        default=None, metadata={"help": "Name of a linear head to put a quantised one in place of, as 'classifier'."}
    )
    layout: str | None = field(
        default=None, metadata={"help": "Digest of the packed weights' names and shapes, filled when they are saved."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("bits", BITS)
        self.check_choice("codebook", CODEBOOKS)
        self.check_choice("granularity", GRANULARITIES)
        self.check_choice("storage", ("packed", "latent"))

    @property
    def quantization(self) -> Quantization:
        """How the method's weights are quantised."""
        return Quantization(self.bits, self.codebook, self.granularity)


class PackedTuner(PetuneTuner):
    """A tuner whose adapters are made of `QuantizedLinear`s, saved packed through PEFT's own save and load.

    The checkpoint holds `<prefix>bits`, uint8, and `<prefix>stats`, float32 [rows, 2], for all of them in the order of
    their names; whatever else the adapter has is stored as always. A model that transformers' own `add_adapter` made
    is saved with its latents: transformers' loader knows no packed form.
    """

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if isinstance(peft_config, QuantizedConfig):  # from inject_adapter_in_model: PeftModel passes a dictionary
            _check_native(peft_config)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    # --- the head ---

    def check_targets(self, config: PetuneConfig, model: nn.Module, targets: list[tuple[str, nn.Module]]) -> None:
        """Also refuses a head that is none, or that PEFT trains whole."""
        assert isinstance(config, QuantizedConfig)
        if config.bi_head is not None:
            self._check_head(config, model, {name for name, _ in targets})

    def _check_head(self, config: QuantizedConfig, model: nn.Module, targets: set[str]) -> None:
        found = _heads(config, model)
        if len(found) != 1:
            near = ", ".join(closest_modules(model, config.bi_head or ""))
            config.refuse("bi_head", f"names {len(found)} modules of the model; similar names: {near or 'none'}")
        name, head = found[0]
        if isinstance(head, QuantizedHead):
            return
        if not isinstance(head, nn.Linear):
            inner = [path for path, module in head.named_modules() if isinstance(module, nn.Linear)]
            hint = f"name {name}.{inner[-1]}, with task_type=None" if inner else "name a Linear"
            config.refuse("bi_head", f"is a {type(head).__name__}, and only a Linear can be quantised; {hint}")
        around = [part for part in config.modules_to_save or () if part in name.split(".")[:-1]]
        if is_wrapped(head) or around or name in targets:
            config.refuse("bi_head", "is trained in another way already, by modules_to_save, task_type or an adapter")

    def prepare_layer(self, layer: AdapterLayer, name: str, adapter_name: str, config: PetuneConfig) -> None:
        """Puts the quantised head in, before the first of the layers."""
        assert isinstance(config, QuantizedConfig)
        if config.bi_head is not None:
            self._put_head(config, adapter_name)

    def _put_head(self, config: QuantizedConfig, adapter_name: str) -> None:
        name, head = _heads(config, self.model)[0]
        if isinstance(head, QuantizedHead):
            head.update(adapter_name, quantization=config.quantization)
            return
        wrapper = QuantizedHead(head, adapter_name, config.quantization)
        wrapper.set_adapter(adapter_name if adapter_name in self.active_adapters else [], config.inference_mode)
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, wrapper)

    # --- checkpoints ---

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """PEFT's selection, with the quantised weights packed into two tensors.

        Raises:
            ValueError: a latent is not finite, or constant and not zero.
        """
        assert isinstance(config, QuantizedConfig)
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        weights = quantized_weights(model, adapter_name)
        entries = [entry for entry, _ in weights]
        config.layout = None
        if not weights:
            return found
        state = {plain_name(key): tensor for key, tensor in state_dict.items()}
        packed = f"{plain_name(weights[0][1])}.bits" in state
        keys = [f"{plain_name(path)}.{part}" for _, path in weights for part in _PARTS[packed]]
        taken = set(keys)
        found = {key: tensor for key, tensor in found.items() if plain_name(key) not in taken}
        first, second = [state[key] for key in keys[::2]], [state[key] for key in keys[1::2]]
        if not packed and (config.storage == "latent" or not isinstance(model, PeftModel)):
            _check_finite(adapter_name, entries, first)
            return {**found, **{key: state[key] for key in keys}}
        bits, stats = (torch.cat(first), torch.cat(second)) if packed else encode(entries, first, second)
        config.layout = layout_digest(entries)
        return {**found, f"{_ROOT}{cls.prefix}bits": bits, f"{_ROOT}{cls.prefix}stats": stats}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's remapping, with the packed weights put back as latents.

        Raises:
            ValueError: the packed tensors are cut short, or of another base, or another config.
        """
        assert isinstance(config, QuantizedConfig)
        weights = quantized_weights(model, adapter_name)
        blob, table = (state_dict.get(f"{_ROOT}{cls.prefix}{part}") for part in ("bits", "stats"))
        plain = {key: tensor for key, tensor in state_dict.items() if tensor is not blob and tensor is not table}
        if blob is None or table is None:
            for entry, path in weights:  # PEFT restores the names below its own layers only, and a head is none
                for part in ("weight", "anchor"):
                    if f"{entry.name}.{part}" in plain:
                        plain[f"{path}.{part}"] = plain.pop(f"{entry.name}.{part}")
        else:
            plain |= _unpacked(model, config, weights, blob, table)
        missing = [path for _, path in weights if f"{path}.weight" not in plain and "modules_to_save" in path]
        if missing:
            raise ValueError(
                f"the checkpoint of adapter {adapter_name!r} lacks the quantised head {missing[0]}; it was trained "
                "without bi_head, or is incomplete."
            )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, plain)


def _check_native(config: QuantizedConfig) -> None:
    """Refuse what transformers' own adapter methods would leave out without a word."""
    if config.layout is not None:
        raise ValueError(
            "transformers' own loader cannot read a packed adapter; load it with peft.PeftModel.from_pretrained or "
            "petune.load_adapter, or save it with storage='latent'."
        )
    if config.bi_head is not None:
        config.refuse("bi_head", "needs a PeftModel; wrap the model with peft.get_peft_model")


def _heads(config: QuantizedConfig, model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if name == config.bi_head or name.endswith(f".{config.bi_head}")
    ]


def _unpacked(
    model: nn.Module, config: QuantizedConfig, weights: list[tuple[Entry, str]], blob: Tensor, table: Tensor
) -> dict[str, Tensor]:
    entries = [entry for entry, _ in weights]
    parts = decode(entries, blob, table)
    if config.layout not in (None, layout_digest(entries)):
        raise ValueError(
            "the packed adapter was made for modules of other names or shapes than those it is loaded into; load it "
            "on the base, and with the config, that it was trained with."
        )
    if not config.inference_mode:
        warnings.warn(
            "latents are not stored in a packed adapter: it resumes exactly for inference, approximately for "
            "optimisation; train with storage='latent' to continue exactly.",
            stacklevel=2,
        )
    found: dict[str, Tensor] = {}
    for (entry, path), (packed, stats) in zip(weights, parts, strict=True):
        module: Any = model.get_submodule(path)
        latent, anchor = rebuild(entry, packed, stats, module.weight.dtype)
        found |= {f"{path}.weight": latent, f"{path}.anchor": anchor}
    return found


def quantized_weights(model: nn.Module, adapter_name: str) -> list[tuple[Entry, str]]:
    """The quantised weights of an adapter in the order of their names in a checkpoint, each with its module's path."""
    return sorted(_entries(model, adapter_name))


def _entries(model: nn.Module, adapter_name: str) -> Iterator[tuple[Entry, str]]:
    for path, module in model.named_modules():
        parts = plain_name(path).split(".")
        if not isinstance(module, QuantizedLinear | PackedLinear):
            continue
        at = _adapter_part(parts)
        if module.quantization.active and at is not None and parts[at] == adapter_name:
            name = ".".join(parts[:at] + parts[at + 1 :])
            name = name if name.startswith(_ROOT) else _ROOT + name
            shape = torch.Size((module.out_features, module.in_features))
            yield Entry(name, shape, module.quantization), path


def _adapter_part(parts: list[str]) -> int | None:
    """Where in a path the adapter's name is: behind a container of ours, or PEFT's for heads."""
    containers = [at for at, part in enumerate(parts[:-1]) if part.startswith("petune_") or part == "modules_to_save"]
    return containers[-1] + 1 if containers else None


def layout_digest(entries: list[Entry]) -> str:
    """What `QuantizedConfig.layout` says of packed weights: their names, shapes and bits."""
    text = json.dumps([(entry.name, list(entry.shape), entry.quantization.bits) for entry in entries])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_finite(adapter_name: str, entries: list[Entry], latents: list[Tensor]) -> None:
    for entry, latent in zip(entries, latents, strict=True):
        if not torch.isfinite(latent).all():
            raise ValueError(
                f"adapter {adapter_name!r} contains non-finite values in {entry.name}, so it was not saved; "
                "train it again."
            )
