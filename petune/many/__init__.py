"""Many adapters on one frozen base: `fit_many` trains them at the same time."""

from petune.many.fit import ManyRun, RunResult, fit_many

__all__ = ["ManyRun", "RunResult", "fit_many"]
