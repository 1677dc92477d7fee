"""`petune compare`: the same data, steps and seeds for every method; what was measured; what is run again."""

import copy
import csv
import importlib.util
import math
import re
from functools import partial
from pathlib import Path

import filelock
import pytest
import yaml
from safetensors.torch import load_file

from petune.cli import compare as command
from petune.cli import main
from petune.cli.errors import UsageError
from petune.comparison import compare, plan, run_in_this_process
from petune.comparison.methods import BASELINE, find_methods
from petune.comparison.record import write_record
from petune.comparison.study import LOCK
from petune.tasks import TextClassification
from petune.tasks.base import LEARNING_RATE
from tests.comparison.records import record

STEPS = 12  # an epoch of 96 rows
SHORT = "--trainer.max_steps=2"


@pytest.fixture(scope="module")
def task(tiny_bert, reviews) -> list[str]:
    """The arguments that all methods share."""
    return [
        *("-c", "text_classification", f"--model.model={tiny_bert}"),
        f"--data.train_file={reviews['train']}",
        f"--data.validation_file={reviews['validation']}",
        *("--data.max_length=16", "--data.batch_size=8", "--trainer.max_epochs=1"),
    ]


@pytest.fixture(scope="module", autouse=True)
def parsed_once():
    """Has equal arguments parsed once for all tests here: it takes a third of a second."""
    found, resolve = {}, plan.resolve

    def remembered(arguments):
        key = tuple(Path(part).read_text() if part.endswith(".yaml") else part for part in arguments)
        if key not in found:
            found[key] = resolve(arguments)
        return copy.deepcopy(found[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "resolve", remembered)
        yield


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    """LoRA, a class of PEFT's, and the head alone, with two seeds."""
    longer = [*task, "--trainer.max_epochs=3", "--model.learning_rate=0.01"]
    folder = tmp_path_factory.mktemp("compare")
    return compare(longer, ["lora", "peft.IA3Config"], [0, 1], folder, runner=run_in_this_process)


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def method_file(path: Path, **adapter) -> Path:
    path.write_text(yaml.safe_dump({"model": {"init_args": {"adapter": adapter}}}))
    return path


def nothing(trials):
    """A runner that must have nothing to do."""
    assert list(trials) == []
    return iter(())


def pretending(made: list[str]):
    """A runner that trains nothing: it writes down the runs that it is given, and records of its own making."""

    def run(trials):
        for trial in trials:
            made.append(" ".join(map(str, (trial.method, trial.seed, trial.rate or ""))).strip())
            rate, best = trial.rate or 1e-3, {"lora": 1e-3}.get(trial.method, 1e-2)
            near = 1 - abs(math.log10(rate / best)) / 10
            metrics = {"val/accuracy": near, "val/loss": near, "test/accuracy": 1 - near, "test/loss": near}
            weights = sum(map(len, trial.arguments))
            write_record(trial.folder, record(metrics=metrics, learning_rate=rate, weights_bytes=weights))
            yield trial, ""

    return run


def test_every_run_has_a_line_and_a_folder_of_its_own(finished):
    rows = lines(finished.folder / "results.csv")
    assert [(row["method"], row["seed"]) for row in rows] == [
        (method, seed) for method in ("head_only", "lora", "IA3Config") for seed in "01"
    ]
    for row in rows:
        folder = finished.folder / row["method"] / f"seed-{row['seed']}"
        assert Path(row["folder"]) == folder
        assert {"run.json", "trial.json", "log.txt", "checkpoints"} <= {path.name for path in folder.iterdir()}
        assert (folder / "adapter").exists() == (row["method"] != "head_only")


def test_all_methods_get_the_same_steps_rows_and_validation_data(finished):
    rows = lines(finished.folder / "results.csv")
    assert {row["steps"] for row in rows} == {str(3 * STEPS)}
    assert {row["train_rows"] for row in rows} == {"288"}
    assert {row["val_rows"] for row in rows} == {"32"}
    assert any(f"{3 * STEPS} optimizer steps on 288 rows" in note for note in finished.notes)


def test_the_numbers_are_those_of_the_runs_own_folder(finished):
    for row in lines(finished.folder / "results.csv"):
        if row["method"] == "head_only":
            assert int(row["weights_bytes"]) == 4 * int(row["trainable_parameters"]) == 4 * (32 * 2 + 2)
            continue
        adapter = Path(row["folder"]) / "adapter"
        content = yaml.safe_load((adapter / "petune.yaml").read_text())
        assert float(row["val/accuracy"]) == content["metrics"]["val/accuracy"]  # of the fit's own last validation
        assert float(row["val/loss"]) == pytest.approx(content["metrics"]["val/loss"])
        assert content["config"]["seed_everything"] == int(row["seed"])
        assert float(row["learning_rate"]) == content["config"]["model"]["init_args"]["learning_rate"]
        weights = (adapter / "adapter_model.safetensors").stat().st_size
        assert int(row["weights_bytes"]) == weights
        assert float(row["seconds"]) > 0
    sizes = {row["method"]: int(row["weights_bytes"]) for row in lines(finished.folder / "results.csv")}
    assert sizes["IA3Config"] < sizes["lora"]


def test_the_seeds_differ_in_what_they_train(finished):
    first, second = (
        load_file(finished.folder / "lora" / f"seed-{seed}" / "adapter" / "adapter_model.safetensors")
        for seed in (0, 1)
    )
    assert any((first[name] != second[name]).any() for name in first)


def test_the_summary_is_mean_and_deviation_of_the_runs(finished):
    table = finished.table
    assert list(table.index) == ["head_only", "lora", "IA3Config"]
    values = finished.details.set_index("method")["val/accuracy"]
    for method, row in zip(table.index, lines(finished.folder / "summary.csv"), strict=True):
        assert row["method"] == method
        assert table.loc[method, "val/accuracy"] == pytest.approx(values[method].mean())
        assert table.loc[method, "std"] == pytest.approx(values[method].std(ddof=1))
        assert float(row["val/accuracy_mean"]) == pytest.approx(values[method].mean())
        assert (row["n"], row["failed"]) == ("2", "0")


def test_the_page_needs_nothing_else(finished):
    page = (finished.folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", page) == []
    assert "<script" not in page
    assert "@import" not in page
    assert (finished.folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for text in (
        "petune compare -c text_classification",
        "IA3Config",
        "val/accuracy",
        "transformers",
        "learning_rate",
    ):
        assert text in page


def test_only_what_is_not_there_is_run(task, tmp_path):
    made: list[str] = []
    options = {"output": tmp_path / "out", "baseline": False, "runner": pretending(made)}
    compare(task, ["lora"], [0], **options)
    grown = compare(task, ["bilora", "lora"], [0, 3], **options)
    assert made == ["lora 0", "bilora 0", "bilora 3", "lora 3"]
    assert grown.table["n"].to_dict() == {"bilora": 2, "lora": 2}
    again = compare(task, ["bilora", "lora"], [0, 3], **{**options, "runner": nothing})
    assert again.table.equals(grown.table)


def test_an_interrupted_comparison_goes_on_where_it_stopped(task, tmp_path, monkeypatch):
    steady = [*task, "--trainer.max_epochs=2", "--trainer.max_steps=20"]
    options = {"baseline": False, "runner": run_in_this_process}
    unbroken = compare(steady, ["lora"], [1], tmp_path / "unbroken", **options)

    calls, step = [], TextClassification.training_step

    def interrupted(self, batch, batch_idx):
        calls.append(batch_idx)
        if len(calls) == 20 + 16:  # the second run, in its second epoch
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TextClassification, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(steady, ["lora"], [0, 1], tmp_path / "broken", **options)
    assert [row["seed"] for row in lines(tmp_path / "broken" / "results.csv")] == ["0"]  # what there is
    monkeypatch.setattr(TextClassification, "training_step", lambda *args: (calls.append(-1), step(*args))[1])
    del calls[:]
    mended = compare(steady, ["lora"], [0, 1], tmp_path / "broken", **options)
    assert len(calls) == 20 - STEPS  # from the checkpoint at the end of the first epoch
    costs = ["val/accuracy", "val/loss", "steps", "train_rows"]
    assert mended.details.loc[1, costs].equals(unbroken.details.loc[0, costs])


def test_a_failed_run_ends_no_other_and_its_sentence_stands_in_the_results(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "compare", partial(compare, runner=run_in_this_process))
    broken = method_file(
        tmp_path / "broken.yaml", class_path="peft.LoraConfig", init_args={"target_modules": ["qery"]}
    )
    arguments = [SHORT, f"--methods={broken},lora", "--seeds=0", "--no-baseline", f"--output={tmp_path / 'out'}"]
    assert main(["compare", *task, *arguments]) == 1
    failures = {row["method"]: row["failure"] for row in lines(tmp_path / "out" / "results.csv")}
    assert "target_modules=['qery'] matches no module" in failures["broken"]
    assert failures["lora"] == ""
    assert "matches no module" in (tmp_path / "out" / "index.html").read_text()
    printed = capsys.readouterr().out
    assert "broken, seed 0, failed: " in printed
    assert "2 steps" in printed


def test_each_method_takes_the_rate_that_its_first_seed_does_best_with(task, reviews, tmp_path):
    made: list[str] = []
    tested = [*task, f"--data.test_file={reviews['test']}"]  # where the other rates do better, which must not count
    options = {"rates": ["1e-4", "1e-3", "1e-2"], "baseline": False, "runner": pretending(made)}
    found = compare(tested, ["lora", "bilora"], [0, 1], tmp_path, **options)
    best = {"lora": 1e-3, "bilora": 1e-2}  # see `pretending`
    assert made[6:] == ["lora 1 0.001", "bilora 1 0.01"]
    for row in lines(tmp_path / "results.csv"):
        assert row["chosen"] == str(float(row["learning_rate"]) == best[row["method"]])
    assert found.metric.name == "test/accuracy"
    assert found.table["learning_rate"].to_dict() == best
    assert found.table["n"].to_dict() == {"lora": 2, "bilora": 2}
    assert (tmp_path / "lora" / "rate-0.001" / "seed-1" / "run.json").is_file()
    assert any("chosen by the validation data" in note for note in found.notes)
    assert "bilora took the largest rate tried, 0.01: one beyond it may be better." in found.notes
    assert not any("smallest" in note for note in found.notes)


def test_test_data_decides_where_it_is_given(task, reviews, tmp_path):
    arguments = [*task, SHORT, f"--data.test_file={reviews['test']}"]
    found = compare(arguments, ["lora"], [0], tmp_path, baseline=False, runner=run_in_this_process)
    assert found.metric.name == "test/accuracy"
    (row,) = lines(tmp_path / "results.csv")
    assert {"val/accuracy", "test/accuracy", "val/macro_f1", "test/macro_f1"} <= row.keys()
    assert row["test_rows"] == "32"


def test_a_changed_method_is_refused_and_made_anew_if_asked_for(task, tmp_path):
    method = method_file(tmp_path / "mine.yaml", class_path="petune.FusedLoraConfig", init_args={"r": 2})
    arguments = {"arguments": [*task, SHORT], "methods": [str(method), "lora"], "seeds": [0]}
    arguments |= {"output": tmp_path / "out", "baseline": False}
    compare(**arguments, runner=pretending([]))
    method_file(method, class_path="petune.FusedLoraConfig", init_args={"r": 4})
    with pytest.raises(UsageError, match="was made with another configuration; take another --output, or --overwrite"):
        compare(**arguments, runner=nothing)
    made: list[str] = []
    (tmp_path / "out" / "mine" / "seed-0" / "checkpoints").mkdir()  # of the other configuration
    compare(**arguments, overwrite=True, runner=pretending(made))
    assert made == ["mine 0"]
    assert not (tmp_path / "out" / "mine" / "seed-0" / "checkpoints").exists()


def test_a_comparison_of_other_arguments_is_refused_and_replaced_if_asked_for(task, tmp_path):
    made: list[str] = []
    options = {"seeds": [0], "output": tmp_path / "out", "baseline": False, "runner": pretending(made)}
    compare(task, ["lora", "bilora"], **options)
    with pytest.raises(UsageError, match="holds a comparison with other arguments of the task"):
        compare([*task, SHORT], ["lora"], **options)
    compare([*task, SHORT], ["lora"], **options, overwrite=True)
    assert made == ["lora 0", "bilora 0", "lora 0"]
    assert not (tmp_path / "out" / "bilora").exists()


def test_the_command_runs_each_method_as_a_process_of_its_own(task, tmp_path, capsys):
    arguments = [SHORT, "--methods=lora", "--seeds", "0", "--no-baseline"]
    assert main(["compare", *task, *arguments, f"--output={tmp_path / 'out'}"]) == 0
    (row,) = lines(tmp_path / "out" / "results.csv")
    assert row["memory"] == "resident set of the process"
    assert int(row["peak_memory_bytes"]) > 100e6  # torch alone takes that
    assert row["steps"] == "2"
    printed = capsys.readouterr().out
    assert "[1/1] lora, seed 0: 2 steps" in printed
    assert "val/accuracy" in printed
    assert "One seed" in printed
    assert "Traceback" not in (tmp_path / "out" / "lora" / "seed-0" / "log.txt").read_text()


def test_the_commands_help_names_its_own_options_and_the_front_names_it(capsys):
    assert main(["compare", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--methods", "--seeds", "--rates", "--no-baseline", "--output", "--overwrite", "petune fit"):
        assert option in text
    assert main(["--help"]) == 0
    assert "\n    compare " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "baseline", "expected"),
    [
        ("text_classification", None, ["head_only", "lora"]),
        ("text_classification", False, ["lora"]),
        ("causal_lm", None, ["lora"]),  # its head is the output embedding
        ("causal_lm", True, ["head_only", "lora"]),
    ],
)
def test_the_baseline_is_there_by_itself_where_the_task_has_a_head_of_its_own(task, baseline, expected, tmp_path):
    arguments = ["-c", task, "--model.model=folder", "--data.train_file=rows.jsonl"]
    made = plan.Plan(arguments, find_methods(["lora"]), baseline=baseline, output=tmp_path)
    assert [method.name for method in made.methods] == expected


def test_the_baseline_has_the_rate_of_a_head_and_not_of_the_tasks_adapter():
    arguments = ["-c", "text_classification", "--model.model=folder"]
    alone = plan.resolve([*arguments, *BASELINE.arguments])["model"]["init_args"]
    assert (alone["train"], alone["learning_rate"]) == ("head", LEARNING_RATE["head"])
    asked = plan.resolve([*arguments, "--model.learning_rate=0.5", *BASELINE.arguments])["model"]["init_args"]
    assert asked["learning_rate"] == 0.5


BAD = [
    (["--methods=lorra"], "no method 'lorra'. Did you mean 'lora'?"),
    (["--methods=peft.LoreConfig"], "method LoreConfig: 'peft' has no class 'LoreConfig'."),
    (["--methods=lora,lora"], "the method 'lora' is given twice"),
    (["--methods=lora,{folder}/lora.yaml"], "are both called 'lora'; rename a file."),
    (["--methods={folder}/head_only.yaml"], "has the name of the baseline"),
    (["--methods={folder}/none.yaml"], "no file '{folder}/none.yaml' for a method"),
    (["--methods=many-runs"], "'many-runs' lists runs, for `petune fit-many --runs`, and is no method"),
    (["--methods=seq2seq"], "'seq2seq' is the recipe of a task, not of a method"),
    ([], "no methods are given to compare; add --methods"),
    (["--methods=lora", "--seeds=0,one"], "--seeds has 'one'; give whole numbers from 0 on"),
    (["--methods=lora", "--seeds=-1"], "--seeds has '-1'"),
    (["--methods=lora", "--seeds=0,0"], "--seeds has '0' twice"),
    (["--methods=lora", "--seeds="], "--seeds is empty"),
    (["--methods=lora", "--rates=0"], "--rates has '0'; give numbers above 0"),
    (["--methods=lora", "--seed_everything=3"], "--seed_everything is each run's own in a comparison"),
    (["--methods=lora", "--ckpt_path=last"], "runs go on by themselves where they stopped"),
    (["--methods=lora", "--trainer.max_time=00:00:01:00"], "would give each method another number of steps"),
    (["--methods=lora", "--trainer.fast_dev_run=1"], "trainer.fast_dev_run saves nothing to compare"),
    (["--methods=lora", "--data.lebel_column=x"], "there is no option 'lebel_column' here. Did you mean"),
    (["--methods={folder}/longer.yaml"], "method longer sets trainer.accumulate_grad_batches=4 where the task has 1"),
    (["--methods={folder}/tagger.yaml"], "method tagger puts petune.tasks.TokenClassification in the place"),
]


@pytest.mark.parametrize(("more", "expected"), BAD, ids=[expected for _, expected in BAD])
def test_a_wrong_argument_is_one_sentence_and_nothing_is_trained(task, tmp_path, capsys, more, expected):
    for name in ("lora", "head_only"):
        method_file(tmp_path / f"{name}.yaml", class_path="petune.FusedLoraConfig")
    (tmp_path / "longer.yaml").write_text("trainer:\n  accumulate_grad_batches: 4\n")
    (tmp_path / "tagger.yaml").write_text("model:\n  class_path: petune.tasks.TokenClassification\n")
    more = [part.format(folder=tmp_path) for part in more]
    assert main(["compare", *task, *more, f"--output={tmp_path / 'out'}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("petune: ")]
    assert expected.format(folder=tmp_path) in line
    assert not (tmp_path / "out").exists()


def test_a_task_without_data_to_measure_on_is_refused(task, tmp_path):
    blind = [part for part in task if "validation_file" not in part] + ["--data.validation_split=0"]
    with pytest.raises(UsageError, match="neither validation nor test data to compare the methods on"):
        compare(blind, ["lora"], [0], tmp_path / "out", runner=nothing)
    with pytest.raises(UsageError, match="--rates chooses by validation data and there is none"):
        compare([*blind, "--data.test_file=x.csv"], ["lora"], [0], tmp_path / "out", rates=[1e-3], runner=nothing)


def test_a_folder_of_something_else_is_left_alone(task, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="holds something that is no comparison"):
            compare(task, ["lora"], [0], tmp_path, overwrite=overwrite, runner=nothing)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_two_comparisons_do_not_share_a_folder(task, tmp_path):
    with filelock.FileLock(tmp_path / LOCK), pytest.raises(UsageError, match="another `petune compare` works in"):
        compare(task, ["lora"], [0], tmp_path, runner=nothing)


@pytest.mark.parametrize("package", ["matplotlib", "pandas"])
def test_a_missing_extra_is_named_before_anything_is_trained(task, tmp_path, monkeypatch, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else found(name, *more)
    )
    with pytest.raises(ImportError, match=rf'with {package}, .* pip install "petune\[compare\]"'):
        compare(task, ["lora"], [0], tmp_path / "out", runner=nothing)
