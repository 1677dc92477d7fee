"""The GPU benchmarks run, refuse what is wrong, and keep what they have; the README shows what was committed."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from benchmarks import lora_linear, lora_step
from benchmarks.gpu import gate, harness, measure, peers, problem, steps, unsloth
from petune.kernels import lora_linear as linear_package

fused = linear_package.lora_linear

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

FAST_LORA = """
from unsloth_zoo.utils import Version
from .utils import matmul
from . import rms_layernorm
assert Version("2.11.0+cpu") > Version("2.9")


def apply_lora_o(self, X):
    return matmul(X, self.o_proj)


def apply_lora_qkv(self, X, inplace=True):
    return tuple(matmul(X, proj) for proj in (self.q_proj, self.k_proj, self.v_proj))


def apply_lora_mlp_swiglu(self, X, inplace=True):
    raise RuntimeError("0 active drivers")
"""
UTILS = """
from ..device_type import DEVICE_TYPE
from .fp8 import fp8_linear
assert DEVICE_TYPE == "cuda"


def matmul(X, proj):
    X_dropped = proj.lora_dropout["default"](X)
    update = X_dropped @ proj.lora_A["default"].weight.t() @ proj.lora_B["default"].weight.t()
    return X @ proj.base_layer.weight.t() + proj.scaling["default"] * update


fast_linear_forward = lambda proj, X: matmul(X, proj)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A folder laid out like Unsloth's wheel, with functions that run on a CPU."""
    folder = tmp_path_factory.mktemp("unpacked")
    kernels = folder / "unsloth" / "kernels"
    kernels.mkdir(parents=True)
    (folder / "unsloth-1.2.3.dist-info").mkdir()
    for name in unsloth.FILES:
        (kernels / f"{name}.py").write_text({"fast_lora": FAST_LORA, "utils": UTILS}.get(name, ""))
    return folder


@pytest.fixture(autouse=True)
def forget_unsloth():
    yield
    for name in [name for name in sys.modules if name.startswith(unsloth.NAME)]:
        del sys.modules[name]


def small(**changes: Any) -> problem.Problem:
    row = problem.Row("q/o", batch=2, length=40, in_features=64, out_features=(48,), rank=4)._replace(**changes)
    return problem.make(row, CPU, torch.bfloat16, seed=0)


# the scripts


def test_linear_smoke_checks_and_times_every_side(tmp_path, wheel, capsys):
    out = tmp_path / "linear.json"
    assert lora_linear.main(["--smoke", "--budget-s", "3600", "--out", str(out), "--unsloth", str(wheel)]) == 0
    content = json.loads(out.read_text())
    assert content["smoke"]
    assert content["complete"]
    assert content["reach"] == []  # a smoke run reaches and misses nothing
    assert content["unsloth"] == "1.2.3"
    assert [row["name"] for row in content["rows"]] == [row.name for row in lora_linear.smoke_rows()]
    for row in content["rows"]:
        expected = {"floor", "E1", "E2", "E2-nocast", "E3", "ours", "ours-fp32", "unsloth"}
        if row["mlp"] or len(row["out_features"]) == 3:
            expected |= {"ours-grouped", "ours-grouped-fp32", "unsloth-inplace"}
        expected |= {f"compile({setting})" for setting in row["compiled"]}
        assert row["sides"].keys() == expected
        for name, side in row["sides"].items():
            if name.startswith("unsloth") and (row["mlp"] or row["bias"]):
                assert "missing" in side or "0 active drivers" in side["failed"]
                continue
            assert side["gate"]["passed"], (row["label"], name)
            assert ("both" in side["eager"]) == row["backward"]
    printed = capsys.readouterr().out
    assert "no figure of it is a measurement" in printed
    assert f"written: {out}" in printed


@pytest.mark.slow
def test_step_smoke_trains_every_side_to_the_same_loss(tmp_path, wheel):
    out = tmp_path / "step.json"
    assert lora_step.main(["--smoke", "--budget-s", "3600", "--out", str(out), "--unsloth", str(wheel)]) == 0
    content = json.loads(out.read_text())
    assert [row["name"] for row in content["rows"]] == ["Llama-1B", "Llama-1B, checkpointing", "ViT-B/16"]
    for row in content["rows"]:
        sides = row["sides"]
        assert {"E1", "E2", "E3", "compile(E3)", "ours", "ours-fp32", "ours-grouped", "ours-grouped-fp32"} < set(sides)
        assert ("missing" in sides["unsloth"]) == (row["model"] == "ViT-B/16")
        for name, side in sides.items():
            if "missing" not in side:
                assert side["gate"]["passed"], (row["name"], name)
                assert side["step"]["median_us"] > 0
                assert side.get("loss_agrees", True), (row["name"], name)
        assert sides["floor"]["loss"] != sides["E1"]["loss"]  # the adapters do something
        assert sides["ours-grouped"]["note"].startswith("fused: ")


