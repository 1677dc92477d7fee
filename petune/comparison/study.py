"""`compare`: the runs of a comparison that are not there yet, then table, plot and page of all of them."""

import importlib.util
import json
import shlex
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import filelock
from rich.console import Console

from petune.atomic import replacing_file
from petune.cli.errors import UsageError
from petune.cli.light import environment
from petune.comparison.methods import HEAD, check_rates, check_seeds, find_methods
from petune.comparison.plan import Plan, Trial
from petune.comparison.record import RESIDENT, Record, read_digest, read_record, write_trial
from petune.comparison.results import Comparison, Run, best_of, main_metric
from petune.comparison.runner import Runner, run_in_processes

MANIFEST = "comparison.json"
"""In the folder of a comparison: the digest of what its methods share, and their names."""
LOCK = ".lock"


def compare(
    arguments: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int | str] = (0, 1, 2),
    output: str | Path = "runs/compare",
    *,
    rates: Sequence[float | str] | None = None,
    baseline: bool | None = None,
    overwrite: bool = False,
    runner: Runner = run_in_processes,
    console: Console | None = None,
) -> Comparison:
    """Train each method with each seed on the same task, and write what came out.

    Runs that are finished are read, not run again; one that was interrupted goes on. The tables are written after
    each run, plot and page at the end.

    Args:
        arguments: of `petune fit`: task, data, and what holds for all methods.
        methods: names of recipes, PEFT config classes, or YAML files that do what a method's recipe does.
        seeds: of initial values and dropout; the data keeps its own, and so its split and order.
        output: folder of the comparison; a run is in `<output>/<method>/seed-<n>`, with rates one level deeper.
        rates: learning rates; each method takes the one with which its first seed does best on the validation data.
        baseline: also the frozen model with a trained head; None where the task has a head of its own.
        overwrite: make runs anew whose configuration is no longer the one they were made with.
        runner: trains the runs.
        console: where progress goes; None for standard output.

    Raises:
        UsageError: an argument is wrong, or `output` holds something else; nothing was trained then.
        ImportError: matplotlib or pandas is not installed.
        KeyboardInterrupt: what was found until then is written already.
    """
    found, numbers = find_methods(methods), check_seeds(seeds)
    tried = None if rates is None else check_rates(rates)
    _check_extra()
    folder = Path(output)
    plan = Plan(arguments, found, baseline=baseline, output=folder)
    if tried is not None and not plan.validates:
        raise UsageError("--rates chooses by validation data and there is none; add --data.validation_file=FILE.")
    own = ["--methods", ",".join(methods), "--seeds", ",".join(map(str, numbers)), "--output", str(folder)]
    own += ["--rates", ",".join(map(str, tried))] if tried else []
    own += [] if baseline is None else ["--baseline" if baseline else "--no-baseline"]
    command = shlex.join(["petune", "compare", *arguments, *own])
    study = _Study(plan, runner, console or Console(), command)
    with _owned(folder, plan, overwrite=overwrite):
        return study.run(numbers, tried, overwrite=overwrite)


