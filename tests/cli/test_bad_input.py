"""Everything a user can get wrong: an exit code and one line that says what to do, before anything is lost."""

import json
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BertConfig, BertModel

from petune.cli import main
from petune.cli.arguments import explain, resolve_recipes, take_option
from petune.cli.errors import UsageError
from petune.tasks import TextClassification


@pytest.fixture
def said(capsys):
    """Run a command and return its one line of error."""

    def run(arguments: list[str], code: int) -> str:
        assert main([str(argument) for argument in arguments]) == code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("petune: ")]
        assert len(lines) == 1
        assert "Traceback" not in lines[0]
        return lines[0].removeprefix("petune: error: ")

    return run


@pytest.fixture
def fit(tiny_bert, reviews, tmp_path) -> list[str]:
    return [
        "fit",
        *("-c", "text_classification", "-c", "lora"),
        f"--model.model={tiny_bert}",
        f"--data.train_file={reviews['train']}",
        "--data.max_length=16",
        "--trainer.max_steps=1",
        f"--output={tmp_path / 'run'}",
    ]


@pytest.fixture
def trained(fit, tmp_path) -> Path:
    assert main(fit) == 0
    return tmp_path / "run"


def table(path: Path, *rows: str) -> str:
    path.write_text("\n".join(rows) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("--model.adapter.rr=4", "there is no option 'rr' here. Did you mean 'r'?"),
        ("--model.learning_rat=4", "there is no option 'learning_rat' here. Did you mean 'learning_rate'?"),
        ("--data.train_fil=x", "there is no option 'train_fil' here. Did you mean 'train_file'?"),
        ("--data.max_source_length=9", "there is no option 'max_source_length' here. Did you mean 'max_length'?"),
        ("--model.adapter.r=four", "r must be int, got 'four'."),
        ("--trainer.max_epochs=many", "trainer.max_epochs must be int, got 'many'."),
        ("--model.adapter.r=0", "FusedLoraConfig.r=0 must be a positive integer"),
        ("--model.adapter.task_type=FOO", "Invalid task type: 'FOO'. Must be one of"),
        ("--model.adapter=FusedLoraConfg", "no class 'FusedLoraConfg' is known. Did you mean 'FusedLoraConfig'?"),
        ("--model.adapter=peft.LoreConfig", "'peft' has no class 'LoreConfig'. Did you mean"),
        ("--data=TextClassificatonData", "Did you mean 'TextClassificationData'?"),
        ("--trainr.max_epochs=4", "unknown argument --trainr.max_epochs=4. Did you mean '--trainer"),
        ("stray", "unknown argument stray."),
        ("--model.learning_rate=-1", "TextClassification.learning_rate=-1"),
        ("--ckpt_path=nowhere.ckpt", "there is no nowhere.ckpt; leave it out to start anew."),
        ("--config=lorra", "no recipe and no file is called 'lorra'. Did you mean 'lora'?"),
        ("--config=many-runs", "'many-runs' lists runs, for `petune fit-many --runs`; give -c the recipe of a task"),
        ("--config=nowhere.yaml", "no config file 'nowhere.yaml'; give a path, or the name of a recipe"),
    ],
)
def test_a_wrong_argument_is_a_usage_error(fit, said, more, expected):
    assert expected in said([*fit, more], 2)


def test_a_fit_without_a_recipe_says_what_one_looks_like(said):
    assert "petune fit -c text_classification -c lora" in said(["fit"], 2)


def test_a_missing_file_is_named(fit, said):
    assert "train_file=nowhere.csv does not exist" in said([*fit, "--data.train_file=nowhere.csv"], 2)


def test_a_fit_without_rows_says_what_to_give(fit, said):
    without = [argument for argument in fit if "train_file" not in argument]
    assert said(without, 2) == "Labels are read from the training rows and none were given; give train_file or labels."


def test_a_wrong_column_is_named_with_those_there_are(fit, said):
    assert "label_column=labl is no column of train.csv, which has text, label" in said(
        [*fit, "--data.label_column=labl"], 2
    )


def test_an_empty_split_is_named(fit, said, tmp_path):
    empty = table(tmp_path / "empty.csv", "text,label")
    assert "empty.csv" in said([*fit, f"--data.validation_file={empty}"], 1)


def test_a_label_seen_only_in_validation_is_named_with_its_line(fit, said, tmp_path):
    odd = table(tmp_path / "odd.csv", "text,label", "the film,good", "the plot,strange")
    line = said([*fit, f"--data.validation_file={odd}"], 1)
    assert "strange" in line
    assert "odd.csv, line 3" in line


def test_a_base_that_is_nowhere_is_looked_for_without_waiting(fit, said):
    line = said([*fit, "--model.model=nobody/nothing"], 1)
    assert "nobody/nothing" in line
    assert "HF_HUB_OFFLINE" in line
    assert "--model.model=" in line


