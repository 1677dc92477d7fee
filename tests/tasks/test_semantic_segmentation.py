"""One class per pixel: what the head sees, what is learned and measured, and what is kept."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from sklearn.metrics import confusion_matrix
from torch import nn
from torch.utils.data import DataLoader

from petune.adapters.lora import FusedLoraConfig
from petune.adapters.side import HierarchicalSideConfig, LadderSideConfig
from petune.callbacks import AdapterCheckpoint
from petune.export import load_adapter, save_adapter
from petune.tasks import SemanticSegmentation
from petune.tasks.segmentation_model import MapHead, patch_map, resize
from tests.families import FAMILIES
from tests.tasks import tiny

LABELS = ["ground", "square", "stripe"]
ADAPTERS = {
    "fused-lora": FusedLoraConfig(),
    "plain-lora": LoraConfig(target_modules="all-linear"),
    "ladder": LadderSideConfig(reduction_factor=2),
    "hierarchical": HierarchicalSideConfig(dims=[8, 8, 16, 16], heads=[1, 2, 2, 4]),
    "hierarchical-through": HierarchicalSideConfig(dims=[8, 8, 16, 16], heads=[1, 2, 2, 4], detach=False),
}


def shapes(count: int = 12, seed: int = 0, size: int = 32, batch_size: int = 4) -> DataLoader:
    """Bright squares and dark stripes on grey, at random places, with a column that does not count."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        pixels, labels = 0.1 * torch.randn(3, size, size, generator=rng), torch.zeros(size, size, dtype=torch.long)
        top, left, row = torch.randint(size - 12, (3,), generator=rng).tolist()
        pixels[:, row : row + 8], labels[row : row + 8] = -1.0, 2
        pixels[:, top : top + 12, left : left + 12], labels[top : top + 12, left : left + 12] = 1.0, 1
        labels[:, -1] = -100
        rows.append({"pixel_values": pixels, "labels": labels})
    return DataLoader(rows, batch_size=batch_size)  # type: ignore[arg-type]


def task_for(adapter="fused-lora", family: str = "vit", **arguments) -> SemanticSegmentation:
    config = ADAPTERS[adapter] if isinstance(adapter, str) else adapter
    return SemanticSegmentation(FAMILIES[family].build(), labels=LABELS, adapter=config, **arguments)


def saved_vit(folder) -> str:
    FAMILIES["vit"].build().save_pretrained(folder)
    return str(folder)


# ---- what is learned


@pytest.mark.parametrize("adapter", list(ADAPTERS))
@pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])
def test_it_learns_shapes_with_every_kind_of_adapter(tmp_path, adapter, family):
    task = task_for(adapter, family, learning_rate=1e-2)
    trainer = tiny.trainer(tmp_path, max_epochs=6)
    before = trainer.validate(task, shapes(), verbose=False)[0]
    trainer.fit(task, shapes(24, seed=1), shapes())
    after = trainer.callback_metrics
    assert after["val/loss"] < 0.8 * before["val/loss"]
    assert after["val/mean_iou"] > before["val/mean_iou"] + 0.1
    assert torch.isfinite(after["train/loss"])


