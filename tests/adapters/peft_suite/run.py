"""Runs PEFT's own tests with PETune's methods: `python tests/adapters/peft_suite/run.py [--sdist FILE] [-n 2]`.

The tests come from the source distribution of the installed PEFT, fetched by pip into the user's cache. They are read,
never copied into this repository. `FusedLoraConfig` stands where they say `LoraConfig`, and every row of
tests/adapters/cases.py that is a method of its own joins their matrix of toy models.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PLUGIN = "tests.adapters.peft_suite.plugin"
MATRICES = {"TEST_CASES": "test_cases", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": "several_active_cases"}

REPLACED = {
    # few tests need diffusers, but the import alone would take the others with it
    f"from {PLUGIN} import StableDiffusionPipeline\n": "from diffusers import StableDiffusionPipeline\n",
    # PEFT's tests go online once for each model, and wait for a network that may not be there
    "is_offline = True\n": 'is_offline = override.get("HF_HUB_OFFLINE", False) == "1"\n',
}

FILES = (
    "test_custom_models.py",
    "test_initialization.py",
    "test_low_level_api.py",
    "test_lora_conversion.py",
    "test_lora_variants.py",
    "test_mapping.py",
    "test_other.py",
    "test_target_parameters.py",
    "test_trainable_tokens.py",
)
"""Files with tests of methods that ride on a model built on the spot. What the others need is in NOT_APPLICABLE."""

NOT_APPLICABLE = {
    "test_decoder_models, test_encoder_decoder_models, test_feature_extraction_models, test_vision_models, "
    "test_seq_classifier, test_token_classification_qa, test_auto, test_hub_features, test_helpers, "
    "test_integrations, test_torch_compile, test_arrow, test_xlora": "models of the hub",
    "test_common_gpu, test_gpu_examples, test_gptqmodel, test_quantization, test_lora_megatron": "a GPU",
    "test_stablediffusion, test_tuners_utils": "diffusers and parameterized",
    "test_config": "the built-in configs by name, with adapters of the hub",
    "every other file": "a test of one of PEFT's own methods",
}

BY_DESIGN = {
    "TestLayerRepr::test_repr_lora_linear": "our layer prints as lora.FusedLoraLinear",
    "TestLayerRepr::test_repr_lora_conv1d": "our layer prints as lora.FusedLoraLinear",
    "TestLoraInitialization::test_modules_to_save_targets_lora_layer_raises": "the message says FusedLoraLinear",
    "TestDefaultTargetModules::test_default_target_modules_not_set_raises": "without targets: all linear layers",
    "TestDefaultTargetModules::test_default_target_modules_not_set_model_type_set_raises": "the same",
    "TestDefaultTargetModules::test_default_target_modules_list_of_str": "the same; PEFT's table is not asked",
    "TestDefaultTargetModules::test_default_target_modules_str": "the same",
}
"""Tests that `FusedLoraConfig` is meant to fail."""


def main(argv: list[str] | None = None) -> int:
    """Run, print the counts and the reasons, and return 0 if nothing failed that is not meant to."""
    arguments = _parser().parse_args(argv)
    sdist = arguments.sdist or fetch_sdist(version("peft"))
    with tempfile.TemporaryDirectory() as folder:
        tests = unpack(sdist, Path(folder))
        files = [name for name in FILES if (tests / name).exists()]
        result = run(tests, arguments.files or files, arguments.n, arguments.control, arguments.every)
    expected = [name for name in result["failed"] if name.partition("[")[0].partition("::")[2] in BY_DESIGN]
    surprises = [name for name in result["failed"] if arguments.control or name not in expected]
    print(f"passed {result['passed']} · failed {len(surprises)} · different by design {len(expected)}", end=" · ")
    print(f"not applicable {sum(result['not applicable'].values())}")
    for reason, count in result["not applicable"].items():
        print(f"  {count:5} {reason.removeprefix('Skipped: ')[:110]}")
    for name in surprises:
        print(f"FAILED {name}")
    return 1 if surprises or not result["passed"] else 0


def fetch_sdist(peft_version: str) -> Path:
    """The source distribution of PEFT, from the cache or by pip.

    Raises:
        subprocess.CalledProcessError: pip cannot reach a package index; pass --sdist FILE instead.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "petune"
    file = cache / f"peft-{peft_version}.tar.gz"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*command, "--no-build-isolation", "--dest", str(cache), f"peft=={peft_version}"], check=True)
    return file


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack PEFT's tests/ into the folder and put our rows into the matrices of test_custom_models.py."""
    with tarfile.open(sdist) as archive:
        members = [m for m in archive.getmembers() if m.isfile() and m.name.split("/")[1:2] == ["tests"]]
        archive.extractall(folder, members=members, filter="data")
    tests = next(folder.glob("*/tests"))
    for file in tests.glob("*.py"):
        source = file.read_text()
        for ours, theirs in REPLACED.items():
            source = source.replace(theirs, ours)
        file.write_text(_with_our_rows(source) if file.name == "test_custom_models.py" else source)
    return tests


def _with_our_rows(source: str) -> str:
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        name = getattr(node.targets[0], "id", "") if isinstance(node, ast.Assign) else ""
        if name in MATRICES and node.end_lineno:
            lines.insert(node.end_lineno, f"{name} = {PLUGIN}.{MATRICES[name]}({name})\n")
            lines.insert(node.end_lineno, f"import {PLUGIN}\n")
    return "".join(lines)


def run(tests: Path, files: list[str], workers: int, control: bool, every: int = 1) -> dict[str, Any]:
    """Run the files by pytest in a process of their own; the counts, the failures and the reasons for skips."""
    result = tests.parent / "result.json"
    path = os.pathsep.join([str(tests.parent), str(ROOT)])  # `tests` is one namespace package over both folders
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PETUNE_SUITE_RESULT": str(result), "PETUNE_SUITE_CONTROL": str(int(control))}
    environment["PETUNE_SUITE_EVERY"] = str(every)
    options = [
        "--timeout=60",
        "-c",
        os.devnull,
        "--rootdir",
        str(tests.parent),
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
    ]
    command = [sys.executable, "-m", "pytest", "-p", PLUGIN, *options, "-n", str(workers), "--dist", "worksteal"]
    output = subprocess.run(
        [*command, "-q", "--tb=short", *(str(tests / name) for name in files)],
        cwd=tests.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if not result.exists():
        raise RuntimeError(f"PEFT's tests did not run:\n{output.stdout[-4000:]}")
    found = json.loads(result.read_text())
    if found["failed"]:
        print(output.stdout[-20000:], file=sys.stderr)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="some of PEFT's test files; default: all that apply")
    parser.add_argument("--sdist", type=Path, help="peft-<version>.tar.gz; default: fetched by pip")
    parser.add_argument("--control", action="store_true", help="PEFT's own LoRA, to tell its failures from ours")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one of N tests, drawn by their names")
    parser.add_argument("-n", type=int, default=2, help="processes")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
