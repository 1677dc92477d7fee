"""How PEFT is extended: the only file that touches PEFT's enum and its four tables."""

import warnings
from dataclasses import dataclass
from importlib.metadata import entry_points

from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType, register_peft_method

NAMESPACE = "petune_"
ENTRY_POINT_GROUP = "petune.methods"


@dataclass(frozen=True)
class Method:
    """One registered adapter method."""

    name: str
    """Short name, unique, lower case: `lora`, `bilora`, …"""
    peft_type: PeftType
    """What `adapter_config.json` carries as `peft_type`."""
    config_cls: type[PeftConfig]
    model_cls: type[BaseTuner]


_methods: dict[str, Method] = {}


def methods() -> dict[str, Method]:
    """All methods registered so far, by short name."""
    return dict(_methods)


def peft_type(name: str) -> PeftType:
    """The `PeftType` member `PETUNE_<NAME>`, made on first use.

    A method's config needs its member before the method can be registered, and PEFT offers no public way to add one.
    Types are global and written into every saved adapter for good, hence the namespace.

    Raises:
        ValueError: the name is not a lower-case identifier without a trailing underscore.
    """
    if not (name.isidentifier() and name.islower() and not name.endswith("_")):
        raise ValueError(
            f"register_method: name={name!r} must be a lower-case identifier with no trailing underscore."
        )
    return _extend_str_enum(PeftType, f"{NAMESPACE}{name}".upper())


def _extend_str_enum(enum_cls: type[PeftType], name: str) -> PeftType:
    """Add a member whose value is its name, and give it all that a member written in the class body has.

    Name and value must be equal: PEFT looks its tables up by the string of `adapter_config.json`, and an enum member
    hashes by name.
    """
    if name in enum_cls._member_map_:
        return enum_cls[name]
    member = str.__new__(enum_cls, name)
    member._name_ = member._value_ = name
    member.__objclass__ = enum_cls  # pyright: ignore[reportAttributeAccessIssue]
    member._sort_order_ = len(enum_cls._member_names_)  # pyright: ignore[reportAttributeAccessIssue]
    enum_cls._member_names_.append(name)
    enum_cls._member_map_[name] = member
    enum_cls._value2member_map_[name] = member
    type.__setattr__(enum_cls, name, member)  # EnumMeta refuses a plain setattr
    return member


def register_method(name: str, *, config_cls: type[PeftConfig], model_cls: type[BaseTuner] | None = None) -> PeftType:
    """Make a method known to PEFT; calling it again with the same classes is harmless.

    Args:
        name: short name; the PEFT type becomes `PETUNE_<NAME>` and the parameter prefix `petune_<name>_`.
        config_cls: the method's config. Its instances carry `peft_type(name)`.
        model_cls: the method's tuner, whose `prefix` is the parameter prefix. None for a config that rides on one of
            PEFT's own types, as `FusedLoraConfig` does: its adapters are saved and loaded as that type.

    Returns:
        The PEFT type under which adapters of this method are saved.

    Raises:
        ValueError: the name or the prefix is taken, or the prefix of `model_cls` is not `petune_<name>_`.
    """
    if model_cls is None:
        kind = _builtin_type(name, config_cls)
        model_cls = PEFT_TYPE_TO_TUNER_MAPPING[kind]
    else:
        kind = peft_type(name)
        _fill_tables(name, kind, config_cls, model_cls)
    known = _methods.get(name)
    if known is not None and not _same_class(known.config_cls, config_cls):
        raise ValueError(f"register_method: the name {name!r} belongs to {_where(known.config_cls)}; choose another.")
    _methods[name] = Method(name, kind, config_cls, model_cls)
    return kind


def load_entry_points() -> None:
    """Import every method that another distribution announces in the entry-point group `petune.methods`.

    A broken one is reported and left out: it must not take the working ones with it.
    """
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except Exception as error:  # whatever a third party's import raises
            owner = entry.dist.name if entry.dist else "an unknown distribution"
            warnings.warn(
                f"the PETune method {entry.name!r} of {owner} could not be loaded and is left out: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )


def _builtin_type(name: str, config_cls: type[PeftConfig]) -> PeftType:
    for kind, builtin in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if issubclass(config_cls, builtin) and not kind.startswith(NAMESPACE.upper()):
            return PeftType(kind)
    raise ValueError(
        f"register_method: {name!r} has no model_cls, and {config_cls.__name__} extends none of PEFT's own configs; "
        "pass the tuner as model_cls."
    )


def _fill_tables(name: str, kind: PeftType, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    prefix = f"{NAMESPACE}{name}_"
    if model_cls.prefix != prefix:
        raise ValueError(f"register_method: {model_cls.__name__}.prefix={model_cls.prefix!r} must be {prefix!r}.")
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if known is None:
        # PEFT compares a new prefix with the tables' keys, which are types: a taken prefix would pass unseen.
        for other, taken in PEFT_TYPE_TO_PREFIX_MAPPING.items():
            if taken == prefix:
                raise ValueError(f"register_method: the prefix {prefix!r} belongs to {other}; choose another name.")
        register_peft_method(name=f"{NAMESPACE}{name}", config_cls=config_cls, model_cls=model_cls, prefix=prefix)
    elif _same_class(known, config_cls):  # importlib.reload made new class objects of the same classes
        PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[kind] = model_cls
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING.pop(kind, None)
    else:
        raise ValueError(f"register_method: the name {name!r} belongs to {_where(known)}; choose another.")


def _same_class(left: type, right: type) -> bool:
    return _where(left) == _where(right)


def _where(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