@pytest.mark.parametrize("train", ["head", "all"])
def test_the_baselines_train_the_head_or_everything(tmp_path, train):
    task = task_for(train=train)
    tiny.trainer(tmp_path).fit(task, shapes())
    trained = {name.split(".")[0] for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    assert trained == ({"decode_head"} if train == "head" else {"body", "decode_head"})


@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_every_parameter_of_adapter_and_head_that_trains_is_reached_by_the_loss(adapter):
    task = task_for(adapter)
    task.build()
    batch = next(iter(shapes()))
    (task.training_step(batch, 0)).backward()
    head = [
        parameter for name, parameter in task.named_parameters() if "decode_head" in name and parameter.requires_grad
    ]
    assert len(head) == 2 * (4 if adapter.startswith("hierarchical") else 1) + 2
    assert all(parameter.grad.abs().sum() > 0 for parameter in head)
    body = [name for name, p in task.named_parameters() if p.grad is not None and not p.requires_grad]
    assert body == []


def test_the_head_is_no_target_of_an_adapter_for_linear_layers():
    task = task_for("plain-lora")
    task.build()
    assert not [name for name, _ in task.model.named_modules() if "decode_head" in name and "lora" in name]


def test_a_pixel_that_does_not_count_changes_neither_loss_nor_metric():
    task = task_for()
    task.build()
    labels = torch.randint(3, (2, 8, 8))
    logits = torch.randn(2, 3, 8, 8)
    wanted = nn.functional.cross_entropy(logits[:, :, :4], labels[:, :4])
    labels[:, 4:] = -100
    torch.testing.assert_close(task._loss(logits, labels), wanted)
    labels[:] = -100
    assert task._loss(logits, labels) == 0


def test_a_batch_of_one_is_trained_on(tmp_path):
    for adapter in ADAPTERS:
        trainer = tiny.trainer(tmp_path)
        trainer.fit(task_for(adapter), shapes(2, batch_size=1))
        assert torch.isfinite(trainer.callback_metrics["train/loss"])


# ---- what is measured


def reference_iou(predictions: np.ndarray, labels: np.ndarray, classes: int) -> float:
    counted = labels != -100
    matrix = confusion_matrix(labels[counted], predictions[counted], labels=range(classes)).astype(float)
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return float((matrix.diagonal()[union > 0] / union[union > 0]).mean())


@pytest.mark.parametrize("classes", [5, 7])
def test_mean_iou_is_that_of_all_pixels_of_the_set_over_the_classes_there_are(tmp_path, classes, monkeypatch):
    rng = torch.Generator().manual_seed(classes)
    batches = []
    for count in (3, 1):  # unequal batches, so that a mean over batches would differ
        labels = torch.randint(classes - 2, (count, 9, 13), generator=rng)  # two classes are in no label …
        predictions = torch.randint(classes - 1, (count, 9, 13), generator=rng)  # … and one in no prediction either
        labels[torch.rand(labels.shape, generator=rng) < 0.2] = -100
        pixels = nn.functional.one_hot(predictions, classes).permute(0, 3, 1, 2).float()
        batches.append({"pixel_values": pixels, "labels": labels})
    task = SemanticSegmentation(FAMILIES["vit"].build(), labels=[str(index) for index in range(classes)])
    monkeypatch.setattr(SemanticSegmentation, "forward", lambda self, batch: batch["pixel_values"])
    for _ in range(2):  # the second time as the first: nothing is left over
        loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        found = tiny.trainer(tmp_path).validate(task, loader, verbose=False)[0]["val/mean_iou"]
        whole = [torch.cat([batch[name] for batch in batches]) for name in ("pixel_values", "labels")]
        wanted = reference_iou(whole[0].argmax(1).flatten().numpy(), whole[1].flatten().numpy(), classes)
        assert found == pytest.approx(wanted, abs=1e-6)
    parts = [
        reference_iou(batch["pixel_values"].argmax(1).flatten().numpy(), batch["labels"].flatten().numpy(), classes)
        for batch in batches
    ]
    assert abs(np.mean(parts) - wanted) > 1e-3


def test_validate_test_and_predict_run_without_fit(tmp_path):
    trainer, task = tiny.trainer(tmp_path), task_for()
    assert {"val/loss", "val/mean_iou"} <= trainer.validate(task, shapes(), verbose=False)[0].keys()
    assert {"test/loss", "test/mean_iou"} <= trainer.test(task, shapes(), verbose=False)[0].keys()
    first, *_, last = trainer.predict(task, shapes(6))
    assert [len(part["mask"]) for part in (first, last)] == [4, 2]
    assert first["mask"][0].shape == (32, 32)
    assert set(first["mask"][0].unique().tolist()) <= {0, 1, 2}


# ---- what the head sees


def test_the_head_is_its_formula_for_maps_of_four_sizes():
    torch.manual_seed(1)
    head = MapHead([3, 5, 2, 7], width=6, classes=4).double()
    maps = [
        torch.randn(2, c, *size).double()
        for c, size in zip((3, 5, 2, 7), ((7, 9), (4, 5), (2, 3), (1, 2)), strict=True)
    ]
    summed = torch.zeros(2, 7, 9, 6).double()
    for layer, map in zip(head.project, maps, strict=True):
        projected = map.permute(0, 2, 3, 1) @ layer.weight[:, :, 0, 0].T + layer.bias
        summed += resize(projected.permute(0, 3, 1, 2), (7, 9)).permute(0, 2, 3, 1)
    wanted = nn.functional.gelu(summed) @ head.classify.weight[:, :, 0, 0].T + head.classify.bias
    torch.testing.assert_close(head(maps), wanted.permute(0, 3, 1, 2))


@pytest.mark.parametrize(("family", "prefix"), [("vit", 1), ("deit", 2), ("dinov2", 1)])
def test_the_last_hidden_state_is_a_map_without_its_prefix_tokens(family, prefix):
    model = FAMILIES[family].build()
    pixels = torch.randn(2, 3, 32, 32)
    states = model(pixel_values=pixels).last_hidden_state
    assert states.shape[1] == 16 + prefix
    task = SemanticSegmentation(model, labels=LABELS, train="head")
    task.build().eval()
    (found,) = task.feature_maps(pixels)
    assert found.shape == (2, 32, 4, 4)
    assert torch.equal(found[1, :, 2, 3], states[1, prefix + 2 * 4 + 3])


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])
def test_images_of_another_size_than_the_models_are_taken(family):
    task = task_for("fused-lora", family)
    task.build()
    pixels = torch.randn(2, 3, 40, 24)
    assert [map.shape for map in task.feature_maps(pixels)] == [(2, 32, 5, 3)]
    assert task({"pixel_values": pixels}).shape == (2, 3, 40, 24)


