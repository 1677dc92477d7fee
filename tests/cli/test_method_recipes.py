"""Every method's recipe trains from the command line as it is shipped."""

import pytest

from petune.cli import light, main

METHODS = sorted(recipe.name for recipe in light.recipes() if recipe.kind == "method")


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
