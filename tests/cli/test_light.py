"""The answers that must be instant, in fresh processes and in this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from petune.cli import light, main

HEAVY = ("torch", "transformers", "peft", "lightning", "datasets", "triton", "jsonargparse", "rich")
LIGHT_COMMANDS = (["--help"], ["--version"], ["methods"], ["recipes"], ["recipes", "show", "lora"], ["env"])

PROBE = f"""
import json, os, sys
from petune.cli import main
out, sys.stdout = sys.stdout, open(os.devnull, "w")
code = main(json.loads(sys.argv[1]))
seconds = sum(os.times()[:2])
sys.stdout = out
print(json.dumps({{"code": code, "seconds": seconds, "heavy": [m for m in {HEAVY!r} if m in sys.modules]}}))
"""


def probe(arguments: list[str]) -> dict:
    """Exit code, CPU seconds of the whole process and the heavy modules it imported."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("arguments", LIGHT_COMMANDS, ids=" ".join)
def test_a_light_command_imports_nothing_heavy(arguments):
    answer = probe(arguments)
    assert answer["code"] == 0
    assert answer["heavy"] == []


@pytest.mark.parametrize("arguments", LIGHT_COMMANDS, ids=" ".join)
def test_a_light_command_answers_in_a_third_of_a_second(arguments):
    # CPU seconds, one try of three: what a busy machine makes slower is the clock on the wall, seldom all of these
    assert any(probe(arguments)["seconds"] < 0.3 for _ in range(3))


def test_importing_petune_is_light():
    code = f"import petune, sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_python_dash_m_petune_is_the_command():
    done = subprocess.run([sys.executable, "-m", "petune", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("petune ")


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "export", "estimate", "demo", "methods", "recipes", "env"):
        assert f"\n    {command}" in text


def test_no_arguments_print_the_help(capsys):
    assert main([]) == 0
    assert "usage: petune" in capsys.readouterr().out


def test_methods_lists_the_config_that_the_registry_has(capsys):
    import petune.adapters  # noqa: F401  (registers the methods)
    from petune.registry import methods

    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    ours = {n: m for n, m in methods().items() if m.config_cls.__module__.startswith("petune.")}  # not the tests' own
    assert "lora" in ours
    for name, method in ours.items():
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert method.config_cls.__name__ in line


def test_methods_lists_those_of_other_packages_without_loading_them(tmp_path, monkeypatch, capsys):
    info = tmp_path / "peftplus-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peftplus\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[petune.methods]\nhula = peftplus_does_not_exist.hula:HulaConfig\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["methods"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("hula "))
    assert "HulaConfig" in line
    assert "peftplus" in line


def test_every_recipe_has_a_description():
    assert light.recipes()
    for recipe in light.recipes():
        assert recipe.description, f"the first line of {recipe.path} must be a comment"


def test_every_method_recipe_names_its_config():
    for recipe in light.recipes():
        if recipe.kind == "method":
            assert recipe.config_name.endswith("Config")


def test_recipes_lists_tasks_and_methods(capsys):
    assert main(["recipes"]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["text_classification", "task"] in rows
    assert ["lora", "method"] in rows
    assert ["bilora", "method"] in rows  # of a folder of several methods


def test_recipes_show_prints_the_file(capsys):
    assert main(["recipes", "show", "lora"]) == 0
    assert capsys.readouterr().out == light.find_recipe("lora").path.read_text()


def test_recipes_cp_copies_and_never_overwrites(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "cp", "lora"]) == 0
    assert Path("lora.yaml").read_text() == light.find_recipe("lora").path.read_text()
    Path("lora.yaml").write_text("mine")
    assert main(["recipes", "cp", "lora"]) == 2
    assert Path("lora.yaml").read_text() == "mine"
    assert "lora.yaml exists" in capsys.readouterr().err


def test_recipes_cp_takes_a_folder(tmp_path):
    assert main(["recipes", "cp", "lora", str(tmp_path)]) == 0
    assert (tmp_path / "lora.yaml").is_file()


def test_env_names_versions_and_hardware(capsys):
    assert main(["env"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"python", "platform", "cpu", "memory", "gpu", "petune", "torch", "peft"} <= rows.keys()


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("#!/bin/sh\necho 'NVIDIA H100, 81559 MiB, 550.1'\n", "NVIDIA H100, 81559 MiB, 550.1"),
        ("#!/bin/sh\nexit 9\n", "unknown (nvidia-smi:"),
    ],
    ids=["answers", "fails"],
)
def test_env_reads_the_gpu_from_nvidia_smi(tmp_path, monkeypatch, capsys, script, shown):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(script)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert main(["env"]) == 0
    assert shown in capsys.readouterr().out
