"""The fused GEMM, in both forms and every config, against float64: its output, and the update in it."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from petune.kernels.chooser import Config
from petune.kernels.dropout import Mask, philox_lanes
from petune.kernels.launch import INTERPRETED
from petune.kernels.lora_linear import gemm as module
from petune.kernels.lora_linear.gemm import configs, eligible, gemm
from tests.conftest import TOLERANCE, relative_error

SCALE = 0.7
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CAPABILITIES = [(8, 0), (8, 6), (9, 0), (10, 0)]
# the interpreter has the descriptors and the shared memory of every GPU, a GPU those of its own
HERE = CAPABILITIES if INTERPRETED else [torch.cuda.get_device_capability()]
# several tiles along every axis of shapes that the interpreter gets through in a tenth of a second
POINTER = Config(16, 32, num_warps=4, num_stages=2, block_inner=32, form="pointer")
TMA = POINTER._replace(form="tma")
WITH_TMA = pytest.mark.skipif(HERE[-1] < (9, 0), reason="TMA descriptors need compute capability 9.0")
FORMS = pytest.mark.parametrize("config", [POINTER, pytest.param(TMA, marks=WITH_TMA)], ids=lambda config: config.form)


def rounding(dtype: torch.dtype) -> float:
    """Of the output: the interpreter truncates to bf16, where a GPU rounds to the nearest."""
    return TOLERANCE[dtype] * (2 if dtype == torch.bfloat16 else 1)


def operands(tokens, inner, features, rank, device, dtype=torch.float32, b_dtype=None):
    """x, weight, s and b with a low-rank term of about a quarter of the base product."""

    def draw(*shape, to):
        return torch.randn(*shape, device=device).to(to)

    b = draw(features, rank, to=b_dtype or dtype) * (0.25 / SCALE * (inner / rank) ** 0.5)
    return draw(tokens, inner, to=dtype), draw(features, inner, to=dtype), draw(tokens, rank, to=dtype), b


def mask_with(device, dropped: float = 0.4) -> Mask:
    return Mask(torch.tensor([-6148914691236517206], device=device), round(dropped * 65536))


def keep(tokens: int, features: int, mask: Mask | None, device) -> Tensor:
    if mask is None:
        return torch.ones(tokens, features, dtype=torch.float64, device=device)
    return philox_lanes(tokens, features, mask.seed).ge(mask.threshold).double()


def exact(x, weight, s, b, *, scale=SCALE, bias=None, mask=None) -> tuple[Tensor, Tensor]:
    """The output and the low-rank term in it, in float64; the kernel sees b in the dtype of x."""
    term = keep(len(x), len(weight), mask, x.device) * (scale * s.double() @ b.to(x.dtype).double().T)
    return x.double() @ weight.double().T + term + (0.0 if bias is None else bias.double()), term


def check(out: Tensor, *tensors, **kwargs) -> None:
    reference, term = exact(*tensors, **kwargs)
    limit = rounding(tensors[0].dtype)
    assert out.dtype == tensors[0].dtype
    assert out.shape == reference.shape
    assert relative_error(out, reference) <= limit
    update = out.double() - (reference - term)
    # the output is rounded once: no more of the update may be lost than that rounding of the whole
    assert relative_error(update, term) <= limit * (reference.norm() / term.norm()).item()


# --- the formula ---------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b_dtype", [None, torch.float32], ids=["b as x", "fp32 b"])
def test_output_and_update_match_float64(config, dtype, b_dtype, device):
    tensors = operands(37, 72, 40, 24, device, dtype, b_dtype)
    assert eligible(config, *tensors[:2])
    bias = torch.randn(40, device=device).to(dtype)
    check(gemm(*tensors, scale=SCALE, bias=bias, config=config), *tensors, bias=bias)


@FORMS
@pytest.mark.parametrize("rank", [1, 5, 16, 24, 48, 100, 256])
def test_any_rank(config, rank, device):
    tensors = operands(17, 40, 36, rank, device)
    check(gemm(*tensors, scale=SCALE, config=config), *tensors)


@pytest.mark.parametrize(
    ("tokens", "inner", "features"),
    [(1, 1, 1), (1, 33, 7), (16, 32, 32), (15, 31, 33), (50, 70, 90), (150, 20, 65)],  # the last fills a group of rows
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_sizes_by_pointers(tokens, inner, features, dtype, device):
    tensors = operands(tokens, inner, features, 3, device, dtype)
    check(gemm(*tensors, scale=SCALE, config=POINTER), *tensors)


@WITH_TMA
@pytest.mark.parametrize(("tokens", "inner", "features"), [(1, 8, 8), (16, 32, 32), (15, 40, 72), (150, 24, 104)])
def test_any_aligned_sizes_by_descriptors(tokens, inner, features, device):
    tensors = operands(tokens, inner, features, 3, device, torch.float16)
    assert eligible(TMA._replace(block_tokens=64), *tensors[:2])
    check(gemm(*tensors, scale=SCALE, config=TMA), *tensors)


@FORMS
def test_no_tokens_give_no_rows(config, device):
    out = gemm(*operands(0, 16, 24, 4, device), config=config)
    assert out.shape == (0, 24)


@FORMS
def test_no_scale_no_bias_and_no_mask_are_the_defaults(config, device):
    tensors = operands(20, 32, 24, 8, device)
    check(gemm(*tensors, config=config), *tensors, scale=1.0)


@FORMS
@pytest.mark.parametrize("scale", [-3.0, 1e-3])
def test_the_scale_is_of_the_low_rank_term_only(config, scale, device):
    x, weight, s, b = operands(20, 32, 24, 8, device)
    check(gemm(x, weight, s, b, scale=scale, config=config), x, weight, s, b, scale=scale)
    assert torch.equal(gemm(x, weight, s, b, scale=0.0, config=config), gemm(x, weight, s, 0 * b, config=config))


@FORMS
def test_the_low_rank_term_is_not_rounded_before_the_sum(config, device):
    # 1 + 2⁻¹⁰ is no bf16 number: the base product takes the 1 away again, and what is left is exact
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    base = torch.eye(16, dtype=torch.bfloat16, device=device)
    s, b = ones[:, :2], torch.tensor([[1.0, 2**-10]], device=device).bfloat16().expand(16, 2)
    out = gemm(-ones, base, s, b, config=config)
    assert torch.equal(out, torch.full_like(out, 2**-10))


@FORMS
def test_non_finite_values_pass_through(config, device):
    x, weight, s, b = operands(20, 32, 24, 8, device)
    x[3, 5], s[7, 1] = float("inf"), float("nan")
    out = gemm(x, weight, s, b, config=config)
    assert not out[3].isfinite().any()
    assert out[7].isnan().all()
    assert out[[i for i in range(20) if i not in (3, 7)]].isfinite().all()


# --- the mask ------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dx_is_masked_where_x_was_dropped(config, dtype, device):
    mask = mask_with(device)
    dy, weight, ds, a = operands(37, 40, 72, 5, device, dtype)  # the operands of dx: dy W + m ⊙ (ds A)
    weight, a = weight.T.contiguous(), a.T.contiguous()
    out = gemm(dy, weight.T, ds, a.T, scale=SCALE, mask=mask, config=config)
    check(out, dy, weight.T, ds, a.T, mask=mask)


@FORMS
def test_only_the_low_rank_term_is_masked_and_to_zero(config, device):
    mask = mask_with(device)
    x, weight, s, b = operands(37, 40, 72, 5, device)
    kept = keep(37, 72, mask, device).bool()
    alone = gemm(x, 0 * weight, s, b, scale=SCALE, mask=mask, config=config)
    assert torch.equal(alone != 0, kept)
    base = gemm(x, weight, s, 0 * b, config=config)
    both = gemm(x, weight, s, b, mask=mask, config=config)
    assert torch.equal(both[~kept], base[~kept])


@FORMS
@pytest.mark.parametrize("threshold", [0, 1, 65535])
def test_the_ends_of_the_mask(config, threshold, device):
    mask = mask_with(device)._replace(threshold=threshold)
    tensors = operands(19, 32, 40, 4, device)
    term = gemm(tensors[0], 0 * tensors[1], *tensors[2:], mask=mask, config=config)
    assert torch.equal(term != 0, keep(19, 40, mask, device).bool())


@FORMS
def test_every_tiling_masks_the_same_elements(config, device):
    mask = mask_with(device)
    tensors = operands(50, 32, 136, 4, device)
    tilings = [config, config._replace(block_tokens=64, block_features=16), config._replace(block_features=128)]
    first, *rest = (gemm(*tensors, mask=mask, config=tiling) for tiling in tilings)
    assert all(relative_error(out, first) <= TOLERANCE[torch.float32] for out in rest)


# --- strides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "odd", "columns", "strided"])
@pytest.mark.parametrize("operand", ["x", "weight", "s", "b", "out"])
def test_any_strides_by_pointers(operand, layout, device, guarded):
    tensors = dict(zip(("x", "weight", "s", "b"), operands(21, 37, 41, 5, device), strict=True))
    out = None
    if operand == "out":
        out = guarded((21, 41), torch.float32, layout)
    else:
        tensors[operand] = guarded(tuple(tensors[operand].shape), torch.float32, layout, tensors[operand])
    result = gemm(*tensors.values(), scale=SCALE, mask=mask_with(device), out=out, config=POINTER)
    assert out is None or result is out
    check(result, *tensors.values(), mask=mask_with(device))


@WITH_TMA
@pytest.mark.parametrize("weight_layout", ["rows", "columns"])
@pytest.mark.parametrize("layout", ["rows", "odd", "columns", "strided"])
def test_descriptors_take_weight_in_both_orientations_and_any_s_b_and_bias(weight_layout, layout, device, guarded):
    x, weight, s, b = operands(21, 40, 44, 5, device)
    x, weight = guarded((21, 40), x.dtype, "rows", x), guarded((44, 40), x.dtype, weight_layout, weight)
    s, b = guarded((21, 5), x.dtype, layout, s), guarded((44, 5), x.dtype, layout, b)
    bias = guarded((44,), x.dtype, layout, torch.randn(44, device=device))
    out = guarded((21, 44), x.dtype, "rows")
    assert eligible(TMA, x, weight)
    check(gemm(x, weight, s, b, scale=SCALE, bias=bias, out=out, config=TMA), x, weight, s, b, bias=bias)


def test_expanded_operands_by_pointers(device):
    x, weight, s, b = operands(21, 40, 44, 5, device)
    tensors = x[:1].expand(21, 40), weight[:, :1].expand(44, 40), s, b[:1].expand(44, 5)
    assert not eligible(TMA, *tensors[:2])
    check(gemm(*tensors, scale=SCALE, config=POINTER), *tensors)


# --- the tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tables_are_short_and_tma_is_in_those_of_hopper_and_blackwell(capability, dtype):
    table = configs(dtype, 16, capability)
    assert 3 <= len(set(table)) == len(table) <= 6
    assert any(config.form == "tma" for config in table) == (capability[0] in (9, 10))
    assert {config.form for config in table} <= {"pointer", "tma"}


@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.float32, (9, 0)), (torch.float64, (9, 0)), (torch.float16, (7, 5))], ids=str
)
def test_what_has_no_fused_variant_has_an_empty_table(dtype, capability):
    assert configs(dtype, 16, capability) == ()


ALL = sorted({config for capability in HERE for config in configs(torch.float16, 16, capability)})


@pytest.mark.parametrize("config", ALL, ids=str)
def test_every_config_is_right_across_its_edges(config, device, guarded):
    tokens, features, inner = config.block_tokens + 3, config.block_features + 8, config.block_inner + 8
    tensors = operands(tokens, inner, features, 40, device, torch.float16, torch.float32)
    mask, bias = mask_with(device), torch.randn(features, device=device).half()
    out = guarded((tokens, features), torch.float16)
    check(gemm(*tensors, scale=SCALE, bias=bias, mask=mask, out=out, config=config), *tensors, bias=bias, mask=mask)


def test_few_rows_are_a_variant_for_few_tokens_only(device):
    few = POINTER
    assert eligible(few, *operands(64, 8, 8, 1, device)[:2])
    assert not eligible(few, *operands(65, 8, 8, 1, device)[:2])
    assert eligible(few._replace(block_tokens=64), *operands(65, 8, 8, 1, device)[:2])


@pytest.mark.parametrize(
    ("what", "x", "weight"),
    [
        ("a row of x is 2 bytes short of 16", (4, 15), (8, 15)),
        ("a row of the output is 2 bytes short of 16", (4, 16), (7, 16)),
        ("no tokens", (0, 16), (8, 16)),
    ],
)
def test_descriptors_refuse_what_tma_cannot_address(what, x, weight, device):
    assert not eligible(TMA, torch.zeros(x, device=device).half(), torch.zeros(weight, device=device).half()), what


@WITH_TMA
@pytest.mark.parametrize("layout", ["odd", "columns", "strided"])
def test_descriptors_refuse_an_x_without_aligned_rows(layout, device, guarded):
    values = torch.zeros(8, 16, dtype=torch.float16, device=device)
    assert eligible(TMA, values, values)
    assert not eligible(TMA, guarded((8, 16), torch.float16, layout, values), values)


def test_descriptors_refuse_a_base_off_by_one_element(device):
    values = torch.zeros(8, 16, dtype=torch.float16, device=device)
    shifted = torch.zeros(8 * 16 + 1, dtype=torch.float16, device=device)[1:].view(8, 16)
    assert not eligible(TMA, shifted, values)
    assert not eligible(TMA, values, shifted)


@pytest.mark.parametrize("layout", ["odd", "strided"])
def test_descriptors_refuse_a_weight_without_aligned_rows(layout, device, guarded):
    values = torch.zeros(8, 16, dtype=torch.float16, device=device)
    assert not eligible(TMA, values, guarded((8, 16), torch.float16, layout, values))


def test_descriptors_need_compute_capability_9(device, monkeypatch):
    values = torch.zeros(8, 16, dtype=torch.float16, device=device)
    monkeypatch.setattr(module, "INTERPRETED", False)
    for capability in [(8, 9), (9, 0)]:
        module._has_tma.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, at=capability: at)
        assert eligible(TMA, values, values) == (capability >= (9, 0))
        assert eligible(POINTER, values, values)
    module._has_tma.cache_clear()


# --- any of it at once ---------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_case_matches_float64(data, device):
    def pick(values):
        return data.draw(values)

    tma = HERE[-1] >= (9, 0) and pick(st.booleans())
    tokens, rank = pick(st.integers(1, 40)), pick(st.integers(1, 40))
    inner, features = (pick(st.integers(1, 9)) * 8 if tma else pick(st.integers(1, 70)) for _ in range(2))
    dtype, b_dtype = pick(st.sampled_from(DTYPES)), pick(st.sampled_from([None, torch.float32]))
    x, weight, s, b = operands(tokens, inner, features, rank, device, dtype, b_dtype)
    if pick(st.booleans()):
        weight = weight.T.contiguous().T
    if pick(st.booleans()):
        b = b.T.contiguous().T
    bias = torch.randn(features, device=device).to(dtype) if pick(st.booleans()) else None
    mask = mask_with(device, pick(st.floats(0.0, 0.9))) if pick(st.booleans()) else None
    config = (TMA if tma else POINTER)._replace(block_features=pick(st.sampled_from([16, 32, 64])))
    out = gemm(x, weight, s, b, scale=SCALE, bias=bias, mask=mask, config=config)
    reference, term = exact(x, weight, s, b, bias=bias, mask=mask)
    # one product of few terms may cancel: errors are of the size of what was added up
    size = (x.double().abs() @ weight.double().abs().T).norm() + term.norm() + 1e-30
    assert (out.double() - reference).norm() <= 2 * rounding(dtype) * size
