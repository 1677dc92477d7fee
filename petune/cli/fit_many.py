"""`petune fit-many`: the runs of a file, trained at the same time on one frozen base."""

import argparse
import csv
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from petune.atomic import replacing_file
from petune.callbacks import MemoryReport
from petune.cli.arguments import resolve_recipes
from petune.cli.errors import UsageError, one_line
from petune.cli.quiet import quiet
from petune.cli.train import PetuneCLI
from petune.many import RunResult, fit_many
from petune.many.fit import check_strategy

_RECORD = "run.json"  # in a run's folder: what it was asked for, and whether it came to its end
_OWN = ("recipes", "ckpt_path")  # what a run's entry says besides the configuration of `fit`


class _OneOfMany(PetuneCLI):
    """`petune fit` with more callbacks, and without a report of memory and speed, which are no run's own."""

    def __init__(self, arguments: list[str], callbacks: list[Callback]) -> None:
        self._joined = callbacks
        super().__init__(arguments)

    def _missing_callbacks(self, given: list[Callback]) -> Iterator[Callback]:
        yield from self._joined
        yield from (one for one in super()._missing_callbacks(given) if not isinstance(one, MemoryReport))

    def before_fit(self) -> None:
        check_strategy(self.run_folder.name, self.trainer)
        super().before_fit()


class _Row(Callback):
    """A run's row in the display of all."""

    def __init__(self, display: Progress, name: str) -> None:
        self._display, self._name = display, name
        self._task: TaskID | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        self._task = self._display.add_task(self._name, total=None if total == float("inf") else total)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._task is not None:
            self._display.update(self._task, completed=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._task is not None:
            self._display.remove_task(self._task)
            self._task = None


def run_fit_many(options: argparse.Namespace, arguments: list[str]) -> int:
    """Train the runs of a file.

    Args:
        options: of the command: runs, output, tokens_per_step, together, resume.
        arguments: for `petune fit`, the same for all runs.

    Returns:
        0, or 1 if a run failed.

    Raises:
        UsageError: the file or an argument is wrong.
    """
    output = Path(options.output)
    entries = _read_runs(Path(options.runs))
    common = resolve_recipes(arguments)
    console = Console()
    records: dict[str, dict[str, Any]] = {}
    display = Progress(console=console, transient=True, disable=not console.is_terminal)
    with quiet(), tempfile.TemporaryDirectory() as folder, display:
        works: dict[str, Callable[[list[Callback]], Trainer]] = {}
        for name, entry in entries.items():
            digest = _digest(common, entry)
            record = _read_record(output / name) if options.resume else {}
            if record and record["digest"] != digest:
                raise UsageError(
                    f"the run {name!r} was started with other settings than it has now; take another --output, or "
                    "leave out --resume to train it anew."
                )
            if record.get("finished"):
                records[name] = record
                continue
            run_arguments = _arguments(name, entry, common, output, Path(folder), resume=options.resume)
            works[name] = _work(run_arguments, output / name, digest, _Row(display, name))

        def end(result: RunResult) -> None:
            records[result.name] = record = _record(result, _digest(common, entries[result.name]))
            if result.error is None:
                _write_record(output / result.name, record)
            console.print(f"{result.name}: {_summary(record)}", soft_wrap=True, markup=False, highlight=False)

        if works:
            fit_many(works, tokens_per_step=options.tokens_per_step, together=options.together, on_end=end)
    ordered = {name: records[name] for name in entries}
    _write_table(output / "runs.csv", ordered)
    console.print(_table(ordered))
    return 1 if any(record["error"] for record in ordered.values()) else 0


def _read_runs(path: Path) -> dict[str, dict[str, Any]]:
    """Run name to entry.

    Raises:
        UsageError: no such file, or not a mapping of names to settings.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--runs={path}: {error.strerror}; give a YAML file that maps names to settings.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--runs={path} is no YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict) or not content:
        raise UsageError(f"--runs={path} holds no runs; write `name: {{data: {{train_file: …}}, …}}` for each.")
    runs: dict[str, dict[str, Any]] = {}
    folders: dict[str, str] = {}
    for key, entry in content.items():
        name = str(key)
        if not name or Path(name).name != name or name.startswith("."):
            raise UsageError(f"--runs={path}: the run's name {name!r} becomes a folder; use one without '/'.")
        other = folders.setdefault(name.casefold(), name)
        if other != name or name in runs:
            raise UsageError(
                f"--runs={path}: the runs {other!r} and {name!r} would write into one folder; rename one."
            )
        if entry is not None and not isinstance(entry, dict):
            raise UsageError(f"--runs={path}: {name!r} is {entry!r}; write its settings as below `petune fit -c`.")
        runs[name] = dict(entry or {})
    return runs


def _arguments(
    name: str, entry: Mapping[str, Any], common: list[str], output: Path, folder: Path, *, resume: bool
) -> list[str]:
    """Those of `petune fit` for one run; what the run says goes over what all share."""
    recipes = entry.get("recipes") or []
    recipes = [recipes] if isinstance(recipes, str) else list(recipes)
    arguments = resolve_recipes([*common, *(part for recipe in recipes for part in ("-c", str(recipe)))])
    own = {key: value for key, value in entry.items() if key not in _OWN}
    if own:
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(own), encoding="utf-8")
        arguments += ["--config", str(file)]
    arguments += ["--trainer.enable_progress_bar=false", "--output", str(output / name)]
    last = output / name / "checkpoints" / "last.ckpt"
    checkpoint = str(last) if resume and last.exists() else entry.get("ckpt_path")
    return ["fit", *arguments, *(["--ckpt_path", checkpoint] if checkpoint else [])]


def _work(arguments: list[str], folder: Path, digest: str, row: Callback) -> Callable[[list[Callback]], Trainer]:
    def train(callbacks: list[Callback]) -> Trainer:
        _write_record(folder, {"digest": digest, "finished": False})
        return _OneOfMany(arguments, [*callbacks, row]).trainer

    return train


def _digest(common: list[str], entry: Mapping[str, Any]) -> str:
    """Of all that a run was asked for, the contents of its configuration files included."""
    parts = [Path(part).read_text(encoding="utf-8") if Path(part).is_file() else part for part in common]
    content = json.dumps([parts, entry], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / _RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_file(folder / _RECORD) as incoming:
        incoming.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _record(result: RunResult, digest: str) -> dict[str, Any]:
    return {
        "digest": digest,
        "finished": result.error is None,
        "error": None if result.error is None else one_line(result.error),
        "steps": result.steps,
        "seconds": round(result.seconds, 2),
        "metrics": result.metrics,
    }


def _summary(record: Mapping[str, Any]) -> str:
    if record["error"]:
        return f"failed: {record['error']}"
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in _shown(record).items())
    return f"{record['steps']} steps; {metrics}"


def _shown(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record["metrics"].items() if name.startswith(("val/", "train/loss"))}


def _write_table(path: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    names = sorted({name for record in records.values() for name in record["metrics"]})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "status", "steps", "seconds", *names])
    for run, record in records.items():
        values = [record["metrics"].get(name, "") for name in names]
        writer.writerow([run, record["error"] or "finished", record["steps"], record["seconds"], *values])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as incoming:
        incoming.write_text(text.getvalue(), encoding="utf-8")


def _table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for record in records.values() for name in _shown(record)))
    table = Table(box=None)
    for column in ("run", "steps", *names):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run, record in records.items():
        values = [f"{record['metrics'][name]:.4g}" if name in record["metrics"] else "" for name in names]
        table.add_row(run, "failed" if record["error"] else str(record["steps"]), *values)
    return table