def test_a_model_whose_gradients_are_wrong_is_not_timed(tmp_path):
    model = steps.llama(smoke=True)
    builder = steps.Builder(model, CPU, torch.bfloat16, seed=0)
    sides = [builder.lora("E3", fp32_adapters=False), *(builder.ours(fp32_adapters=False) for _ in range(2))]
    sides[1].name = "ours, its scale lost"
    for module in sides[1].model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] = 1.0
    options = SimpleNamespace(smoke=True, seed=0, unsloth=None)
    bench = lora_step.Bench(CPU, options, harness.Results(tmp_path / "r.json", {}), harness.Budget(60.0))
    found: dict[str, dict[str, Any]] = {}
    right = bench._checked(sides, builder, model.batch(CPU, True), model.batch(CPU, False), found)
    assert [side.name for side in right] == ["E3", "ours"]
    assert found["ours, its scale lost"]["gate"]["reason"].startswith("gradient ")


def test_a_budget_of_nothing_leaves_rows_out_by_name(tmp_path):
    results = harness.Results(tmp_path / "r.json", {})
    bench = SimpleNamespace(row=lambda row, budget: {"label": row.label, "sides": {}})
    rows = [small().row._replace(name=name) for name in ("first", "second")]
    lora_linear.run(bench, rows, results, harness.Budget(-1.0))  # type: ignore[arg-type]
    assert not results.rows
    assert [left["what"] for left in results.content["left_out"]] == [row.label for row in rows]


@pytest.mark.parametrize("script", [lora_linear, lora_step])
def test_without_a_gpu_one_sentence_and_code_2(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        script.main([])
    assert stop.value.code == 2
    assert capsys.readouterr().out.count("\n") == 1


def test_a_smoke_run_may_not_write_to_the_results():
    with pytest.raises(SystemExit, match="a smoke run measures nothing, so it may not write"):
        lora_linear.main(["--smoke", "--out", str(harness.RESULTS / "gpu" / "lora_linear.json")])


def test_what_was_measured_survives_a_kill(tmp_path):
    results = harness.Results(tmp_path / "gpu" / "r.json", {"question": "?"})
    results.add({"label": "first"})
    content = json.loads(results.path.read_text())
    assert (content["rows"], content["complete"]) == ([{"label": "first"}], False)
    results.finish()
    assert json.loads(results.path.read_text())["complete"]
    assert list(results.path.parent.iterdir()) == [results.path]  # no part file stays


def test_a_side_that_raises_is_a_result_and_ours_a_failure(tmp_path, monkeypatch, capsys):
    def broken(*_: Any) -> peers.Side:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(peers, "ours", broken)
    out = tmp_path / "linear.json"
    assert lora_linear.main(["--smoke", "--only", "decode", "--out", str(out)]) == 1
    sides = json.loads(out.read_text())["rows"][0]["sides"]
    assert sides["ours"] == {"failed": "RuntimeError: no such kernel"}
    assert sides["E3"]["gate"]["passed"]
    assert "WRONG q/o decode" in capsys.readouterr().out


@pytest.mark.slow
def test_every_variant_of_the_kernels_passes_the_gate_under_the_interpreter(tmp_path):
    out = tmp_path / "linear.json"
    words = ["--smoke", "--dtype", "float16", "--only", "q/o 144", "--out", str(out)]  # it cannot round to bf16
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PETUNE_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "benchmarks/lora_linear.py", *words], cwd=ROOT, env=environment, check=True)
    sides = json.loads(out.read_text())["rows"][0]["sides"]
    variants = {name: side for name, side in sides.items() if name.startswith("ours[")}
    assert {"ours[addmm]", "ours[base_first]"} < variants.keys()
    assert any("pointer" in name for name in variants)
    assert all(side["gate"]["passed"] for side in variants.values())


# the gate


def layer_of(case: problem.Problem) -> Any:
    return peers.adapted(case, case.bases[0], peers.FusedLoraConfig, False)[1][0]


def broken_side(case: problem.Problem, forward: Any) -> peers.Side:
    layer = layer_of(case)
    return peers.Side("ours", [lambda x: forward(layer, x)], peers.factors([layer]))


def call(
    layer: Any, x: Tensor, *, scale: float = problem.SCALE, dropout: float = 0.0, b: Tensor | None = None
) -> Tensor:
    a, own_b = peers.factors([layer])
    return fused(x, layer.base_layer.weight, None, a, own_b if b is None else b, scale, dropout)


