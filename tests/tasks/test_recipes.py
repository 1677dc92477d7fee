import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

import petune.tasks
from petune.demo.scenes import CLASSES, digit_scenes, write_scenes
from petune.tasks import AdapterTask
from tests.families import FAMILIES
from tests.tasks import tiny

FOLDER = Path(petune.tasks.__file__).parent
ROWS = {
    "text_classification": [{"text": f"w{i} w{i + 1}", "label": "low" if i < 20 else "high"} for i in range(38)],
    "text_embedding": [{"query": f"w{i}", "document": f"w{i + 1} w{i + 2}"} for i in range(37)],
}


def rows(folder: Path, name: str) -> tuple[str, list[str]]:
    """A tiny text model, and the arguments that a file of rows takes."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS[name])))
    path = tiny.save_body(folder / "base")
    return path, [f"--data.tokenizer={path}", f"--data.train_file={folder / 'rows.jsonl'}", "--data.max_length=8"]


def scenes(folder: Path, _: str) -> tuple[str, list[str]]:
    """A tiny vision model, and the arguments that a folder of images takes."""
    write_scenes(digit_scenes("train", 20), folder / "train")
    FAMILIES["vit"].build().save_pretrained(folder / "base")
    size = ["--data.image_size=32", f"--model.labels={json.dumps(CLASSES)}"]
    return str(folder / "base"), [f"--data.train_file={folder / 'train'}", *size]


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_a_recipe_runs_as_shipped_with_a_train_file(tmp_path, name):
    recipe = FOLDER / f"{name}.yaml"
    assert recipe.read_text().startswith("# ")
    path, arguments = (scenes if name == "semantic_segmentation" else rows)(tmp_path, name)
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_lightning_class_args(AdapterTask, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    parser.add_argument("--trainer", type=dict)
    parsed = parser.parse_args([f"--config={recipe}", f"--model.model={path}", *arguments])
    made = parser.instantiate_classes(parsed)
    trainer = tiny.trainer(tmp_path, **{**parsed.trainer, "max_epochs": 1})
    trainer.fit(made.model, datamodule=made.data)
    assert trainer.global_step > 0
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
    assert type(made.model.adapter).__name__ == "FusedLoraConfig"