def test_a_hierarchical_adapter_feeds_its_four_maps_to_the_head():
    task = task_for("hierarchical")
    task.build()
    pixels = torch.randn(2, 3, 40, 48)
    wanted = task.model.base_model.features(pixel_values=pixels, interpolate_pos_encoding=True)
    found = task.eval().feature_maps(pixels)
    assert [map.shape[1:] for map in found] == [(8, 10, 12), (8, 5, 6), (16, 3, 3), (16, 2, 2)]
    assert [map.shape for map in found] == [map.shape for map in wanted]
    assert [layer.in_channels for layer in task._head.project] == [8, 8, 16, 16]


def test_a_hierarchical_config_that_is_not_used_does_not_shape_the_head():
    task = task_for("hierarchical", train="head")
    task.build()
    assert [layer.in_channels for layer in task._head.project] == [32]


def test_a_map_is_taken_as_it_is():
    map = torch.randn(2, 6, 3, 5)
    assert patch_map(map, 99, 99, (1, 1)) is map


def test_a_model_that_merges_patches_is_refused():
    task = SemanticSegmentation(FAMILIES["swin"].build(), labels=LABELS, train="head")
    task.build()
    with pytest.raises(ValueError, match=r"gave \d+ tokens for the \d+ x \d+ patches of a 32 x 32 image.*use a plain"):
        task({"pixel_values": torch.randn(1, 3, 32, 32)})


def test_logits_have_the_size_of_the_images_and_masks_that_of_the_files():
    task = task_for()
    task.build()
    batch = {"pixel_values": torch.randn(3, 3, 32, 32), "size": torch.tensor([[32, 32], [17, 50], [64, 5]])}
    assert task(batch).shape == (3, 3, 32, 32)
    assert [tuple(mask.shape) for mask in task.eval().predict_step(batch, 0)["mask"]] == [(32, 32), (17, 50), (64, 5)]


# ---- what is kept


@pytest.mark.parametrize("adapter", list(ADAPTERS))
def test_what_is_saved_gives_the_same_maps_and_holds_no_base_weights(tmp_path, adapter):
    path = saved_vit(tmp_path / "base")
    task = SemanticSegmentation(path, labels=LABELS, adapter=ADAPTERS[adapter], learning_rate=1e-2)
    tiny.trainer(tmp_path).fit(task, shapes())
    batch = next(iter(shapes(seed=3)))
    before = task.eval()(batch)
    save_adapter(task.model, tmp_path / "adapter")
    torch.manual_seed(99)  # a weight that is neither in the base nor in the adapter would come out different
    again = SemanticSegmentation(path, labels=LABELS, adapter=ADAPTERS[adapter])
    base, _ = again.load_base()
    again.model = load_adapter(tmp_path / "adapter", base)
    torch.testing.assert_close(again.eval()(batch), before)  # fused LoRA comes back as PEFT's own: rounding
    names = get_peft_model_state_dict(again.model)
    assert any("decode_head" in name for name in names)
    assert not [name for name in names if name.endswith("patch_embeddings.projection.weight")]