class _UnmaskedGradient(torch.autograd.Function):
    """Drops x in forward and forgets the mask in dX."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, 0.25)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:  # pyright: ignore
        return dx / 0.75


def unmasked(layer: Any, x: Tensor) -> Tensor:
    a, b = peers.factors([layer])
    return x @ layer.base_layer.weight.T + problem.SCALE * (_UnmaskedGradient.apply(x) @ a.T) @ b.T  # type: ignore


def half_unwritten(layer: Any, x: Tensor) -> Tensor:
    y = call(layer, x).clone()
    y[..., -1] = torch.nan
    return y


BROKEN = {
    "the scale is dropped": (lambda layer, x: call(layer, x, scale=1.0), 0.0, "update"),
    "there is no update": (lambda layer, x: call(layer, x, scale=0.0), 0.0, "update"),
    "an element is not written": (half_unwritten, 0.0, "y"),
    "B has no gradient": (lambda layer, x: call(layer, x, b=layer.lora_B["default"].weight.detach()) + 0.0 *
                          layer.lora_B["default"].weight.sum(), 0.0, "db"),
    "nothing is dropped": (lambda layer, x: call(layer, x), 0.25, "keeps 1.0000 of x"),
    "twice as much is dropped": (lambda layer, x: call(layer, x, dropout=0.5), 0.25, "keeps 0.4"),
    "the mask of dX is forgotten": (unmasked, 0.25, "keeps 1.0000 of x"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_the_gate_rejects(fault):
    forward, dropout, reason = BROKEN[fault]
    case = small(dropout=dropout)
    verdict = gate.check(broken_side(case, forward), case, None)
    assert not verdict.passed
    assert reason in verdict.reason


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("out_features", [(48,), (48, 16)])
def test_the_gate_lets_the_operator_pass(dropout, out_features):
    case = small(dropout=dropout, out_features=out_features)
    with ExitStack() as stack:
        best = gate.check(peers.peft(case, "E3", stack), case, None)
        verdict = gate.check(peers.ours(case, fp32_adapters=False), case, best)
    assert best.passed
    assert verdict.passed, verdict.reason
    assert verdict.repeatable
    assert verdict.limits["update"] <= gate.TO_BEST * best.errors["update"]
    assert verdict.keep_ratio == (pytest.approx(0.75, abs=0.03) if dropout else None)


def test_the_update_shows_what_y_hides():
    case = small()
    case.adapters[0][1].mul_(0.01)  # an update of 1/400 of y, and half of it lost
    verdict = gate.check(broken_side(case, lambda layer, x: call(layer, x, scale=1.0)), case, None)
    assert verdict.errors["y"] < gate.LIMIT[torch.bfloat16]
    assert verdict.errors["update"] > 0.4


def test_ours_may_not_err_more_than_peft():
    case = small()
    side = peers.ours(case, fp32_adapters=False)
    strict = gate.Verdict(True, "", dict.fromkeys(("y", "update", "dx", "da", "db"), 1e-6), {})
    verdict = gate.check(side, case, strict)
    assert not verdict.passed
    assert verdict.limits["update"] == pytest.approx(1.1e-6)


def test_e2_without_the_input_cast_keeps_the_setting_as_long_as_it_runs():
    case = small()
    layers: list[Any] = []
    with ExitStack() as stack:
        side = peers.peft(case, "E2-nocast", stack)
        layers = [m for m in side.forwards[0].args[0].modules() if hasattr(m, "cast_input_dtype_enabled")]  # type: ignore
        assert layers
        assert not any(layer.cast_input_dtype_enabled for layer in layers)
    assert all(layer.cast_input_dtype_enabled for layer in layers)


def test_all_sides_hold_one_weight():
    case = small()
    base = problem.named_linears(case.bases[0])["p0"].weight
    assert layer_of(case).base_layer.weight is base


def test_decoding_rotates_weights_until_they_overflow_the_cache(monkeypatch):
    monkeypatch.setattr(problem, "MIN_SETS", 2)
    case = small(backward=False, batch=3, length=1)
    assert len(case.bases) == len(case.sets) == 2
    first, second = (problem.named_linears(base)["p0"].weight for base in case.bases)
    assert not torch.equal(first, second)
    assert not case.sets[0].dys


def test_a_forced_variant_is_taken_where_it_is_eligible(monkeypatch):
    case = small()
    kernel = SimpleNamespace(choose=lambda key, candidates, default, device: default, known=None)
    monkeypatch.setattr(linear_package, "kernel", kernel, raising=False)
    candidates = {"addmm": print, "pointer": print}
    chosen: list[str] = []

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        for site, names in (("project", candidates), ("project_back", {"addmm": print}), ("shrink", candidates)):
            chosen.append(kernel.choose((site, 1), names, "addmm", CPU))
        return case.bases[0](x)

    plain = peers.Side("ours", [forward])
    assert peers.variant_names(plain, case) == ["addmm", "pointer"]
    chosen.clear()
    side = peers.forced(plain, "pointer")
    assert (side.name, side.ours) == ("ours[pointer]", True)
    with side.within():
        side.run(case, 0)
    assert chosen == ["pointer", "addmm", "addmm"]
    chosen.clear()
    plain.run(case, 0)
    assert chosen == ["addmm"] * 3  # and only while it runs


class _Overwrites(torch.autograd.Function):
    """Writes dX over x, as Unsloth's functions do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # pyright: ignore
        return torch.mul(dy, 2, out=ctx.saved_tensors[0])