class _Study:
    """The runs of a plan as they come in."""

    def __init__(self, plan: Plan, runner: Runner, console: Console, command: str) -> None:
        self.plan, self.runner, self.console, self.command = plan, runner, console, command
        self.environment = dict(environment())
        self.runs: dict[Path, Run] = {}
        self.searches: dict[str, list[Trial]] = {}
        """By method, the runs that a learning rate is chosen of."""

    def run(self, seeds: list[int], rates: list[float] | None, *, overwrite: bool) -> Comparison:
        """Train what is missing, and write what there is, also when it is interrupted."""
        try:
            if rates is None:
                trials = [self.plan.trial(method, seed, None) for method in self.plan.methods for seed in seeds]
                self._train(trials, overwrite=overwrite)
            else:
                self._search(seeds, rates, overwrite=overwrite)
        except KeyboardInterrupt:
            self._found().write()
            raise
        comparison = self._found()
        comparison.write()
        return comparison

    def _search(self, seeds: list[int], rates: list[float], *, overwrite: bool) -> None:
        """All rates with the first seed, and the other seeds with the best."""
        for method in self.plan.methods:
            tries = [self.plan.trial(method, seeds[0], rate, searched=True) for rate in rates]
            self.searches[method.name] = tries
        self._train([trial for tries in self.searches.values() for trial in tries], overwrite=overwrite)
        rest: list[Trial] = []
        for method in self.plan.methods:
            if (best := self._best(method.name)) is not None:
                rest += [self.plan.trial(method, seed, best.trial.rate, searched=True) for seed in seeds[1:]]
        self._train(rest, overwrite=overwrite)

    def _train(self, trials: list[Trial], *, overwrite: bool) -> None:
        for trial in trials:
            _prepare(trial, overwrite=overwrite)
        for trial in trials:
            if (record := read_record(trial.folder)) is not None:
                self.runs[trial.folder] = Run(trial, record)
        missing = [trial for trial in trials if trial.folder not in self.runs]
        if there := len(trials) - len(missing):
            self._say(f"{there} of {len(trials)} runs are there already")
        for number, (trial, failure) in enumerate(self.runner(missing), start=1):
            run = self.runs[trial.folder] = Run(trial, read_record(trial.folder), failure)
            done = f"{run.record.steps} steps, {run.record.seconds:.1f} s" if run.record else f"failed: {failure}"
            rate = "" if trial.rate is None else f", rate {trial.rate:g}"
            self._say(f"[{number}/{len(missing)}] {trial.method}, seed {trial.seed}{rate}: {done}")
            self._found().write_tables()  # the plot takes longer than a small run

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _best(self, method: str) -> Run | None:
        """The run with the method's best rate by the validation data, of those that are there; None without any."""
        tries = [trial.folder for trial in self.searches.get(method, ())]
        runs = [self.runs[folder] for folder in tries if folder in self.runs]
        records = [_validated(run.record) for run in runs if run.record is not None]
        metric = main_metric(records, self.plan.task.main_metrics)
        return best_of(runs, metric) if metric else None

    def _marked(self) -> list[Run]:
        """All runs, with those whose rate was not taken marked as such."""
        best = {method: run for method in self.searches if (run := self._best(method)) is not None}
        return [
            replace(run, chosen=run.trial.method not in best or run.trial.rate == best[run.trial.method].trial.rate)
            for run in self.runs.values()
        ]

    def _found(self) -> Comparison:
        order = {method.name: index for index, method in enumerate(self.plan.methods)}
        runs = sorted(self._marked(), key=lambda run: (order[run.trial.method], run.trial.seed, run.trial.rate or 0))
        records = [run.record for run in runs if run.record is not None]
        data = self.plan.resolved["data"]["init_args"]
        source = str(data.get("train_file") or data.get("dataset") or self.plan.resolved["data"]["class_path"])
        return Comparison(
            folder=self.plan.output,
            title=f"{self.plan.task.__name__} on {Path(source).name}",
            metric=main_metric(records, self.plan.task.main_metrics),
            runs=runs,
            environment={"command": self.command, **self.environment},
            notes=_notes(self.plan, runs),
        )


def _prepare(trial: Trial, *, overwrite: bool) -> None:
    """Have the folder of a run hold that run, begun or finished, or nothing.

    Raises:
        UsageError: it holds one of another configuration.
    """
    there = read_digest(trial.folder)
    if there == trial.digest:
        return
    if there is not None:
        if not overwrite:
            raise UsageError(
                f"{trial.folder} was made with another configuration; take another --output, or --overwrite to make "
                "it anew."
            )
        shutil.rmtree(trial.folder)
    write_trial(trial.folder, trial.digest, trial.fit_arguments)


@contextmanager
def _owned(folder: Path, plan: Plan, *, overwrite: bool) -> Generator[None]:
    """Hold the folder of the comparison for this process.

    Raises:
        UsageError: it holds something else, or a comparison of other arguments, or another process works in it.
    """
    manifest = folder / MANIFEST
    if folder.exists() and not manifest.is_file() and not _is_empty(folder):
        raise UsageError(f"--output={folder} holds something that is no comparison; take another one.")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            methods = [method.name for method in plan.methods]
            there = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else None
            if there is not None and there["digest"] == plan.digest:
                methods = list(dict.fromkeys([*there["methods"], *methods]))
            elif there is not None:
                if not overwrite:
                    raise UsageError(
                        f"--output={folder} holds a comparison with other arguments of the task; take another one, or "
                        "--overwrite to make it anew."
                    )
                for name in there["methods"]:
                    shutil.rmtree(folder / name, ignore_errors=True)
            with replacing_file(manifest) as path:
                path.write_text(json.dumps({"digest": plan.digest, "methods": methods}, indent=2), encoding="utf-8")
            yield
    except filelock.Timeout as error:
        raise UsageError(
            f"another `petune compare` works in --output={folder}; wait for it, or take another one."
        ) from error


