"""Load a pretrained model and its tokenizer from a folder or the hub, or say in one sentence why that fails."""

import inspect
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from petune.tasks.quantization import Quantization, prepare, quantization_config
from petune.tasks.sources import hub_or_cache


def load_config(name: str, **kwargs: Any) -> PretrainedConfig:
    """The configuration of a local folder or a hub id.

    Raises:
        FileNotFoundError: the folder is missing or holds no model, or the hub id is neither cached nor reachable.
    """
    return _from_pretrained(AutoConfig, name, **kwargs)


def has_pooler(config_class: type[PretrainedConfig]) -> bool:
    """Whether the model that AutoModel makes of such a config has a pooler that can be left out."""
    kind: Any = MODEL_MAPPING.get(config_class, None)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return all(k is not None and "add_pooling_layer" in inspect.signature(k.__init__).parameters for k in kinds)


def load_model(
    auto_class: Any, name: str, quantization: Quantization | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, list[str]]:
    """A pretrained model and the names of its parameters that the checkpoint does not hold.

    Args:
        auto_class: a transformers Auto class, or a model class.
        name: local folder or hub id.
        quantization: form of the weights; then `kwargs` has the base's `config`.
        kwargs: for `from_pretrained`.

    Raises:
        FileNotFoundError: as `load_config`.
        ImportError: the library of the quantization is not installed.
        ValueError: the checkpoint lacks most of the model's body, or has a part of it in another shape.
    """
    if quantization is not None:
        kwargs["quantization_config"] = quantization_config(
            quantization, auto_class, kwargs["config"], kwargs.get("dtype", "auto")
        )
    # A head of another size counts as missing too, and is made anew.
    model, info = _from_pretrained(auto_class, name, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    mismatched = {str(key[0]) for key in info["mismatched_keys"]}
    fresh = {*info["missing_keys"], *mismatched}
    names = [parameter for parameter, _ in model.named_parameters()]
    body = {parameter for parameter in names if parameter.startswith(f"{model.base_model_prefix}.")} or set(names)
    if body & mismatched or 2 * len(body & fresh) > len(body):  # a pooler may be missing, not the layers
        raise ValueError(
            f"model={name!r} lacks {len(body & fresh)} of {len(body)} weights of {type(model).__name__}'s body or has "
            f"them in another shape, {min(body & fresh)} first; give the folder or hub id of a whole pretrained model."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        prepare(model)
    return model, sorted(fresh)


def load_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a hub id, with a padding token.

    Raises:
        FileNotFoundError: as `load_config`.
    """
    tokenizer = _from_pretrained(AutoTokenizer, name, **kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fresh_modules(model: torch.nn.Module, fresh: list[str]) -> list[str]:
    """The largest modules all of whose parameters are fresh, in the model's order.

    Args:
        model: the loaded model.
        fresh: names of parameters the checkpoint does not hold.
    """
    unseen = set(fresh)
    found: list[str] = []
    for name, module in model.named_modules():
        parameters = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
        inside = any(name.startswith(f"{parent}.") for parent in found)
        if name and parameters and not inside and unseen.issuperset(parameters):
            found.append(name)
    return found


def _from_pretrained(auto_class: Any, name: str, **kwargs: Any) -> Any:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return auto_class.from_pretrained(str(_model_folder(folder)), **kwargs)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"model={name!r} is not a folder on this machine; give the path of a saved model.")
    told_offline = constants.HF_HUB_OFFLINE
    with hub_or_cache():
        try:
            return auto_class.from_pretrained(name, **kwargs)
        except OSError as error:
            if told_offline:
                why = "the hub was not asked because HF_HUB_OFFLINE is set"
            elif constants.HF_HUB_OFFLINE:
                why = f"{constants.ENDPOINT} does not answer"
            else:
                why = str(error).strip().splitlines()[0]
            raise FileNotFoundError(
                f"model={name!r} was looked for as a local folder, in the cache {constants.HF_HUB_CACHE!r} and on the "
                f"hub, in vain: {why}; give the path of a local model folder instead, such as --model.model=./{name}."
            ) from error


def _model_folder(folder: Path) -> Path:
    if (folder / "config.json").is_file() or (folder / "tokenizer_config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"model={str(folder)!r} holds an adapter, not a base model; give the base model here, "
            f"or run `petune predict --adapter {folder}`."
        )
    raise FileNotFoundError(f"model={str(folder)!r} holds no config.json; give the folder of a saved model.")
