"""Real images with a class for every pixel, offline: scenes of scikit-learn's scans of written digits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Part = Literal["train", "validation", "test"]
Pixels = npt.NDArray[np.uint8]

CLASSES = ("background", *(str(digit) for digit in range(10)))
"""Names of a mask's values, in their order."""

_SHARES: dict[Part, float] = {"train": 0.6, "validation": 0.2, "test": 0.2}
_SPLIT_SEED = 0  # of the scans, not of the scenes: no seed puts a scan into two parts
_SCAN, _INK = 8, 16  # pixels a side, and the darkest value of a scan
_THRESHOLD = 0.35  # of full ink; below it a scan's edges are paler than the noise may be
_NOISE = 0.3  # of full ink, the brightest background


@dataclass(frozen=True)
class Scenes:
    """Grey images and their masks, both [count, size, size], uint8; a mask holds indices into CLASSES."""

    images: Pixels
    masks: Pixels

    def __len__(self) -> int:
        return len(self.images)


def digit_scenes(part: Part, count: int, size: int = 32, seed: int = 0) -> Scenes:
    """Scenes of 2 to 6 written digits, at one and two times their size, on grey noise.

    Where digits overlap the darker ink counts, and a pixel belongs to the digit whose ink it shows, if that is more
    than 0.35 of full ink. The parts have no scan in common, whatever the seed.

    Args:
        part: which scans the digits are taken from.
        count: scenes.
        size: pixels a side, 16 or more.
        seed: of the choice of scans, their places and the noise.

    Raises:
        ValueError: an unknown part, or a size that a digit of two times its size does not fit.
    """
    if part not in _SHARES:
        raise ValueError(f"digit_scenes got part={part!r}; use one of {', '.join(_SHARES)}.")
    if size < 2 * _SCAN:
        raise ValueError(f"digit_scenes got size={size}, and a digit takes up to {2 * _SCAN}; use that or more.")
    scans, digits = _scans(part)
    rng = np.random.default_rng(seed)
    images = np.empty((count, size, size), np.uint8)
    masks = np.zeros((count, size, size), np.uint8)
    for image, mask in zip(images, masks, strict=True):
        canvas, ink = rng.uniform(0.0, _NOISE, (size, size)), np.zeros((size, size))
        for index in rng.integers(len(scans), size=rng.integers(2, 7)):
            zoom = int(rng.integers(1, 3))
            scan = np.kron(scans[index], np.ones((zoom, zoom)))
            top, left = rng.integers(0, size - len(scan) + 1, size=2)
            place = np.s_[top : top + len(scan), left : left + len(scan)]
            mask[place][(scan > _THRESHOLD) & (scan > ink[place])] = digits[index] + 1
            ink[place] = np.maximum(ink[place], scan)
        image[:] = np.rint(255 * np.maximum(canvas, ink))
    return Scenes(images, masks)


def write_scenes(scenes: Scenes, folder: Path) -> Path:
    """Write `images/0000.png`, … and `masks/0000.png`, … as `petune.tasks.SegmentationData` reads them."""
    for name, arrays in (("images", scenes.images), ("masks", scenes.masks)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, array in enumerate(arrays):
            Image.fromarray(array).save(folder / name / f"{number:04d}.png")
    return folder


def _scans(part: Part) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The part's scans in 0..1, [scans, 8, 8], and their digits, [scans]; each digit in equal shares."""
    bunch: Any = load_digits()
    train, rest = train_test_split(
        np.arange(len(bunch.target)), train_size=_SHARES["train"], stratify=bunch.target, random_state=_SPLIT_SEED
    )
    validation, test = train_test_split(rest, test_size=0.5, stratify=bunch.target[rest], random_state=_SPLIT_SEED)
    chosen = {"train": train, "validation": validation, "test": test}[part]
    return bunch.images[chosen] / _INK, bunch.target[chosen]
