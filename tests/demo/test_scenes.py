"""The bundled scenes: real scans, exact masks, and nothing in common between what is learned from and measured on."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from petune.demo.scenes import CLASSES, _scans, digit_scenes, write_scenes


def test_a_scene_is_a_function_of_part_and_seed():
    one, same, other = (digit_scenes("train", 5, 41, seed) for seed in (3, 3, 4))
    assert one.images.shape == one.masks.shape == (5, 41, 41)
    assert one.images.dtype == one.masks.dtype == np.uint8
    assert np.array_equal(one.images, same.images)
    assert np.array_equal(one.masks, same.masks)
    assert not np.array_equal(one.images, other.images)
    assert not np.array_equal(one.images, digit_scenes("test", 5, 41, 3).images)


def test_the_parts_share_no_scan_and_use_them_all():
    parts = {part: [scan.tobytes() for scan in _scans(part)[0]] for part in ("train", "validation", "test")}
    sizes = {part: len(scans) for part, scans in parts.items()}
    assert sizes == {"train": 1078, "validation": 359, "test": 360}
    found = [scan for scans in parts.values() for scan in scans]
    assert sorted(found) == sorted((scan / 16).tobytes() for scan in load_digits().images)


def test_every_part_has_every_digit_in_equal_shares():
    for part in ("train", "validation", "test"):
        counts = np.bincount(_scans(part)[1], minlength=10)
        assert counts.min() > 0.9 * counts.mean()


def test_ink_has_the_class_of_its_digit_and_all_else_is_background():
    scenes = digit_scenes("train", 200, 32)
    assert set(np.unique(scenes.masks)) == set(range(len(CLASSES)))
    assert scenes.images[scenes.masks > 0].min() > 0.35 * 255
    assert scenes.images[scenes.masks == 0].max() <= round(0.35 * 255)
    assert 0.5 < (scenes.masks == 0).mean() < 0.9


def test_two_to_six_digits_stand_in_a_scene():
    found = [len(np.unique(mask)) - 1 for mask in digit_scenes("validation", 300, 96).masks]
    assert min(found) >= 1  # two of the same digit are one class
    assert max(found) == 6


def test_written_scenes_read_back_the_same(tmp_path):
    scenes = digit_scenes("test", 3, 23)
    folder = write_scenes(scenes, tmp_path / "test")
    assert sorted(path.name for path in (folder / "images").iterdir()) == ["0000.png", "0001.png", "0002.png"]
    for name, arrays in (("images", scenes.images), ("masks", scenes.masks)):
        assert np.array_equal(np.array(Image.open(folder / name / "0002.png")), arrays[2])


def test_an_unknown_part_or_too_small_a_scene_is_refused():
    with pytest.raises(ValueError, match="got part='valid'; use one of train, validation, test"):
        digit_scenes("valid", 1)
    with pytest.raises(ValueError, match="got size=15, and a digit takes up to 16; use that or more"):
        digit_scenes("train", 1, 15)
