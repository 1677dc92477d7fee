"""What is trained: every installed method that takes the base, as its recipe has it, and full fine-tuning."""

import copy
import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from typing import Any, Literal

import torch
import yaml
from peft import PeftConfig, get_peft_model
from torch import nn

import petune
from petune.probe import probe_inputs
from petune.registry import Method

FULL = "full fine-tuning"


@dataclass(frozen=True)
class Trial:
    """One row to be trained."""

    name: str
    train: Literal["adapter", "all"]
    learning_rate: float
    adapter: PeftConfig | None = None
    """None where the whole model trains."""
    callbacks: tuple[str, ...] = ()
    """Class paths of the Lightning callbacks that the method's recipe brings, such as the schedule of a mask."""

    def make_callbacks(self) -> list[Any]:
        """New instances of `callbacks`."""
        return [pkgutil.resolve_name(path)() for path in self.callbacks]


def trials(
    methods: Sequence[str] | None,
    base: nn.Module,
    *,
    compare: bool,
    adapter_learning_rate: float,
    full_learning_rate: float,
    callbacks: bool = True,
) -> tuple[list[Trial], list[str]]:
    """The methods asked for, in the order asked for, then full fine-tuning; and a sentence for each that is left out.

    Args:
        methods: short names; None for all that are installed and can be trained on this base.
        base: Hugging Face model that is adapted; it is not changed.
        compare: add full fine-tuning.
        adapter_learning_rate: for a method whose recipe names none.
        full_learning_rate: of full fine-tuning.
        callbacks: whether training runs Lightning callbacks, which some methods need.

    Raises:
        ValueError: a method that was asked for is not installed or cannot be trained here, or none was.
    """
    installed = petune.methods()
    if methods is not None and not methods:
        raise ValueError(f"methods is empty; name some of {', '.join(installed)} or leave it out for all of them.")
    chosen = [_find(name, installed) for name in (installed if methods is None else methods)]
    found: list[Trial] = []
    left_out: list[str] = []
    for trial in [_trial(method, adapter_learning_rate) for method in dict.fromkeys(chosen)]:
        try:
            _check(trial, base, callbacks)
        except ValueError as error:
            if methods is not None:
                raise
            left_out.append(f"{trial.name} is left out: {error}")
        else:
            found.append(trial)
    return [*found, Trial(FULL, "all", full_learning_rate)] if compare else found, left_out


def _check(trial: Trial, base: nn.Module, callbacks: bool) -> None:
    """Raises ValueError where a method cannot be trained; what it needs of its input it says when it is called."""
    if trial.callbacks and not callbacks:
        raise ValueError(f"the method {trial.name!r} needs its schedule, which runs with --task retrieval alone.")
    inputs = probe_inputs(base)
    assert inputs is not None
    assert trial.adapter is not None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = get_peft_model(copy.deepcopy(base), copy.deepcopy(trial.adapter))  # pyright: ignore[reportArgumentType]
        model.eval()(**inputs)


def _find(name: str, installed: dict[str, Method]) -> Method:
    if name in installed:
        return installed[name]
    near = get_close_matches(name, installed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"the method {name!r} is not installed; {hint}use one of {', '.join(installed)}.")


def _trial(method: Method, learning_rate: float) -> Trial:
    recipe = _recipe(method)
    model = recipe.get("model", {}).get("init_args", {})
    arguments: dict[str, Any] = model.get("adapter", {}).get("init_args", {})
    callbacks = tuple(entry["class_path"] for entry in recipe.get("trainer", {}).get("callbacks+", ()))
    adapter = method.config_cls(**arguments)
    return Trial(method.name, "adapter", model.get("learning_rate", learning_rate), adapter, callbacks)


def _recipe(method: Method) -> dict[str, Any]:
    """The recipe of the method's config, which lies beside it; empty if it ships none."""
    package = importlib.import_module(method.config_cls.__module__).__package__ or ""
    for file in files(package).iterdir():
        if file.name.endswith(".yaml"):
            recipe: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
            adapter = recipe["model"]["init_args"]["adapter"]
            if adapter["class_path"].rpartition(".")[2] == method.config_cls.__name__:
                return recipe
    return {}
