import random

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig
from peft.tuners.lora import LoraLayer
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from torch.utils.data import DataLoader

from petune.adapters.lora import FusedLoraConfig
from petune.adapters.onebit import BiLoraConfig
from petune.adapters.side import LadderSideConfig
from petune.tasks import TokenClassification, TokenClassificationData
from petune.tasks.metrics import load_metric
from petune.tasks.token_classification import tag_metrics, token_loss
from tests.tasks import tiny

TAGS = ["O", "B-HIGH"]


def sentences(count, seed=0):
    """A word is tagged by which part of the vocabulary it is from: one in four is B-HIGH."""
    rng = random.Random(seed)
    rows = [[f"w{rng.randrange(40)}" for _ in range(rng.randrange(3, 9))] for _ in range(count)]
    return [{"tokens": row, "tags": ["B-HIGH" if int(word[1:]) >= 30 else "O" for word in row]} for row in rows]


def as_loader(batches):
    return DataLoader(batches, batch_size=None)


def data(train=120, held_out=40, **options):
    rows = {"train": sentences(train), "validation": sentences(held_out, 1), "test": sentences(held_out, 1)}
    rows["predict"] = rows["test"]
    return TokenClassificationData(tiny.tokenizer(), dataset=rows, **{"max_length": 32, **options})


@pytest.mark.parametrize(
    ("train", "adapter", "rate", "f1"),
    [
        ("adapter", FusedLoraConfig(), 1e-2, 0.8),
        ("adapter", LoraConfig(target_modules="all-linear"), 1e-2, 0.8),
        ("adapter", BiLoraConfig(r=4), 1e-2, 0.1),
        ("adapter", LadderSideConfig(), 1e-2, 0.4),
        ("head", FusedLoraConfig(), 3e-2, 0.4),
        ("all", FusedLoraConfig(), 3e-3, 0.9),
    ],
    ids=["fused-lora", "plain-lora", "bilora", "ladder-side", "head", "all"],
)
def test_it_learns_what_can_be_learned(tmp_path, train, adapter, rate, f1):
    path = tiny.save_body(tmp_path / "base")
    task = TokenClassification(path, labels=TAGS, train=train, learning_rate=rate, adapter=adapter)
    trainer = tiny.trainer(tmp_path, max_epochs=5)
    rows = data(200, batch_size=8)
    before = trainer.validate(task, datamodule=rows, verbose=False)[0]["val/loss"]
    trainer.fit(task, datamodule=rows)
    assert trainer.callback_metrics["val/loss"] < before
    assert trainer.callback_metrics["val/entity_f1"] > f1


@pytest.mark.parametrize("adapter", [LoraConfig(target_modules="all-linear"), FusedLoraConfig()])
def test_all_linear_leaves_the_head_to_be_trained_whole(tmp_path, adapter):
    task = TokenClassification(tiny.save_body(tmp_path / "base"), labels=TAGS, adapter=adapter)
    model = task.build()
    assert not any("classifier" in name for name, each in model.named_modules() if isinstance(each, LoraLayer))
    trained = {name for name, each in task.named_parameters() if each.requires_grad}
    assert any("classifier.modules_to_save" in name for name in trained)
    assert "exclude_modules" not in task.describe()["init_args"]["adapter"]["init_args"], "as the user gave it"


@pytest.mark.parametrize("adapter", [IA3Config(), PromptTuningConfig(num_virtual_tokens=3)], ids=["ia3", "prompt"])
def test_pefts_own_methods_train_with_the_head(tmp_path, adapter):
    task = TokenClassification(tiny.save_body(tmp_path / "base"), labels=TAGS, adapter=adapter)
    trainer = tiny.trainer(tmp_path)
    rows = data(16, 8)
    trainer.fit(task, datamodule=rows)
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    batch = next(iter(rows.val_dataloader()))
    assert task.eval()(batch).shape == (*batch["input_ids"].shape, 2), "none of a prompt's tokens"


