"""Arguments before the parser sees them (recipes by name, our own options) and its messages after it has failed."""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser
from peft import PeftConfig

from petune.cli.errors import UsageError, closest
from petune.cli.light import Recipe, find_recipe
from petune.tasks import AdapterTask

_CONFIG_OPTIONS = ("-c", "--config")


def take_option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """Remove `name VALUE` or `name=VALUE` from the arguments; the last one counts.

    Raises:
        UsageError: the option stands without a value.
    """
    value: str | None = None
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == name:
            value = next(remaining, None)
            if value is None or value.startswith("--"):
                raise UsageError(f"{name} needs a value.")
        elif argument.startswith(f"{name}="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
    return value, rest


def resolve_recipes(arguments: list[str]) -> list[str]:
    """Replace recipe names after -c by the shipped files.

    Tasks are put before methods, because a method's recipe fills in an argument of the task's class. Files of the user
    keep their place among the rest.

    Raises:
        UsageError: neither a file nor a recipe has that name.
    """
    configs: list[tuple[int, str]] = []
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        option, has_value, value = argument.partition("=")
        if option not in _CONFIG_OPTIONS:
            rest.append(argument)
            continue
        if not has_value:
            value = next(remaining, "")
        configs.append(_resolve(value))
    configs.sort(key=lambda config: config[0])
    return [part for _, path in configs for part in ("--config", path)] + rest


def _resolve(value: str) -> tuple[int, str]:
    """(0 for a task's recipe, 1 for anything else; path)."""
    path = Path(value)
    if path.is_file():
        is_task = _is_task_config(path)
        return (0 if is_task else 1), str(path)
    if not value or path.suffix or len(path.parts) > 1:
        raise UsageError(f"no config file {value!r}; give a path, or the name of a recipe (`petune recipes`).")
    recipe: Recipe = find_recipe(value)
    if recipe.kind == "runs":
        raise UsageError(
            f"{value!r} lists runs, for `petune fit-many --runs`; give -c the recipe of a task or a method."
        )
    return (0 if recipe.kind == "task" else 1), str(recipe.path)


def _is_task_config(path: Path) -> bool:
    """Whether a YAML file names the task's class itself: `class_path` directly below `model`."""
    return (
        re.search(r"^model:\s*\n(\s*#.*\n)*\s+class_path:", path.read_text(encoding="utf-8"), re.MULTILINE) is not None
    )


class CommandParser(LightningArgumentParser):
    """Lightning's parser; what it would print on several lines is raised as one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(explain(message, self)) from ex


def explain(message: str, parser: LightningArgumentParser | None = None) -> str:
    """The sentence that matters of a jsonargparse message, with the closest name where one is unknown."""
    text = _innermost(message)
    if found := re.search(r"Option '([^']+)' is not accepted", text):
        name = found[1]
        known = [action.dest for action in parser._actions] if parser else _option_names()
        return f"there is no option {name!r} here.{closest(name, known)}"
    if found := re.search(r"Expected a dot import path string: (\S+)", text) or re.search(
        r"Import path \S+ given for class .* (\S+)", text
    ):
        return f"no class {found[1]!r} is known.{_closest_class(found[1])} `petune methods` lists the methods."
    if found := re.search(r"module '([^']+)' has no attribute '([^']+)'", text):
        return f"{found[1]!r} has no class {found[2]!r}.{_closest_class(found[2])}"
    if found := re.match(r"unrecognized arguments: (\S+)", text):
        option = found[1].partition("=")[0]
        known = [name for action in parser._actions for name in action.option_strings] if parser else []
        return f"unknown argument {found[1]}.{closest(option, known)}"
    if text.startswith("the following arguments are required: "):
        return _explain_missing(text.partition(": ")[2])
    return text


def _explain_missing(names: str) -> str:
    missing = [name.strip() for name in names.split(",")]
    if any(name.endswith((".model", ".data")) for name in missing):
        return "no task is given; name a recipe: petune fit -c text_classification -c lora --data.train_file=FILE"
    if missing == ["model"]:
        return "no base model is given; add --model.model=PATH (a local folder or a hub id)."
    return f"missing: {', '.join(missing)}."


_NOISE = (
    "Does not validate against any of the Union subtypes",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a <class 'NoneType'>",
    "Expected a path but",
    "Problem with given class_path",
    "Parser key",
)


def _innermost(message: str) -> str:
    """The most specific error of a message that lists one for each type a value may have."""
    lines = [line.strip(" -\t") for line in message.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_NOISE)]
    types = [line for line in lines if line.startswith("Expected a") and "dot import path" not in line]
    specific = [line for line in lines if line not in types]
    if specific or not types:
        return " ".join(dict.fromkeys(specific)) or " ".join(message.split())
    key = re.search(r'Parser key "([^"]+)"', message)
    given = re.search(r"(?:Given|Got) value: (.{0,80})", message)
    wanted = " or ".join(_type_name(line) for line in types)
    return f"{key[1] if key else 'the value'} must be {wanted}" + (f", got {given[1]!r}." if given else ".")


def _type_name(line: str) -> str:
    """'int' of "Expected a <class 'int'>. Got value: x"."""
    text = line.removeprefix("Expected a ").partition(". Got value")[0]
    return re.sub(r"<class '([^']+)'>", r"\1", text).replace("typing.Literal", "one of ")


def _subclasses(base: type) -> Iterator[type]:
    for child in base.__subclasses__():
        yield child
        yield from _subclasses(child)


def _closest_class(wanted: str) -> str:
    """As `closest`, among configs, tasks and data modules; "Config", which most share, does not count."""
    bases: tuple[type, ...] = (PeftConfig, AdapterTask, LightningDataModule)
    stems = {child.__name__.removesuffix("Config"): child.__name__ for base in bases for child in _subclasses(base)}
    stem = wanted.rpartition(".")[2].removesuffix("Config")
    near = difflib.get_close_matches(stem, stems, n=1)
    return f" Did you mean {stems[near[0]]!r}?" if near else ""


def _option_names() -> Iterable[str]:
    for child in _subclasses(PeftConfig):
        if dataclasses.is_dataclass(child):
            yield from (field.name for field in dataclasses.fields(child))
    bases: tuple[Any, ...] = (AdapterTask, LightningDataModule)
    for base in bases:
        for child in (base, *_subclasses(base)):
            yield from list(inspect.signature(child.__init__).parameters)[1:]
