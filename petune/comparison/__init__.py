"""Several methods on one task: the same data, steps and seeds, each run in a process of its own; table, plot, page."""

from petune.comparison.results import Comparison, Metric, Run
from petune.comparison.runner import Runner, run_in_processes, run_in_this_process
from petune.comparison.study import compare

__all__ = ["Comparison", "Metric", "Run", "Runner", "compare", "run_in_processes", "run_in_this_process"]