def test_a_side_that_writes_over_x_starts_from_x_each_time():
    case = small(out_features=(64,))
    before = [inputs.x.detach().clone() for inputs in case.sets]
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return _Overwrites.apply(x)  # type: ignore[return-value]

    side = peers.Side("unsloth-inplace", [forward], overwrites_x=True)
    measure.eager([side], case, harness.Plan(1, 3, 2), CPU)
    assert len(seen) == 8
    assert all(torch.equal(x, before[step % 4 % 2]) for step, x in enumerate(seen))
    assert all(torch.equal(inputs.x, x) for inputs, x in zip(case.sets, before, strict=True))


# Unsloth's functions


def test_unsloth_is_loaded_without_its_package(wheel):
    functions = unsloth.load(wheel)
    assert functions.apply_lora_o
    assert unsloth.load(wheel) is functions
    assert "unsloth" not in sys.modules
    assert "unsloth_zoo" not in sys.modules
    assert unsloth.release(wheel) == "1.2.3"
    assert unsloth.release(Path("unsloth-2026.10.9-py3-none-any.whl")) == "2026.10.9"


def test_an_unknown_unsloth_says_what_is_missing(wheel, tmp_path):
    with pytest.raises(unsloth.UnslothError, match=r"does not exist; pass a wheel or a folder"):
        unsloth.load(tmp_path / "nothing.whl")
    (tmp_path / "unsloth" / "kernels").mkdir(parents=True)
    with pytest.raises(unsloth.UnslothError, match=r"has no fast_lora, swiglu, geglu, utils, indexing"):
        unsloth.load(tmp_path)
    for name in unsloth.FILES:
        (tmp_path / "unsloth" / "kernels" / f"{name}.py").write_text("import no_such_module")
    with pytest.raises(unsloth.UnslothError, match=r"does not load by itself: .*no_such_module"):
        unsloth.load(tmp_path)
    assert not [name for name in sys.modules if name.startswith(unsloth.NAME)]  # the next one is tried afresh


def test_an_absent_unsloth_is_said_to_be_absent(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(unsloth.UnslothError, match="not installed: pass --unsloth with its wheel"):
        unsloth.load(None)


# statistics and verdicts


def test_a_replay_is_divided_by_its_calls_and_a_failed_capture_is_told(monkeypatch):
    case = small()
    captured: list[tuple[str, bool]] = []

    def capture(side: peers.Side, case: problem.Problem, backward: bool, pool: Any) -> Any:
        if side.name == "E2":
            raise RuntimeError("operation not permitted when stream is capturing\nlong trace")
        captured.append((side.name, backward))
        return SimpleNamespace(replay=lambda: None)

    marks = iter(range(10**6))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(measure, "_capture", capture)
    monkeypatch.setattr(measure.Clock, "mark", lambda self: next(marks))
    monkeypatch.setattr(measure.Clock, "between_us", lambda self, start, end: 80.0 * (end - start))
    sides = [peers.Side(name, []) for name in ("E1", "E2")]
    times, failed = measure.graphed(sides, case, harness.Plan(2, 4, 2), CPU)
    assert captured == [("E1", False), ("E1", True)]
    assert failed == {"E2": "RuntimeError: operation not permitted when stream is capturing"}
    assert times["E1"]["both"]["median_us"] == 80.0 / len(case.sets)
    assert times["E1"]["backward"] == {"median_us": 0.0}


def test_sides_take_turns_and_the_warm_up_is_dropped():
    order: list[str] = []

    def sampler(name: str) -> Any:
        def sample(step: int) -> dict[str, float]:
            order.append(name)
            return {"both": 1000.0 if step < 2 else 10.0 + step}

        return sample

    found = harness.interleaved({"a": sampler("a"), "b": sampler("b")}, harness.Plan(2, 3, 2))
    assert order == ["a", "b"] * 10
    assert found["a"]["both"]["median_us"] == 13.0
    assert (found["a"]["both"]["p10_us"], found["a"]["both"]["p90_us"]) == (12.0, 14.0)
    assert found["a"]["both"]["noise_ratio"] == 0.0


def test_noise_is_the_distance_of_the_repetitions():
    assert harness.timing([[10.0, 10.0], [11.0, 11.0]]).noise_ratio == pytest.approx(1 / 10.5)
