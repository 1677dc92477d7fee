"""The callbacks with the project's own tasks and data: the whole of a run, cut in the middle and resumed."""

import json

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification

from petune.adapters.lora import FusedLoraConfig
from petune.callbacks import AdapterCheckpoint, ExportAdapter, MemoryReport
from petune.export import export_merged, load_adapter, load_run
from petune.tasks import TextClassification
from petune.tasks.data import TextClassificationData
from tests.tasks import tiny


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base model and 90 rows of text, 3 to 12 words long."""
    folder = tmp_path_factory.mktemp("files")
    rows = [
        {"text": " ".join(tiny.WORDS[(row * 7 + word) % 40] for word in range(3 + row % 10)), "label": "ab"[row % 2]}
        for row in range(90)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tiny.save_body(folder / "base", hidden_dropout_prob=0.2), str(folder / "rows.jsonl")


def run(files, folder, adapter, resume=None):
    base, rows = files
    L.seed_everything(5, verbose=False)
    data = TextClassificationData(
        tokenizer=base, train_file=rows, batch_size=8, max_length=16, validation_split=0.2, seed=1
    )
    task = TextClassification(base, labels=data.labels, adapter=adapter, learning_rate=1e-2)
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    callbacks = [AdapterCheckpoint(), ExportAdapter(folder), MemoryReport(print_table=False), saver]
    trainer = tiny.trainer(folder, max_epochs=3, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(task, datamodule=data, ckpt_path=resume)
    return task, callbacks


@pytest.mark.parametrize("adapter", [FusedLoraConfig, LoraConfig])
def test_a_run_resumes_bit_for_bit_and_its_folder_is_enough(files, tmp_path, adapter):
    def config():
        return adapter(target_modules="all-linear", r=4, lora_dropout=0.1)

    reference, callbacks = run(files, tmp_path / "one", config())
    for step in (6, 12, 18):  # nine steps an epoch: inside the first, inside the second, at the end of the second
        resumed, _ = run(files, tmp_path / f"from{step}", config(), resume=tmp_path / "one" / f"step={step}.ckpt")
        ours, theirs = resumed.state_dict(), reference.state_dict()
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert callbacks[2].report["tokens_per_second"] > 0

    inputs = tiny.labelled(8).dataset[:1]
    ids = torch.stack([row["input_ids"] for row in inputs])
    wanted = reference.model.eval()(input_ids=ids).logits
    assert load_run(tmp_path / "one").base["config"]["id2label"] == {0: "a", 1: "b"}
    torch.testing.assert_close(load_adapter(tmp_path / "one").eval()(input_ids=ids).logits, wanted)
    plain = AutoModelForSequenceClassification.from_pretrained(files[0])
    plain = PeftModel.from_pretrained(plain, tmp_path / "one" / "adapter").eval()
    torch.testing.assert_close(plain(input_ids=ids).logits, wanted)
    export_merged(tmp_path / "one", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(input_ids=ids).logits, wanted)
