"""Segmentation from the command line: fit on a folder of scenes, then validate, test and predict from what it left."""

import json

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from petune.cli import main
from petune.cli.light import recipes
from petune.cli.saved import SavedRun
from petune.demo.scenes import CLASSES, digit_scenes, write_scenes
from petune.tasks import SegmentationData, SemanticSegmentation
from tests.families import FAMILIES

COUNTS = {"train": 40, "validation": 9, "test": 7}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Folders of scenes by part."""
    folder = tmp_path_factory.mktemp("scenes")
    return {part: write_scenes(digit_scenes(part, count), folder / part) for part, count in COUNTS.items()}


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_vit")
    FAMILIES["vit"].build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fit(tiny_vit, scenes):
    def arguments(output, *more):
        return [
            *("fit", "-c", "semantic_segmentation", *more),
            f"--model.model={tiny_vit}",
            f"--data.train_file={scenes['train']}",
            f"--data.validation_file={scenes['validation']}",
            f"--data.labels={json.dumps(CLASSES)}",
            *("--data.image_size=32", "--data.mean=0.5", "--data.std=0.5", "--data.batch_size=8"),
            *("--trainer.max_epochs=3", "--model.learning_rate=0.01", f"--output={output}"),
        ]

    return arguments


@pytest.fixture(scope="module")
def run(fit, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(fit(folder, "-c", "lora")) == 0
    return folder


def test_a_run_logs_mean_iou_and_leaves_an_adapter_with_its_head(run, tiny_vit):
    log = (run / "logs" / "version_0" / "metrics.csv").read_text()
    assert "val/mean_iou" in log.splitlines()[0]
    names = load_file(run / "adapter" / "adapter_model.safetensors")
    assert any("decode_head" in name for name in names)
    assert all("lora_" in name or "decode_head" in name for name in names)
    content = yaml.safe_load((run / "adapter" / "petune.yaml").read_text())
    assert content["config"]["model"]["class_path"] == "petune.tasks.SemanticSegmentation"
    assert content["config"]["model"]["init_args"]["labels"] == list(CLASSES)
    assert content["base"]["name"] == str(tiny_vit)
    assert 0 < content["metrics"]["val/mean_iou"] < 1
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert sum(tensor.numel() for tensor in state.values()) == sum(tensor.numel() for tensor in names.values())


def test_validate_and_test_take_the_adapter_folder(run, scenes, capsys):
    trained = yaml.safe_load((run / "adapter" / "petune.yaml").read_text())["metrics"]["val/mean_iou"]
    assert main(["validate", "--adapter", str(run)]) == 0
    assert f"{trained:.4f}"[:5] in capsys.readouterr().out
    assert main(["test", "--adapter", str(run), f"--data.test_file={scenes['test']}"]) == 0
    assert "test/mean_iou" in capsys.readouterr().out


def test_predict_writes_a_mask_for_every_image_in_the_size_of_its_file(run, tmp_path):
    folder = write_scenes(digit_scenes("test", 5, size=45), tmp_path / "new")
    output = tmp_path / "out" / "answers.jsonl"
    assert main(["predict", "--adapter", str(run), f"--input={folder}", f"--output={output}"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    masks = tmp_path / "out" / "answers_masks"
    assert [row["image"] for row in rows] == [str(folder / "images" / f"000{number}.png") for number in range(5)]
    assert [row["mask"] for row in rows] == [str(masks / f"000{number}.png") for number in range(5)]
    assert len(list(masks.iterdir())) == 5
    for row in rows:
        with Image.open(row["mask"]) as mask:
            assert (mask.size, mask.mode) == ((45, 45), "L")
            assert np.array(mask).max() < len(CLASSES)


def test_predicted_masks_can_be_measured_as_labels(run, scenes, tmp_path):
    """What predict writes is what the data reads: against its own masks the model has an IoU of one."""
    images = scenes["test"] / "images"
    output = tmp_path / "predictions.jsonl"
    assert main(["predict", "--adapter", str(run), f"--input={images}", f"--output={output}"]) == 0
    (tmp_path / "predictions_masks").rename(tmp_path / "masks")
    (tmp_path / "images").symlink_to(images)
    task = SavedRun.load(str(run))
    made = SemanticSegmentation(task.base, labels=list(CLASSES))
    task.load_into(made)
    data = SegmentationData(test_file=str(tmp_path), batch_size=3)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    assert trainer.test(made, datamodule=data, verbose=False)[0]["test/mean_iou"] == pytest.approx(1.0)


@pytest.mark.parametrize("config", ["LadderSideConfig", "HierarchicalSideConfig"])
def test_a_side_network_trains_by_its_recipe(fit, tmp_path, config, capsys):
    recipe = next(recipe.name for recipe in recipes() if recipe.config_name == config)
    assert main([*fit(tmp_path / "run", "-c", recipe), "--trainer.max_steps=2"]) == 0
    assert f"adapter: {config}(" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_folder_whose_files_do_not_pair_stops_before_anything_is_trained(fit, scenes, tmp_path, capsys):
    write_scenes(digit_scenes("train", 4), tmp_path / "odd")
    (tmp_path / "odd" / "masks" / "0002.png").unlink()
    assert main([*fit(tmp_path / "run"), f"--data.train_file={tmp_path / 'odd'}"]) != 0
    error = capsys.readouterr().err
    assert "0002.png: has no mask named 0002.* in masks/" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_recipe_is_listed_and_estimated_without_weights(tiny_vit, capsys):
    assert main(["recipes"]) == 0
    assert "semantic_segmentation" in capsys.readouterr().out
    assert main(["estimate", "-c", "semantic_segmentation", "-c", "lora", f"--model.model={tiny_vit}"]) == 0
    assert "trainable" in capsys.readouterr().out
