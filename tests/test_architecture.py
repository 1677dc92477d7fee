"""Who may import whom, read from the source. The rules are those of CONTRIBUTING.md."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = ("petune", "adapters", "tasks", "callbacks")
METHODS = sorted(folder.name for folder in (ROOT / "adapters").iterdir() if (folder / "__init__.py").exists())


def sources() -> Iterator[tuple[str, Path]]:
    """(module name, file) of every source file; the links below petune/ are the folders at the top."""
    for top in CODE:
        for file in sorted((ROOT / top).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            if len(parts) > 1 and parts[0] == "petune" and parts[1] in CODE:
                continue
            module = ".".join(parts if top == "petune" else ("petune", *parts))
            yield module.removesuffix(".__init__"), file


SOURCES = dict(sources())


def imports(file: Path, *, at_import_time: bool = False) -> set[str]:
    """Modules that a file imports; with at_import_time, only those outside of functions and TYPE_CHECKING."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = names & SOURCES.keys()
            found.update(
                modules or {node.module or "", *names}
            )  # `from package import module` needs that module alone
        if at_import_time:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                return
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return found


def offenders(prefix: str, *forbidden: str, at_import_time: bool = False) -> list[str]:
    """`module imports name` for each module below prefix that imports something below a forbidden name."""
    return [
        f"{module} imports {name}"
        for module, file in SOURCES.items()
        if f"{module}.".startswith(f"{prefix}.")
        for name in sorted(imports(file, at_import_time=at_import_time))
        if any(f"{name}.".startswith(f"{root}.") for root in forbidden)
    ]


def test_the_source_is_found():
    assert {"petune", "petune.registry", "petune.adapters.lora", "petune.tasks.base"} <= SOURCES.keys()


def test_kernels_import_nothing_of_ours():
    mine = [line for line in offenders("petune.kernels", "petune") if " imports petune.kernels" not in line]
    assert mine == []


@pytest.mark.parametrize("method", METHODS)
def test_a_method_imports_no_other_method_and_no_trainer(method):
    others = [f"petune.adapters.{other}" for other in METHODS if other != method]
    banned = ("lightning", "triton", "petune.tasks", "petune.callbacks", "petune.cli", *others)
    assert offenders(f"petune.adapters.{method}", *banned) == []


def test_tasks_do_not_import_callbacks_or_the_command_line():
    assert offenders("petune.tasks", "petune.callbacks", "petune.cli", "petune.demo", "petune.comparison") == []


def test_callbacks_do_not_import_tasks():
    assert offenders("petune.callbacks", "petune.tasks", "petune.cli", "petune.demo", "petune.comparison") == []


SHARED = ("registry", "config", "layer", "block_layer", "frozen_block", "tuner", "topology", "fingerprint", "export")
TURNS = ("layer_scheduler", "layer_options", "layer_turns", "trainer_callbacks")


@pytest.mark.parametrize("name", [*SHARED, "feature_cache", *TURNS])
def test_the_shared_base_imports_neither_trainer_nor_what_stands_on_it(name):
    above = ("lightning", "triton", "petune.tasks", "petune.callbacks", "petune.cli", "petune.demo")
    assert offenders(f"petune.{name}", *above) == []


def test_triton_is_imported_by_kernels_alone_and_only_when_one_runs():
    outside = [line for line in offenders("petune", "triton") if not line.startswith("petune.kernels.")]
    assert outside == []
    loads = {name: imports(file, at_import_time=True) for name, file in SOURCES.items()}
    needs_triton = {name for name, found in loads.items() if any(root.split(".")[0] == "triton" for root in found)}
    while more := {name for name, found in loads.items() if found & needs_triton} - needs_triton:
        needs_triton |= more
    assert "petune.kernels.lora_linear.kernel" in needs_triton
    public = {name for name in needs_triton if name.rpartition(".")[2] in {"op", "reference", "dispatch", "chooser"}}
    assert public == set()
    assert not {"petune", "petune.kernels", "petune.adapters.lora", "petune.kernels.lora_linear"} & needs_triton


def test_imports_are_absolute():
    relative = [
        f"{module}: {ast.unparse(node)}"
        for module, file in SOURCES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_imports_are_acyclic():
    graph = {
        module: {name for name in imports(file, at_import_time=True) if name in SOURCES} - {module}
        for module, file in SOURCES.items()
    }
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in graph[module]:
                walk(name, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())


@pytest.mark.parametrize("method", METHODS)
def test_a_method_folder_is_complete_and_in_the_contract(method):
    folder = ROOT / "adapters" / method
    missing = [name for name in ("README.md", "config.py", "layer.py") if not (folder / name).exists()]
    assert missing == []
    cases = (ROOT / "tests" / "adapters" / "cases.py").read_text()
    registered = re.findall(r'register_method\(\s*"(\w+)"', (folder / "__init__.py").read_text())
    assert registered  # a folder may hold several methods of one kind
    recipes = {f"{name}.yaml" for name in registered} if len(registered) > 1 else {"recipe.yaml"}
    assert {path.name for path in folder.glob("*.yaml")} == recipes
    for name in registered:
        assert (ROOT / "tests" / "adapters" / f"test_{name}.py").exists()
        assert f'"{name}"' in cases, f"tests/adapters/cases.py has no row for {name}"
    assert method in ast.dump(ast.parse((ROOT / "adapters" / "__init__.py").read_text()))
