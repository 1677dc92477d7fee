"""The fields that all methods share, and the checks that name field, value and a valid alternative."""

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig

from petune.registry import peft_type


@dataclass
class PetuneConfig(PeftConfig):
    """Base of every config that is saved as a `PETUNE_<METHOD>` type."""

    method: ClassVar[str]
    """Short name under which the method is registered."""

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Module name endings, a regular expression, 'all-linear', or None for the default."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module name endings or a regular expression to leave alone."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole beside the adapter, such as a task head."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt; None for all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the ModuleList that layers_to_transform counts in."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start as the identity; False starts from random weights, for tests."}
    )
    base_shape: dict[str, int | str] | None = field(
        default=None,
        metadata={"help": "Model type and sizes of the base, filled at injection; an adapter refuses any other base."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(self.method)
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # pyright: ignore[reportAttributeAccessIssue]  # as PEFT's own
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)  # pyright: ignore[reportAttributeAccessIssue]
        if self.target_modules is not None and not self.target_modules:
            self.refuse("target_modules", "names at least one module; leave it out for the method's default")
        expression = isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear"
        if expression and self.layers_to_transform is not None:
            self.refuse("layers_to_transform", "needs a list in target_modules; write the layers into the expression")

    def refuse(self, name: str, must: str) -> None:
        """Raise the ValueError `<Config>.<field>=<value> <must>.`"""
        raise ValueError(f"{type(self).__name__}.{name}={getattr(self, name)!r} {must}.")

    def check_positive(self, *names: str) -> None:
        """Refuse fields that are not integers of 1 or more."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                self.refuse(name, "must be a positive integer")

    def check_interval(self, low: float, high: float, *names: str) -> None:
        """Refuse fields outside of [low, high)."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
                self.refuse(name, f"must be a number in [{low}, {high})")

    def check_choice(self, name: str, choices: Collection[Any]) -> None:
        """Refuse a field whose value is not among the choices."""
        value = getattr(self, name)
        if value not in choices:
            near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
            hint = f"; the closest is {near[0]!r}" if near else ""
            self.refuse(name, f"must be one of {', '.join(map(repr, choices))}{hint}")
