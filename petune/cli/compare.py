"""`petune compare`: several methods on one task, as a table, a plot and a page."""

import argparse

from rich.console import Console

from petune.comparison import compare
from petune.comparison.results import PAGE, PLOT, RESULTS, SUMMARY
from petune.comparison.runner import run_in_processes
from petune.comparison.together import run_together


def run_compare(options: argparse.Namespace, arguments: list[str]) -> int:
    """Train what is missing, print the table.

    Args:
        options: methods, seeds, rates, baseline, together, output, overwrite.
        arguments: all others, which are those of fit.

    Returns:
        0, or 1 where a run failed.

    Raises:
        UsageError: an argument is wrong.
    """
    console = Console()
    comparison = compare(
        arguments,
        _parts(options.methods),
        _parts(options.seeds),
        options.output,
        rates=None if options.rates is None else _parts(options.rates),
        baseline=options.baseline,
        overwrite=options.overwrite,
        runner=run_together if options.together else run_in_processes,
        console=console,
    )
    console.print(comparison.rich_table())
    for note in comparison.notes:
        console.print(note, style="dim", markup=False, highlight=False)
    files = ", ".join(name for name in (PAGE, PLOT, SUMMARY, RESULTS) if (comparison.folder / name).is_file())
    console.print(f"written to {comparison.folder}: {files}", markup=False, highlight=False, soft_wrap=True)
    return 1 if comparison.failed else 0


def _parts(text: str) -> list[str]:
    return [part for part in map(str.strip, text.split(",")) if part]
