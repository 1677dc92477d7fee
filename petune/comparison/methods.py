"""What `--methods`, `--seeds` and `--rates` name; read without torch, before anything is loaded."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from petune.cli.errors import UsageError, closest
from petune.cli.light import recipes

HEAD = "head_only"
"""Name of the baseline: the frozen model with a trained head."""

_LARGEST_SEED = 2**32 - 1  # of lightning.seed_everything

Value = TypeVar("Value")


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    name: str
    """Its name in the table, and of its folder."""
    arguments: tuple[str, ...]
    """What it adds to the arguments of `petune fit`."""


BASELINE = Method(HEAD, ("-c", str(Path(__file__).with_name(f"{HEAD}.yaml"))))


def find_methods(wanted: Sequence[str]) -> list[Method]:
    """The methods of that name, in that order.

    Args:
        wanted: names of recipes, PEFT config classes as `--model.adapter` takes them, or YAML files.

    Raises:
        UsageError: none is given, one is not known, or two have the same name.
    """
    if not wanted:
        raise UsageError("no methods are given to compare; add --methods, such as --methods lora,bilora.")
    found: dict[str, tuple[str, Method]] = {}
    for text in wanted:
        method = _find(text)
        if method.name == HEAD:
            raise UsageError(f"the method {text!r} has the name of the baseline, {HEAD}; rename the file.")
        if method.name in found:
            first = found[method.name][0]
            if first == text:
                raise UsageError(
                    f"the method {text!r} is given twice; name each once, and give --seeds for more runs."
                )
            raise UsageError(f"the methods {first!r} and {text!r} are both called {method.name!r}; rename a file.")
        found[method.name] = text, method
    return [method for _, method in found.values()]


def check_seeds(seeds: Iterable[str | int]) -> list[int]:
    """The seeds as integers.

    Raises:
        UsageError: one is no integer from 0 on, or there twice, or there are none.
    """
    wants = "whole numbers from 0 on, such as 0,1,2"
    return _numbers("--seeds", seeds, int, lambda seed: 0 <= seed <= _LARGEST_SEED, wants)


def check_rates(rates: Iterable[str | float]) -> list[float]:
    """The learning rates as numbers.

    Raises:
        UsageError: one is no number above 0, or there twice, or there are none.
    """
    wants = "numbers above 0, such as 1e-4,1e-3"
    return _numbers("--rates", rates, float, lambda rate: 0 < rate < math.inf, wants)


def _numbers(
    option: str, given: Iterable[str | float], kind: Callable[[str], Value], good: Callable[[Value], bool], wants: str
) -> list[Value]:
    numbers: list[Value] = []
    for text in map(str, given):
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not good(number):
            raise UsageError(f"{option} has {text!r}; give {wants}.")
        if number in numbers:
            raise UsageError(f"{option} has {text!r} twice; give each once.")
        numbers.append(number)
    if not numbers:
        raise UsageError(f"{option} is empty; give {wants}.")
    return numbers


def _find(text: str) -> Method:
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UsageError(f"no file {text!r} for a method; give its path, or the name of a recipe.")
        return Method(path.stem, ("-c", text))
    shipped = {recipe.name: recipe for recipe in recipes()}
    if text in shipped:
        if shipped[text].kind == "runs":
            raise UsageError(
                f"{text!r} lists runs, for `petune fit-many --runs`, and is no method; `petune methods` lists those."
            )
        if shipped[text].kind != "method":
            raise UsageError(f"{text!r} is the recipe of a task, not of a method; give it with -c.")
        return Method(text, ("-c", text))
    name = text.rpartition(".")[2]
    if name.isidentifier() and (name != text or name.endswith("Config")):
        return Method(name, (f"--model.adapter={text}",))
    methods = [recipe.name for recipe in shipped.values() if recipe.kind == "method"]
    raise UsageError(
        f"no method {text!r}.{closest(text, methods)} Give the name of a recipe (`petune methods`), a class such as "
        "peft.IA3Config, or a YAML file."
    )
