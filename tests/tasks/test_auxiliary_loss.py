"""Tasks with a loss of their own: what the adapter adds to it, in training and nowhere else."""

import pytest
import torch
from torch.nn import functional as F

from petune.adapters.emoe import EmoeConfig
from petune.adapters.lora import FusedLoraConfig
from petune.adapters.pat import PatConfig
from petune.tasks import TextClassification, TextEmbedding
from tests.tasks import tiny

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def pat():
    return PatConfig(target_dim=23, r=3, hsm_rank=5, lora_dropout=0.0, total_steps=9)


def emoe():
    return EmoeConfig(num_experts=4, top_k=2, layers="all", router="learned", r=3, lora_dropout=0.0, balance_loss=0.3)


def classification(adapter, **options):
    task = TextClassification(tiny.classifier(**NO_DROPOUT), adapter=adapter, **options)
    task.build()
    return task.train(), next(iter(tiny.labelled(5, batch_size=5)))


def embedding(adapter, folder):
    task = TextEmbedding(tiny.save_body(folder / "base", **NO_DROPOUT), adapter=adapter)
    task.build()
    return task.train(), next(iter(tiny.pairs(5, batch_size=5)))


def test_a_classifier_trains_on_its_own_loss_and_the_adapters():
    task, batch = classification(pat())
    loss = task.training_step(batch, 0)
    extra = task.model.base_model.auxiliary_loss()
    assert extra > 1
    torch.testing.assert_close(loss, F.cross_entropy(task(batch), batch["labels"]) + extra)
    loss.backward()
    wanted = torch.autograd.grad(extra, task.model.base_model.mask().logits)[0]
    assert wanted.norm() > 0
    assert F.cosine_similarity(task.model.base_model.mask().logits.grad, wanted, dim=0) > 0.9


def test_the_loss_that_is_validated_is_the_tasks_alone(tmp_path):
    task, batch = classification(pat())
    found = tiny.trainer(tmp_path).validate(task, tiny.labelled(5, batch_size=5), verbose=False)[0]["val/loss"]
    with torch.no_grad():
        wanted = F.cross_entropy(task.eval()(batch), batch["labels"]).item()
    assert found == pytest.approx(wanted, rel=1e-5)


def test_an_embedding_trains_on_the_contrastive_loss_and_the_adapters(tmp_path):
    task, batch = embedding(pat(), tmp_path)
    loss, extra = task.training_step(batch, 0), task.model.base_model.auxiliary_loss()
    own = task._loss(batch, task(batch["query"]), task(batch["document"]))
    torch.testing.assert_close(loss, own + extra)


def test_a_loss_that_depends_on_the_texts_is_the_mean_of_both_sides(tmp_path):
    task, batch = embedding(emoe(), tmp_path)
    loss, sides, extras = task.training_step(batch, 0), [], []
    for side in ("query", "document"):
        sides.append(task(batch[side]))
        extras.append(task.model.base_model.auxiliary_loss())
    assert (extras[0] - extras[1]).abs() > 1e-4
    torch.testing.assert_close(loss, task._loss(batch, *sides) + sum(extras) / 2)


@pytest.mark.parametrize("options", [{}, {"train": "head"}, {"train": "all"}], ids=["adapter", "head", "all"])
def test_without_such_a_loss_nothing_is_added(options):
    task, batch = classification(FusedLoraConfig(lora_dropout=0.0), **options)
    assert task.auxiliary_loss() == 0.0
    assert torch.equal(task.training_step(batch, 0), F.cross_entropy(task(batch), batch["labels"]))
