"""SlimFit's schedule: the blocks that move least rest."""

from petune.callbacks.layer_schedule import LayerSchedule
from petune.layer_options import MotionOptions


class FreezeByMotion(MotionOptions, LayerSchedule):
    """Train the blocks whose parameters moved most when they last trained (Ardakani et al. 2023, arXiv 2305.18513)

    The inter-layer schedule of SlimFit, with blocks for its single matrices; its quantised activations are not part of
    it. Blocks that have not trained yet come first, in random order. The paper has a freezing rate for each task; the
    default is that of BERT on CoLA in its code. What always trains, a head or embeddings, stays on.

    Args:
        freeze_ratio: share of the blocks that rest in a step, at least 0 and below 1; rounded down.
        min_layer: see `LayerSchedule`.
        seed: see `LayerSchedule`.
        reset_optimizer: see `LayerSchedule`.

    Raises:
        ValueError: an argument is out of its range.
        MisconfigurationException: as `LayerSchedule` does.
    """
