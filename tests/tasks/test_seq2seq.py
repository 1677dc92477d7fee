"""A text for each text: what is learned, what is measured, what is written, and what is kept."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from petune import BiLoraConfig
from petune.adapters.lora import FusedLoraConfig
from petune.callbacks import AdapterCheckpoint
from petune.tasks import Seq2Seq, Seq2SeqData
from petune.tasks.metrics import load_metric
from tests.families import FAMILIES
from tests.tasks import tiny

ADAPTERS = {
    "fused-lora": FusedLoraConfig(r=16),
    "plain-lora": LoraConfig(target_modules="all-linear"),
    "bilora": BiLoraConfig(r=16),
}
ROWS = [{"source": f"w{i} w{j}", "target": f"w{i}"} for i in range(8) for j in range(20, 28)]


def model(family, **changes):
    torch.manual_seed(3)
    shape = {**FAMILIES[family].config, "vocab_size": 44, "eos_token_id": 3, **changes}
    # wide initial weights: what random features do not tell apart, no adapter of them can
    shape |= {"initializer_factor": 2.0} if family == "t5" else {"init_std": 0.2, "forced_eos_token_id": None}
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **shape)).eval()


def task_for(family="t5", adapter="fused-lora", **arguments):
    given = {"adapter": ADAPTERS[adapter], "tokenizer": tiny.tokenizer(), "max_new_tokens": 4, **arguments}
    return Seq2Seq(model(family), **given)


def data(**options):
    given = {"tokenizer": tiny.tokenizer(), "dataset": {"train": ROWS, "validation": ROWS[::5], "test": ROWS[::3]}}
    return Seq2SeqData(**{**given, "max_source_length": 8, "max_target_length": 4, "batch_size": 8, **options})


@pytest.mark.parametrize(("family", "adapter"), [("t5", "fused-lora"), ("t5", "bilora"), ("bart", "plain-lora")])
def test_it_learns_to_write_the_first_word(tmp_path, family, adapter):
    task = task_for(family, adapter, learning_rate=1e-2, scheduler="constant", generate_in_validation=True)
    trainer = tiny.trainer(tmp_path, max_epochs=6)
    before = trainer.validate(task, datamodule=data(), verbose=False)[0]
    trainer.fit(task, datamodule=data())
    after = trainer.callback_metrics
    assert after["val/loss"] < 0.6 * before["val/loss"]
    assert {"val/rouge1", "val/rouge2", "val/rougeL", "val/bleu", "train/loss"} <= after.keys()
    assert after["train/loss"] < 0.6 * before["val/loss"]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_loss_is_that_of_the_model_itself(family):
    task = task_for(family)
    task.build().eval()
    batch = next(iter(data().train_dataloader()))
    own = task.model.get_base_model()(**task.model_inputs(batch), labels=batch["labels"]).loss
    torch.testing.assert_close(task._token_losses(batch).mean(), own)
    smoothed = F.cross_entropy(task(batch).flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.2)
    torch.testing.assert_close(task._token_losses(batch, 0.2).mean(), smoothed)


def test_the_training_loss_is_smoothed_and_the_validation_loss_is_not(tmp_path):
    batch, losses = next(iter(data().train_dataloader())), []
    for smoothing in (0.0, 0.5):
        task = task_for(label_smoothing=smoothing)
        task.build().eval()
        trained = task.training_step(batch, 0).item()
        validated = tiny.trainer(tmp_path).validate(task, datamodule=data(), verbose=False)[0]["val/loss"]
        losses.append((trained, validated))
    assert losses[0][0] != pytest.approx(losses[1][0])
    assert losses[0][1] == pytest.approx(losses[1][1])


def test_the_validation_loss_is_the_mean_over_tokens_and_not_over_batches(tmp_path):
    rows = [{"source": "w1", "target": "w2"}] * 3 + [{"source": "w3", "target": "w4 w5 w6"}] * 2
    measured = data(dataset={"validation": rows}, max_target_length=8, batch_size=3)
    task = task_for()
    found = tiny.trainer(tmp_path).validate(task, datamodule=measured, verbose=False)[0]["val/loss"]
    task.eval()
    parts = [task._token_losses(batch) for batch in measured.val_dataloader()]
    assert found == pytest.approx(torch.cat(parts).mean().item(), rel=1e-5)
    assert found != pytest.approx(sum(part.mean().item() for part in parts) / len(parts), rel=1e-3)


def test_metrics_are_those_of_the_written_texts_of_the_whole_set(tmp_path, monkeypatch):
    written = {row["source"]: row["target"] if i % 2 else "w9 w8" for i, row in enumerate(ROWS)}

    def write(self, batch):
        sources = self.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        return [written[source] for source in sources]

    monkeypatch.setattr(Seq2Seq, "write", write)
    found = tiny.trainer(tmp_path).test(task_for(), datamodule=data(), verbose=False)[0]
    measured = ROWS[::3]
    texts = {
        "predictions": [written[row["source"]] for row in measured],
        "references": [row["target"] for row in measured],
    }
    wanted = {**load_metric("rouge").compute(**texts), **load_metric("bleu").compute(**texts)}
    assert {name: found[f"test/{name}"] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    assert 0.3 < wanted["rouge1"] < 0.7


def test_texts_are_written_in_validation_only_if_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(Seq2Seq, "write", lambda self, batch: pytest.fail("not asked for"))
    assert set(tiny.trainer(tmp_path).validate(task_for(), datamodule=data(), verbose=False)[0]) == {"val/loss"}


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_written_texts_are_those_of_generate(family):
    task = task_for(family, num_beams=2, max_new_tokens=5)
    task.build().eval()
    batch = next(iter(data().test_dataloader()))
    with task.model.disable_adapter():  # a fresh adapter changes nothing
        ids = model(family).generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], num_beams=2, max_new_tokens=5
        )
    wanted = tiny.tokenizer().batch_decode(ids, skip_special_tokens=True)
    assert task.predict_step(batch, 0) == {"text": wanted}
    assert all(isinstance(text, str) for text in wanted)


def test_batches_without_texts_of_their_targets_are_measured_by_their_labels():
    task = task_for()
    task.build()
    batch = next(iter(data().test_dataloader()))
    assert task._decoded(batch["labels"]) == batch["references"]


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize(("train", "count"), [("head", 1), ("all", None)])
def test_the_baselines_train_the_output_layer_or_everything(tmp_path, family, train, count):
    task = task_for(family, train=train)
    tiny.trainer(tmp_path, max_steps=1).fit(task, datamodule=data())
    trained = [p for p in task.model.parameters() if p.requires_grad]
    assert len(trained) == (count or len(list(task.model.parameters())))
    assert any(p is task.model.get_output_embeddings().weight for p in trained)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_adapter_trains_no_weight_of_the_base(family):
    task = task_for(family, "plain-lora")
    task.build()
    assert all("lora_" in name for name, p in task.named_parameters() if p.requires_grad)


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit_and_plain_peft_reads_what_it_saves(tmp_path):
    def fit(epochs, checkpoint=None):
        torch.manual_seed(5)
        task = Seq2Seq(path, adapter=ADAPTERS["plain-lora"], scheduler="constant", warmup_ratio=0)
        trainer = tiny.trainer(tmp_path, max_epochs=epochs, callbacks=[AdapterCheckpoint()])
        trainer.fit(task, datamodule=data(), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return task.eval()

    path = str(tmp_path / "base")
    model("t5").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    batch = next(iter(data().train_dataloader()))
    unbroken = fit(2)
    fit(1)
    torch.testing.assert_close(fit(2, tmp_path / "1.ckpt")(batch), unbroken(batch), rtol=0, atol=0)
    unbroken.model.save_pretrained(tmp_path / "adapter")
    again = Seq2Seq(path)
    again.model = PeftModel.from_pretrained(again.load_base()[0], tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(batch), unbroken(batch), rtol=0, atol=0)


def test_the_task_describes_itself_so_that_it_can_be_made_again():
    described = task_for(label_smoothing=0.1, num_beams=3, generate_in_validation=True).describe()
    assert described["class_path"] == "petune.tasks.Seq2Seq"
    again = Seq2Seq(**{**described["init_args"], "model": model("t5")})
    assert (again.label_smoothing, again.num_beams, again.max_new_tokens) == (0.1, 3, 4)
    assert again.generate_in_validation


# ---- refused


@pytest.mark.parametrize("name", ["max_source_length", "max_target_length"])
def test_more_tokens_than_the_model_has_positions_for_are_refused(tmp_path, name):
    task = Seq2Seq(model("bart", max_position_embeddings=6), tokenizer=tiny.tokenizer())
    lengths = {"max_source_length": 6, "max_target_length": 6, name: 7}
    with pytest.raises(ValueError, match=rf"{name}=7 is more than the 6 tokens that BartForConditionalGeneration has"):
        tiny.trainer(tmp_path).fit(task, datamodule=data(**lengths))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"Seq2Seq\.label_smoothing=1\.0 is no share"),
        ({"max_new_tokens": 0}, r"Seq2Seq\.max_new_tokens=0 writes nothing"),
        ({"num_beams": 0}, r"Seq2Seq\.num_beams=0 writes nothing"),
    ],
)
def test_an_argument_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Seq2Seq("base", **options)
