"""Every method's recipe trains from the command line as it is shipped."""

import json

import pytest

from petune.cli import light, main
from petune.demo.scenes import CLASSES, digit_scenes, write_scenes
from tests.families import FAMILIES

OF_IMAGES = {"hside"}
METHODS = sorted({recipe.name for recipe in light.recipes() if recipe.kind == "method"} - OF_IMAGES)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_recipe_trains_as_shipped(tiny_bert, reviews, tmp_path, name):
    arguments = [
        f"--model.model={tiny_bert}",
        f"--data.train_file={reviews['train']}",
        f"--data.validation_file={reviews['validation']}",
        "--data.max_length=16",
        "--trainer.max_epochs=1",
        f"--output={tmp_path / 'run'}",
    ]
    assert main(["fit", "-c", "text_classification", "-c", name, *arguments]) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", sorted(OF_IMAGES))
def test_a_recipe_for_images_trains_as_shipped(tmp_path, name):
    FAMILIES["vit"].build().save_pretrained(tmp_path / "vit")
    scenes = {part: write_scenes(digit_scenes(part, 8), tmp_path / part) for part in ("train", "validation")}
    arguments = [
        f"--model.model={tmp_path / 'vit'}",
        f"--data.train_file={scenes['train']}",
        f"--data.validation_file={scenes['validation']}",
        f"--data.labels={json.dumps(CLASSES)}",
        "--data.image_size=32",
        "--trainer.max_epochs=1",
        f"--output={tmp_path / 'run'}",
    ]
    assert main(["fit", "-c", "semantic_segmentation", "-c", name, *arguments]) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
