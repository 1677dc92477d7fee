"""Pruning-aware tuning from the command line: fit with the schedule, and a smaller stock model from the export."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaModel

from petune.adapters.pat import PatConfig
from petune.cli import main
from petune.export import load_adapter, load_run, save_adapter
from petune.pruned import load_pruned
from tests import fresh
from tests.conftest import relative_error

SETTINGS = """
trainer:
  max_epochs: 4
  callbacks+:
    - class_path: petune.callbacks.PruningSchedule
model:
  init_args:
    learning_rate: 0.01
    adapter:
      class_path: petune.adapters.pat.PatConfig
      init_args: {target_ratio: 0.25, round_to: 4, r: 4, hsm_rank: 8}
"""


@pytest.fixture(scope="module")
def tiny_llama(tiny_bert, tmp_path_factory) -> Path:
    """Folder of a Llama of 2 layers x 32 with random weights, and the tokenizer of the tiny BERT."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaModel(config).save_pretrained(folder)
    return folder


def fit(base: Path, reviews: dict[str, Path], output: Path, *more: str) -> int:
    settings = output.parent / "pat.yaml"
    settings.write_text(SETTINGS)
    arguments = [
        *("fit", "-c", "text_classification", "-c", str(settings), f"--model.model={base}", f"--output={output}"),
        *(f"--data.train_file={reviews['train']}", f"--data.validation_file={reviews['validation']}"),
        *("--data.max_length=16", "--data.batch_size=8"),
    ]
    return main([*arguments, *more])


@pytest.fixture(scope="module")
def run(tiny_llama, reviews, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("prune") / "run"
    assert fit(tiny_llama, reviews, folder) == 0
    return folder


def test_the_run_learns_logs_and_ends_with_the_wanted_channels(run):
    saved = load_run(run)
    assert saved.metrics["val/accuracy"] > 0.9
    mask = load_adapter(run).base_model.mask()
    assert (mask.now, mask.total_steps, int(mask.hard.sum())) == (48, 48, 24)
    assert "pat/kept_channels" in (run / "logs" / "version_0" / "metrics.csv").read_text()


def test_the_merged_export_is_a_smaller_stock_model(run, tmp_path, capsys):
    assert main(["export", "--adapter", str(run), "--format", "merged", "--output", str(tmp_path / "merged")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"exported {tmp_path / 'merged'}: ")
    assert "pruned from " in line
    assert line.endswith("(stock, for from_pretrained)")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    batch = tokenizer(["the film was great", "awful cast and a very awful plot"], padding=True, return_tensors="pt")
    torch.save(dict(batch), tmp_path / "batch.pt")
    code = (
        "import sys, torch\nfrom transformers import AutoModelForSequenceClassification\n"
        "model = AutoModelForSequenceClassification.from_pretrained('merged')\n"
        "torch.save(model(**torch.load('batch.pt')).logits.detach(), 'logits.pt')\n"
        "assert model.config.hidden_size == 24 and 'petune' not in sys.modules\n"
    )
    done = fresh.run(code, cwd=tmp_path)
    assert done.code == 0, done.errors
    with torch.no_grad():
        wanted = load_adapter(run).eval()(**batch).logits
    assert relative_error(torch.load(tmp_path / "logits.pt"), wanted) <= 1e-5
    assert wanted.argmax(-1).tolist() == [1, 0]  # good, bad


def test_where_the_config_cannot_say_it_the_export_is_compact(tiny_bert, reviews, tmp_path, capsys):
    assert fit(tiny_bert, reviews, tmp_path / "run", "--trainer.max_epochs=1") == 0
    assert main(["export", "--adapter", str(tmp_path / "run"), "--format=merged", f"--output={tmp_path / 'm'}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("(compact, for petune.load_pruned)")
    batch = {"input_ids": torch.tensor([[2, 5, 6, 7, 3]])}
    with torch.no_grad():
        found, wanted = load_pruned(tmp_path / "m")(**batch), load_adapter(tmp_path / "run").eval()(**batch)
    assert relative_error(found.logits, wanted.logits) <= 1e-5


def test_an_adapter_whose_mask_is_soft_is_not_merged(tiny_llama, tmp_path, capsys):
    base = AutoModelForSequenceClassification.from_pretrained(tiny_llama)
    model = get_peft_model(base, PatConfig(r=4, total_steps=9, task_type="SEQ_CLS", init_weights=False))
    model.base_model.advance(2)
    save_adapter(model, tmp_path / "adapter")
    arguments = ["export", "--adapter", str(tmp_path / "adapter"), "--format=merged", f"--output={tmp_path / 'm'}"]
    assert main(arguments) == 1
    assert "mask values are not binary" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_an_adapter_that_prunes_is_not_written_as_a_lora(run, tmp_path, capsys):
    arguments = ["export", "--adapter", str(run), "--format=lora", f"--output={tmp_path / 'lora'}"]
    assert main(arguments) == 2
    assert "layers of PETUNE_PAT do not support LoRA conversion" in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()
