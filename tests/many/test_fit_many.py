"""Runs that train together learn what each of them learns alone."""

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar

from petune.adapters.lora import fuse
from petune.many import engine, fit_many, joint_module
from tests.conftest import TOLERANCE, relative_error
from tests.many.learners import Learner, alone, bilora, lora, rows, run


def assert_alike(together: Learner, by_itself: Learner) -> None:
    assert len(together.losses) == len(by_itself.losses) > 0
    found, expected = together.learned, by_itself.learned
    assert found.keys() == expected.keys()
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    worst = max(relative_error(found[name], expected[name]) for name in expected)
    assert worst <= 10 * TOLERANCE[torch.float32]  # AdamW divides rounding by the size of small gradients


CONFIGS = {
    "rank 2": lambda: (lora(r=2), {"length": 11, "batch": 3}),
    "rank 5, dropout": lambda: (lora(r=5, lora_dropout=0.2), {"length": 7, "batch": 2}),
    "queries alone": lambda: (lora(target_modules=["query"]), {"length": 9, "batch": 4}),
    "one bit": lambda: (bilora(), {"length": 11, "batch": 1}),
    "dora": lambda: (lora(use_dora=True, target_modules=["value"]), {"length": 5, "batch": 3}),
}


def _run(name, folder, **options):
    config, sizes = CONFIGS[name]()
    data = rows(length=sizes["length"], seed=len(name))
    return run(folder, Learner(config), data, batch=sizes["batch"], seed=len(name), **options)


def test_runs_of_many_kinds_learn_together_what_they_learn_alone(tmp_path):
    runs = {name: _run(name, tmp_path / "together" / name) for name in CONFIGS}
    results = fit_many(runs)
    assert list(results) == list(CONFIGS)
    for name, result in results.items():
        assert result.error is None
        expected = alone(_run(name, tmp_path / "alone" / name))
        assert_alike(runs[name].task, expected)
        assert result.steps == len(expected.losses)
        assert result.metrics["train/loss"] == pytest.approx(expected.losses[-1], rel=1e-4)


