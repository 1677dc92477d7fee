"""Every variant of every kernel compiles for the GPUs it is meant for, and into what was meant.

The interpreter knows no registers, no shared memory and no TF32; the compiler does, on any machine.
"""

import importlib
import os
import pkgutil
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

import petune.kernels
from petune.kernels.chooser import Config
from petune.kernels.dropout import Mask
from petune.kernels.expert_linear import kernel as experts
from petune.kernels.gated_lora import gate
from petune.kernels.lora_linear import gemm, skinny
from petune.kernels.packed_lora import kernel as packed
from petune.kernels.residual_low_rank import kernel as residual
from tests.kernels import aot, grouped_aot
from tests.kernels.aot import Build


def _asked(names: str) -> set[int]:
    return set(SHARED_BYTES) if names == "all" else {int(name) for name in names.split(",")}


SHARED_BYTES = {80: 166912, 86: 101376, 90: 232448, 100: 232448}  # what one block may have: A100, RTX 3090, H100, B200
# the one with the least shared memory; `make aot-oldest` compiles for sm_90, and `make aot` for all of them
ARCHES = [arch for arch in SHARED_BYTES if arch in _asked(os.environ.get("PETUNE_AOT", "86"))]
WITHOUT_PRODUCTS = {"_sum_kernel", "_expert_sum_kernel", "_gate_forward_kernel", "_gate_backward_kernel"}
TOKENS, IN, OUT = 8192, 4096, 1024
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALE = 2.0

Launches = dict[str, Callable[[], object]]


