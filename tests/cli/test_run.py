"""The main job from the command line: fit on a CSV, then predict, test, export and resume from what it left."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from petune.cli import main

EPOCHS = 6


def fit_arguments(tiny_bert: Path, reviews: dict[str, Path], output: Path, *more: str) -> list[str]:
    return [
        "fit",
        *("-c", "lora", "-c", "text_classification"),  # in this order: a method's recipe may come first
        f"--model.model={tiny_bert}",
        f"--data.train_file={reviews['train']}",
        f"--data.validation_file={reviews['validation']}",
        "--data.max_length=16",
        "--data.batch_size=8",
        "--model.learning_rate=0.01",
        "--model.adapter.r=4",
        f"--output={output}",
        *more,
    ]


@pytest.fixture(scope="module")
def run(tiny_bert, reviews, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(fit_arguments(tiny_bert, reviews, folder, f"--trainer.max_epochs={EPOCHS}")) == 0
    return folder


@pytest.fixture
def away(tmp_path, monkeypatch) -> Path:
    """Another working directory than the run's."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_adapter_checkpoints_and_logs(run):
    assert {path.name for path in run.iterdir()} == {"adapter", "checkpoints", "logs"}
    files = {path.name for path in (run / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "petune.yaml", "README.md"} <= files
    assert "tokenizer_config.json" in files
    assert (run / "checkpoints" / "last.ckpt").is_file()
    log = run / "logs" / "version_0"
    assert "train/loss" in (log / "metrics.csv").read_text()
    assert (log / "config.yaml").is_file()
    assert list(log.glob("events.out.tfevents*"))


def test_the_run_is_written_into_the_adapter_folder(run, tiny_bert):
    content = yaml.safe_load((run / "adapter" / "petune.yaml").read_text())
    model = content["config"]["model"]
    assert model["class_path"] == "petune.tasks.TextClassification"
    assert model["init_args"]["labels"] == ["bad", "good"]
    assert model["init_args"]["adapter"]["init_args"]["r"] == 4
    assert content["config"]["seed_everything"] == 0
    assert content["base"]["name"] == str(tiny_bert)
    assert content["metrics"]["val/accuracy"] > 0.9
    assert "text classification" in (run / "adapter" / "README.md").read_text()


def test_the_resolved_adapter_is_printed_at_the_start(tiny_bert, reviews, tmp_path, capsys):
    arguments = fit_arguments(tiny_bert, reviews, tmp_path / "run", "--trainer.fast_dev_run=1")
    assert main([*arguments, "--model.adapter.target_modules=[query,value]"]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("adapter: "))
    assert line.startswith("adapter: FusedLoraConfig(r=4, target_modules=['query', 'value']")


def test_predict_needs_the_adapter_folder_and_the_rows_only(run, reviews, away):
    rows = [{"text": row["text"], "id": index} for index, row in enumerate(texts(reviews["test"]))]
    (away / "new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["predict", "--adapter", str(run / "adapter"), "--input", "new.jsonl", "--output", "out.jsonl"]) == 0
    answers = read_jsonl(away / "out.jsonl")
    assert [answer["id"] for answer in answers] == list(range(len(rows)))  # in the order of the rows
    right = [answer["label"] == row["label"] for answer, row in zip(answers, texts(reviews["test"]), strict=True)]
    assert sum(right) / len(right) > 0.9
    assert all(sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5) for answer in answers)
    assert {path.name for path in away.iterdir()} == {"new.jsonl", "out.jsonl"}


def test_predict_works_without_the_training_data(run, reviews, away):
    shutil.copytree(run / "adapter", away / "moved")
    content = yaml.safe_load((away / "moved" / "petune.yaml").read_text())
    content["config"]["data"]["init_args"]["train_file"] = "/gone/train.csv"
    (away / "moved" / "petune.yaml").write_text(yaml.safe_dump(content))
    assert main(["predict", "--adapter=moved", f"--input={reviews['test']}"]) == 0
    assert len(read_jsonl(away / "predictions.jsonl")) == 32


def test_test_and_validate_take_the_adapter_folder(run, reviews, away, capsys):
    assert main(["test", "--adapter", str(run), f"--data.test_file={reviews['test']}"]) == 0
    assert "test/accuracy" in capsys.readouterr().out
    assert main(["validate", "--adapter", str(run)]) == 0  # the run's own validation file
    assert "val/accuracy" in capsys.readouterr().out
    assert list(away.iterdir()) == []


def logits(model, tokenizer, rows: list[dict[str, str]]) -> torch.Tensor:
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_the_exports_answer_as_the_adapter_does_without_petune(run, tiny_bert, reviews, tmp_path, tolerance, capsys):
    rows = texts(reviews["test"])
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    wanted = logits(PeftModel.from_pretrained(base, run / "adapter"), tokenizer, rows)
    for form in ("adapter", "lora", "merged"):
        target = tmp_path / form
        assert main(["export", "--adapter", str(run), "--format", form, "--output", str(target)]) == 0
        assert capsys.readouterr().out.startswith(f"exported {target}")
        kind = AutoModelForSequenceClassification if form == "merged" else AutoPeftModelForSequenceClassification
        model = kind.from_pretrained(target, **({} if form == "merged" else {"num_labels": 2}))
        found = logits(model, AutoTokenizer.from_pretrained(target), rows)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=tolerance[torch.float32] * 10)