def test_metrics_are_those_of_the_whole_set_by_sentence(tmp_path):
    task = TokenClassification(tiny.save_body(tmp_path / "base"), labels=TAGS)
    rows = data(batch_size=7)
    logged = tiny.trainer(tmp_path).test(task, datamodule=rows, verbose=False)[0]
    task.eval()
    tags: dict[int, tuple[list[str], list[str]]] = {}
    losses, words = 0.0, 0
    for batch in rows.test_dataloader():
        logits = task(batch)
        counted = batch["labels"] != -100
        losses += float(F.cross_entropy(logits[counted], batch["labels"][counted], reduction="sum"))
        words += int(counted.sum())
        for i, row in enumerate(batch["row"].tolist()):
            found = [TAGS[k] for k in logits[i].argmax(-1)[counted[i]].tolist()]
            tags[row] = found, [TAGS[k] for k in batch["labels"][i][counted[i]].tolist()]
    assert [tags[row][1] for row in range(40)] == [row["tags"] for row in sentences(40, 1)]
    predictions, references = zip(*tags.values(), strict=True)
    assert logged["test/loss"] == pytest.approx(losses / words, rel=1e-5), "a mean over words, not over batches"
    entities = load_metric("entities").compute(predictions=list(predictions), references=list(references))
    assert logged["test/entity_f1"] == pytest.approx(entities["entity_f1"])
    hits = [a == b for ps, rs in tags.values() for a, b in zip(ps, rs, strict=True)]
    assert logged["test/accuracy"] == pytest.approx(np.mean(hits))


def test_a_row_that_two_processes_saw_counts_once(tmp_path):
    task = TokenClassification(tiny.save_body(tmp_path / "base"), labels=TAGS)
    rows = data()
    rows.setup("test")
    batches = list(rows.test_dataloader())
    once, twice = (
        tiny.trainer(tmp_path).test(task, as_loader(given), verbose=False)[0]
        for given in (batches, [*batches, batches[0]])
    )
    assert twice["test/accuracy"] == once["test/accuracy"]
    assert twice["test/entity_f1"] == once["test/entity_f1"]


def test_tags_that_mark_no_entities_are_measured_by_macro_f1():
    found = tag_metrics([(["N", "V"], ["N", "N"]), (["V"], ["V"])], ["N", "V"])
    assert found == {"accuracy": pytest.approx(2 / 3), "macro_f1": pytest.approx(2 / 3)}
    assert tag_metrics([([], [])], TAGS) == {}


def test_the_loss_is_weighted_by_hand():
    logits = torch.randn(2, 3, 2)
    labels = torch.tensor([[-100, 0, 1], [1, -100, 0]])
    weights = torch.tensor([1.0, 3.0])
    log_p = logits.log_softmax(-1)
    parts = [(1, 0, 1, 0), (3, 0, 2, 1), (3, 1, 0, 1), (1, 1, 2, 0)]
    by_hand = -sum(w * log_p[i, j, k] for w, i, j, k in parts) / 8
    torch.testing.assert_close(token_loss(logits, labels, weights), by_hand)
    torch.testing.assert_close(token_loss(logits, labels), -sum(log_p[i, j, k] for _, i, j, k in parts) / 4)
    assert token_loss(logits, torch.full((2, 3), -100)) == 0


def test_balanced_weights_are_scikit_learns(tmp_path):
    task = TokenClassification(tiny.save_body(tmp_path / "base"), labels=TAGS, class_weights="balanced")
    tiny.trainer(tmp_path, max_steps=1).fit(task, datamodule=data())
    tags = np.array([tag for row in sentences(120) for tag in row["tags"]])
    expected = compute_class_weight("balanced", classes=np.array(TAGS), y=tags)
    np.testing.assert_allclose(task._weights.numpy(), expected, rtol=1e-6)
    assert task.describe()["init_args"]["class_weights"] == "balanced"
    assert not any("_weights" in name for name in task.state_dict())


