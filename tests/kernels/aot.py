"""Compile, for a GPU that is not there, the kernels that a host function would launch on it."""

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from petune.kernels.lora_linear import skinny

TOOLS = Path(nvidia).parent / "bin"
MULTIPROCESSORS = 132  # an H100's: the grids depend on it, the code does not

# PTX of a product on tensor cores: sm_80, sm_90, sm_100
_TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_TMA = re.compile(r"\bcp\.async\.bulk\.tensor\b")


class Build(NamedTuple):
    """What the compiler made of one kernel."""

    name: str
    registers: int
    shared_bytes: int
    spills: int
    """Instructions that move a register to or from local memory."""
    products: int
    """Tensor-core instructions."""
    tma: int
    uses_tf32: bool


class Known(Protocol):
    """Where builds are kept between runs; pytest's cache is one."""

    def get(self, key: str, default: None) -> Any: ...
    def set(self, key: str, value: object) -> None: ...


def builds_of(call: Callable[[], object], arch: int, known: Known) -> list[Build]:
    """Every kernel that `call` launches, compiled for sm_<arch> instead.

    The host code runs as it is, on tensors of the meta device, so that what is compiled is what would be launched:
    Triton itself finds the types, the constants, and which sizes and addresses are multiples of 16.
    """
    builds: list[Build] = []
    launch = JITFunction.run
    digest = ""

    def before_compiling(*, key: str, fn: Any, **_: object) -> bool:
        """Whether there is no need to: Triton's key has the arguments and options, the function's the source."""
        nonlocal digest
        text = f"{triton.__version__} sm_{arch} {fn.jit_function.cache_key} {key}"
        digest = f"petune/aot/{hashlib.sha256(text.encode()).hexdigest()}"
        values = known.get(digest, None)
        if values is not None:
            builds.append(Build(*values))
        return values is not None

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        nonlocal digest
        digest = ""
        kernel = launch(self, *args, warmup=True, **kwargs)
        if kernel is not None:
            builds.append(_build(kernel))
        if kernel is not None and digest:  # else this process compiled it before
            known.set(digest, builds[-1])

    gpu = SimpleNamespace(
        get_current_device=lambda: f"sm_{arch}",  # the key of Triton's own table of kernels
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    with (
        mock.patch.object(driver, "_active", gpu),
        mock.patch.object(knobs.runtime, "jit_cache_hook", before_compiling),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(arch, 10)),
        mock.patch.object(skinny, "capability", return_value=divmod(arch, 10)),  # meta tensors are on no device
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
    ):
        call()
    return builds


def _build(kernel: Any) -> Build:
    ptx = kernel.asm["ptx"]
    registers, spills = _resources(kernel.asm["cubin"])
    return Build(
        name=kernel.name,
        registers=registers,
        shared_bytes=kernel.metadata.shared,
        spills=spills,
        products=len(_TENSOR_CORE.findall(ptx)),
        tma=len(_TMA.findall(ptx)),
        uses_tf32="tf32" in ptx,
    )


@cache
def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and instructions that spill them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _run("cuobjdump", "-res-usage", file.name))
        assert usage, "cuobjdump -res-usage gives no registers"
        registers, stack_bytes = map(int, usage.groups())
        # a spilled register needs a place on the stack; to disassemble a kernel takes longer than to compile it
        spills = len(re.findall(r"\b(?:STL|LDL)\b", _run("nvdisasm", "-c", file.name))) if stack_bytes else 0
    return registers, spills


def _run(tool: str, *args: str) -> str:
    path = TOOLS / tool
    assert path.exists(), f"{path} is missing: a Triton wheel brings it, and without it no kernel can be checked."
    done = subprocess.run([path, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{tool} {' '.join(args)}: {done.stderr}"
    return done.stdout + done.stderr