def test_target_modules_that_match_nothing_name_the_closest(fit, said):
    line = said([*fit, "--model.adapter.target_modules=[qery]"], 1)
    assert "target_modules=['qery'] matches no module" in line
    assert "query" in line


def test_a_checkpoint_with_code_in_it_is_refused(fit, trained, said, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Evil()))
    torch.save({"state_dict": {}, "evil": Evil()}, tmp_path / "evil.pt")
    for name in ("evil.ckpt", "evil.pt"):
        line = said([*fit, f"--ckpt_path={tmp_path / name}"], 1)
        assert name in line
        assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "pickle"])
def test_a_damaged_adapter_is_refused(trained, reviews, said, damage):
    weights = trained / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[-3] ^= 0xFF
        weights.write_bytes(content)
    else:
        weights.rename(weights.with_name("adapter_model.bin"))
    line = said(["predict", "--adapter", trained, "--input", reviews["test"]], 1)
    assert {"truncated": "cut short or damaged", "flipped": "is damaged", "pickle": "a pickle"}[damage] in line


def test_an_adapter_of_another_base_is_refused(trained, tiny_bert, reviews, said, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_bert, other)
    config = BertConfig.from_pretrained(tiny_bert)
    BertModel(config).save_pretrained(other)  # same shapes, other weights
    line = said(["predict", "--adapter", trained, f"--model.model={other}", "--input", reviews["test"]], 1)
    assert "the adapter was made for" in line


def test_a_folder_without_an_adapter_is_named(reviews, said, tmp_path):
    assert "no adapter folder" in said(["predict", "--adapter", tmp_path / "no", "--input", reviews["test"]], 1)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "petune.yaml" in said(["test", "--adapter", tmp_path], 1)


def test_an_adapter_saved_from_python_says_what_it_lacks(trained, reviews, said):
    path = trained / "adapter" / "petune.yaml"
    content = yaml.safe_load(path.read_text())
    content["config"] = {}
    path.write_text(yaml.safe_dump(content))
    line = said(["predict", "--adapter", trained, "--input", reviews["test"]], 2)
    assert "names no task and data" in line


def test_predict_without_rows_says_how_to_give_them(trained, said):
    assert "--input" in said(["predict", "--adapter", trained], 2)


def test_predict_of_a_missing_file_writes_nothing(trained, said, tmp_path):
    out = tmp_path / "out.jsonl"
    line = said(["predict", "--adapter", trained, "--input", "nowhere.csv", "--output", out], 2)
    assert "nowhere.csv does not exist" in line
    assert not out.exists()


def test_an_interrupted_fit_is_one_line_and_exit_130(fit, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(TextClassification, "training_step", interrupt)
    assert main(fit) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "petune: interrupted; what was saved stays."
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_recipes_are_found_by_name_and_tasks_put_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("trainer:\n  max_epochs: 1\n")
    resolved = resolve_recipes(["-c", "lora", "-c=mine.yaml", "--config", "text_classification", "--x=1"])
    assert [Path(part).name for part in resolved[1:6:2]] == ["text_classification.yaml", "recipe.yaml", "mine.yaml"]
    assert resolved[6:] == ["--x=1"]


def test_a_file_goes_before_a_recipe_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lora").write_text("model:\n  class_path: Mine\n")
    assert resolve_recipes(["-c", "lora"]) == ["--config", "lora"]


def test_an_option_without_a_value_is_named():
    with pytest.raises(UsageError, match="--adapter needs a value"):
        take_option(["--adapter"], "--adapter")
    assert take_option(["--adapter=a", "-x", "--adapter", "b"], "--adapter") == ("b", ["-x"])


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("argument --model: expected one argument", "argument --model: expected one argument"),
        ("the following arguments are required: model", "no base model is given; add --model.model=PATH"),
        ("the following arguments are required: fit.data.x", "missing: fit.data.x."),
        ("Errors:\n  - Expected a <class 'NoneType'>\nGiven value: 3", "Errors: - Expected a <class 'NoneType'>"),
    ],
)
def test_the_parsers_messages_become_one_sentence(message, sentence):
    assert explain(message).startswith(sentence)


@pytest.mark.parametrize(
    ("form", "message"),
    [("merged", r"contains a ReLU and cannot be merged; use unload"), ("lora", "do not support LoRA conversion")],
)
def test_a_method_that_has_nothing_of_a_form_says_so(said, fit, tmp_path, form, message):
    bottleneck = [argument.replace("lora", "biadapter") if argument == "lora" else argument for argument in fit]
    assert main(bottleneck) == 0
    error = said(["export", "--adapter", tmp_path / "run", "--format", form, "--output", tmp_path / "out"], 2)
    assert message in error
    assert not (tmp_path / "out").exists()
