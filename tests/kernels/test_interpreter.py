"""The Triton kernels on a CPU: each file of `triton/` in a process of its own, under Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((Path(__file__).parent / "triton").glob("test_*.py"))

pytestmark = pytest.mark.skipif(
    os.environ.get("PETUNE_TEST_DEVICE") == "cuda", reason="the folder is collected as it is: its kernels are compiled"
)


def test_there_are_files_to_interpret():
    assert FILES


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_interpreted_kernels_pass(file: Path):
    # Triton reads the flag when a kernel is defined, and a process has it for all kernels or for none
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-q", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=580)
    tail = "\n".join((done.stdout + done.stderr).splitlines()[-60:])
    assert done.returncode == 0, tail
    assert re.search(r"\b[1-9]\d* passed\b", done.stdout), tail
    assert not re.search(r"\b\d+ (skipped|xfailed|deselected)\b", done.stdout), tail
