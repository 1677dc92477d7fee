"""The benchmark of 1-bit adapters runs, keeps test rows apart, and says what it missed."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import onebit, onebit_tasks, report


def found(scores: list[float], size: int = 100) -> dict[str, Any]:
    return {
        "scores": {"accuracy": scores, "MRR": [0.0] * len(scores)},
        "file_bytes": size,
        "learning_rate": 1e-2,
        "scale": 4.0,
    }


def measured(one_bit: list[float], one_bit_bytes: int = 90) -> dict[str, Any]:
    """A task in which every other side has 90 points."""
    sides = {side: found([90.0, 90.0]) for side in onebit.SIDES}
    sides[onebit.ONE_BIT] = found(one_bit, one_bit_bytes)
    sides[onebit.EQUAL_BYTES] = found([80.0, 80.0])
    rows = {"train": 6, "validation": 3, "test": 5}
    return {"rows": rows, "steps": 7, "frozen": {"accuracy": [10.0, 30.0], "MRR": [0.0, 0.0]}, "sides": sides}


def time_row(ratio: float) -> dict[str, Any]:
    names = {"task": "digits", "side": onebit.ONE_BIT, "parent": onebit.LORA}
    return {**names, "ratio": ratio, "ratio_min": 1.0, "ratio_max": 1.3, "side_ms": 12.34, "parent_ms": 10.0}


def test_smoke_runs_every_side_of_a_task_and_claims_nothing(tmp_path, capsys):
    out = tmp_path / "onebit.json"
    assert onebit.main(["--smoke", "--tasks", "turned digits", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["smoke"]
    task = content["tasks"]["turned digits"]
    assert list(task["sides"]) == list(onebit.SIDES)
    sizes = {side: row["file_bytes"] for side, row in task["sides"].items()}
    weights = 4 * 2 * 32 * (64 + 64)  # four blocks, q and v, A and B
    for side, bits in ((onebit.LORA, 32), ("Bi-LoRA 4 bits", 4), ("Bi-LoRA 2 bits", 2), (onebit.ONE_BIT, 1)):
        assert 0 < sizes[side] - weights * bits / 8 < (2500 if bits == 32 else 500), side  # the header, the statistics
    assert sizes[onebit.EQUAL_BYTES] > sizes[onebit.ONE_BIT]
    assert {(row["side"], row["parent"]) for row in content["time"]} == {
        (side, parent) for parent, sides in onebit.TIMED.items() for side in sides
    }
    assert all(len(row["scores"]["accuracy"]) == 1 for row in task["sides"].values())
    with pytest.raises(ValueError, match="from a smoke run"):
        report.onebit(content)


def test_a_smoke_run_may_not_write_to_the_results(capsys):
    with pytest.raises(SystemExit):
        onebit.main(["--smoke"])
    assert "a smoke run measures nothing, so it may not write onebit.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["retrieval", "word order"])
def test_a_text_task_keeps_files_apart_and_its_test_rows_are_the_same_for_every_seed(name):
    first, second = (onebit.TASKS[name](seed, True) for seed in (0, 1))
    files = onebit_tasks._retrieval_texts(True)[2] if name == "retrieval" else onebit_tasks._order_texts(True)[2]
    for task in (first, second):
        parts = [{files[row] for row in task.parts[part]} for part in ("train", "validation", "test")]
        assert all(parts)
        assert sum(map(len, parts)) == len(set.union(*parts))
    assert torch.equal(first.parts["test"], second.parts["test"])
    assert not torch.equal(first.parts["train"], second.parts["train"])


def test_no_seed_of_the_digits_sees_a_test_image(monkeypatch):
    monkeypatch.setattr(onebit_tasks.Digits, "_pretrain", lambda self, upright, steps, seed: seen.append(upright))
    seen: list[onebit_tasks.Images] = []
    tasks = [onebit.TASKS["turned digits"](seed, True) for seed in (0, 1)]
    pixels = [task.parts["test"].pixels for task in tasks]
    assert torch.equal(*pixels)
    turned_back = {image.numpy().tobytes() for image in torch.rot90(pixels[0], -1, dims=(2, 3)).contiguous()}
    for task, upright in zip(tasks, seen, strict=True):
        assert len(upright.labels) == task.num_pretrain
        assert not turned_back & {image.numpy().tobytes() for image in upright.pixels}
        for part in ("train", "validation"):
            own = torch.rot90(task.parts[part].pixels, -1, dims=(2, 3)).contiguous()
            assert not turned_back & {image.numpy().tobytes() for image in own}


def test_shuffled_words_are_the_same_words_in_another_order():
    texts, labels, files = onebit_tasks._order_texts(True)
    assert len(texts["states"]) == len(labels) == len(files) == 2 * labels.sum()
    words = ["a", "a", "a", "a", "a", "b", "c", "d", "e"]
    for seed in range(20):
        shuffled = onebit_tasks.shuffled(words, onebit_tasks.random.Random(seed))
        changed = [at for at, (old, new) in enumerate(zip(words, shuffled, strict=True)) if old != new]
        assert sorted(shuffled) == words
        assert 0 < changed[-1] - changed[0] < 4


def test_batches_show_every_row_once_an_epoch_and_are_the_same_for_every_side():
    drawn = onebit_tasks.batches(50, 10, 8, seed=3)
    assert sorted(torch.cat(drawn[:5]).tolist()) == list(range(50))
    assert len(drawn) == 8
    assert all(torch.equal(*pair) for pair in zip(drawn, onebit_tasks.batches(50, 10, 8, seed=3), strict=True))


def test_the_best_setting_of_the_mean_over_the_tuning_seeds_is_chosen(monkeypatch):
    points = {(1e-3, 0): 50.0, (1e-3, 1): 60.0, (1e-2, 0): 80.0, (1e-2, 1): 20.0}

    class Told:
        def scores(self, model: Any, part: str) -> dict[str, float]:
            assert part == "validation"
            return {"accuracy": points[model], "MRR": 0.0}

    monkeypatch.setattr(onebit, "fit", lambda task, side, learning_rate, scale, seed: (learning_rate, seed))
    grid = [onebit.Setting(rate, 1.0) for rate in (1e-3, 1e-2)]
    for settings in (grid, grid[::-1]):
        tried, models = onebit.choose([Told(), Told()], onebit.LORA, settings)  # type: ignore[list-item]
        assert tried == [((1e-3, 1.0), 55.0), ((1e-2, 1.0), 50.0)]
        assert models == [(1e-3, 0), (1e-3, 1)]


def test_a_loss_of_points_bytes_or_time_misses_its_gate():
    good = onebit.gates({"digits": measured([89.0, 90.5])}, [time_row(1.1)])
    assert good.pop(f"digits: {onebit.PAPER_START} − {onebit.ONE_BIT}, points")["value"] == pytest.approx(0.25)
    assert all(gate["passed"] for gate in good.values())
    bad = onebit.gates({"digits": measured([79.0, 80.0], one_bit_bytes=101)}, [time_row(1.2)])
    missed = {name for name, gate in bad.items() if not gate["passed"]}
    assert missed == {
        f"digits: {onebit.LORA} − {onebit.ONE_BIT}, points",
        f"digits: {onebit.EQUAL_BYTES} − {onebit.ONE_BIT}, points",
        f"digits: {onebit.PAPER_START} − {onebit.ONE_BIT}, points",
        f"digits: {onebit.ONE_BIT} / {onebit.EQUAL_BYTES}, file",
        f"digits: {onebit.ONE_BIT} / {onebit.LORA}, step",
    }


def test_the_report_pairs_the_seeds():
    section = report.onebit_task("digits", measured([89.0, 90.5]))
    deviation = np.std([-1.0, 0.5], ddof=1)
    assert f"| {onebit.ONE_BIT} | 89.8 ± 1.1 | 0.0 ± 0.0 | -0.2 ± {deviation:.1f} | 90 | 0.01 | 4 |" in section
    assert "| no adapter | 20.0 ± 14.1 | 0.0 ± 0.0 |" in section
    assert "6 rows to train on, 5 to test, 7 steps" in section
