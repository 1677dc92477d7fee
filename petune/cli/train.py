"""`petune fit`, `validate`, `test` and `predict`: Lightning's command line over the tasks, with PETune's defaults."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning_utilities.core.imports import RequirementCache

from petune import tasks
from petune.callbacks import AdapterCheckpoint, ExportAdapter, MemoryReport, ProgressBar
from petune.cli.arguments import CommandParser, explain, resolve_recipes, take_option
from petune.cli.describe import adapter_line, card_info, run_config, short_name
from petune.cli.errors import UsageError
from petune.cli.predictions import WritePredictions
from petune.cli.quiet import quiet
from petune.cli.saved import SavedRun
from petune.tasks import AdapterTask

# The parser knows the short names of classes that are imported; the tasks' package imports each at its first use.
KNOWN_CLASSES = [getattr(tasks, name) for name in tasks.__all__]

DEFAULT_EPOCHS = 3
DEFAULT_PREDICTIONS = "predictions.jsonl"
OUTPUT_HELP = {
    "fit": "Folder of the run; adapter/, checkpoints/ and logs/ go there (default: runs/TASK-ADAPTER).",
    "predict": f"File for the answers, one JSON object a row (default: {DEFAULT_PREDICTIONS}).",
}


def run_trainer_command(command: str, arguments: list[str]) -> int:
    """Parse and run one of the Lightning commands.

    Args:
        command: fit, validate, test, predict or estimate.
        arguments: what follows the command.

    Raises:
        UsageError: an argument or a recipe is wrong.
    """
    with quiet():
        arguments = resolve_recipes(arguments)
        if command == "estimate":
            from petune.cli.estimate import run_estimate

            return run_estimate(arguments)
        folder, _ = take_option(arguments, "--adapter")
        if folder is None or command == "fit":
            PetuneCLI([command, *arguments])
        else:
            saved = SavedRun.load(folder)
            PetuneCLI([command, "--config", saved.config_yaml(command), *arguments], saved)
    return 0


class PetuneCLI(LightningCLI):
    """Lightning's command line for one command; constructing it runs the command.

    Args:
        arguments: the command and its arguments, recipes resolved.
        saved: the adapter folder to validate, test or predict with.
    """

    def __init__(self, arguments: list[str], saved: SavedRun | None = None) -> None:
        self.saved = saved
        super().__init__(
            model_class=AdapterTask,
            datamodule_class=LightningDataModule,
            save_config_callback=SaveConfigCallback if arguments[0] == "fit" else None,
            save_config_kwargs={"overwrite": True},  # a resumed run may log into the folder it logged into before
            seed_everything_default=0,
            trainer_defaults={"enable_model_summary": False, "log_every_n_steps": 10},  # MemoryReport tells more
            parser_class=CommandParser,
            parser_kwargs={"prog": "petune"},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=arguments,
            auto_configure_optimizers=False,
        )

    # ---------------------------------------------------------------------------------------------------- arguments

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Tell the data which tokenizer the model has, and the model which labels the data has."""
        sources = ("model.init_args.model", "model.init_args.tokenizer")
        parser.link_arguments(sources, "data.init_args.tokenizer", compute_fn=_tokenizer)
        if self.saved is None:  # a saved run knows its labels, and its training rows may be gone
            parser.link_arguments("data", "model.init_args.labels", compute_fn=_labels, apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults(weights_only=True)  # a checkpoint is data; a pickle with code in it is refused
        if subcommand in OUTPUT_HELP:
            parser.add_argument("--output", type=str | None, default=None, help=OUTPUT_HELP[subcommand])
        if subcommand != "fit":
            adapter_help = "Adapter folder of a run; it names task, base model and columns."
            parser.add_argument("--adapter", type=str | None, default=None, help=adapter_help)
        if subcommand == "predict":
            parser.add_argument("--input", type=str | None, default=None, help="File with the new rows.")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args` whatever stands in sys.argv."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Keep the configuration as given: the base class would put the checkpoint's over it."""

    @property
    def options(self) -> Any:
        """The parsed arguments of the command."""
        return self.config[self.config["subcommand"]]

    @property
    def run_folder(self) -> Path:
        """Where a fit writes."""
        options = self.options
        if options.output or options.trainer.default_root_dir:
            return Path(options.output or options.trainer.default_root_dir)
        names = (options.model.class_path, options.model.init_args.adapter.class_path.removesuffix("Config"))
        return Path("runs") / "-".join(map(short_name, names))

    def before_instantiate_classes(self) -> None:
        """Fill in what depends on other arguments.

        Raises:
            UsageError: there is nothing to predict, or no such checkpoint, where Lightning would start anew.
        """
        options, trainer = self.options, self.options.trainer
        if self.subcommand == "predict":
            rows = options.data.init_args
            rows.predict_file = options.input or rows.get("predict_file")
            if not rows.predict_file and not rows.get("dataset"):
                raise UsageError("there is nothing to predict; add --input FILE.")
        if trainer.max_epochs is None and trainer.max_time is None and trainer.max_steps == -1:
            trainer.max_epochs = DEFAULT_EPOCHS
        if self.subcommand == "fit":
            trainer.default_root_dir = str(self.run_folder)
        if options.ckpt_path is not None:
            last = self.run_folder / "checkpoints" / "last.ckpt" if self.subcommand == "fit" else None
            path = last if options.ckpt_path == "last" and last else Path(options.ckpt_path)
            if not path.exists():
                raise UsageError(f"--ckpt_path={options.ckpt_path}: there is no {path}; leave it out to start anew.")
            options.ckpt_path = str(path)

    # ------------------------------------------------------------------------------------------------------ objects

    def instantiate_classes(self) -> None:
        """Make data, task and trainer; no weights are read yet but those of a saved adapter.

        Raises:
            UsageError: a class refuses its arguments.
        """
        try:
            self.config_init = self.parser.instantiate(self.config)
        except ValueError as error:
            raise UsageError(explain(str(error))) from error
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        if self.saved is not None:
            self.saved.load_into(self.model)
        self.trainer = self.instantiate_trainer()

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given = config.get("callbacks") or []
        given = list(given) if isinstance(given, list) else [given]
        config["callbacks"] = [*given, *self._missing_callbacks(given)]
        for callback in config["callbacks"]:
            if isinstance(callback, ExportAdapter):
                callback.run_config = run_config(self.model, self.options)
                callback.directory = callback.directory or self.run_folder
        if self.subcommand != "fit":
            config["logger"] = config.get("logger") or False  # a look at data leaves no folder behind
        elif config.get("logger") in (None, True):
            config["logger"] = default_loggers(self.run_folder)
        return super()._instantiate_trainer(config, callbacks)

    def _missing_callbacks(self, given: list[Callback]) -> Iterator[Callback]:
        """The default callbacks, less those that the configuration brings itself or switches off."""
        trainer = self.options.trainer
        wanted: list[tuple[type[Callback], Callable[[], Callback]]] = []
        if trainer.enable_progress_bar is not False:
            wanted.append((AnyProgressBar, ProgressBar))
        if self.subcommand == "fit" and not trainer.fast_dev_run:
            wanted += [(ExportAdapter, self._export), (MemoryReport, MemoryReport)]
            if trainer.enable_checkpointing is not False:
                wanted += [(AdapterCheckpoint, AdapterCheckpoint), (Checkpoint, self._checkpoint)]
        if self.subcommand == "predict":
            wanted.append((WritePredictions, self._predictions))
        for kind, make in wanted:
            if not any(isinstance(callback, kind) for callback in given):
                yield make()

    def _checkpoint(self) -> Callback:
        # No version counter: it would write last-v1.ckpt beside a stale last.ckpt when a run is started again.
        return ModelCheckpoint(self.run_folder / "checkpoints", save_last=True, enable_version_counter=False)

    def _export(self) -> Callback:
        return ExportAdapter(self.run_folder, card=card_info(self.options))

    def _predictions(self) -> Callback:
        return WritePredictions(Path(self.options.output or DEFAULT_PREDICTIONS))

    # ---------------------------------------------------------------------------------------------------------- run

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as stop:
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it from then on, and exits
            raise KeyboardInterrupt from stop

    def before_fit(self) -> None:
        """Say what is trained and where it goes; the first of several processes says it."""
        if not self.trainer.is_global_zero:
            return
        print(adapter_line(self.model))
        adapter = self.run_folder / "adapter"
        replaces = " (replaces the adapter there once the new one is whole)" if adapter.exists() else ""
        print(f"run: {self.run_folder}, adapter: {adapter}{replaces}", flush=True)

    def before_predict(self) -> None:
        """Keep no predictions in memory: they are written batch by batch."""
        self.config_init["predict"]["return_predictions"] = False


def default_loggers(folder: Path) -> list[Logger]:
    """A CSV log, and TensorBoard's if it is installed, both in `<folder>/logs/version_<n>`."""
    csv = CSVLogger(folder, name="logs")
    loggers: list[Logger] = [csv]
    if RequirementCache("tensorboard"):
        loggers.append(TensorBoardLogger(folder, name="logs", version=csv.version))
    return loggers


def _labels(data: Any) -> list[str] | None:
    return getattr(data, "labels", None)  # pairs have none


def _tokenizer(model: str, tokenizer: str | None) -> str:
    return tokenizer or model


class ParsedFit(PetuneCLI):
    """The command line of fit, parsed and checked but not run."""

    def _set_seed(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...
