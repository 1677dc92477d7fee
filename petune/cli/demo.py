"""`petune demo`: hand the options to the demonstration."""

import argparse

from petune.demo import run_demo


def run(options: argparse.Namespace) -> int:
    """Run the demo; it prints its own tables."""
    given = {name: value for name, value in vars(options).items() if name not in ("command", "debug")}
    run_demo(**{name: value for name, value in given.items() if value is not None})
    return 0
