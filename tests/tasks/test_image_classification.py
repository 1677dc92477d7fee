"""One label per image: what is learned with which adapter, what is measured, and what is kept."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from sklearn.metrics import f1_score
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageClassification

from petune import BiLoraConfig, EmoeConfig
from petune.adapters.lora import FusedLoraConfig
from petune.adapters.side import LadderSideConfig
from petune.callbacks import AdapterCheckpoint
from petune.export import load_adapter, save_adapter
from petune.tasks import ImageClassification, ImageClassificationData
from tests.families import FAMILIES
from tests.tasks import tiny
from tests.tasks.digits import write_classes

LABELS = ["one", "seven", "zero"]
ADAPTERS = {
    "fused-lora": FusedLoraConfig(),
    "plain-lora": LoraConfig(target_modules="all-linear"),
    "bilora": BiLoraConfig(r=8),
    "emoe": EmoeConfig(num_experts=4, top_k=2),
    "ladder": LadderSideConfig(reduction_factor=2),
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Batches of scans to train on, and of others to measure with."""
    folder = tmp_path_factory.mktemp("digits")
    for name, count, first in (("train", 30, 0), ("test", 8, 40)):
        write_classes(folder / name, count, first)
    data = ImageClassificationData(
        train_file=str(folder / "train"),
        validation_file=str(folder / "test"),
        test_file=str(folder / "test"),
        image_size=32,
        batch_size=8,
    )
    data.setup("fit")
    return data


def saved(folder, family="vit", head="none") -> str:
    FAMILIES[family].build(head=head).save_pretrained(folder)
    return str(folder)


def task_for(adapter="fused-lora", family="vit", **arguments):
    model = FAMILIES[family].build(head="cls")
    return ImageClassification(model, **{"labels": LABELS, "adapter": ADAPTERS[adapter], **arguments})


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        *(("vit", adapter) for adapter in ADAPTERS),
        ("dinov2", "fused-lora"),
        ("swin", "plain-lora"),
    ],
)
def test_it_learns_digits(tmp_path, digits, family, adapter):
    torch.manual_seed(3)
    # wide initial weights: what random features do not tell apart, no adapter of them can
    shape = {**FAMILIES[family].config, "num_labels": 3, "initializer_range": 0.1}
    model = AutoModelForImageClassification.from_config(AutoConfig.for_model(FAMILIES[family].model_type, **shape))
    task = ImageClassification(
        model, labels=LABELS, adapter=ADAPTERS[adapter], learning_rate=3e-3, scheduler="constant"
    )
    trainer = tiny.trainer(tmp_path, max_epochs=10)
    before = trainer.validate(task, digits.train_dataloader(), verbose=False)[0]["val/loss"]
    trainer.fit(task, datamodule=digits)
    assert trainer.callback_metrics["val/accuracy"] > 0.5  # of scans it has not seen; chance is a third
    assert trainer.callback_metrics["val/macro_f1"] > 0.45
    assert trainer.validate(task, digits.train_dataloader(), verbose=False)[0]["val/loss"] < 0.7 * before


@pytest.mark.parametrize("train", ["head", "all"])
def test_the_baselines_train_the_head_or_everything(tmp_path, digits, train):
    task = task_for(train=train)
    tiny.trainer(tmp_path, max_steps=1).fit(task, datamodule=digits)
    trained = {name.split(".")[0] for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    assert trained == ({"classifier"} if train == "head" else {"vit", "classifier"})


@pytest.mark.parametrize("family", ["vit", "dinov2", "swin"])
@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_the_head_is_trained_whole_and_wrapped_by_no_adapter(adapter, family):
    if (adapter, family) in {("ladder", "swin"), ("emoe", "swin")}:
        return
    task = task_for(adapter, family)
    task.build()
    head = {name: p for name, p in task.model.named_parameters() if "classifier" in name and p.requires_grad}
    assert {name.split("classifier.")[1] for name in head} == {
        "modules_to_save.default.weight",
        "modules_to_save.default.bias",
    }
    assert task.adapter.modules_to_save is None  # what the user gave stays what it was


def test_metrics_are_those_of_the_whole_set(tmp_path, digits):
    task = task_for()
    found = tiny.trainer(tmp_path).test(task, datamodule=digits, verbose=False)[0]
    task.eval()
    batches = list(digits.test_dataloader())
    predictions = torch.cat([task(batch).argmax(-1) for batch in batches])
    references = torch.cat([batch["labels"] for batch in batches])
    assert found["test/accuracy"] == pytest.approx((predictions == references).float().mean().item())
    assert found["test/macro_f1"] == pytest.approx(f1_score(references, predictions, average="macro"), abs=1e-6)


def test_predictions_are_names_and_probabilities(tmp_path, digits):
    parts = tiny.trainer(tmp_path).predict(task_for(), digits.test_dataloader())
    assert [len(part["label"]) for part in parts] == [8, 8, 8]
    assert set(parts[0]["label"]) <= set(LABELS)
    torch.testing.assert_close(parts[0]["probabilities"].sum(-1), torch.ones(8))


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "swin"])
def test_images_of_another_size_than_the_models_are_taken(family):
    task = task_for(family=family)
    task.build()
    assert task({"pixel_values": torch.randn(2, 3, 48, 40)}).shape == (2, 3)
    assert "interpolate_pos_encoding" not in task.model_inputs({"pixel_values": torch.randn(2, 3, 32, 32)})


