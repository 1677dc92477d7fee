"""From the arguments of one `petune fit` to the runs of a comparison: resolved, checked against each other."""

import hashlib
import json
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from petune.cli.arguments import resolve_recipes
from petune.cli.errors import UsageError
from petune.cli.quiet import quiet
from petune.cli.train import ParsedFit
from petune.comparison.methods import BASELINE, Method
from petune.tasks import AdapterTask

Resolved = dict[str, Any]
"""All arguments of a fit with their values, as a configuration file has them."""

_BUDGET = (
    "max_epochs",
    "max_steps",
    "min_epochs",
    "min_steps",
    "accumulate_grad_batches",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "overfit_batches",
)
_LOW_RANK = ("FusedLoraConfig", "BiLoraConfig")
_OURS = ("output", "seed_everything", "ckpt_path")  # which each run has of its own


@dataclass(frozen=True)
class Trial:
    """One run that is to be there."""

    method: str
    seed: int
    rate: float | None
    """Learning rate; None for that of the method's recipe."""
    folder: Path
    """Of the run; what `petune fit` calls --output."""
    arguments: tuple[str, ...]
    """Of `petune fit`, the folder's aside."""
    digest: str
    """Of the resolved arguments."""
    joins: bool = False
    """Whether it can train at the same time as others on one base."""

    @property
    def fit_arguments(self) -> list[str]:
        """What `petune fit` takes to make the run, or to go on with it from its last checkpoint."""
        last = self.folder / "checkpoints" / "last.ckpt"
        return [*self.arguments, f"--output={self.folder}", *(["--ckpt_path=last"] if last.is_file() else [])]


def resolve(arguments: Sequence[str]) -> Resolved:
    """All arguments of `petune fit` with their values, less those that each run of a comparison has of its own.

    Raises:
        UsageError: one is wrong.
    """
    with quiet():
        parsed = ParsedFit(["fit", *resolve_recipes(list(arguments))])
        given = cast("Resolved", yaml.safe_load(parsed._parser("fit").dump(parsed.options, skip_none=False)))
    given["trainer"].pop("default_root_dir")
    return {name: value for name, value in given.items() if name not in _OURS}


class Plan:
    """The runs of some methods on one task.

    Args:
        arguments: of `petune fit`: the task's recipe or file, the data, and whatever holds for all methods.
        methods: what each adds to them.
        baseline: also the frozen model with a trained head; None where the task's head is small enough for that.
        output: folder of the comparison.

    Raises:
        UsageError: an argument is wrong; there is nothing to measure on; a method changes the task, the data or the
            number of steps.
    """

    def __init__(
        self, arguments: Sequence[str], methods: Sequence[Method], *, baseline: bool | None, output: Path
    ) -> None:
        self.arguments, self.output = tuple(arguments), output
        _refuse_own(self.arguments)
        self.resolved = resolve(self.arguments)
        _check_task(self.resolved)
        self.task: type[AdapterTask] = pkgutil.resolve_name(self.resolved["model"]["class_path"])
        wants_baseline = self.task.has_own_head if baseline is None else baseline
        self.methods = [*([BASELINE] if wants_baseline else []), *methods]
        self._configs = {method.name: self._resolve(method) for method in self.methods}

    @property
    def validates(self) -> bool:
        """Whether there is validation data, as far as the arguments tell."""
        return _has(self.resolved["data"], "validation")

    @property
    def digest(self) -> str:
        """Of the arguments that all methods share."""
        return _digest(self.resolved)

    def trial(self, method: Method, seed: int, rate: float | None, *, searched: bool = False) -> Trial:
        """The run of a method with a seed.

        Args:
            method: one of `methods`.
            seed: of initial values and dropout.
            rate: learning rate; None for the method's own.
            searched: there are runs with other rates.
        """
        own = (f"--seed_everything={seed}", *(() if rate is None else (f"--model.learning_rate={rate!r}",)))
        folder = self.output / method.name
        return Trial(
            method=method.name,
            seed=seed,
            rate=rate,
            folder=(folder / f"rate-{rate:g}" if searched else folder) / f"seed-{seed}",
            arguments=(*self.arguments, *method.arguments, *own),
            digest=_digest({"config": self._configs[method.name], "seed": seed, "rate": rate}),
            joins=_joins(self._configs[method.name]),
        )

    def _resolve(self, method: Method) -> Resolved:
        try:
            found = resolve([*self.arguments, *method.arguments])
        except UsageError as error:
            raise UsageError(f"method {method.name}: {error}") from error
        if found["model"]["class_path"] != self.resolved["model"]["class_path"]:
            raise UsageError(
                f"method {method.name} puts {found['model']['class_path']} in the place of the task "
                f"{self.resolved['model']['class_path']}; give the task with -c and leave it out of the method."
            )
        theirs, ours = _common(found), _common(self.resolved)
        for name in theirs.keys() | ours.keys():
            if theirs.get(name) != ours.get(name):
                raise UsageError(
                    f"method {method.name} sets {name}={theirs.get(name)} where the task has {ours.get(name)}; all "
                    "methods get the same data and steps, so leave it out of the method."
                )
        return found


def _joins(resolved: Resolved) -> bool:
    """Whether `petune.many` has grouped kernels for the method, and nothing else of the run needs it to be alone."""
    model, trainer = resolved["model"]["init_args"], resolved["trainer"]
    one_device = trainer["devices"] in ("auto", 1, "1") and trainer["strategy"] == "auto"
    low_rank = (model.get("adapter") or {}).get("class_path", "").rpartition(".")[2] in _LOW_RANK
    return low_rank and one_device and model.get("train") == "adapter" and not model.get("compile")


def _refuse_own(arguments: Sequence[str]) -> None:
    for name in ("seed_everything", "ckpt_path"):
        if any(argument.partition("=")[0] == f"--{name}" for argument in arguments):
            instead = "give --seeds" if name == "seed_everything" else "runs go on by themselves where they stopped"
            raise UsageError(f"--{name} is each run's own in a comparison; leave it out: {instead}.")


def _check_task(resolved: Resolved) -> None:
    """There is a number of steps, and something to measure on."""
    if resolved["trainer"]["max_time"] is not None:
        raise UsageError(
            f"trainer.max_time={resolved['trainer']['max_time']} would give each method another number of steps; use "
            "trainer.max_steps or trainer.max_epochs."
        )
    if resolved["trainer"]["fast_dev_run"]:
        raise UsageError("trainer.fast_dev_run saves nothing to compare; use trainer.max_steps.")
    if not _has(resolved["data"], "validation") and not _has(resolved["data"], "test"):
        raise UsageError(
            "there is neither validation nor test data to compare the methods on; add --data.validation_file=FILE, "
            "--data.test_file=FILE or --data.validation_split=0.1."
        )


def _has(data: Resolved, split: str) -> bool:
    """Whether a split is given; True where only reading the data would tell."""
    given = data["init_args"]
    if "validation_split" not in given:  # a data module of the user's
        return True
    aside = split == "validation" and bool(given["validation_split"] and given.get("train_file"))
    return bool(given.get(f"{split}_file") or given.get("dataset")) or aside


def _common(resolved: Resolved) -> Resolved:
    """What has to be the same for all methods, by the option's name."""
    budget = {f"trainer.{name}": resolved["trainer"].get(name) for name in _BUDGET}
    data = {f"data.{name}": value for name, value in resolved["data"]["init_args"].items()}
    return {"data": resolved["data"]["class_path"], **data, **budget}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