@pytest.mark.parametrize(
    ("targets", "sizes"),
    [
        ({}, {1, 3}),
        ({"b": ["query", "value"]}, {1, 2}),  # keys by themselves, though one run has them with the other two
        ({"b": ["key", "value"], "a": ["query", "value"]}, {1}),
        ({"a": ["query", "value"], "b": ["query", "value"]}, {2}),
    ],
    ids=["all", "less of one", "one in common", "some"],
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_projections_of_one_input_are_one_operator_for_all_runs(dropout, targets, sizes, tmp_path, monkeypatch):
    def one(place, name):
        more = {"target_modules": targets[name]} if name in targets else {}
        config = lora(r=3 + len(name), lora_dropout=dropout, **more)
        return run(tmp_path / place / name, Learner(config), rows(count=4, seed=ord(name)), batch=2, seed=ord(name))

    found: set[int] = set()
    operator = joint_module.grouped_lora_projections

    def counting(x, weights, *args, **kwargs):
        found.add(len(weights))
        return operator(x, weights, *args, **kwargs)

    monkeypatch.setattr(joint_module, "grouped_lora_projections", counting)
    runs = {name: one("together", name) for name in "ab"}
    assert [result.error for result in fit_many(runs).values()] == [None, None]
    assert found == sizes
    for name, together in runs.items():
        assert_alike(together.task, alone(one("alone", name)))


class Ungrouped(Learner):
    """Each of its projections draws a mask of its own."""

    def configure_model(self) -> None:
        super().configure_model()
        fuse(self.model, group=False)


def test_a_run_whose_projections_draw_one_mask_each_keeps_them_among_others(tmp_path):
    def one(place, kind):
        learner = kind(lora(lora_dropout=0.3))
        return run(tmp_path / place / kind.__name__, learner, rows(count=4), batch=2)

    runs = {kind.__name__: one("together", kind) for kind in (Learner, Ungrouped)}
    assert [result.error for result in fit_many(runs).values()] == [None, None]
    for kind in (Learner, Ungrouped):
        assert_alike(runs[kind.__name__].task, alone(one("alone", kind)))


@pytest.mark.parametrize(
    ("family", "head", "task_type"),
    [
        ("roberta", "cls", "SEQ_CLS"),
        ("llama", "lm", "CAUSAL_LM"),
        ("gpt2", "lm", "CAUSAL_LM"),
        ("vit", "cls", None),
        ("bart", "cls", "SEQ_CLS"),
        ("t5", "lm", "SEQ_2_SEQ_LM"),
    ],
)
def test_each_family_learns_together_what_it_learns_alone(family, head, task_type, tmp_path):
    def one(place, index):
        learner = Learner(lora(r=2 + index, task_type=task_type), family, head)
        data = rows(family, head, count=4, length=6 + 2 * index, seed=index)
        return run(tmp_path / place / str(index), learner, data, batch=2, seed=index)

    runs = {str(index): one("together", index) for index in range(2)}
    assert all(result.error is None for result in fit_many(runs).values())
    for index in range(2):
        assert_alike(runs[str(index)].task, alone(one("alone", index)))


def test_a_run_in_no_company_and_runs_that_fill_the_device_take_their_own_models(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_FULL", {"cpu": 20})
    passes: list[int] = []
    merge = engine.merge
    monkeypatch.setattr(engine, "merge", lambda calls: passes.append(len(calls)) or merge(calls))

    def one(place: str, name: str):
        large = name.startswith("large")
        data = rows(count=6 if large else 4, length=11 if large else 6, seed=len(name))
        return run(tmp_path / place / name, Learner(lora(lora_dropout=0.1)), data, batch=2, seed=len(name))

    runs = {name: one("together", name) for name in ("large", "small", "large too", "small too")}
    assert [result.error for result in fit_many(runs).values()] == [None] * 4
    assert passes == [2, 2]  # the two steps of the small ones
    for name, together in runs.items():
        assert_alike(together.task, alone(one("alone", name)))
    fit_many({"only": one("single", "small")})
    assert len(passes) == 2


def test_runs_whose_trainers_have_a_progress_bar_train_without_it(tmp_path):
    runs = {str(index): run(tmp_path / str(index), Learner(lora()), rows(count=4)) for index in range(2)}
    for one in runs.values():
        one.trainer.callbacks.append(RichProgressBar())  # as Lightning adds by itself
    assert [result.error for result in fit_many(runs).values()] == [None, None]


def test_runs_of_different_length_leave_and_others_enter(tmp_path):
    def one(place, index):
        data = rows(count=4 * (1 + index % 3), seed=index)
        return run(tmp_path / place / str(index), Learner(lora()), data, batch=2, seed=index)

    runs = {str(index): one("together", index) for index in range(5)}
    ended = []
    fit_many(runs, together=2, on_end=lambda result: ended.append(result.name))
    assert ended != sorted(ended)  # "3", of two steps, overtakes "2", of six
    assert sorted(ended) == list("01234")
    for index in range(5):
        assert_alike(runs[str(index)].task, alone(one("alone", index)))


def test_a_token_budget_cuts_rounds_and_changes_no_run(tmp_path):
    def one(place, index):
        return run(tmp_path / place / str(index), Learner(lora()), rows(count=6, seed=index), batch=2, seed=index)

    runs = {str(index): one("together", index) for index in range(3)}
    fit_many(runs, tokens_per_step=2 * 2 * 11)
    for index in range(3):
        assert_alike(runs[str(index)].task, alone(one("alone", index)))


def test_accumulation_clipping_and_validation_are_each_runs_own(tmp_path):
    options = [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"validates": True}]

    def one(place, index):
        learner = Learner(lora())
        return run(tmp_path / place / str(index), learner, rows(seed=index), seed=index, **options[index])

    runs = {str(index): one("together", index) for index in range(3)}
    results = fit_many(runs)
    for index in range(3):
        assert_alike(runs[str(index)].task, alone(one("alone", index)))
    assert "val/loss" in results["2"].metrics


def test_activation_checkpointing_gives_the_same_weights(tmp_path):
    def one(place, index, checkpointing):
        config = lora(lora_dropout=0.2, task_type="CAUSAL_LM")
        data = rows("llama", "lm", count=6, length=7 + index, seed=index)
        learner = Learner(config, "llama", "lm", checkpointing=checkpointing)
        return run(tmp_path / place / str(index), learner, data, seed=index)

    runs = {str(index): one("together", index, True) for index in range(2)}
    assert all(result.error is None for result in fit_many(runs).values())
    for index in range(2):
        assert_alike(runs[str(index)].task, alone(one("alone", index, False)))


def test_with_activation_checkpointing_the_base_has_no_dropout_of_its_own(tmp_path):
    def losses(place, seed):
        learner = Learner(lora(task_type="CAUSAL_LM"), "gpt2", "lm", checkpointing=True)
        fit_many({"only": run(tmp_path / place, learner, rows("gpt2", "lm", 3), seed=seed, shuffle=False)})
        return learner.losses

    assert losses("0", 0) == losses("1", 1)


def test_a_run_that_stops_early_leaves_the_batch(tmp_path):
    stop = EarlyStopping("train/loss", patience=1, min_delta=1e9, check_on_train_epoch_end=True)
    early = run(tmp_path / "early", Learner(lora()), rows(count=6), epochs=5, callbacks=(stop,))
    whole = run(tmp_path / "whole", Learner(lora()), rows(count=6), epochs=5)
    results = fit_many({"early": early, "whole": whole})
    assert results["early"].steps < results["whole"].steps == 10


def test_a_run_goes_on_from_its_checkpoint_to_the_weights_of_one_that_was_never_stopped(tmp_path):
    def one(place, index, epochs, ckpt_path=None):
        options = {"epochs": epochs, "ckpt_path": ckpt_path, "validates": True, "shuffle": False}
        learner = Learner(lora(lora_dropout=0.1))
        return run(tmp_path / place / str(index), learner, rows(seed=index), seed=index, **options)

    fit_many({str(index): one("part", index, 1) for index in range(2)})
    last = {index: str(tmp_path / "part" / str(index) / "checkpoints" / "last.ckpt") for index in range(2)}
    resumed = {str(index): one("part", index, 2, last[index]) for index in range(2)}
    fit_many(resumed)
    whole = {str(index): one("whole", index, 2) for index in range(2)}
    fit_many(whole)
    for name in whole:
        found, expected = resumed[name].task.learned, whole[name].task.learned
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_base_lies_in_memory_once_and_stays_as_it_was(tmp_path):
    runs = {str(index): run(tmp_path / str(index), Learner(lora()), rows(seed=index)) for index in range(3)}
    fit_many(runs)
    models = [one.task.model.get_base_model() for one in runs.values()]
    addresses = [
        {name: p.data_ptr() for name, p in model.named_parameters() if not p.requires_grad and ".base_layer." in name}
        for model in models
    ]
    assert addresses[0]
    assert addresses[0] == addresses[1] == addresses[2]
    fresh = alone(run(tmp_path / "fresh", Learner(lora()), rows(), max_steps=1)).model.get_base_model()
    for name, tensor in fresh.named_parameters():
        if not tensor.requires_grad:
            assert torch.equal(models[0].get_parameter(name), tensor)


def test_a_checkpoint_holds_one_runs_adapter_and_no_base(tmp_path):
    runs = {str(index): run(tmp_path / str(index), Learner(lora(r=2 + index)), rows()) for index in range(2)}
    fit_many(runs)
    for index in range(2):
        state = torch.load(tmp_path / str(index) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert state.keys() == runs[str(index)].task.learned.keys()
        assert {len(tensor) for name, tensor in state.items() if "lora_A" in name} == {2 + index}
