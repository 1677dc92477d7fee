"""The `petune` command; this front answers `--help`, `methods`, `recipes` and `env` itself.

The training libraries take seconds to import, so what needs them stands in modules that are imported when their
command runs.
"""

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from petune.cli.errors import UsageError, closest, report

TRAINER_COMMANDS = {
    "fit": "train an adapter:  petune fit -c text_classification -c lora --data.train_file=mine.csv",
    "validate": "metrics on the validation data:  petune validate --adapter DIR --data.validation_file=FILE",
    "test": "metrics on the test data:  petune test --adapter DIR --data.test_file=FILE",
    "predict": "answers for new rows:  petune predict --adapter DIR --input FILE [--output FILE]",
    "estimate": "parameters, bytes and memory before training; takes the arguments of fit",
}
"""Commands whose arguments are those of the Lightning command line (petune/cli/train.py)."""

_MANY = "fit-many"

DESCRIPTION = "Parameter-efficient fine-tuning for PEFT, Lightning and Hugging Face models."
EPILOG = "`petune COMMAND --help` explains a command. --debug, anywhere, shows the traceback of an error."


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing its usage block, so that every error looks the same."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; sys.argv when None.

    Returns:
        0, or 1 (it failed), 2 (the arguments are wrong), 130 (interrupted).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _dispatch(arguments)
    except SystemExit as stop:  # argparse after --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:  # the reader of a pipe went away, as in `petune recipes | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return report(error, debug)


def _dispatch(arguments: list[str]) -> int:
    parser = _build_parser()
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if command in TRAINER_COMMANDS and arguments[0] == command:
        _announce_loading()
        from petune.cli.train import run_trainer_command

        return run_trainer_command(command, arguments[1:])
    if command == _MANY and arguments[0] == command:
        return _fit_many(arguments[1:])
    commands = [*TRAINER_COMMANDS, _MANY, "compare", *_LOCAL_COMMANDS]
    if command is not None and command not in commands:
        raise UsageError(f"no command {command!r}.{closest(command, commands)} Commands: {', '.join(commands)}.")
    if command is None and not arguments:
        parser.print_help()
        return 0
    options, rest = parser.parse_known_args(arguments)
    if options.command == "compare":
        return _compare(options, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command is None:
        raise UsageError(f"no command given. Commands: {', '.join(commands)}.")
    return _LOCAL_COMMANDS[options.command](options)


def _announce_loading() -> None:
    if sys.stderr.isatty():
        print("loading torch, transformers, lightning …", file=sys.stderr)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="petune", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"petune {importlib.metadata.version('petune')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    _add_fit_many(commands.add_parser(_MANY, help="train the runs of a file at the same time on one base"))
    _add_export(commands.add_parser("export", help="write an adapter as a folder, a merged model or a plain LoRA"))
    _add_chat(commands.add_parser("chat", help="talk to a causal language model:  petune chat --adapter DIR"))
    # the arguments of fit stand among its own, so no abbreviation may take one of those
    _add_compare(commands.add_parser("compare", help="methods on one task, as table and plot", allow_abbrev=False))
    _add_demo(commands.add_parser("demo", help="adapt a small encoder on this machine, offline, and compare"))
    commands.add_parser("methods", help="the installed methods")
    recipe_actions = commands.add_parser("recipes", help="the shipped YAML files; show or copy one").add_subparsers(
        dest="action", metavar="[show NAME | cp NAME [DEST]]"
    )
    show = recipe_actions.add_parser("show", help="print a recipe")
    show.add_argument("name")
    copy = recipe_actions.add_parser("cp", help="copy a recipe to edit it")
    copy.add_argument("name")
    copy.add_argument("destination", nargs="?", help="file or folder (default: ./NAME.yaml)")
    commands.add_parser("env", help="versions and hardware, for a bug report")
    return parser


def _add_fit_many(parser: argparse.ArgumentParser) -> None:
    parser.description = "The arguments of `petune fit`, which hold for all runs, and:"
    parser.add_argument("--runs", required=True, metavar="FILE", help="YAML: name to what differs from run to run")
    parser.add_argument("--output", default="runs/many", metavar="DIR", help="a folder in it for each run (runs/many)")
    parser.add_argument(
        "--tokens-per-step", type=int, metavar="N", help="of all runs in a step at most (default: a batch of each)"
    )
    parser.add_argument("--together", type=int, metavar="N", help="runs in memory at a time (default: all)")
    parser.add_argument("--resume", action="store_true", help="skip what is finished, go on with what is not")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="DIR", help="adapter folder, e.g. RUN/adapter")
    parser.add_argument(
        "--format",
        choices=("adapter", "merged", "lora"),
        default="adapter",
        help="adapter: the folder as it is; merged: a plain model with the update folded in; lora: for plain PEFT",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--push", metavar="USER/NAME", help="also upload the folder to the Hugging Face hub")


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="DIR", help="adapter folder, or the folder of a run")
    parser.add_argument("--model", metavar="PATH", help="base model (default: the one the adapter was trained on)")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and end (default: read line after line)")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the first question")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer at most (256)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 for the likeliest token each time (0)"
    )


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.usage = "petune compare -c TASK --methods A,B,… [options] [any argument of petune fit]"
    parser.add_argument("--methods", default="", metavar="A,B", help="recipes, classes (peft.IA3Config) or YAML files")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N", help="a run of each method with each (0,1,2)")
    parser.add_argument("--rates", metavar="R,R", help="learning rates; each method takes the best of its first seed")
    parser.add_argument(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        help="also the frozen model with a trained head (where the task has one of its own)",
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="train runs of low-rank methods at the same time; a run's own memory and time are not measured then",
    )
    parser.add_argument("--output", default="runs/compare", metavar="DIR", help="folder; goes on there (runs/compare)")
    parser.add_argument("--overwrite", action="store_true", help="make runs of another configuration there anew")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=("retrieval", "vision"), default="retrieval")
    parser.add_argument("--method", action="append", help="only this method, may be given again (default: all)")
    parser.add_argument("--compare", action="store_true", help="fine-tune the whole model too")
    parser.add_argument("--budget", type=float, default=180.0, metavar="SECONDS", help="training is cut to fit (180)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", metavar="DIR", help="folder for the adapters (default: petune-demo)")


