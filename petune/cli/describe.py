"""What is about to be trained: as one line for people, as plain data for the adapter folder."""

import re
from pathlib import Path
from typing import Any

from petune.export import CardInfo
from petune.tasks import AdapterTask
from petune.tasks.describe import describe_adapter


def adapter_line(task: AdapterTask) -> str:
    """'adapter: FusedLoraConfig(r=16, target_modules=all-linear)': the rank, and what is no default.

    Recipes and options are merged, and changing the class in one of them drops fields of the other, so what came out
    is shown.
    """
    if task.trained != "adapter":
        return f"adapter: none (train: {task.trained})"
    described = describe_adapter(task.adapter)
    shown = {**({"r": rank} if (rank := getattr(task.adapter, "r", None)) else {}), **described["init_args"]}
    fields = ", ".join(f"{name}={value}" for name, value in shown.items())
    return f"adapter: {described['class_path'].rpartition('.')[2]}({fields})"


def run_config(task: AdapterTask, options: Any) -> dict[str, Any]:
    """The sections of a configuration file that make this run again.

    Args:
        task: for its resolved arguments, labels among them.
        options: the parsed arguments of fit.
    """
    data = options.data.as_dict()
    data["init_args"] = {name: value for name, value in data["init_args"].items() if value is not None}
    trainer = options.trainer
    limits = {name: trainer[name] for name in ("max_epochs", "max_steps", "precision") if trainer[name] is not None}
    return {
        "seed_everything": options.seed_everything,
        "model": task.describe(),
        "data": data,
        "trainer": limits,
    }


def card_info(options: Any) -> CardInfo:
    """What the model card says of the task and the data.

    Args:
        options: the parsed arguments of fit.
    """
    data = options.data.init_args
    source = data.get("train_file") or data.get("dataset")
    task = short_name(options.model.class_path).replace("_", " ")
    return CardInfo(task=task, data=str(Path(source).name) if data.get("train_file") else str(source or ""))


def short_name(class_path: str) -> str:
    """'text_classification' of 'petune.tasks.TextClassification'."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", class_path.rpartition(".")[2]).lower()
