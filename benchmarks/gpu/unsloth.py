"""Unsloth's LoRA functions as a peer, without the rest of Unsloth.

`import unsloth` patches transformers, peft and trl for the whole process, which would change the other sides of a
benchmark. Its kernels/{fast_lora,swiglu,geglu,utils,...}.py are read from a wheel, an unpacked wheel or the installed
package and imported below a stub package; what they import from the rest of Unsloth and what only quantised bases
need is replaced by stubs. Nothing of it is kept in this repository.
"""

import importlib
import importlib.util
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import packaging.version
import torch

NAME = "unsloth_for_benchmarks"
FILES = ("fast_lora", "swiglu", "geglu", "utils", "indexing")
NOT_INSTALLED = "not installed: pass --unsloth with its wheel, or install the package"

_folders: list[tempfile.TemporaryDirectory[str]] = []  # Triton reads a kernel's source from its file, later


class UnslothError(RuntimeError):
    """Unsloth's files were not found, or cannot be imported by themselves."""


def load(source: Path | None) -> ModuleType:
    """`fast_lora` of Unsloth.

    Args:
        source: the wheel, or a folder that holds unsloth/; None for the installed package.

    Raises:
        UnslothError: it is not there, or this version of it does not load below the stubs.
    """
    if f"{NAME}.kernels.fast_lora" in sys.modules:
        return sys.modules[f"{NAME}.kernels.fast_lora"]
    folder = _kernels(source)
    missing = [file for file in FILES if not (folder / f"{file}.py").exists()]
    if missing:
        raise UnslothError(f"unsloth: {folder} has no {', '.join(missing)}; this version is not known here")
    before = set(sys.modules)
    stubs = _stubs(folder)
    sys.modules.update(stubs)
    try:
        return importlib.import_module(f"{NAME}.kernels.fast_lora")
    except Exception as error:
        for name in set(sys.modules) - before:
            if name.startswith(NAME):
                del sys.modules[name]
        raise UnslothError(f"unsloth: kernels/fast_lora.py does not load by itself: {error!r}") from error
    finally:
        for name in stubs:
            if not name.startswith(NAME) and name not in before:
                del sys.modules[name]  # nobody else may take the stub for the real unsloth_zoo


def release(source: Path | None) -> str:
    """The version, as the wheel's name or the installed package says it."""
    if source is not None and source.suffix == ".whl":
        return source.name.split("-")[1]
    if source is not None:
        return next(
            (p.name.split("-")[1].removesuffix(".dist") for p in source.glob("unsloth-*.dist-info")), "unknown"
        )
    try:
        return version("unsloth")
    except PackageNotFoundError:
        return ""


def _kernels(source: Path | None) -> Path:
    if source is None:
        spec = importlib.util.find_spec("unsloth")  # finds it without running it
        if spec is None or not spec.submodule_search_locations:
            raise UnslothError(f"unsloth: {NOT_INSTALLED}")
        return Path(next(iter(spec.submodule_search_locations))) / "kernels"
    if not source.exists():
        raise UnslothError(f"unsloth: {source} does not exist; pass a wheel or a folder that holds unsloth/")
    if source.is_dir():
        return source / "unsloth" / "kernels"
    _folders.append(tempfile.TemporaryDirectory())
    with zipfile.ZipFile(source) as wheel:
        members = [name for name in wheel.namelist() if name.startswith("unsloth/kernels/") and name.count("/") == 2]
        wheel.extractall(_folders[-1].name, members)
    return Path(_folders[-1].name) / "unsloth" / "kernels"


def _stubs(folder: Path) -> dict[str, ModuleType]:
    """What the files import from elsewhere; enough for dense bf16 weights on one NVIDIA GPU, and for nothing else."""
    unquantised: dict[str, Any] = {
        "fp8": ("weight_dequant", "fp8_linear", "can_use_fp8_rowwise_gemv", "fp8_rowwise_gemv"),
        "nvfp4": ("NVFP4QuantState", "nvfp4_dequantize", "nvfp4_linear"),
        "int4_packed": ("Int4QuantState", "int4_dequantize_weight", "int4_matmul"),
    }
    stubs = {
        NAME: _module(NAME, __path__=[]),
        f"{NAME}.kernels": _module(f"{NAME}.kernels", __path__=[str(folder)]),
        f"{NAME}.device_type": _module(
            f"{NAME}.device_type",
            is_hip=lambda: False,
            get_device_type=lambda: "cuda",
            DEVICE_TYPE="cuda",
            DEVICE_TYPE_TORCH="cuda",
            DEVICE_COUNT=torch.cuda.device_count(),
            ALLOW_PREQUANTIZED_MODELS=False,
        ),
        f"{NAME}.bnb_availability": _module(f"{NAME}.bnb_availability", native_kernels_ready=lambda *_: False),
        f"{NAME}.kernels.rms_layernorm": _module(f"{NAME}.kernels.rms_layernorm", _SAVE_OUTPUT=False),
        "unsloth_zoo": _module("unsloth_zoo", __path__=[]),
        "unsloth_zoo.utils": _module("unsloth_zoo.utils", Version=packaging.version.Version),
    }
    for file, names in unquantised.items():
        name = f"{NAME}.kernels.{file}"
        stubs[name] = _module(name, **{member: type(member, (), {}) for member in names})
    stubs[f"{NAME}.kernels"].rms_layernorm = stubs[f"{NAME}.kernels.rms_layernorm"]  # type: ignore[attr-defined]
    return stubs


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(members)
    return module
