import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model_state_dict
from transformers import BertModel

from petune.adapters.lora import FusedLoraConfig
from petune.tasks import TextClassification
from tests.tasks import tiny

LABELS = ["low", "high"]


@pytest.mark.parametrize(
    ("train", "adapter", "rate", "accuracy"),
    [
        ("adapter", FusedLoraConfig(), 1e-2, 0.95),
        ("adapter", LoraConfig(target_modules="all-linear"), 1e-2, 0.95),
        ("adapter", IA3Config(), 3e-2, 0.7),  # the body is random: scaling its features helps less than changing them
        ("head", FusedLoraConfig(), 3e-2, 0.6),
        ("all", FusedLoraConfig(), 3e-3, 0.95),
    ],
    ids=["fused-lora", "plain-lora", "ia3", "head", "all"],
)
def test_it_learns_what_can_be_learned(tmp_path, train, adapter, rate, accuracy):
    path = tiny.save_body(tmp_path / "base")
    task = TextClassification(path, labels=LABELS, train=train, learning_rate=rate, adapter=adapter)
    trainer = tiny.trainer(tmp_path, max_epochs=8)
    held_out = tiny.labelled(60, seed=1)
    loss_before = trainer.validate(task, held_out, verbose=False)[0]["val/loss"]
    trainer.fit(task, tiny.labelled(160), held_out)
    assert trainer.callback_metrics["val/accuracy"] > accuracy  # always the larger class: 0.533
    assert trainer.callback_metrics["val/macro_f1"] > accuracy - 0.05
    assert trainer.callback_metrics["val/loss"] < loss_before


def test_validate_test_and_predict_run_without_fit(tmp_path):
    task = TextClassification(tiny.save_body(tmp_path / "base"), labels=LABELS)
    trainer = tiny.trainer(tmp_path)
    assert {"val/loss", "val/accuracy", "val/macro_f1"} <= trainer.validate(task, tiny.labelled(20), verbose=False)[
        0
    ].keys()
    assert {"test/loss", "test/accuracy", "test/macro_f1"} <= trainer.test(task, tiny.labelled(20), verbose=False)[
        0
    ].keys()
    predicted = trainer.predict(task, tiny.labelled(20, batch_size=16))
    assert [len(part["label"]) for part in predicted] == [16, 4]
    assert set(predicted[0]["label"]) <= set(LABELS)
    torch.testing.assert_close(predicted[0]["probabilities"].sum(-1), torch.ones(16))


def test_metrics_are_those_of_the_whole_set_and_not_a_mean_over_batches(tmp_path):
    task = TextClassification(tiny.classifier(), labels=LABELS, tokenizer=tiny.tokenizer())
    loader = tiny.labelled(21, batch_size=8)
    metrics = tiny.trainer(tmp_path).validate(task, loader, verbose=False)[0]
    task.eval()
    hits = [task(batch).argmax(-1) == batch["labels"] for batch in loader]
    assert metrics["val/accuracy"] == pytest.approx(torch.cat(hits).float().mean().item())


def test_labels_are_in_the_config_that_an_export_writes(tmp_path):
    task = TextClassification(tiny.save_body(tmp_path / "base"), labels=["a", "b", "c"])
    config = task.build().config
    assert config.id2label == {0: "a", 1: "b", 2: "c"}
    assert config.label2id == {"a": 0, "b": 1, "c": 2}
    assert task(next(iter(tiny.labelled(4)))).shape == (4, 3)


def test_labels_default_to_those_the_model_knows():
    task = TextClassification(tiny.classifier(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}))
    task.build()
    assert task.labels == ["no", "yes"]
    assert task.describe()["init_args"]["labels"] == ["no", "yes"]


def test_a_head_of_another_size_is_made_anew_and_trained(tmp_path):
    tiny.classifier(num_labels=5).save_pretrained(tmp_path / "base")
    task = TextClassification(str(tmp_path / "base"), labels=LABELS)
    model = task.build()
    assert model.config.num_labels == 2
    assert "classifier" in task.head


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "gpt2", "bart"])
def test_every_weight_the_checkpoint_lacks_is_trained_and_saved(tmp_path, model_type):
    """PEFT alone leaves DistilBERT's pre_classifier out, and BART's head: random anew after each load."""
    path = tiny.save_body(tmp_path / "base", model_type)
    task = TextClassification(path, labels=LABELS, train="adapter")
    task.build()
    task.eval()
    batch = next(iter(tiny.labelled(4)))
    before = task(batch)
    task.model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(99)  # a weight that is neither in the base nor in the adapter would come out different
    again = TextClassification(path, labels=LABELS)
    base, _ = again.load_base()
    again.model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(batch), before, rtol=0, atol=0)


def test_fresh_modules_inside_the_body_are_saved_too(tmp_path):
    torch.manual_seed(3)
    BertModel(tiny.config(), add_pooling_layer=False).save_pretrained(tmp_path / "base")
    task = TextClassification(str(tmp_path / "base"), labels=LABELS)
    model = task.build()
    assert task.head == ["classifier", "bert.pooler"]
    assert any("pooler.dense.weight" in name for name in get_peft_model_state_dict(model))


def test_prompt_tuning_trains_the_head_as_well(tmp_path):
    adapter = PromptTuningConfig(num_virtual_tokens=3)
    task = TextClassification(tiny.save_body(tmp_path / "base"), labels=LABELS, adapter=adapter)
    trainer = tiny.trainer(tmp_path)
    trainer.fit(task, tiny.labelled(16))
    trained = [name for name, parameter in task.named_parameters() if parameter.requires_grad]
    assert any("classifier" in name for name in trained)
    assert any("prompt" in name for name in trained)


@pytest.mark.parametrize("labels", [["only"], ["twice", "twice"]])
def test_labels_must_be_two_or_more_different_names(labels):
    with pytest.raises(ValueError, match="two or more different names"):
        TextClassification("base", labels=labels)


def test_labels_that_do_not_fit_a_model_object_are_refused():
    task = TextClassification(tiny.classifier(num_labels=3), labels=LABELS)
    with pytest.raises(ValueError, match="has 2 names and the BertForSequenceClassification given has 3 outputs"):
        task.build()


def test_a_checkpoint_whose_body_has_another_shape_is_refused(tmp_path):
    path = tiny.save_body(tmp_path / "base")
    tiny.config(intermediate_size=48).save_pretrained(path)
    with pytest.raises(ValueError, match=r"them in another shape, bert\.encoder.*give the folder"):
        TextClassification(path, labels=LABELS).build()


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    path = tiny.save_body(tmp_path / "base")
    tiny.config("distilbert").save_pretrained(path)
    with pytest.raises(ValueError, match=r"lacks 32 of 36 weights of DistilBert.* distilbert\.transformer"):
        TextClassification(path, labels=LABELS).build()


def test_the_architecture_is_built_on_meta_without_reading_weights(tmp_path):
    path = tiny.save_body(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    task = TextClassification(path, labels=LABELS)
    with torch.device("meta"):
        model = task.build(weights=False)
    assert model.config.num_labels == 2
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
