"""PETune: parameter-efficient fine-tuning methods that plug into PEFT, Lightning and Hugging Face models.

Importing the package is all that is needed: its methods are registered the moment PEFT is there, whichever of the two
is imported first. Nothing heavy is imported before that, so the command line answers at once.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from petune.adapters.emoe import EmoeConfig
    from petune.adapters.lora import FusedLoraConfig, fuse, unfuse
    from petune.adapters.onebit import BiAdapterConfig, BiLoraConfig
    from petune.adapters.pat import PatConfig
    from petune.adapters.side import HierarchicalSideConfig, LadderSideConfig
    from petune.export import export_lora, export_merged, load_adapter, save_adapter
    from petune.pruned import load_pruned
    from petune.registry import methods

__version__ = "0.1.0"

__all__ = [
    "BiAdapterConfig",
    "BiLoraConfig",
    "EmoeConfig",
    "FusedLoraConfig",
    "HierarchicalSideConfig",
    "LadderSideConfig",
    "PatConfig",
    "export_lora",
    "export_merged",
    "fuse",
    "load_adapter",
    "load_pruned",
    "methods",
    "save_adapter",
    "unfuse",
]

_HOME = {
    "BiAdapterConfig": "petune.adapters.onebit",
    "BiLoraConfig": "petune.adapters.onebit",
    "EmoeConfig": "petune.adapters.emoe",
    "FusedLoraConfig": "petune.adapters.lora",
    "HierarchicalSideConfig": "petune.adapters.side",
    "LadderSideConfig": "petune.adapters.side",
    "PatConfig": "petune.adapters.pat",
    "fuse": "petune.adapters.lora",
    "unfuse": "petune.adapters.lora",
    "export_lora": "petune.export",
    "export_merged": "petune.export",
    "load_adapter": "petune.export",
    "save_adapter": "petune.export",
    "load_pruned": "petune.pruned",
    "methods": "petune.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'petune' has no attribute {name!r}")
    importlib.import_module("petune.adapters")  # `methods()` must be complete however it is reached
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _register_methods(_: ModuleType | None = None) -> None:
    # a module of ours that is the first to import PEFT is not whole yet, and the methods need it: they follow it
    specs = [module.__spec__ for name, module in list(sys.modules.items()) if name.startswith("petune.")]
    unfinished = next((spec for spec in specs if getattr(spec, "_initializing", False)), None)
    if unfinished is None:
        importlib.import_module("petune.adapters")
    else:
        unfinished.__class__ = _FollowedSpec


class _FollowedSpec(ModuleSpec):
    """Of a module that is being imported: when the import system calls it whole, the methods are registered."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # pyright: ignore[reportAttributeAccessIssue]
            if self.name in sys.modules:  # else its import has failed
                _register_methods()


wrapt.register_post_import_hook(_register_methods, "peft")
