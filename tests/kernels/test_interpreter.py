"""The Triton kernels on a CPU: each file of `triton/` in a process of its own, under Triton's interpreter."""

import os
import re
from pathlib import Path

import pytest

from tests import fresh

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
    done = fresh.run_pytest(str(file), cwd=ROOT, timeout=580)
    tail = "\n".join((done.output + done.errors).splitlines()[-60:])
    assert done.code == 0, tail
    assert re.search(r"\b[1-9]\d* passed\b", done.output), tail
    assert not re.search(r"\b\d+ (skipped|xfailed|deselected)\b", done.output), tail
