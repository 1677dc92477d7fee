"""What the layer schedules take, for Lightning's callbacks and transformers' alike, and the policies they make."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from petune.layer_scheduler import ImportantLayers, LayerPolicy, LayerScheduler, MovingLayers, RandomLayers


class LayerOptions(ABC):
    """Options of every layer schedule; `LayerSchedule` says what they do.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(self, min_layer: int, seed: int, reset_optimizer: bool) -> None:
        super().__init__()
        if min_layer < 0:
            raise ValueError(f"{type(self).__name__}.min_layer={min_layer} is no block; use 0 or more.")
        self.min_layer, self.seed, self.reset_optimizer = min_layer, seed, reset_optimizer

    @abstractmethod
    def make_policy(self) -> LayerPolicy:
        """Who chooses, for a new run."""

    def check(self, scheduler: LayerScheduler) -> None:  # noqa: B027 - most schedules suit all models
        """Refuse a model that this schedule does not suit, with a ValueError."""


class LISAOptions(LayerOptions):
    """Options of `LISACallback`."""

    def __init__(
        self,
        layers: int = 2,
        interval_steps: int = 20,
        min_layer: int = 0,
        seed: int = 0,
        reset_optimizer: bool = True,
    ) -> None:
        super().__init__(min_layer, seed, reset_optimizer)
        name = type(self).__name__
        if layers < 1:
            raise ValueError(f"{name}.layers={layers} lets no block train; use 1 or more.")
        if interval_steps < 1:
            raise ValueError(f"{name}.interval_steps={interval_steps} is no length; use 1 or more.")
        self.layers, self.interval_steps = layers, interval_steps

    def make_policy(self) -> RandomLayers:
        return RandomLayers(self.layers, self.interval_steps, self.seed)


class MotionOptions(LayerOptions):
    """Options of `FreezeByMotion`."""

    def __init__(
        self, freeze_ratio: float = 0.9, min_layer: int = 0, seed: int = 0, reset_optimizer: bool = False
    ) -> None:
        super().__init__(min_layer, seed, reset_optimizer)
        if not 0.0 <= freeze_ratio < 1.0:
            raise ValueError(
                f"{type(self).__name__}.freeze_ratio={freeze_ratio} is no share of the blocks that can rest; use at "
                "least 0 and below 1."
            )
        self.freeze_ratio = freeze_ratio

    def make_policy(self) -> MovingLayers:
        return MovingLayers(self.freeze_ratio, self.seed)


class ISTOptions(LayerOptions):
    """Options of `ISTCallback`, and what it learns."""

    def __init__(
        self,
        ratio: float = 0.25,
        suppressed_ratio: float = 0.5,
        suppression: float = 0.25,
        draws: int = 3,
        importance_rate: float = 10.0,
        interval_steps: int = 10,
        min_layer: int = 0,
        seed: int = 0,
        reset_optimizer: bool = False,
    ) -> None:
        super().__init__(min_layer, seed, reset_optimizer)
        self.ratio, self.suppressed_ratio, self.suppression = ratio, suppressed_ratio, suppression
        self.draws, self.importance_rate, self.interval_steps = draws, importance_rate, interval_steps
        for name, good, want in (
            ("ratio", 0.0 < ratio <= 1.0, "a share above 0 and at most 1"),
            ("suppressed_ratio", 0.0 < suppressed_ratio <= 1.0, "a share above 0 and at most 1"),
            ("suppression", 0.0 <= suppression <= 1.0, "0 to 1"),
            ("draws", draws >= 2, "2 or more: a reward is only good or bad beside another one"),
            ("importance_rate", importance_rate > 0.0, "a number above 0"),
            ("interval_steps", interval_steps >= 1, "1 or more"),
        ):
            if not good:
                raise ValueError(f"{type(self).__name__}.{name}={getattr(self, name)} is out of range; use {want}.")

    @property
    def importance(self) -> dict[int, float]:
        """I of each block that may train, by its index; once training has started."""
        return dict(zip(self._policy.scheduler.blocks, self._policy.importance.tolist(), strict=True))

    def make_policy(self) -> ImportantLayers:
        self._policy = ImportantLayers(self.ratio, self.suppressed_ratio, self.draws, self.importance_rate, self.seed)
        return self._policy

    def check(self, scheduler: LayerScheduler) -> None:
        with scheduler.suppressed((), self.suppression):
            pass

    def is_due(self, step: int) -> bool:
        """Whether the importance is updated before optimizer step `step`."""
        return step > 0 and step % self.interval_steps == 0

    def update(self, loss: Callable[[], float]) -> None:
        """Learn the importance from `loss()` with some blocks suppressed, several times over."""
        policy = self._policy

        def suppressed(blocks: Sequence[int]) -> float:
            with policy.scheduler.suppressed(blocks, self.suppression):
                return loss()

        policy.update(suppressed)