def test_export_leaves_a_folder_of_something_else_alone(run, tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("mine")
    assert main(["export", "--adapter", str(run), "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("petune: error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_push_is_refused_without_the_network(run, tmp_path, capsys):
    arguments = ["export", "--adapter", str(run), "--output", str(tmp_path / "out"), "--push", "me/mine"]
    assert main(arguments) == 2
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_push_uploads_the_exported_folder(run, tmp_path, monkeypatch, capsys):
    from petune.cli import export

    calls = []

    class Hub:
        def create_repo(self, name, exist_ok):
            calls.append(("create", name, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, Path(folder_path)))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(export, "HfApi", Hub)
    monkeypatch.setattr(export.constants, "HF_HUB_OFFLINE", False)
    target = tmp_path / "out"
    assert main(["export", "--adapter", str(run), "--output", str(target), "--push", "me/mine"]) == 0
    assert calls == [("create", "me/mine", True), ("upload", "me/mine", target)]
    assert "pushed to https://hub/me/mine" in capsys.readouterr().out


def test_resuming_from_last_ends_where_an_unbroken_run_does(tiny_bert, reviews, tmp_path):
    half, steady = tmp_path / "half", ("--model.scheduler=constant", "--model.warmup_ratio=0")
    assert main(fit_arguments(tiny_bert, reviews, tmp_path / "unbroken", *steady, "--trainer.max_epochs=2")) == 0
    assert main(fit_arguments(tiny_bert, reviews, half, *steady, "--trainer.max_epochs=1")) == 0
    before = load_file(half / "adapter" / "adapter_model.safetensors")
    again = (*steady, "--trainer.max_epochs=2", "--ckpt_path=last")
    assert main(fit_arguments(tiny_bert, reviews, half, *again)) == 0
    after = load_file(half / "adapter" / "adapter_model.safetensors")
    unbroken = load_file(tmp_path / "unbroken" / "adapter" / "adapter_model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in after)
    for name, tensor in unbroken.items():
        assert torch.equal(after[name], tensor), name
    assert {path.name for path in (half / "logs").iterdir()} == {"version_0", "version_1"}


def test_a_second_run_leaves_no_stale_last_checkpoint(tiny_bert, reviews, tmp_path):
    for steps in (1, 2):
        assert main(fit_arguments(tiny_bert, reviews, tmp_path, f"--trainer.max_steps={steps}")) == 0
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert not list((tmp_path / "checkpoints").glob("last-v*"))


def test_resuming_without_a_checkpoint_is_refused(tiny_bert, reviews, tmp_path, capsys):
    assert main(fit_arguments(tiny_bert, reviews, tmp_path / "new", "--ckpt_path=last")) == 2
    assert "last.ckpt; leave it out to start anew" in capsys.readouterr().err


def test_a_failing_run_leaves_the_old_adapter(run, tiny_bert, reviews, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    before = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    broken = fit_arguments(tiny_bert, reviews, tmp_path / "run", "--model.adapter.target_modules=[qery]")
    assert main(broken) == 1
    captured = capsys.readouterr()
    assert "replaces the adapter there once the new one is whole" in captured.out
    assert "target_modules=['qery'] matches no module" in captured.err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_peft_configs_work_and_drop_the_other_class_fields(tiny_bert, reviews, tmp_path, capsys):
    arguments = [a for a in fit_arguments(tiny_bert, reviews, tmp_path / "run") if not a.startswith("--model.adapter")]
    assert main([*arguments, "--model.adapter=peft.IA3Config", "--trainer.max_steps=2"]) == 0
    assert "adapter: IA3Config(" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["peft_type"] == "IA3"


def test_a_users_callbacks_and_logger_stand_in_for_the_defaults(tiny_bert, reviews, tmp_path):
    settings = tmp_path / "mine.yaml"
    settings.write_text(
        "trainer:\n  logger: false\n  callbacks:\n"
        "  - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
        f"    init_args: {{dirpath: {tmp_path / 'kept'}, filename: mine}}\n"
        "  - class_path: petune.callbacks.ExportAdapter\n"
    )
    arguments = fit_arguments(tiny_bert, reviews, tmp_path / "run", "-c", str(settings), "--trainer.max_steps=2")
    assert main(arguments) == 0
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["mine.ckpt"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"adapter", "config.yaml"}
    assert yaml.safe_load((tmp_path / "run" / "adapter" / "petune.yaml").read_text())["config"]["model"]


def test_the_run_folder_has_a_default(tiny_bert, reviews, away):
    arguments = [a for a in fit_arguments(tiny_bert, reviews, away) if not a.startswith("--output")]
    assert main([*arguments, "--trainer.max_steps=1"]) == 0
    assert (away / "runs" / "text_classification-fused_lora" / "adapter" / "adapter_config.json").is_file()


def test_print_config_is_yaml_that_fit_reads(tiny_bert, reviews, tmp_path, capsys):
    assert main(fit_arguments(tiny_bert, reviews, tmp_path / "run", "--print_config")) == 0
    printed = tmp_path / "all.yaml"
    printed.write_text(capsys.readouterr().out)
    assert yaml.safe_load(printed.read_text())["model"]["init_args"]["adapter"]["init_args"]["r"] == 4
    assert main(["fit", "-c", str(printed), "--trainer.fast_dev_run=1"]) == 0
    assert "FusedLoraConfig(r=4" in capsys.readouterr().out
