"""Read an adapter folder back, with a clear answer for each way in which it can be broken."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils.peft_types import PeftType
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from petune.fingerprint import check_fingerprint
from petune.four_bits import keep_form
from petune.hub import locate_model
from petune.quantized.slots import packed_names
from petune.quantized.tuner import QuantizedConfig
from petune.run import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_FILE, adapter_folder, read_run
from petune.state import peft_config

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
_TASK_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_adapter(
    directory: str | Path,
    base: PreTrainedModel | str | Path | None = None,
    *,
    is_trainable: bool = False,
    **base_options: Any,
) -> PeftModel:
    """Build the base, check that it is the right one, and put the adapter on it.

    Args:
        directory: the adapter folder, or a run folder that has it below `adapter/`.
        base: a model, or a folder or hub id to load it from; None for the one that the adapter was trained on.
        is_trainable: train on from here.
        base_options: for the base's `from_pretrained`: `dtype`, `device_map`, ...

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        OSError: the base is neither on this machine nor to be had.
        ValueError: cut short or damaged weights, pickled weights, an unknown method, another base.
    """
    folder = adapter_folder(directory)
    config = read_adapter_config(folder)
    content = read_run(folder) or {}
    keys = check_weights(folder, content.get("files", {}))
    recorded: dict[str, Any] = content.get("base") or {}
    model = base if isinstance(base, PreTrainedModel) else _build_base(base, config, recorded, folder, base_options)
    keep_form(model)
    if recorded:
        check_fingerprint(recorded["fingerprint"], model, where=str(folder))
    try:
        wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        detail = " ".join(str(error).split("size mismatch", 1)[1].split())
        raise ValueError(f"{folder}: its tensors do not fit this model: size mismatch{detail}") from error
    except KeyError as error:  # from PEFT, of a module that the config says was trained whole
        if error.args[0] in keys or not str(error.args[0]).startswith("base_model."):
            raise
        raise ValueError(f"{folder / ADAPTER_WEIGHTS} lacks {error.args[0]}; export it again.") from error
    _check_complete(folder, keys, wrapped)
    return wrapped


def read_adapter_config(folder: Path) -> PeftConfig:
    """The config of an adapter folder, of a method that is known here."""
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {ADAPTER_CONFIG}, so it is no adapter folder; pass one that is.")
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); export the adapter again.") from error
    if kind not in list(PeftType):
        known = ", ".join(sorted(member.value for member in PeftType if member.value.startswith("PETUNE_")))
        raise ValueError(
            f"{folder} is an adapter of type {kind!r}, which neither this PEFT nor this PETune knows (PETune has: "
            f"{known or 'none of its own'}); install the version that made it, or the package that registers it."
        )
    return PeftConfig.from_pretrained(str(folder))


def check_weights(folder: Path, digests: dict[str, str]) -> set[str]:
    """The names in the weights file, once it is known to be whole."""
    path = folder / ADAPTER_WEIGHTS
    if not path.exists():
        pickled = [name for name in _PICKLES if (folder / name).exists()]
        if pickled:
            raise ValueError(
                f"{folder} holds its weights as {pickled[0]}, a pickle, which can run code when read, so it is not; "
                f"have whoever made it save {ADAPTER_WEIGHTS}."
            )
        raise FileNotFoundError(f"{folder} holds no {ADAPTER_WEIGHTS}; copy it again, whole.")
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}); copy or export it again.") from error
    expected = digests.get(ADAPTER_WEIGHTS)
    if expected is not None and expected != file_digest(path):
        raise ValueError(
            f"{path} is damaged: it is not the file that was exported; copy it again, or, if it was changed on "
            f"purpose, take its line out of {RUN_FILE}."
        )
    return keys


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _build_base(
    base: str | Path | None, config: PeftConfig, recorded: dict[str, Any], folder: Path, options: dict[str, Any]
) -> PreTrainedModel:
    name = base or recorded.get("name") or config.base_model_name_or_path
    if not name:
        raise ValueError(
            f"{folder} does not say what its base is (it was built from a config); pass the model as `base`."
        )
    source = locate_model(str(name))
    # the adapter brings a head of its own, which may have another number of labels than the base was published with
    options = {"ignore_mismatched_sizes": True, **recorded.get("config", {}), **options}
    loader = _base_class(config, recorded, folder).from_pretrained
    model, info = loader(source, output_loading_info=True, **options)
    _check_shapes(folder, config, sorted(str(key[0]) for key in info["mismatched_keys"]))
    model.name_or_path = model.config._name_or_path = str(name)  # not the cache's folder
    return model


def _check_shapes(folder: Path, config: PeftConfig, mismatched: Sequence[str]) -> None:
    replaced = tuple(f".{name}." for name in getattr(config, "modules_to_save", None) or ())
    for key in mismatched:
        if not any(name in f".{key}" for name in replaced):
            raise ValueError(
                f"{folder}: {key} has another shape in the base's file than in its config, and the adapter does not "
                "replace it; pass the model as `base`."
            )


def _base_class(config: PeftConfig, recorded: dict[str, Any], folder: Path) -> Any:
    mapping: dict[str, str] = getattr(config, "auto_mapping", None) or {}
    for name in (recorded.get("class"), _TASK_CLASSES.get(str(config.task_type)), mapping.get("base_model_class")):
        found = getattr(transformers, name, None) if name else None
        # Only classes of transformers: the name comes from a file that somebody else may have written.
        if isinstance(found, type) and hasattr(found, "from_pretrained"):
            return found
    raise ValueError(f"{folder} does not say what class its base has; pass the model as `base`.")


def _check_complete(folder: Path, keys: set[str], model: PeftModel) -> None:
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    config = peft_config(model)
    if isinstance(config, QuantizedConfig) and any(key.endswith(".anchor") for key in keys):
        wanted -= {*packed_names(config)}  # the folder holds latents instead, and the tuner has found all of them
    missing = sorted(wanted - keys)
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"{folder / ADAPTER_WEIGHTS} lacks {len(missing)} tensors of the adapter: {', '.join(missing[:5])}{more}; "
            "export it again."
        )