def _fit_many(arguments: list[str]) -> int:
    parser = _Parser(prog=f"petune {_MANY}")
    _add_fit_many(parser)
    options, rest = parser.parse_known_args(arguments)
    _announce_loading()
    from petune.cli.fit_many import run_fit_many

    return run_fit_many(options, rest)


def _methods(_: argparse.Namespace) -> int:
    from petune.cli import light

    light.print_methods()
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from petune.cli import light

    if options.action == "show":
        light.show_recipe(options.name)
    elif options.action == "cp":
        print(light.copy_recipe(options.name, options.destination))
    else:
        light.print_recipes()
    return 0


def _env(_: argparse.Namespace) -> int:
    from petune.cli import light

    light.print_env()
    return 0


def _export(options: argparse.Namespace) -> int:
    _announce_loading()
    from petune.cli.export import run_export

    return run_export(options.adapter, options.format, options.output, options.push)


def _chat(options: argparse.Namespace) -> int:
    _announce_loading()
    from petune.cli.chat import run_chat

    return run_chat(options)


def _compare(options: argparse.Namespace, rest: list[str]) -> int:
    _announce_loading()
    from petune.cli.compare import run_compare

    return run_compare(options, rest)


def _demo(options: argparse.Namespace) -> int:
    _announce_loading()
    from petune.cli.demo import run

    return run(options)


_LOCAL_COMMANDS = {
    "export": _export,
    "chat": _chat,
    "demo": _demo,
    "methods": _methods,
    "recipes": _recipes,
    "env": _env,
}
