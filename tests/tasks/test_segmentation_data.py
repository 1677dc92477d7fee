"""Images and masks from folders: which belong together, which tensors they become, and what is refused."""

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn

from petune.tasks import SegmentationData
from petune.tasks.sources import DataError

HEIGHT, WIDTH = 10, 14


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array), mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Seven images of one grey each, 10 times their number, whose masks are full of their number modulo 3."""
    for number in range(7):
        save(tmp_path / "set" / "images" / f"{number}.png", np.full((HEIGHT, WIDTH, 3), 10 * number, np.uint8))
        save(tmp_path / "set" / "masks" / f"{number}.png", np.full((HEIGHT, WIDTH), number % 3, np.uint8))
    return tmp_path / "set"


def data(folder, **options):
    return SegmentationData(**{"train_file": str(folder), "batch_size": 3, "validation_split": 0, **options})


def whole(loader):
    batches = list(loader)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def test_a_training_batch_holds_pixels_and_labels_and_no_more(folder):
    batch = next(iter(data(folder).train_dataloader()))
    assert set(batch) == {"pixel_values", "labels"}
    assert batch["pixel_values"].shape == (3, 3, HEIGHT, WIDTH)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].shape == (3, HEIGHT, WIDTH)
    assert batch["labels"].dtype == torch.int64


def test_masks_follow_their_images_through_shuffling(folder):
    batch = whole(data(folder, mean=0, std=1).train_dataloader())
    number = (batch["pixel_values"][:, 0] * 25.5).round()
    assert sorted(number[:, 0, 0].tolist()) == list(range(7))
    assert torch.equal(number.long() % 3, batch["labels"])


def test_the_order_is_new_every_epoch_and_the_same_for_a_seed(folder):
    def order(seed, epoch):
        loader = data(folder, seed=seed).train_dataloader()
        loader.set_epoch(epoch)
        return whole(loader)["pixel_values"][:, 0, 0, 0].tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_pixels_are_normalised_per_channel(folder):
    loaded = data(folder, mean=[0.1, 0.2, 0.3], std=[0.5, 1.0, 2.0], test_file=str(folder))
    batch = next(iter(loaded.test_dataloader()))
    grey = 10 * batch["row"] / 255
    wanted = torch.stack([(grey - 0.1) / 0.5, grey - 0.2, (grey - 0.3) / 2], 1)
    torch.testing.assert_close(batch["pixel_values"][:, :, 3, 5], wanted)


def test_grey_images_have_one_channel(folder):
    assert next(iter(data(folder, channels=1).train_dataloader()))["pixel_values"].shape == (3, 1, HEIGHT, WIDTH)


def test_images_and_masks_are_resized_together_and_no_class_is_made_up(folder):
    stripes = np.repeat(np.array([0, 9], np.uint8), WIDTH // 2)[None].repeat(HEIGHT, 0)
    save(folder / "masks" / "4.png", stripes)
    batch = whole(data(folder, image_size=[9, 20], test_file=str(folder)).test_dataloader())
    assert batch["pixel_values"].shape == (7, 3, 9, 20)
    assert batch["labels"][4].unique().tolist() == [0, 9]
    assert batch["labels"][4, 0].tolist() == [0] * 10 + [9] * 10
    assert batch["size"].tolist() == [[HEIGHT, WIDTH]] * 7
    assert next(iter(data(folder, image_size=8).train_dataloader()))["labels"].shape == (3, 8, 8)


def test_the_ignored_value_becomes_minus_one_hundred(folder):
    mask = np.ones((HEIGHT, WIDTH), np.uint8)
    mask[2, 3], mask[4, 5] = 255, 9
    save(folder / "masks" / "1.png", mask)
    with pytest.raises(DataError, match=r"1\.png: has class 9, and there are 3, counted from 0.*ignore_index=9"):
        whole(data(folder, labels=["a", "b", "c"]).train_dataloader())
    mask[4, 5] = 1
    save(folder / "masks" / "1.png", mask)
    labels = whole(data(folder, test_file=str(folder)).test_dataloader())["labels"]
    assert (labels == -100).nonzero().tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("mode", ["P", "I;16", "1"])
def test_a_mask_may_be_of_any_mode_with_one_whole_number_a_pixel(folder, mode):
    values = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 2
    if mode == "P":
        picture = Image.fromarray(values.astype(np.uint8))
        picture = picture.convert("P")
        picture.putdata(values.flatten().tolist())
        picture.putpalette([255, 0, 0, 0, 255, 0])
    else:
        picture = Image.fromarray(values.astype({"I;16": np.uint16, "1": bool}[mode]))
    assert picture.mode == mode
    picture.save(folder / "masks" / "2.png")
    labels = whole(data(folder, test_file=str(folder)).test_dataloader())["labels"]
    assert torch.equal(labels[2], torch.from_numpy(values))


def test_classes_are_numbered_up_to_the_largest_in_the_training_masks_unless_named(folder):
    assert data(folder).labels == ["0", "1", "2"]
    assert data(folder, labels=["sky", "sea", "sand", "ship"]).labels == ["sky", "sea", "sand", "ship"]


def test_classes_cannot_be_counted_without_training_masks(folder):
    with pytest.raises(DataError, match="counted in the training masks and there are none; give labels"):
        _ = data(None, test_file=str(folder), train_file=None).labels


def test_a_test_set_of_its_own_needs_no_class_names(folder):
    assert len(whole(data(None, train_file=None, test_file=str(folder)).test_dataloader())["labels"]) == 7


# ---- splits


def test_validation_images_are_set_aside_once(folder):
    def parts(seed):
        both = data(folder, validation_split=0.3, seed=seed)
        both.setup("fit")
        return [[picture.image.stem for picture in both.pictures(split)] for split in ("train", "validation")]

    train, validation = parts(0)
    assert (len(train), len(validation)) == (4, 3)
    assert sorted(train + validation) == [str(number) for number in range(7)]
    assert parts(0) == [train, validation]
    assert any(parts(seed) != parts(0) for seed in (1, 2, 3))
    alone = data(folder, validation_split=0.3)
    alone.setup("validate")
    assert [picture.image.stem for picture in alone.pictures("validation")] == validation


def test_a_folder_to_validate_on_goes_before_a_split(folder):
    both = data(folder, validation_split=0.3, validation_file=str(folder))
    both.setup("fit")
    assert len(both.pictures("train")) == len(both.pictures("validation")) == 7
    assert data(folder).val_dataloader() == []


def test_images_to_predict_need_no_masks_and_no_subfolder(folder):
    for place in (folder, folder / "images"):
        batch = whole(data(None, train_file=None, predict_file=str(place)).predict_dataloader())
        assert set(batch) == {"pixel_values", "row", "size"}
        assert batch["row"].tolist() == list(range(7))


def test_a_batch_of_one_is_a_batch(folder):
    assert {len(batch["labels"]) for batch in data(folder, batch_size=1).train_dataloader()} == {1}


def test_workers_give_the_same_batches(folder):
    one, two = (whole(data(folder, num_workers=count).train_dataloader()) for count in (0, 2))
    assert torch.equal(one["pixel_values"], two["pixel_values"])


class _Sum(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[float] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["pixel_values"].sum().item())
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_run_goes_on_in_the_middle_of_an_epoch(folder, tmp_path):
    def fit(checkpoint=None):
        module = _Sum()
        saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1, enable_version_counter=False)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = L.Trainer(max_epochs=2, callbacks=[saver], default_root_dir=tmp_path, **quiet)
        trainer.fit(module, datamodule=data(folder, batch_size=2), ckpt_path=checkpoint)
        return module.seen

    unbroken = fit()
    assert len(unbroken) == 8
    assert fit(tmp_path / "step=2.ckpt") == unbroken[2:]


# ---- refused


def broken(path):
    path.write_bytes(b"no image")


def cut(path):
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    save(path, noise)
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize("damage", [broken, cut])
def test_an_image_that_does_not_decode_is_named(folder, damage):
    damage(folder / "images" / "5.png")
    loaded = data(folder)
    with pytest.raises(DataError, match=r"images/5\.png: is no image that can be decoded \(.+\); replace it"):
        whole(loaded.train_dataloader())


def test_a_mask_that_does_not_decode_is_named(folder):
    broken(folder / "masks" / "5.png")
    with pytest.raises(DataError, match=r"masks/5\.png: is no image that can be decoded"):
        data(folder).setup("fit")


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("masks/3.png", r"images/3\.png: has no mask named 3\.\* in masks/; add it, or take this file out"),
        ("images/3.png", r"masks/3\.png: has no image named 3\.\* in images/"),
    ],
)
def test_an_image_or_a_mask_alone_is_named(folder, gone, message):
    (folder / gone).unlink()
    with pytest.raises(DataError, match=message):
        data(folder).setup("fit")


def test_two_images_of_one_name_are_refused(folder):
    save(folder / "images" / "3.jpg", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    with pytest.raises(DataError, match=r"3\.png: 3\.jpg has the same name; take one of them out"):
        data(folder).setup("fit")


def test_a_mask_of_another_size_than_its_image_is_refused(folder):
    save(folder / "masks" / "6.png", np.zeros((WIDTH, HEIGHT), np.uint8))
    with pytest.raises(DataError, match=r"masks/6\.png: is 14 x 10 pixels and its image 10 x 14; make them equal"):
        data(folder, image_size=8).setup("fit")


def test_images_of_several_sizes_need_one_to_be_resized_to(folder):
    save(folder / "images" / "6.png", np.zeros((12, 9, 3), np.uint8))
    save(folder / "masks" / "6.png", np.zeros((12, 9), np.uint8))
    with pytest.raises(DataError, match=r"6\.png: is 12 x 9 pixels and 0\.png 10 x 14; set image_size"):
        data(folder).setup("fit")
    assert len(whole(data(folder, image_size=8).train_dataloader())["labels"]) == 7


def test_a_mask_of_colours_is_refused(folder):
    save(folder / "masks" / "2.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    with pytest.raises(DataError, match=r"2\.png: is a picture of mode RGB, not of classes; save a mask"):
        whole(data(folder, labels=["a", "b", "c"]).train_dataloader())


def test_an_image_of_sixteen_bits_is_refused(folder):
    save(folder / "images" / "2.png", np.zeros((HEIGHT, WIDTH), np.uint16))
    with pytest.raises(DataError, match=r"2\.png: has I;16 pixels of more than 8 bits; save it with 8 bits"):
        whole(data(folder).train_dataloader())


def test_a_folder_without_masks_or_images_is_refused(folder, tmp_path):
    (folder / "masks").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"set has no folder masks/; put images into images/, their masks into masks/"):
        data(folder).setup("fit")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no images; put some there \(\.bmp, .*\)"):
        data(None, train_file=None, predict_file=str(tmp_path / "empty")).setup("predict")


def test_a_stage_without_images_is_refused(folder):
    with pytest.raises(DataError, match=r"No test images were given; give test_file\."):
        data(folder).setup("test")
    with pytest.raises(DataError, match=r"No validation images .*; give validation_file or validation_split\."):
        data(folder).setup("validate")


def test_a_split_that_leaves_nothing_to_train_on_is_refused(folder):
    with pytest.raises(DataError, match=r"validation_split=0\.9 takes 7 of the 7 images of .*set and leaves none"):
        data(folder, validation_split=0.9).setup("fit")


def test_a_file_or_a_missing_folder_is_refused(folder):
    with pytest.raises(DataError, match=r"train_file=.*0\.png is a file; give the folder that holds the images"):
        data(folder / "images" / "0.png")
    with pytest.raises(FileNotFoundError, match=r"test_file=.*sets does not exist; .* has set"):
        data(folder, test_file=str(folder.parent / "sets"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_split": 1.0}, r"validation_split=1\.0 is no share of the images"),
        ({"num_workers": -1}, "num_workers=-1 is negative"),
        ({"channels": 4}, r"channels=4 is neither 1 \(grey\) nor 3"),
        ({"image_size": 0}, "image_size=0 is no size"),
        ({"image_size": [3, 4, 5]}, r"image_size=\[3, 4, 5\] is no size"),
        ({"mean": [0.1, 0.2]}, r"mean=\[0\.1, 0\.2\] has 2 numbers for 3 channels"),
        ({"std": 0.0}, r"std=0\.0 is not above 0"),
        ({"batch_size": 0}, "batch_size=0 leaves nothing in a batch"),
    ],
)
def test_an_argument_out_of_range_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        data(folder, **options)


def test_every_argument_has_a_type_and_a_help_line():
    parser = ArgumentParser()
    parser.add_class_arguments(SegmentationData, "data")
    helps = {action.dest: action.help for action in parser._actions if action.dest.startswith("data.")}
    assert len(helps) == 14
    assert [name for name, text in helps.items() if not text or len(text) < 10] == []
