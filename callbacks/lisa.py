"""LISA: a few blocks drawn at random, in turns."""

from petune.callbacks.layer_schedule import LayerSchedule
from petune.layer_options import LISAOptions


class LISACallback(LISAOptions, LayerSchedule):
    """Train `layers` random blocks for `interval_steps` optimizer steps, then others (Pan et al. 2024)

    arXiv 2403.17919, algorithm 1: each of the blocks is as likely as the others, and embeddings and head always train.
    It is made for full fine-tuning (train: all), and schedules adapters as well, with what else trains left on. The
    defaults are those of the authors' code (LMFlow). It counts a block's optimizer state as discarded at the end of
    its turn, which is where the memory is saved (LMFlow issue 729); `reset_optimizer` off keeps it.

    Args:
        layers: blocks that train at a time, 1 or more.
        interval_steps: optimizer steps of a turn, 1 or more.
        min_layer: see `LayerSchedule`.
        seed: see `LayerSchedule`.
        reset_optimizer: see `LayerSchedule`.

    Raises:
        ValueError: an argument is out of its range.
        MisconfigurationException: as `LayerSchedule` does.
    """