def test_plain_peft_reads_the_adapter_folder(tmp_path):
    path = saved_vit(tmp_path / "base")
    task = SemanticSegmentation(path, labels=LABELS, adapter=ADAPTERS["plain-lora"])
    batch = next(iter(shapes()))
    task.build().save_pretrained(tmp_path / "adapter")
    again = SemanticSegmentation(path, labels=LABELS)
    again.model = PeftModel.from_pretrained(again.load_base()[0], tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(batch), task.eval()(batch), rtol=0, atol=0)


def test_a_folder_loaded_without_its_task_says_that_the_model_is_needed(tmp_path):
    path = saved_vit(tmp_path / "base")
    task = SemanticSegmentation(path, labels=LABELS)
    save_adapter(task.build(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="does not say what class its base has; pass the model as `base`"):
        load_adapter(tmp_path / "adapter")


def test_a_checkpoint_holds_adapter_and_head_alone_and_is_gone_on_with(tmp_path):
    def fit(epochs, checkpoint=None):
        torch.manual_seed(5)
        task = SemanticSegmentation(
            path, labels=LABELS, adapter=ADAPTERS["ladder"], scheduler="constant", warmup_ratio=0
        )
        trainer = tiny.trainer(tmp_path, max_epochs=epochs, callbacks=[AdapterCheckpoint()])
        trainer.fit(task, shapes(), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return task.eval()(next(iter(shapes(seed=3))))

    path = saved_vit(tmp_path / "base")
    unbroken = fit(2)
    names = torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"]
    assert all("petune_ladder_" in name or "decode_head.modules_to_save" in name for name in names)
    fit(1)
    torch.testing.assert_close(fit(2, tmp_path / "1.ckpt"), unbroken, rtol=0, atol=0)


def test_the_task_describes_itself_so_that_it_can_be_made_again():
    task = task_for("hierarchical", head_width=24)
    described = task.describe()
    assert described["class_path"] == "petune.tasks.SemanticSegmentation"
    again = SemanticSegmentation(**{**described["init_args"], "model": FAMILIES["vit"].build()})
    task.build()
    again.build()
    assert again.labels == LABELS
    shapes_of = [[tuple(p.shape) for p in one.parameters() if p.requires_grad] for one in (task, again)]
    assert shapes_of[0] == shapes_of[1]


def test_the_architecture_is_built_on_meta_without_reading_weights(tmp_path):
    path = saved_vit(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    task = SemanticSegmentation(path, labels=LABELS)
    with torch.device("meta"):
        model = task.build(weights=False)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]


def test_a_model_object_with_a_classifier_lends_its_body():
    model = FAMILIES["vit"].build(head="cls")
    task = SemanticSegmentation(model, train="head")
    segmenter = task.build()
    assert segmenter.body is model.vit
    assert task.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert task.describe()["init_args"]["labels"] == task.labels


def test_half_precision_bases_keep_a_head_in_float32():
    task = task_for("fused-lora", dtype="bfloat16")
    task.build()
    batch = next(iter(shapes()))
    loss = task.training_step(batch, 0)
    loss.backward()
    assert {p.dtype for n, p in task.named_parameters() if "decode_head" in n} == {torch.float32}
    assert next(task._base.body.parameters()).dtype == torch.bfloat16
    assert torch.isfinite(loss)


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        task = task_for("fused-lora", gradient_checkpointing=checkpointing)
        task.build()
        task.training_step(next(iter(shapes())), 0).backward()
        grads.append({n: p.grad for n, p in task.named_parameters() if p.requires_grad and "lora_B" in n})
    assert grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


# ---- refused


@pytest.mark.parametrize("labels", [["only"], ["twice", "twice"]])
def test_labels_must_be_two_or_more_different_names(labels):
    with pytest.raises(ValueError, match=r"SemanticSegmentation\.labels=.* must be two or more different names"):
        SemanticSegmentation("base", labels=labels)


def test_a_head_without_channels_is_refused():
    with pytest.raises(
        ValueError, match=r"SemanticSegmentation\.head_width=0 leaves the head no channel; use 1 or more"
    ):
        SemanticSegmentation("base", labels=LABELS, head_width=0)


def test_a_class_that_the_model_does_not_have_is_refused():
    task = task_for()
    task.build()
    batch = next(iter(shapes()))
    batch["labels"][0, 0, 0] = 3
    with pytest.raises(
        ValueError, match="labels hold 3 and SemanticSegmentation has 3 classes from 0 on, first in row"
    ):
        task.training_step(batch, 0)
