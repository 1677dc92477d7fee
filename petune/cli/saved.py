"""An adapter folder as the start of `validate`, `test` and `predict`: it names the task, the base and the columns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from petune.cli.errors import UsageError
from petune.export import load_adapter, load_run
from petune.tasks import AdapterTask

_STAGE_FILES = {
    "validate": ("train_file", "validation_file", "dataset", "dataset_config"),
    "test": ("test_file", "dataset", "dataset_config"),
    "predict": (),
}
_FILES = {"train_file", "validation_file", "test_file", "predict_file", "dataset", "dataset_config"}


@dataclass(frozen=True)
class SavedRun:
    """An exported adapter and the configuration it was trained with."""

    folder: Path
    config: dict[str, Any]
    """The `model` and `data` sections, as a configuration file has them."""
    base: str | None
    """Hub id or absolute folder of the base model."""

    @classmethod
    def load(cls, folder: str) -> "SavedRun":
        """Read `petune.yaml` of an adapter folder, or of the `adapter` folder in a run's.

        Raises:
            FileNotFoundError: there is no adapter, or no petune.yaml with it.
            UsageError: it was not written by a run of the command line.
        """
        run = load_run(Path(folder).expanduser())
        if not {"model", "data"} <= run.config.keys():
            raise UsageError(
                f"--adapter={folder}: its petune.yaml names no task and data; use an adapter written by `petune fit`, "
                "or load it from Python with petune.load_adapter."
            )
        return cls(run.directory, run.config, run.base["name"])

    def config_yaml(self, command: str) -> str:
        """The configuration for a command: the run's own, less the files that the command does not read.

        The labels go to the data as well, which otherwise reads them from training rows that may be gone.
        """
        model, data = dict(self.config["model"]), dict(self.config["data"])
        model_args, data_args = dict(model["init_args"]), dict(data["init_args"])
        if self.base is not None:  # the configuration may have it relative to where the run was started
            model_args["model"] = self.base
        if (self.folder / "tokenizer_config.json").is_file():
            model_args["tokenizer"] = str(self.folder)
        for name in _FILES & data_args.keys():
            if name not in _STAGE_FILES[command] or _is_gone(name, data_args[name]):
                del data_args[name]
        if "labels" in model_args and "label_column" in data_args:
            data_args["labels"] = model_args["labels"]
        model["init_args"], data["init_args"] = model_args, data_args
        return yaml.safe_dump({"model": model, "data": data}, sort_keys=False)

    def load_into(self, task: AdapterTask) -> None:
        """Put the base and the trained adapter into a task that is not built yet."""
        base, _ = task.load_base()
        task.model = load_adapter(self.folder, base)


def _is_gone(name: str, value: Any) -> bool:
    return name.endswith("_file") and (value is None or not Path(value).expanduser().exists())
