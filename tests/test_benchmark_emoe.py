"""The benchmark of emergent experts runs part by part, keeps test rows apart, and says what it missed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import emoe, emoe_tasks, report
from benchmarks.emoe_routing import capacity, compare, kept_experts, within_capacity
from benchmarks.emoe_tasks import IN_DOMAIN, SHIFTED, WordOrder
from petune.adapters.emoe import Router

MEASURED = {"smoke": False, "hardware": {"cpu": "Z80", "threads": 1}, "versions": {"torch": "9.9"}}


@pytest.fixture(scope="module")
def task() -> WordOrder:
    return WordOrder(0, smoke=True)


@pytest.fixture(scope="module")
def routed(task) -> Any:
    return emoe.fit(task, emoe.EMOE, 1e-3, 0)


def routers_of(model: Any) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]


def accuracy_part() -> dict[str, Any]:
    frozen = {IN_DOMAIN: [50.0, 52.0], SHIFTED: [50.0, 50.0]}
    sides = {emoe.LORA: ([70.0, 74.0], [60.0, 60.0]), emoe.EMOE: ([71.0, 78.0], [59.0, 60.0])}
    return {
        **MEASURED,
        "seeds": 2,
        "rows": {"train": 6, "validation": 3, IN_DOMAIN: 5, SHIFTED: 4},
        "steps": 7,
        "frozen": frozen,
        "sides": {
            side: {"learning_rate": 0.004, "scores": dict(zip((IN_DOMAIN, SHIFTED), scores, strict=True))}
            for side, scores in sides.items()
        },
    }


def invariance_part(same_ratio: float = 1.0, difference: float = 1e-7) -> dict[str, Any]:
    dropless = {"same_ratio": same_ratio, "dropped_ratio": 0.0, "logits_difference": difference, "logits_std": 0.3}
    dropping = {"same_ratio": 0.065, "dropped_ratio": 0.18, "logits_difference": 0.158, "logits_std": 0.31}
    return {**MEASURED, "rows": 64, "capacity_factor": 1.5, "dropless": dropless, "capacity": dropping}


def speed_part(**ratios: float) -> dict[str, Any]:
    """Ratio by number of tokens, `t256=0.4`."""
    times = {"dense": {"ms": 2.0}, "masked": {"ratio": 1.2, "ratio_min": 1.1, "ratio_max": 1.3}}
    place = {"device": "Z80", "dtype": "float32", "num_experts": 64, "top_k": 16}
    rows = [
        {
            **place,
            "tokens": int(tokens[1:]),
            "sparse": {"ratio": r, "ratio_min": r - 0.1, "ratio_max": r + 0.1},
            **times,
        }
        for tokens, r in ratios.items()
    ]
    return {**MEASURED, "rows": rows}


# the script


@pytest.mark.slow
def test_smoke_runs_all_parts_and_claims_nothing(tmp_path, capsys):
    out = tmp_path / "emoe.json"
    assert emoe.main(["--smoke", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    sides = content["accuracy"]["sides"]
    assert list(sides) == [emoe.LORA, emoe.EMOE, emoe.DENSE, emoe.RANDOM]
    assert all(len(side["scores"][part]) == 1 for side in sides.values() for part in (IN_DOMAIN, SHIFTED))
    assert content["invariance"]["dropless"]["same_ratio"] == 1.0
    assert [(row["top_k"], row["num_experts"], row["tokens"]) for row in content["speed"]["rows"]] == [
        (k, n, tokens) for n, k in emoe.ROUTINGS for tokens in (5, 300)
    ]
    assert len(content["gates"]) == 2 + 4
    assert all(content[part]["smoke"] for part in emoe.PARTS)
    for part in emoe.PARTS:
        with pytest.raises(ValueError, match=f"{part} of emoe.json is from a smoke run"):
            report.emoe({part: content[part]})


def test_a_part_is_measured_anew_and_the_others_stay(tmp_path, monkeypatch):
    out = tmp_path / "emoe.json"
    out.write_text(json.dumps({"accuracy": accuracy_part(), "invariance": invariance_part(same_ratio=0.9)}))
    monkeypatch.setitem(emoe.PARTS, "speed", lambda plan: speed_part(t16=0.9))
    assert emoe.main(["--only", "speed", "--out", str(out)]) == 1  # a batch changed routing decisions
    content = json.loads(out.read_text())
    assert content["accuracy"] == accuracy_part()
    assert content["speed"]["rows"][0]["tokens"] == 16
    assert [name for name, gate in content["gates"].items() if not gate["passed"]] == [
        "routing decisions that a batch changes"
    ]


def test_a_smoke_run_may_not_write_to_the_results(capsys):
    with pytest.raises(SystemExit):
        emoe.main(["--smoke"])
    assert "a smoke run measures nothing, so it may not write emoe.json" in capsys.readouterr().err


# the task


def test_files_are_apart_and_the_test_rows_are_the_same_for_every_seed(task):
    others = [WordOrder(seed, smoke=True) for seed in (1, 2)]
    files = emoe_tasks._texts(True)[2]
    for one in (task, *others):
        parts = [{files[row] for row in one.parts[part]} for part in ("train", "validation", IN_DOMAIN)]
        assert all(parts)
        assert sum(map(len, parts)) == len(set.union(*parts))
    assert len({tuple(one.parts["train"].tolist()) for one in (task, *others)}) > 1
    for part in (IN_DOMAIN, SHIFTED):
        assert all(torch.equal(task.parts[part], other.parts[part]) for other in others)


def test_a_docstring_that_the_standard_library_has_too_is_not_shifted(monkeypatch):
    def made(root: Path) -> Iterator[tuple[tuple[str, ...], str]]:
        for number in range(0 if root.name == "scipy" else 50):
            yield tuple(f"{root.name if number < 40 else 'shared'}{number}.{word}" for word in range(6)), "a.py"

    monkeypatch.setattr(emoe_tasks, "_docstrings", made)
    monkeypatch.setattr(emoe_tasks, "_states", list)
    texts, labels, files = emoe_tasks._texts.__wrapped__(True)
    assert len(files) == 2 * 50
    assert len(texts) == len(labels) == 2 * (50 + 40)
    assert all(text.startswith("numpy") for text in texts[len(files) :: 2])
    for written, shuffled in zip(texts[::2], texts[1::2], strict=True):
        assert written != shuffled
        assert sorted(written.split()) == sorted(shuffled.split())


def test_the_shifted_rows_stand_behind_those_that_have_a_file(task):
    _, labels, files = emoe_tasks._texts(True)
    assert task.parts[SHIFTED].tolist() == list(range(len(files), len(labels)))
    assert labels[task.parts[SHIFTED]].double().mean() == 0.5


def test_the_best_mean_over_the_tuning_seeds_is_chosen(monkeypatch):
    points = {(1e-3, 0): 50.0, (1e-3, 1): 60.0, (1e-2, 0): 80.0, (1e-2, 1): 20.0}

    class Told:
        def scores(self, model: Any, part: str) -> dict[str, float]:
            assert part == "validation"
            return {"accuracy": points[model]}

    monkeypatch.setattr(emoe, "fit", lambda task, side, learning_rate, seed: (learning_rate, seed))
    for rates in ((1e-3, 1e-2), (1e-2, 1e-3)):
        tried, models = emoe.choose([Told(), Told()], emoe.LORA, rates)  # type: ignore[list-item]
        assert list(tried.items()) == [(1e-3, 55.0), (1e-2, 50.0)]
        assert models == [(1e-3, 0), (1e-3, 1)]


def test_the_sides_share_lora_and_differ_in_routing(task):
    configs = {side: make(3) for side, make in emoe.SIDES.items()}
    assert len({(c.r, c.lora_alpha, c.lora_dropout, frozenset(c.target_modules)) for c in configs.values()}) == 1
    assert {side: getattr(c, "cluster", None) for side, c in configs.items()} == {
        emoe.LORA: None,
        emoe.EMOE: "balanced_kmeans",
        emoe.RANDOM: "random",
    }
    assert configs[emoe.RANDOM].seed == 3


# invariance


def test_capacity_takes_first_choices_in_the_order_of_the_batch():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 5)  # all tokens want 0, then 1
    keep = within_capacity(scores, top_k=2, factor=1.0)  # room for 2 · ⌊1 · ⌈5 / 4⌉⌋ = 4 of 5
    assert keep.tolist() == [[True, True, False, False]] * 4 + [[False] * 4]


def test_second_choices_come_after_all_first_ones():
    scores = torch.tensor([[2.0, 3.0, 0.0], [3.0, 2.0, 0.0], [3.0, 2.0, 0.0]])
    keep = within_capacity(scores, top_k=2, factor=1.0)  # room for 2: of 0 the later tokens, whose first choice it is
    assert keep.tolist() == [[False, True, False], [True, True, False], [True, False, False]]


def test_without_a_shortage_capacity_keeps_the_best(task):
    scores = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    keep = within_capacity(scores, top_k=2, factor=100.0)
    assert torch.equal(keep, torch.zeros_like(keep).scatter(-1, scores.topk(2).indices, True))


def test_capacity_lets_a_batch_change_a_sample_and_is_taken_off_again(task, routed):
    rows = task.parts[IN_DOMAIN][:20]
    plain = task.logits(routed, rows)
    before = compare(task, routed, rows)
    assert before["same_ratio"] == 1.0
    assert before["dropped_ratio"] == 0.0
    assert before["logits_difference"] < 1e-5 < before["logits_std"]
    assert before["decisions"] == 2 * task.texts["mask"][rows].sum()
    with capacity(routed, 1.5):
        found = compare(task, routed, rows)
        dropped = task.logits(routed, rows)
    assert found["same_ratio"] < 0.9
    assert found["dropped_ratio"] > 0.01
    assert not torch.allclose(plain, dropped, atol=1e-3)
    assert torch.equal(task.logits(routed, rows), plain)


def test_endless_capacity_is_the_model_as_it_is(task, routed):
    rows = task.parts[IN_DOMAIN][:5]
    plain, chosen = kept_experts(task, routed, routers_of(routed), rows)
    with capacity(routed, 1e4):
        logits, kept = kept_experts(task, routed, routers_of(routed), rows)
    assert torch.equal(plain, logits)
    assert all(torch.equal(*pair) for pair in zip(chosen, kept, strict=True))


# gates and report


def test_slow_or_changeable_routing_misses_its_gate():
    good = emoe.gates({"invariance": invariance_part(), "speed": speed_part(t1=1.02, t255=0.6, t256=0.49)})
    assert all(gate["passed"] for gate in good.values())
    bad = emoe.gates({"invariance": invariance_part(0.999, 1e-3), "speed": speed_part(t1=1.04, t256=0.51)})
    assert len(bad) == 4
    assert not any(gate["passed"] for gate in bad.values())


def test_the_report_pairs_the_seeds_and_says_what_is_missing():
    tables = report.emoe_tables({"accuracy": accuracy_part()})
    deviation = np.std([1.0, 4.0], ddof=1)
    assert f"| {emoe.EMOE} | 74.5 ± 4.9 | +2.5 ± {deviation:.1f} | 59.5 ± 0.7 | -0.5 ± 0.7 | 0.004 |" in tables[0]
    assert "| no adapter | 51.0 ± 1.4 |  | 50.0 ± 0.0 |  |  |" in tables[0]
    assert f"| {emoe.LORA} | 72.0 ± 2.8 |  | 60.0 ± 0.0 |  | 0.004 |" in tables[0]
    assert tables[1:] == [f"invariance: {report.UNMEASURED}", f"speed: {report.UNMEASURED}"]


def test_the_report_shows_invariance_and_speed():
    result = {"invariance": invariance_part(), "speed": speed_part(t1=0.9), "gates": {}}
    result["gates"] = emoe.gates({**result, "speed": speed_part(t256=0.6)})
    section = report.emoe(result)
    assert "| ours | 100 % | 0 % | 1e-07 | 0.3 |" in section
    assert "| capacity 1.5 | 6.5 % | 18 % | 0.16 | 0.31 |" in section
    assert "| Z80, float32 | 16 of 64 | 1 | 0.90 (0.80..1.00) | 1.20 (1.10..1.30) | 2 |" in section
    assert "| Z80 float32, 16 of 64, 256 tokens, time | 0.6 (MISS, <= 0.5) |" in section
    assert section.count("Z80, 1 threads; torch 9.9.") == 2
