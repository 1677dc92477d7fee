"""Hide the messages of libraries that a user of the command line can do nothing about; all others pass."""

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager

import datasets.utils.logging
import transformers.utils.logging

_WARNINGS = (
    r".*does not have many workers.*",  # rows in memory: workers cost more than they bring
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*Checkpoint directory .* exists and is not empty.*",  # resuming is meant
    r".*`loftq_config` specified but will be ignored.*",  # the parser fills in every field's default
    r".*is_gradient_checkpointing` is deprecated.*",  # PEFT's use of transformers
    r".*overridden `on_before_batch_transfer`.*",  # which tasks check their labels in
    r"Found .* in eval mode at the start of training.*",  # a side network's backbone is meant to be
    r".*number of training batches .* is smaller than the logging interval.*",
)
_MESSAGES = ("litlogger", "litmodels", "estimate number of stepping batches", "Detected KeyboardInterrupt")


@contextmanager
def quiet() -> Generator[None, None, None]:
    """Within the block: no advertisement, no bar for what takes milliseconds, no report that the head is new."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    verbosity = transformers.utils.logging.get_verbosity()
    logger.addFilter(_wanted)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for pattern in _WARNINGS:
                warnings.filterwarnings("ignore", message=pattern)
            yield
    finally:
        logger.removeFilter(_wanted)
        transformers.utils.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()
        datasets.utils.logging.enable_progress_bar()


def _wanted(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return not any(part in text for part in _MESSAGES)
