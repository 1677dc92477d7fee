"""An adapter's configuration as plain data and back, for checkpoints, logs, saved configurations and messages."""

import copy
import dataclasses
import sys
from collections.abc import Mapping
from enum import Enum
from typing import Any, cast

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from petune.registry import methods
from petune.topology import closest_modules

_WRITTEN_BY_PEFT = ("peft_type", "peft_version", "auto_mapping")


def describe_adapter(config: PeftConfig) -> dict[str, Any]:
    """`class_path`, and as `init_args` the fields that differ from their defaults."""
    init_args: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        value = getattr(config, field.name)
        if field.init and value != default and field.name not in _WRITTEN_BY_PEFT:
            init_args[field.name] = plain(value)
    return {"class_path": class_path(type(config)), "init_args": init_args}


def resolve_adapter(adapter: PeftConfig | Mapping[str, Any]) -> PeftConfig:
    """A configuration of the caller's own: PEFT writes into the one it is given.

    Args:
        adapter: a configuration, or what `describe_adapter` made of one.

    Raises:
        ValueError: the class described is not registered with PEFT.
    """
    if isinstance(adapter, PeftConfig):
        return copy.deepcopy(adapter)
    known = {class_path(kind): kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING.values()}
    known |= {class_path(method.config_cls): method.config_cls for method in methods().values()}
    kind = known.get(str(adapter.get("class_path")))
    if kind is None:  # only registered classes: a checkpoint must not choose what is imported
        raise ValueError(
            f"adapter class {adapter.get('class_path')!r} is not registered with PEFT; import the package that "
            "registers it, or pass adapter= as an object."
        )
    return kind(**adapter.get("init_args", {}))


def class_path(kind: type) -> str:
    """The shortest import path of a class: `peft.LoraConfig`, not the file that it is written in."""
    parts = kind.__module__.split(".")
    packages = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    home = next((name for name in packages if getattr(sys.modules.get(name), kind.__name__, None) is kind), None)
    return f"{home or kind.__module__}.{kind.__qualname__}"


def plain(value: Any) -> Any:
    """Enums, nested configurations, sets and tuples as JSON has them."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in cast("set[Any]", value))
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast("list[Any]", value)]
    return value


def no_match(model: nn.Module, config: PeftConfig) -> str:
    """What to say where `target_modules` names nothing in the model."""
    wanted = getattr(config, "target_modules", None)
    names = [wanted] if isinstance(wanted, str) else sorted(wanted or ())
    closest = closest_modules(model, names)
    return (
        f"{type(config).__name__}.target_modules={names} matches no module of {type(model).__name__}; "
        f"closest are {', '.join(closest) or 'none'}; give some of those, or all-linear."
    )