@pytest.fixture
def builds_of(tmp_path, monkeypatch, cache):
    """`builds_of(call, arch)`; what the compiler found is kept between runs, what it wrote is not: it is 100 MB."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return partial(aot.builds_of, known=cache)


def of(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


MASK = Mask(of(1, dtype=torch.int64), 3277)


# --- what is launched ----------------------------------------------------------------------------------------------
# The adapters are fp32 where there is a mask, as PEFT keeps them, and of the dtype of x elsewhere. A few tokens make
# the kernels write partial sums, and odd sizes leave nothing aligned.


def of_shrink(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    x, few, odd = of(TOKENS, IN, dtype=dtype), of(16, IN, dtype=dtype), of(777, 333, dtype=dtype)
    return {
        "masked": lambda: skinny.shrink(x, of(rank, IN, dtype=FP32), mask=MASK, config=config),
        "split": lambda: skinny.shrink(few, of(rank, IN, dtype=dtype), config=config),
        "odd": lambda: skinny.shrink(odd, of(rank - 1, 333, dtype=dtype), mask=MASK, config=config),
    }


def of_dual(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    dy, s, odd = of(TOKENS, OUT, dtype=dtype), of(TOKENS, rank, dtype=dtype), of(777, 333, dtype=dtype)
    odd_s, odd_b = of(777, rank - 1, dtype=dtype), of(333, rank - 1, dtype=dtype)
    return {
        "fp32 b": lambda: skinny.dual(dy, s, of(OUT, rank, dtype=FP32), scale=SCALE, config=config),
        "odd": lambda: skinny.dual(odd, odd_s, odd_b, scale=SCALE, config=config),
    }


def of_outer(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    x, ds, odd = of(TOKENS, IN, dtype=dtype), of(TOKENS, rank, dtype=dtype), of(777, 333, dtype=dtype)
    return {
        "masked": lambda: skinny.outer(x, ds, dtype=FP32, mask=MASK, config=config),
        "plain": lambda: skinny.outer(x, ds, dtype=dtype, config=config),
        "odd": lambda: skinny.outer(odd, of(777, rank - 1, dtype=dtype), dtype=FP32, mask=MASK, config=config),
    }


def of_expand(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    s, b, bias = of(TOKENS, rank, dtype=dtype), of(OUT, rank, dtype=dtype), of(OUT, dtype=dtype)
    y, odd, odd_b = of(TOKENS, OUT, dtype=dtype), of(777, rank - 1, dtype=dtype), of(333, rank - 1, dtype=FP32)
    return {
        "masked": lambda: skinny.expand(s, b.to(FP32), mask=MASK, config=config),
        "bias": lambda: skinny.expand(s, b, scale=SCALE, bias=bias, config=config),
        "accumulate": lambda: skinny.expand(s, b, out=y, accumulate=True, config=config),
        "odd": lambda: skinny.expand(odd, odd_b, mask=MASK, config=config),
    }


def of_gemm(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    assert config
    x, dy, weight = of(TOKENS, IN, dtype=dtype), of(TOKENS, OUT, dtype=dtype), of(OUT, IN, dtype=dtype)
    s, bias = of(TOKENS, rank, dtype=dtype), of(OUT, dtype=dtype)
    a, b = of(rank, IN, dtype=FP32), of(OUT, rank, dtype=dtype)
    odd = of(777, 333, dtype=dtype), of(555, 333, dtype=dtype), of(777, rank - 1, dtype=dtype)
    launches: Launches = {
        "forward": lambda: gemm.gemm(x, weight, s, b, scale=SCALE, bias=bias, config=config),
        "masked dx": lambda: gemm.gemm(dy, weight.T, s, a.T, mask=MASK, config=config),
    }
    if config.form != "tma":  # descriptors take aligned rows alone
        launches["odd"] = lambda: gemm.gemm(*odd, of(555, rank - 1, dtype=FP32), mask=MASK, config=config)
    return launches


def of_gate(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    up, rows = of(64, 512, dtype=dtype), of(64, 1024, dtype=dtype)[:, :512]
    launches: Launches = {}
    for activation in ("silu", "gelu", "gelu_tanh"):
        launches[activation] = lambda name=activation: gate.gate_forward(up, up, name, dtype)
        launches[f"{activation} backward"] = lambda name=activation: gate.gate_backward(
            up, rows, up, name, with_h=True
        )
    return launches


def of_packed_shrink(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    x, few, odd = of(TOKENS, IN, dtype=dtype), of(16, IN, dtype=dtype), of(777, 333, dtype=dtype)
    return {
        "1 bit": lambda: packed.shrink(x, codes(rank, IN, 1), levels(1, 1), rank, 1, config=config),
        "8 bits": lambda: packed.shrink(few, codes(rank, IN, 8), levels(rank, 8), rank, 8, config=config),
        "odd": lambda: packed.shrink(odd, codes(rank - 1, 333, 2), levels(1, 2), rank - 1, 2, config=config),
    }


def of_packed_expand(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    s, odd = of(1, TOKENS, rank, dtype=dtype), of(1, 777, rank - 1, dtype=dtype)
    # partial sums reach the config for few tokens alone
    parts = of(4, 16, rank, dtype=FP32) if config == packed.configs("expand", dtype)[0] else s
    fixed = {"scale": SCALE, "dtype": dtype, "config": config}
    bias, shape = of(OUT, dtype=dtype), (OUT, rank)
    return {
        "1 bit": lambda: packed.expand(s, codes(*shape, 1), levels(OUT, 1), OUT, 1, bias=bias, **fixed),
        "8 bits": lambda: packed.expand(parts, codes(*shape, 8), levels(1, 8), OUT, 8, bias=None, **fixed),
        "odd": lambda: packed.expand(odd, codes(333, rank - 1, 2), levels(1, 2), 333, 2, bias=None, **fixed),
    }


def of_expert_product(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    def layers(size: int, width: int) -> tuple[Callable[[], object], Callable[[], object]]:
        x, h, weight = (of(*shape, dtype=dtype) for shape in ((TOKENS, width), (4 * TOKENS, size), (64, size, width)))
        tokens, offsets = of(4 * TOKENS, dtype=torch.int64), of(65, dtype=torch.int64)
        bias, fixed = of(64, size, dtype=dtype), {"pairs": 4 * TOKENS, "config": config}
        return (
            lambda: experts.product(x, weight, offsets, tokens=tokens, bias=bias, **fixed),
            lambda: experts.product(h, weight.mT, offsets, **fixed),
        )

    # 3072 / 64 and 11008 / 64 neurons an expert
    (in_48, out_48), (in_172, out_172), (odd, _) = layers(48, 768), layers(172, 4096), layers(37, 333)
    return {"in 48": in_48, "out 48": out_48, "in 172": in_172, "out 172": out_172, "odd": odd}


def of_expert_sum(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    q, places, bias = of(16 * TOKENS, IN, dtype=dtype), of(TOKENS, 16, dtype=torch.int64), of(IN, dtype=dtype)
    odd_q, odd_places = of(777 * 3, 333, dtype=dtype), of(777, 3, dtype=torch.int64)
    return {
        "bias": lambda: experts.add_up(q, places, bias),
        "odd": lambda: experts.add_up(odd_q, odd_places, None),
    }


def of_residual_expand(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    u, s, up, gate = (of(*shape, dtype=dtype) for shape in ((TOKENS, IN), (TOKENS, rank), (IN, rank), (IN,)))
    odd, odd_s, odd_up = of(777, 333, dtype=dtype), of(777, rank - 1, dtype=dtype), of(333, rank - 1, dtype=dtype)
    return {
        "plain": lambda: residual.expand(u, s, up, gate, config=config),
        "fp32 factors": lambda: residual.expand(u, s, up.to(FP32), gate.to(FP32), config=config),
        "fp32 stream": lambda: residual.expand(u.to(FP32), s, up.to(FP32), gate.to(FP32), config=config),
        "odd": lambda: residual.expand(odd, odd_s, odd_up, of(333, dtype=dtype), config=config),
    }


def of_residual_backward(dtype: torch.dtype, rank: int, config: Config | None) -> Launches:
    assert config
    two_sums = config.form != residual.APART
    every, frozen_u = (True, two_sums, True, True), (False, two_sums, True, True)

    def launch(needs: tuple[bool, ...], stream: torch.dtype, factors: torch.dtype, tokens=TOKENS, features=IN, r=rank):
        dz, s, gate = of(tokens, features, dtype=stream), of(tokens, r, dtype=dtype), of(features, dtype=factors)
        down = of(r, features, dtype=factors)
        return lambda: residual.gradients(dz, dz, s, s, down, gate, needs=needs, config=config)

    return {
        "plain": launch(every, dtype, dtype),
        "fp32 factors": launch(every, dtype, FP32),
        "fp32 stream": launch(every, FP32, FP32),
        "frozen u": launch(frozen_u, dtype, FP32),
        "frozen map": launch((True, False, False, False), dtype, FP32),
        "few tokens": launch(every, dtype, FP32, tokens=16),
        "odd": launch(every, dtype, dtype, 777, 333, rank - 1),
    }


def codes(rows: int, columns: int, bits: int) -> Tensor:
    return of(-(-rows * columns * bits // 8), dtype=torch.uint8)


def levels(rows: int, bits: int) -> Tensor:
    return of(rows, 2**bits, dtype=FP32)


LAUNCHES = {
    "shrink": of_shrink, "dual": of_dual, "outer": of_outer, "expand": of_expand, "gemm": of_gemm, "gate": of_gate,
    "packed_shrink": of_packed_shrink, "packed_expand": of_packed_expand, "expert_product": of_expert_product,
    "expert_sum": of_expert_sum, "residual_expand": of_residual_expand, "residual_backward": of_residual_backward,
    **grouped_aot.LAUNCHES,
}  # fmt: skip


def configs(op: str, dtype: torch.dtype, rank: int, arch: int) -> tuple[Config | None, ...]:
    if op in ("gate", "expert_sum"):
        return (None,)
    if op == "expert_product":
        return experts.configs(dtype)
    if op.startswith("grouped_"):
        return grouped_aot.configs(op, dtype, rank)
    if op.startswith("packed_"):
        return packed.configs(op.removeprefix("packed_"), dtype)
    if op.startswith("residual_"):
        return (residual.configs(op.removeprefix("residual_"), dtype, rank, divmod(arch, 10)),)
    if op == "gemm":
        return gemm.configs(dtype, rank, divmod(arch, 10))
    return skinny.configs(op, dtype, rank, divmod(arch, 10))


# --- what is asked of it -------------------------------------------------------------------------------------------


def faults(build: Build, dtype: torch.dtype, arch: int, form: str = "") -> list[str]:
    found = []
    if build.shared_bytes > SHARED_BYTES[arch]:
        found.append(f"asks for {build.shared_bytes} of {SHARED_BYTES[arch]} bytes of shared memory")
    if build.spills:
        found.append(f"spills registers with {build.spills} instructions")
    if dtype.itemsize == 2 and not build.products and build.name not in WITHOUT_PRODUCTS:
        found.append("multiplies without tensor cores")
    if dtype == FP32 and build.uses_tf32:
        found.append("rounds fp32 to TF32")
    if form == "tma" and not build.tma:
        found.append("has no TMA instruction")
    return [f"{build.name} {fault}" for fault in found]


def faults_of(op: str, dtype: torch.dtype, rank: int, arch: int, config: Config | None, builds_of) -> list[str]:
    """Those of every variant of a config but the odd one, each with its variant and config."""
    launches = {name: launch for name, launch in LAUNCHES[op](dtype, rank, config).items() if name != "odd"}
    builds = [(name, build) for name, launch in launches.items() for build in builds_of(launch, arch)]
    form = config.form if config else ""
    return [f"{name} {config}: {fault}" for name, build in builds for fault in faults(build, dtype, arch, form)]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES, ids="sm_{}".format)
@pytest.mark.parametrize("rank", [16, 64, 256], ids="rank {}".format)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("op", LAUNCHES)
def test_every_config_compiles_without_fault(op, dtype, rank, arch, builds_of):
    found = []
    for config in configs(op, dtype, rank, arch):
        found += faults_of(op, dtype, rank, arch, config, builds_of)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("op", LAUNCHES)
def test_fp16_compiles_without_fault(op, builds_of):
    assert faults_of(op, FP16, 16, 90, configs(op, FP16, 16, 90)[0], builds_of) == []


@pytest.mark.parametrize("op", [op for op in LAUNCHES if op != "gate"])
def test_odd_sizes_compile_and_fit(op, builds_of):
    config = next(config for config in configs(op, BF16, 64, 90) if config is None or config.form != "tma")
    # loads of one element each take more registers than there are; such sizes are right, and slow with any kernel
    found = [fault for b in builds_of(LAUNCHES[op](BF16, 64, config)["odd"], 90) for fault in faults(b, BF16, 90)]
    assert [fault for fault in found if "spills" not in fault] == []


@pytest.mark.skipif(90 not in ARCHES, reason="some kernels are for sm_90 and later alone")
def test_no_kernel_is_forgotten(builds_of):
    builds = []
    for op, launches in LAUNCHES.items():
        for config in configs(op, BF16, 16, 90):
            for launch in launches(BF16, 16, config).values():
                builds += builds_of(launch, 90)
    found = pkgutil.walk_packages(petune.kernels.__path__, "petune.kernels.")
    modules = [vars(importlib.import_module(module.name)) for module in found]
    kernels = {name for module in modules for name, value in module.items() if isinstance(value, JITFunction)}
    assert {build.name for build in builds} == {name for name in kernels if name.endswith("_kernel")}


# --- and that the checks can fail ----------------------------------------------------------------------------------


def test_a_tile_with_too_few_warps_is_seen_to_spill(builds_of):
    config = Config(128, 256, num_warps=4, num_stages=3, block_inner=64, form="pointer")
    [build] = builds_of(of_gemm(BF16, 16, config)["forward"], 90)
    assert [fault for fault in faults(build, BF16, 90) if "spills" in fault]


def test_a_tile_that_does_not_fit_is_seen(builds_of):
    config = Config(128, 128, num_warps=8, num_stages=4, block_inner=128, form="pointer")
    [build] = builds_of(of_gemm(BF16, 16, config)["forward"], 90)
    assert [fault for fault in faults(build, BF16, 90) if "shared memory" in fault]


def test_tf32_is_seen_where_torch_allows_it(builds_of):
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        launch = of_shrink(FP32, 16, configs("shrink", FP32, 16, 90)[0])["masked"]
        [build] = builds_of(launch, 90)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert faults(build, FP32, 90) == ["_shrink_kernel rounds fp32 to TF32"]


def test_products_without_tensor_cores_and_missing_tma_are_seen(builds_of):
    launch = of_shrink(FP32, 16, configs("shrink", FP32, 16, 90)[0])["masked"]
    [build] = builds_of(launch, 90)
    assert faults(build, BF16, 90, "tma") == [
        "_shrink_kernel multiplies without tensor cores",
        "_shrink_kernel has no TMA instruction",
    ]


def test_a_known_build_is_not_compiled_again(builds_of, monkeypatch):
    launch = of_gate(FP32, 16, None)["silu"]
    builds = builds_of(launch, 90)
    gate._gate_forward_kernel.device_caches.clear()  # what a new process has
    monkeypatch.setattr(aot, "_build", None)
    assert builds_of(launch, 90) == builds


def test_a_missing_disassembler_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(aot, "TOOLS", tmp_path)
    with pytest.raises(AssertionError, match=r"nvdisasm is missing: a Triton wheel brings it"):
        aot._run("nvdisasm")
