"""New Python processes in half a second: forked from one that has imported the large libraries, and nothing of ours.

A new interpreter imports torch and transformers for four seconds before `import peft` begins. Here one process of the
session does, and each new one is its fork, in which PEFT, PETune and Lightning have not been imported. Triton has, and
for its interpreter: its own functions are made for that or for the compiler, once and for all, when it is imported.
"""

import multiprocessing
import os
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple
from unittest import mock

LIBRARIES = (
    "accelerate",
    "torch",
    "transformers.generation.utils",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
)
"""What `import peft` imports besides itself."""

_BEGIN = """
import os, sys, torch
for descriptor, path in ((1, output), (2, errors)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
os.environ.clear()
os.environ.update(environment)
os.chdir(folder)
sys.argv = ["-c", *arguments]
torch.set_num_threads(1)
exec(compile(code, "<fresh process>", "exec"), {"__name__": "__main__"})
"""

_PYTEST = """
import os, sys
for name in [name for name in os.environ if name.startswith("PYTEST_")]:
    del os.environ[name]
sys.path.insert(0, os.getcwd())
import pytest
sys.exit(pytest.main(["-n", "0", "-p", "no:cacheprovider", "-q", *sys.argv[1:]]))
"""


class Finished(NamedTuple):
    """How a process ended.

    Attributes:
        code: of its exit; −n where signal n ended it.
        output: what it printed.
        errors: what it wrote to the standard error, a traceback for example.
    """

    code: int | None
    output: str
    errors: str


class Fresh:
    """A process that runs `code` with `arguments` as `sys.argv[1:]`, and has begun."""

    def __init__(self, code: str, *arguments: object, cwd: Path | None = None, **environment: str) -> None:
        self._files = tempfile.TemporaryDirectory()
        self._output, self._errors = (Path(self._files.name) / name for name in ("output", "errors"))
        request = {
            "code": code,
            "arguments": [str(argument) for argument in arguments],
            "folder": str(cwd or Path.cwd()),
            "environment": {**os.environ, **environment},
            "output": str(self._output),
            "errors": str(self._errors),
        }
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*LIBRARIES])
        self._process: BaseProcess = context.Process(target=exec, args=(_BEGIN, request))
        with mock.patch.dict(
            os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"
        ):  # what all are forked from reads it
            self._process.start()

    def wait(self, timeout: float = 240) -> Finished:
        """How it ended; it is killed where that takes longer than `timeout` seconds."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        with self._files:
            output, errors = (path.read_text() if path.exists() else "" for path in (self._output, self._errors))
            return Finished(self._process.exitcode, output, errors)


def run(code: str, *arguments: object, cwd: Path | None = None, **environment: str) -> Finished:
    """Run `code` to its end."""
    return Fresh(code, *arguments, cwd=cwd, **environment).wait()


def run_pytest(*arguments: str, cwd: Path, timeout: float, **environment: str) -> Finished:
    """Run pytest under Triton's interpreter, on what stands in `cwd`."""
    return Fresh(_PYTEST, *arguments, cwd=cwd, TRITON_INTERPRET="1", **environment).wait(timeout)


def script(module: str) -> str:
    """The code that does what `python -m module` does."""
    return f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