def test_a_heavier_tag_is_predicted_more_often(tmp_path):
    path, counts = tiny.save_body(tmp_path / "base"), []
    for weights in ([1.0, 1.0], [1.0, 30.0]):
        torch.manual_seed(0)
        task = TokenClassification(path, labels=TAGS, class_weights=weights, learning_rate=1e-2)
        trainer, rows = tiny.trainer(tmp_path, max_epochs=1), data(48)
        trainer.fit(task, datamodule=rows)
        found = [tag for part in trainer.predict(task, datamodule=rows) for row in part["tags"] for tag in row]
        counts.append(found.count("B-HIGH"))
    assert counts[1] > counts[0]


def test_predictions_are_of_words_and_of_none_beyond_max_length(tmp_path):
    task = TokenClassification(tiny.save_body(tmp_path / "base"), labels=TAGS)
    rows = [{"tokens": ["w1", "w2", "w3", "w4"]}, {"tokens": ["w5", "w6"]}]
    given = TokenClassificationData(tiny.tokenizer(), dataset={"predict": rows}, max_length=5)
    (found,) = tiny.trainer(tmp_path).predict(task, datamodule=given)
    assert found["words"] == [["w1", "w2", "w3", "w4"], ["w5", "w6"]]
    assert found["tags"][0][3] is None
    assert found["probability"][0][3] is None
    assert set(found["tags"][0][:3] + found["tags"][1]) <= set(TAGS)
    assert all(0.5 <= sure <= 1 for sure in found["probability"][0][:3] + found["probability"][1])


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0]])
def test_weights_must_be_one_of_zero_or_more_for_each_label(weights):
    with pytest.raises(ValueError, match=r"must be one number of 0 or more for each of labels=.*; or balanced"):
        TokenClassification("base", labels=TAGS, class_weights=weights)


def test_weights_that_cannot_be_had_are_refused(tmp_path):
    path = tiny.save_body(tmp_path / "base")
    batches = data(8, 8)
    batches.setup("fit")
    task = TokenClassification(path, labels=TAGS, class_weights="balanced")
    with pytest.raises(ValueError, match="asks the data module for tag_counts\\(\\) and there is none"):
        tiny.trainer(tmp_path).fit(task, batches.train_dataloader())
    task = TokenClassification(path, class_weights=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="class_weights has 3 weights and there are 2 labels; give each one"):
        tiny.trainer(tmp_path).fit(task, datamodule=data(8, 8))


def test_a_label_outside_the_range_is_refused(tmp_path):
    task = TokenClassification(tiny.save_body(tmp_path / "base"), labels=TAGS)
    rows = data(8, 8)
    rows.setup("fit")
    batch = {**next(iter(rows.train_dataloader()))}
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, 1] = 2
    with pytest.raises(
        ValueError, match="labels hold 2 and TokenClassification has 2 classes from 0 on, first in row 0"
    ):
        tiny.trainer(tmp_path).fit(task, as_loader([batch]))


def test_a_max_length_beyond_the_models_positions_is_refused_at_the_first_short_batch(tmp_path):
    task = TokenClassification(tiny.save_body(tmp_path / "base", max_position_embeddings=16), labels=TAGS)
    with pytest.raises(
        ValueError, match=r"max_length=20 is more than the 16 tokens .*; set the data's max_length to 16"
    ):
        tiny.trainer(tmp_path).fit(task, datamodule=data(8, 8, max_length=20))
    long = {"input_ids": torch.ones(1, 17, dtype=torch.int64), "labels": torch.zeros(1, 17, dtype=torch.int64)}
    with pytest.raises(ValueError, match="a text of 17 tokens is longer than the 16 tokens"):
        tiny.trainer(tmp_path).fit(task, as_loader([long]))
