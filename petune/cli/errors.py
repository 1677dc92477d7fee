"""How the command line says what went wrong: one sentence on stderr, an exit code, no traceback."""

import difflib
import sys
import traceback
from collections.abc import Iterable

EXIT_RUNTIME = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what shells expect

# Raised by this package and by the libraries below it with a sentence meant for the user. Anything else is shown with
# its type, because it is more likely a fault of the program than of the input.
_SPEAKS_FOR_ITSELF = (ValueError, OSError, RuntimeError, ImportError, NotImplementedError)


class UsageError(Exception):
    """The command line or a recipe asks for something that does not exist."""


def closest(wanted: str, known: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the nearest known name, '' when nothing is near."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(wanted.lower(), names, n=1, cutoff=0.5)
    return f" Did you mean {names[near[0]]!r}?" if near else ""


def one_line(error: BaseException) -> str:
    """The message of an exception on one line, with its type where the message alone says little."""
    text = " ".join(str(error).split())
    if text.startswith("Call to compute_fn of link") and error.__cause__ is not None:
        return one_line(error.__cause__)  # jsonargparse puts the whole data module in front of what it says
    if isinstance(error, UsageError):
        return text
    if isinstance(error, _SPEAKS_FOR_ITSELF) and text:
        return text
    return f"{type(error).__name__}: {text}. Run again with --debug for the traceback."


def report(error: BaseException, debug: bool) -> int:
    """Print `petune: error: …` (and the traceback with --debug) and return the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        print("petune: interrupted; what was saved stays.", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"petune: error: {one_line(error)}", file=sys.stderr)
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_RUNTIME