def _is_empty(folder: Path) -> bool:
    return all(path.name == LOCK for path in folder.iterdir())


def _validated(record: Record) -> Record:
    """A record without what was measured on test data."""
    return replace(record, metrics={name: value for name, value in record.metrics.items() if name.startswith("val/")})


def _check_extra() -> None:
    for package in ("matplotlib", "pandas"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"`petune compare` draws and tabulates with {package}, which is not installed; run: "
                'pip install "petune[compare]"'
            )


def _notes(plan: Plan, runs: Sequence[Run]) -> list[str]:
    """How to read the numbers, as far as it depends on them."""
    records = [run.record for run in runs if run.record is not None]
    notes: list[str] = []
    if records:
        notes += [_budget(runs), _spread(runs)]
        kinds = {record.memory for record in records if record.peak_memory_bytes is not None}
        libraries = ", all libraries included" if RESIDENT in kinds else ""
        notes += [f"Peak memory is that of the {' or the '.join(sorted(kinds))}{libraries}."] if kinds else []
        notes.append("Seconds are of the training alone, without loading and validation.")
        joined = sorted({run.trial.method for run in runs if run.record is not None and run.record.together > 1})
        if joined:
            notes.append(
                f"Runs of {', '.join(joined)} trained at the same time: their seconds are shares of the time of all, "
                "and their own memory is not known."
            )
    if any(not run.chosen for run in runs):
        notes.append(
            "Each method's learning rate was chosen by the validation data with the first seed, so its val/ metrics "
            "are on the high side; test/ metrics are not."
        )
        notes += _edges(runs)
    if plan.methods[0].name == HEAD:
        notes.append(f"{HEAD} is the frozen model with a trained head: what the data gives without an adapter.")
    else:
        notes.append("There is no row of the frozen model with a trained head (--baseline adds it).")
    return notes


def _budget(runs: Sequence[Run]) -> str:
    steps = {run.record.steps for run in runs if run.record is not None}
    rows = {run.record.rows["train"] for run in runs if run.record is not None}
    measured = next(run.record.rows for run in runs if run.record is not None)
    on = " and ".join(f"{measured[split]} rows ({split}/)" for split in ("val", "test") if split in measured)
    if len(steps) > 1:
        counts = ", ".join(
            sorted({f"{run.trial.method} {run.record.steps}" for run in runs if run.record is not None})
        )
        return f"The runs took different numbers of optimizer steps ({counts}), so they do not compare like with like."
    trained = " to ".join(f"{count:,}" for count in sorted({min(rows), max(rows)}))
    return f"Each run took {steps.pop():,} optimizer steps on {trained} rows, epochs together; measured on {on}."


def _edges(runs: Sequence[Run]) -> list[str]:
    """Methods that took the smallest or largest of several rates, beyond which a better one may lie."""
    taken = {run.trial.method: run.trial.rate for run in runs if run.chosen and run.trial.rate is not None}
    tried = sorted({run.trial.rate for run in runs if run.trial.rate is not None})
    ends = {"smallest": tried[0], "largest": tried[-1]}
    return [
        f"{', '.join(methods)} took the {which} rate tried, {rate:g}: one beyond it may be better."
        for which, rate in ends.items()
        if (methods := [method for method, chosen in taken.items() if chosen == rate])
    ]


def _spread(runs: Sequence[Run]) -> str:
    seeds = len({run.trial.seed for run in runs})
    if seeds == 1:
        return "One seed: how far another one would be from it is not known."
    return (
        f"± is the standard deviation over {seeds} seeds, which set initial values and dropout; the standard error of "
        "a mean is that over the square root of n. The order of the training rows and the rows measured on are the "
        "same for all seeds, so what another draw of them would change is not in it."
    )
