"""Images with masks for the segmentation task: folders of files, split, decoded and batched."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from sklearn.model_selection import train_test_split
from torch.utils.data import default_collate

from petune.tasks.loaders import Order, ResumableLoader, TableBatches
from petune.tasks.pictures import Decode, Picture, PictureRows, check_sizes, find_pictures
from petune.tasks.sources import DataError, existing
from petune.tasks.text_data import STAGES, SplitName


class SegmentationData(L.LightningDataModule):
    """Images with a mask each, from folders.

    A folder has the images in images/ and the masks in masks/, under equal names but for the ending; a mask is a PNG
    with the number of its class in each pixel, from 0. Batches hold pixel_values [batch, channels, height, width] and
    labels [batch, height, width]; those of validation, test and prediction also `row` [batch], the number of the image
    in its split, from 0, and `size` [batch, 2], its height and width in the file. Nothing is augmented.

    Args:
        train_file: folder with images/ and masks/.
        validation_file: the same, to validate on.
        test_file: the same, to test on.
        predict_file: folder of images, or one with images/; needs no masks.
        labels: names of the classes in the order of their numbers; otherwise the numbers 0, 1, … up to the largest in
            the training masks, which are all read for it.
        ignore_index: value of the masks' pixels that do not count.
        image_size: pixels a side, or height and width, to resize images (bilinear) and masks (nearest) to; None where
            all have one size already.
        channels: 1 for grey images, 3 for colours.
        mean: subtracted from pixels in 0..1, one for all channels or one each, as the model was pretrained.
        std: what pixels are divided by then, likewise.
        batch_size: images a batch, on each device.
        validation_split: share of the training images to validate on when no others are given, 0..1.
        num_workers: processes that decode beside the training.
        seed: of the order of the images and of the validation split.

    Raises:
        FileNotFoundError: a folder is not there.
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        train_file: str | None = None,
        validation_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        labels: list[str] | None = None,
        ignore_index: int = 255,
        image_size: int | list[int] | None = None,
        channels: int = 3,
        mean: float | list[float] = 0.5,
        std: float | list[float] = 0.5,
        batch_size: int = 16,
        validation_split: float = 0.1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= validation_split < 1:
            raise ValueError(f"validation_split={validation_split} is no share of the images; use 0 up to below 1.")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} is negative; use 0 to decode in the main process.")
        if channels not in (1, 3):
            raise ValueError(f"channels={channels} is neither 1 (grey) nor 3 (colours); use one of them.")
        self.files: dict[SplitName, Path | None] = {
            "train": _folder(train_file, "train_file"),
            "validation": _folder(validation_file, "validation_file"),
            "test": _folder(test_file, "test_file"),
            "predict": _folder(predict_file, "predict_file"),
        }
        self.validation_split, self.num_workers = validation_split, num_workers
        self._given_labels = labels
        self._order = Order(batch_size, seed=seed)
        self._decode = Decode(
            channels=channels,
            image_size=_image_size(image_size),
            mean=_per_channel("mean", mean, channels),
            std=_per_channel("std", std, channels),
            ignore_index=ignore_index,
            classes=None,
        )
        if min(self._decode.std) <= 0:
            raise ValueError(f"std={std} is not above 0; use such as 0.5.")
        self._pictures: dict[SplitName, list[Picture]] = {}

    @cached_property
    def labels(self) -> list[str]:
        """Class names in the order of their numbers.

        Raises:
            DataError: there are no training masks to find the largest number in.
        """
        if self._given_labels is not None:
            return list(self._given_labels)
        if self.files["train"] is None:
            raise DataError("The classes are counted in the training masks and there are none; give labels.")
        values = (self._decode.classes_of(picture.mask) for picture in self.pictures("train") if picture.mask)
        largest = max(int(value[value != self._decode.ignore_index].max(initial=0)) for value in values)
        return [str(number) for number in range(largest + 1)]

    def pictures(self, split: SplitName) -> list[Picture]:
        """Files of a split in the order of their rows, found and checked once.

        Raises:
            DataError: there are none, or they do not fit together.
        """
        if split not in self._pictures:
            folder = self.files[split]
            if folder is not None:
                found = find_pictures(folder, masks=split != "predict")
                check_sizes(found, alike=self._decode.image_size is None)
                self._pictures[split] = found
                if split == "train" and self.files["validation"] is None and self.validation_split:
                    self._set_aside()
            elif split == "validation" and self._has_validation():
                self.pictures("train")
            else:
                ways = " or validation_split" if split == "validation" else ""
                raise DataError(f"No {split} images were given; give {split}_file{ways}.")
        return self._pictures[split]

    def setup(self, stage: str | None = None) -> None:
        """Find and check the images of a stage.

        Raises:
            DataError: there are none for the stage, or they do not fit together.
        """
        for split in STAGES["fit" if stage is None else stage]:
            if split != "validation" or stage == "validate" or self._has_validation():
                self.pictures(split)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches, in the order of (seed, epoch)."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Batches always in the same order; none when there is nothing to validate on."""
        return self._loader("validation") if self._has_validation() else []

    def test_dataloader(self) -> ResumableLoader:
        """Batches always in the same order."""
        return self._loader("test")

    def predict_dataloader(self) -> ResumableLoader:
        """Batches always in the same order, without labels, each image once."""
        return self._loader("predict")

    def _has_validation(self) -> bool:
        return self.files["validation"] is not None or (self.files["train"] is not None and self.validation_split > 0)

    def _set_aside(self) -> None:
        """Move `validation_split` of the training images to validation."""
        pictures = self._pictures["train"]
        aside = int(np.ceil(len(pictures) * self.validation_split))
        if aside >= len(pictures):
            raise DataError(
                f"validation_split={self.validation_split} takes {aside} of the {len(pictures)} images of "
                f"{self.files['train']} and leaves none to train on; use a smaller one or 0."
            )
        kept, moved = train_test_split(range(len(pictures)), test_size=aside, random_state=self._order.seed)
        self._pictures["train"] = [pictures[index] for index in sorted(kept)]
        self._pictures["validation"] = [pictures[index] for index in sorted(moved)]

    def _loader(self, split: SplitName, shuffle: bool = False) -> ResumableLoader:
        pictures, trainer = self.pictures(split), self.trainer
        shard: dict[str, Any] = (trainer and trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        order = replace(
            self._order,
            shuffle=shuffle and not getattr(trainer, "overfit_batches", 0),  # the same batches again and again
            rank=shard["rank"],
            world_size=shard["num_replicas"],
            even=split != "predict",
        )
        known = self._given_labels is not None or self.files["train"] is not None
        decode = replace(self._decode, classes=len(self.labels) if known and split != "predict" else None)
        rows = PictureRows(pictures, decode, with_rows=not shuffle)
        return ResumableLoader(
            TableBatches(rows, np.zeros(len(pictures)), order),
            default_collate,
            num_workers=self.num_workers,
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
        )


def _folder(path: str | None, asked: str) -> Path | None:
    if path is None:
        return None
    folder = existing(path, asked)
    if not folder.is_dir():
        raise DataError(f"{asked}={folder} is a file; give the folder that holds the images.")
    return folder


def _image_size(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"image_size={size} is no size; give pixels a side, or height and width, each 1 or more.")
    return pair[0], pair[1]


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> tuple[float, ...]:
    values = (value,) * channels if isinstance(value, int | float) else tuple(value)
    if len(values) != channels:
        raise ValueError(
            f"{name}={list(values)} has {len(values)} numbers for {channels} channels; give one, or each."
        )
    return values
