"""The script that runs PEFT's own tests: what it feeds them, and that it tells a failure from a missing hub model."""

import tarfile
from pathlib import Path

import pytest

from tests.adapters.peft_suite import run as suite

MINI_SUITE = """
import peft
import pytest
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig

from .testing_common import HELPER

TEST_CASES = [
    ("LoRA", "MLP", LoraConfig, {"target_modules": "lin0"}),
    ("IA3", "MLP", peft.IA3Config, {"target_modules": "lin0"}),
]


@pytest.mark.parametrize("name, model_id, config_cls, config_kwargs", TEST_CASES)
def test_row(name, model_id, config_cls, config_kwargs):
    assert HELPER == 1
    assert config_cls.__name__ != "IA3Config"
    kind = config_cls(**config_kwargs).peft_type.removeprefix("PETUNE_")
    assert kind in ("LORA", "BILORA", "DENSEDELTA", "RELUDELTA")
    print(config_cls.__name__)


def test_lora_is_ours():
    assert LoraConfig.__name__ == "FusedLoraConfig"


def test_needs_the_hub():
    try:
        raise LocalEntryNotFoundError("nothing cached")
    except LocalEntryNotFoundError as error:
        raise OSError("cannot load") from error


class TestLayerRepr:
    def test_repr_lora_linear(self):
        assert False


def test_cuda():
    pytest.skip("no GPU")
"""


@pytest.fixture
def sdist(tmp_path) -> Path:
    def write(extra: str = "") -> Path:
        tests = tmp_path / "peft-0.0.1" / "tests"
        tests.mkdir(parents=True)
        (tests / "testing_common.py").write_text("HELPER = 1\n")
        (tests / "test_custom_models.py").write_text(MINI_SUITE + extra)
        with tarfile.open(tmp_path / "peft-0.0.1.tar.gz", "w:gz") as archive:
            archive.add(tests.parent, arcname="peft-0.0.1")
        return tmp_path / "peft-0.0.1.tar.gz"

    return write


@pytest.mark.slow
def test_pefts_tests_run_on_our_configs_and_what_needs_the_hub_is_told_apart(sdist, capsys):
    assert suite.main(["--sdist", str(sdist()), "-n", "0"]) == 0
    first, *reasons = capsys.readouterr().out.splitlines()
    assert "failed 0 · different by design 1 · not applicable 2" in first
    assert int(first.split()[1]) > 10  # LoRA's row, a few for each method of cases.py, and the check of LoraConfig
    assert any("needs a model of the hub" in reason for reason in reasons)
    assert any("no GPU" in reason for reason in reasons)


@pytest.mark.slow
def test_a_failure_is_named_and_fails_the_run(sdist, capsys):
    broken = sdist("\n\ndef test_broken():\n    assert 1 == 2\n")
    assert suite.main(["--sdist", str(broken), "-n", "0"]) == 1
    assert "FAILED test_custom_models.py::test_broken" in capsys.readouterr().out


def test_the_repository_holds_none_of_pefts_tests():
    folder = Path(suite.__file__).parent
    assert {file.name for file in folder.glob("*.py")} == {"run.py", "plugin.py"}
