"""What a user installs: every package is in the wheel, under `petune.` and nothing else."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOPS = ("adapters", "tasks", "callbacks")


def packages_on_disk() -> set[str]:
    found = set()
    for top in ("petune", *TOPS):
        for file in (ROOT / top).rglob("__init__.py"):
            parts = file.parent.relative_to(ROOT).parts
            if parts[0] == "petune" and len(parts) > 1 and parts[1] in TOPS:
                continue  # the link to a folder at the top
            found.add(".".join(parts if top == "petune" else ("petune", *parts)))
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    copy = out / "source"  # setuptools would leave its build/ in the checkout, and take stale files from there
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "runs"))
    # --no-isolation: setuptools is in the environment, and the test must not need an index
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(packages_on_disk()) == sorted(listed), "the packages list of pyproject.toml and the folders differ"


def test_the_wheel_holds_every_file_and_installs_no_generic_name(wheel):
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"petune"}
    for top in ("petune", *TOPS):
        for file in (ROOT / top).rglob("*.py"):
            relative = file.relative_to(ROOT).as_posix()
            if not any(relative.startswith(f"petune/{link}/") for link in TOPS):
                assert (relative if top == "petune" else f"petune/{relative}") in names
    assert "petune/py.typed" in names
    assert "petune/adapters/lora/recipe.yaml" in names
    assert "petune/adapters/lora/README.md" in names
    assert "petune/tasks/text_embedding.yaml" in names


def test_the_wheel_declares_lower_bounds_only(wheel):
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert len(required) > 10
    assert [line for line in required if "<" in line.split(";")[0] or "==" in line.split(";")[0]] == []


@pytest.mark.parametrize("top", TOPS)
def test_the_one_wrong_import_explains_itself(top):
    command = [sys.executable, "-c", f"import {top}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)
    assert done.returncode == 1
    assert re.search(rf"(?i)this folder .*petune\.{top}", done.stderr.splitlines()[-1])


@pytest.mark.parametrize("top", TOPS)
def test_the_links_lead_to_the_folders_at_the_top(top):
    assert (ROOT / "petune" / top).resolve() == (ROOT / top).resolve()


def test_no_file_of_the_repository_is_over_a_mebibyte():
    done = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True, cwd=ROOT)
    files = [ROOT / name for name in done.stdout.split("\0") if name]
    assert [str(file) for file in files if file.is_file() and file.stat().st_size > 2**20] == []
