"""`petune methods`, `recipes` and `env`: answers read from installed files, without torch, transformers or peft."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from petune.cli.errors import UsageError, closest

METHOD_GROUP = "petune.methods"
"""Entry-point group through which other packages add methods."""

_PACKAGES = (
    "petune",
    "torch",
    "transformers",
    "peft",
    "lightning",
    "datasets",
    "evaluate",
    "accelerate",
    "safetensors",
    "tokenizers",
    "jsonargparse",
    "torchmetrics",
    "scikit-learn",
    "numpy",
    "triton",
    "bitsandbytes",
    "tensorboard",
)


@dataclass(frozen=True)
class Recipe:
    """A YAML file shipped with petune: of a task (`tasks/<name>.yaml`) or a method (`adapters/<name>/recipe.yaml`).

    A folder of several methods has a file for each, `<name>.yaml`. One more is an example of the runs of `fit-many`.
    """

    name: str
    kind: str
    """'task', 'method' or 'runs'."""
    path: Path

    @property
    def description(self) -> str:
        """The comment on the first line."""
        with self.path.open(encoding="utf-8") as file:
            first = file.readline().strip()
        return first.lstrip("# ") if first.startswith("#") else ""

    @property
    def config_name(self) -> str:
        """Class name of the adapter config the recipe selects; '' if it selects none."""
        value = yaml.safe_load(self.path.read_text(encoding="utf-8")) or {}
        for key in ("model", "init_args", "adapter", "class_path"):
            value = value.get(key) if isinstance(value, dict) else None
        return value.rpartition(".")[2] if isinstance(value, str) else ""


def _package_folder(name: str) -> Path:
    """Folder of an installed package of ours, found without importing it."""
    spec = importlib.util.find_spec(name)  # imports the parent `petune` only, which is light
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the installed petune has no {name}; install it again.")
    return Path(next(iter(spec.submodule_search_locations)))


def recipes() -> list[Recipe]:
    """Shipped recipes: tasks first, then methods, each by name, then the runs of `fit-many`."""
    tasks = sorted(_package_folder("petune.tasks").glob("*.yaml"))
    methods = [
        Recipe(path.parent.name if path.stem == "recipe" else path.stem, "method", path)
        for path in _package_folder("petune.adapters").glob("*/*.yaml")
    ]
    methods.sort(key=lambda each: each.name)
    runs = Recipe("many-runs", "runs", _package_folder("petune.many") / "runs.yaml")
    return [*(Recipe(path.stem, "task", path) for path in tasks), *methods, runs]


def find_recipe(name: str) -> Recipe:
    """The shipped recipe of that name.

    Raises:
        UsageError: there is none; the closest name is given.
    """
    by_name = {recipe.name: recipe for recipe in recipes()}
    if name not in by_name:
        raise UsageError(
            f"no recipe and no file is called {name!r}.{closest(name, by_name)} `petune recipes` lists them."
        )
    return by_name[name]


def third_party_methods() -> list[importlib.metadata.EntryPoint]:
    """Methods that other installed packages declare; their code is not loaded."""
    return sorted(importlib.metadata.entry_points(group=METHOD_GROUP), key=lambda entry: entry.name)


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_methods() -> None:
    """name, config class and description of every installed method."""
    rows = [("method", "config", "what it does")]
    rows += [(recipe.name, recipe.config_name, recipe.description) for recipe in recipes() if recipe.kind == "method"]
    for entry in third_party_methods():
        package = entry.dist.name if entry.dist else "unknown package"
        rows.append((entry.name, entry.value.rpartition(":")[2], f"from {package} ({entry.value})"))
    _print_table(rows)
    print("\nUse one:  petune fit -c TASK -c METHOD …    Every PEFT config works too:  --model.adapter=peft.IA3Config")


def print_recipes() -> None:
    """name, kind and description of every shipped recipe."""
    rows = [("recipe", "kind", "what it is")]
    rows += [(recipe.name, recipe.kind, recipe.description) for recipe in recipes()]
    _print_table(rows)
    print("\nUse one by name:  petune fit -c TASK -c METHOD …    Read or copy it:  petune recipes show|cp NAME")


def show_recipe(name: str) -> None:
    """The text of a recipe."""
    print(find_recipe(name).path.read_text(encoding="utf-8"), end="")


def copy_recipe(name: str, destination: str | None) -> Path:
    """Copy a recipe to `destination` (a file or folder; default ./<name>.yaml); an existing file is never overwritten.

    Raises:
        UsageError: the recipe does not exist, the target does.
    """
    recipe = find_recipe(name)
    target = Path(destination) if destination else Path(f"{name}.yaml")
    if target.is_dir():
        target /= f"{name}.yaml"
    if target.exists():
        raise UsageError(f"{target} exists; give another name: petune recipes cp {name} NEW.yaml")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(recipe.path, target)
    return target


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    """Names, memory and driver by nvidia-smi; asking torch would cost seconds."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except FileNotFoundError:
        return "none (no nvidia-smi)"
    except (subprocess.SubprocessError, OSError) as error:
        return f"unknown (nvidia-smi: {' '.join(str(error).split())})"
    return "; ".join(answer.stdout.split("\n")).strip("; ") or "none"


def _memory_gib() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (AttributeError, ValueError, OSError):  # Windows, or a system that does not tell
        return "unknown"


def _cpu_name() -> str:
    """What the processor calls itself, else its architecture."""
    with suppress(OSError):  # Linux alone has the file
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment() -> list[tuple[str, str]]:
    """Versions, hardware and settings that the numbers of a run depend on."""
    rows = [
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("platform", platform.platform()),
        ("cpu", f"{os.cpu_count()} x {_cpu_name()}"),
        ("memory", _memory_gib()),
        ("gpu", _gpus()),
    ]
    rows += [(package, _version(package)) for package in _PACKAGES]
    settings = sorted(name for name in os.environ if name.startswith("PETUNE_") or name == "OMP_NUM_THREADS")
    return rows + [(name, os.environ[name]) for name in settings]


def print_env() -> None:
    """`environment`, as a block to paste into a bug report."""
    _print_table([*environment(), ("executable", sys.executable)])