@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_what_is_saved_gives_the_same_logits(tmp_path, digits, adapter):
    path = saved(tmp_path / "base")
    task = ImageClassification(path, labels=LABELS, adapter=ADAPTERS[adapter], learning_rate=1e-2)
    tiny.trainer(tmp_path, max_steps=3).fit(task, datamodule=digits)
    batch = next(iter(digits.test_dataloader()))
    before = task.eval()(batch)
    save_adapter(task.model, tmp_path / "adapter")
    torch.manual_seed(99)  # a weight that is neither in the base nor in the adapter would come out different
    again = ImageClassification(path, labels=LABELS, adapter=ADAPTERS[adapter])
    base, _ = again.load_base()
    again.model = load_adapter(tmp_path / "adapter", base)
    torch.testing.assert_close(again.eval()(batch), before)
    names = get_peft_model_state_dict(again.model)
    assert any("classifier" in name for name in names)
    assert not [name for name in names if "patch_embeddings.projection" in name]


def test_plain_peft_reads_the_adapter_folder(tmp_path, digits):
    path = saved(tmp_path / "base")
    task = ImageClassification(path, labels=LABELS, adapter=ADAPTERS["plain-lora"])
    batch = next(iter(digits.test_dataloader()))
    task.build().save_pretrained(tmp_path / "adapter")
    again = ImageClassification(path, labels=LABELS)
    again.model = PeftModel.from_pretrained(again.load_base()[0], tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(batch), task.eval()(batch), rtol=0, atol=0)


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, digits):
    def fit(epochs, checkpoint=None):
        torch.manual_seed(5)
        task = ImageClassification(path, labels=LABELS, scheduler="constant", warmup_ratio=0)
        trainer = tiny.trainer(tmp_path, max_epochs=epochs, callbacks=[AdapterCheckpoint()])
        trainer.fit(task, datamodule=digits, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return task.eval()(next(iter(digits.test_dataloader())))

    path = saved(tmp_path / "base")
    unbroken = fit(2)
    names = torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in names)
    fit(1)
    torch.testing.assert_close(fit(2, tmp_path / "1.ckpt"), unbroken, rtol=0, atol=0)


def test_a_checkpoints_own_classifier_of_as_many_classes_is_kept(tmp_path):
    path = saved(tmp_path / "base", head="cls")
    task = ImageClassification(path)
    task.build()
    assert task.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    wanted = FAMILIES["vit"].build(head="cls").classifier.weight
    assert torch.equal(task.model.base_model.model.classifier.original_module.weight, wanted)


def test_the_task_describes_itself_so_that_it_can_be_made_again():
    task = task_for("plain-lora")
    task.build()
    described = task.describe()
    assert described["class_path"] == "petune.tasks.ImageClassification"
    assert described["init_args"]["labels"] == LABELS
    assert described["init_args"]["adapter"]["init_args"] == {"target_modules": "all-linear"}
    again = ImageClassification(**{**described["init_args"], "model": FAMILIES["vit"].build(head="cls")})
    again.build()
    assert [p.shape for p in again.parameters()] == [p.shape for p in task.parameters()]


def test_a_half_precision_base_keeps_its_adapter_in_float32(digits):
    task = task_for(dtype="bfloat16")
    task.build()
    loss = task.training_step(next(iter(digits.train_dataloader())), 0)
    loss.backward()
    assert {p.dtype for n, p in task.named_parameters() if "lora_" in n} == {torch.float32}
    assert torch.isfinite(loss)


@pytest.mark.parametrize("wrong", [3, -1])
def test_a_label_that_the_model_has_no_output_for_is_refused(tmp_path, digits, wrong):
    batch = next(iter(digits.train_dataloader()))
    batch["labels"][2] = wrong
    loader = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=rf"labels hold {wrong} and ImageClassification has 3 classes from 0 on, first in row"
    ):
        tiny.trainer(tmp_path).fit(task_for(), loader)


@pytest.mark.parametrize("labels", [["only"], ["twice", "twice"]])
def test_labels_must_be_two_or_more_different_names(labels):
    with pytest.raises(ValueError, match=r"ImageClassification\.labels=.* must be two or more different names"):
        ImageClassification("base", labels=labels)


def test_labels_that_do_not_fit_a_model_object_are_refused():
    with pytest.raises(ValueError, match="has 2 names and the ViTForImageClassification given has 3 outputs"):
        task_for(labels=["a", "b"]).build()
