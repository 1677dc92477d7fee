"""`petune demo`: hand the options to the demonstration."""

import argparse

from petune.cli.quiet import quiet
from petune.demo import run_demo


def run(options: argparse.Namespace) -> int:
    """Run the demo, which prints its own report.

    Args:
        options: task, method, compare, budget, seed, output.
    """
    with quiet():
        run_demo(
            task=options.task,
            compare=options.compare,
            budget_s=options.budget,
            seed=options.seed,
            methods=options.method,
            output=options.output,
        )
    return 0
