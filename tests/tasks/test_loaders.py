"""The order of batches is a function of (seed, epoch), and a run goes on in the middle of an epoch bit for bit."""

from functools import partial
from itertools import islice

import lightning as L
import numpy as np
import pytest
import torch
from datasets import IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from petune.tasks.loaders import (
    Order,
    ResumableLoader,
    StreamBatches,
    TableBatches,
    bucket_batches,
    epoch_generator,
    lightning_reads_ahead,
    to_row_order,
)

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")
ROWS = 53  # odd on purpose: the last batch is short
LENGTHS = [(7 * i) % 31 + 1 for i in range(ROWS)]


class Numbers(torch.utils.data.Dataset):
    """Row i is {"row": i}; counts how often it is read."""

    def __init__(self, rows=ROWS):
        self.rows, self.read = rows, 0

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        self.read += 1
        return {"row": index}


def rows_of(batch):
    return {"row": torch.tensor([row["row"] for row in batch])}


def numbers():
    for i in range(ROWS):
        yield {"row": i}


def table_loader(num_workers=0, **order):
    order = Order(**{"batch_size": 4, "shuffle": True, "bucketing": True, "seed": 3, **order})
    return ResumableLoader(TableBatches(Numbers(), LENGTHS, order), rows_of, num_workers=num_workers)


def stream_loader(num_workers=0, **order):
    order = Order(**{"batch_size": 4, "shuffle": True, "bucketing": True, "seed": 3, **order})
    source = StreamBatches(
        IterableDataset.from_generator(numbers), lambda row: LENGTHS[row["row"]], order, shuffle_buffer=10
    )
    return ResumableLoader(source, rows_of, num_workers=num_workers)


def seen(loader, epoch=0):
    loader.set_epoch(epoch)
    return [batch["row"].tolist() for batch in loader]


LOADERS = pytest.mark.parametrize("make", [table_loader, stream_loader], ids=["table", "stream"])
WORKERS = pytest.mark.parametrize("num_workers", [0, 2], ids=["no workers", "two workers"])


@given(
    lengths=st.lists(st.integers(0, 500), max_size=400),
    batch_size=st.integers(1, 9),
    shuffle=st.booleans(),
    bucketing=st.booleans(),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_every_position_is_in_one_batch_and_the_order_is_a_function_of_seed_and_epoch(
    lengths, batch_size, shuffle, bucketing, seed, epoch
):
    order = Order(batch_size, shuffle=shuffle, bucketing=bucketing, seed=seed)
    batches = bucket_batches(lengths, order, epoch_generator(seed, epoch))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert batches == bucket_batches(lengths, order, epoch_generator(seed, epoch))


def test_epochs_and_seeds_give_other_orders():
    orders = [seen(table_loader(seed=seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_without_shuffling_every_epoch_is_the_same():
    assert seen(table_loader(shuffle=False), 0) == seen(table_loader(shuffle=False), 5)


def test_bucketing_pads_less_than_half_of_what_a_plain_shuffle_pads():
    lengths = np.random.default_rng(0).integers(1, 200, size=1000)

    def padding(bucketing):
        order = Order(8, shuffle=True, bucketing=bucketing)
        batches = bucket_batches(lengths, order, epoch_generator(0, 0))
        return sum(len(batch) * lengths[batch].max() - lengths[batch].sum() for batch in batches)

    assert padding(True) < 0.5 * padding(False)


def test_without_shuffling_the_longest_rows_come_first():
    order = Order(4, bucketing=True)
    batches = bucket_batches(LENGTHS, order, epoch_generator(0, 0))
    assert LENGTHS[batches[0][0]] == max(LENGTHS)


def test_outputs_come_back_in_the_order_of_the_rows():
    rows = torch.cat([batch["row"] for batch in table_loader(shuffle=False)])
    assert rows.tolist() != list(range(ROWS))
    assert to_row_order(rows * 10, rows).tolist() == [10 * i for i in range(ROWS)]


@LOADERS
@WORKERS
def test_a_pass_leaves_the_global_generators_alone_and_gives_each_row_once(make, num_workers):
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    batches = seen(make(num_workers), 1)
    assert torch.equal(torch_before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002
    assert sorted(i for batch in batches for i in batch) == list(range(ROWS))
    assert batches == seen(make(), 1), "the number of workers must not change the order"


@LOADERS
@WORKERS
@pytest.mark.parametrize("done", [1, 5, 13])
def test_a_loaded_state_goes_on_with_the_next_batch(make, num_workers, done):
    whole = seen(make(num_workers), 2)
    first = make(num_workers)
    first.set_epoch(2)
    taken = [batch["row"].tolist() for batch in islice(first, done)]
    second = make(num_workers)
    second.load_state_dict(first.state_dict())
    assert taken + [batch["row"].tolist() for batch in second] == whole
    assert seen(second, 3) == seen(make(), 3), "the epoch after a resumed one is whole"


@LOADERS
def test_a_state_from_the_end_of_an_epoch_goes_on_with_the_next_epoch(make):
    first = make()
    whole = seen(first, 2)
    assert len(whole) == 14
    second = make()
    second.load_state_dict(first.state_dict())
    assert [batch["row"].tolist() for batch in second] == seen(make(), 3)


def test_batches_before_the_resumed_one_are_not_read():
    loader = table_loader(batch_size=4, shuffle=False)
    state = {"epoch": 0, "batches": 12, "plan": loader.source.plan()}
    loader.load_state_dict(state)
    assert len(list(loader)) == 2
    assert loader.source.rows.read == ROWS - 48


def test_a_new_epoch_that_has_not_begun_counts_no_batches():
    loader = table_loader()
    seen(loader, 0)
    loader.set_epoch(1)
    assert loader.state_dict()["batches"] == 0


def test_resuming_in_the_middle_of_an_epoch_of_another_order_is_refused():
    first = table_loader(batch_size=4)
    next(iter(first))
    second = table_loader(batch_size=8)
    second.load_state_dict(first.state_dict())
    with pytest.raises(
        ValueError, match=r"1 batches into epoch 0 of data with batch_size=4, this run has batch_size=8"
    ):
        next(iter(second))


def test_another_order_is_fine_after_the_end_of_an_epoch():
    first = table_loader(batch_size=4)
    seen(first, 0)
    second = table_loader(batch_size=8)
    second.load_state_dict(first.state_dict())
    assert len(seen(second, 1)) == 7


@LOADERS
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("even", [True, False], ids=["even", "each row once"])
def test_processes_share_the_batches(make, world_size, even):
    shares = [seen(make(rank=rank, world_size=world_size, even=even), 1) for rank in range(world_size)]
    whole = {tuple(batch) for batch in seen(make(), 1)}
    shared = [tuple(batch) for share in shares for batch in share]
    assert set(shared) <= whole
    if even:
        assert len({len(share) for share in shares}) == 1
    else:
        assert sorted(shared) == sorted(whole)
    if make is table_loader:
        assert set(shared) == whole
        lengths = [len(make(rank=rank, world_size=world_size, even=even)) for rank in range(world_size)]
        assert lengths == [len(share) for share in shares]


def test_fewer_batches_than_processes_still_give_each_process_one():
    order = [Order(4, rank=rank, world_size=5) for rank in range(5)]
    shares = [TableBatches(Numbers(6), [1] * 6, one).batches(0) for one in order]
    assert [len(share) for share in shares] == [1] * 5


@pytest.mark.parametrize(
    ("values", "message"),
    [({"batch_size": 0}, "batch_size=0 leaves nothing"), ({"batch_size": 1, "seed": -1}, "seed=-1 is negative")],
    ids=["batch_size", "seed"],
)
def test_orders_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Order(**values)


def test_an_empty_shuffle_buffer_is_refused():
    with pytest.raises(ValueError, match="shuffle_buffer=0 holds no row"):
        StreamBatches(IterableDataset.from_generator(numbers), len, Order(1), shuffle_buffer=0)


def test_a_stream_has_no_length():
    with pytest.raises(TypeError, match="has no length"):
        len(stream_loader())


# ------------------------------------------------------------------------------------------- under Lightning's trainer


class Tiny(L.LightningModule):
    """A network with dropout, so that a resumed run shows every difference in random numbers and in batches."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(ROWS, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append((self.current_epoch, tuple(batch["row"].tolist())))
        return self.net(batch["row"]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.net(batch["row"]).mean(), batch_size=len(batch["row"]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class KeepGenerator(Callback):
    """Torch's generator in the checkpoint, restored before anything of the resumed run draws from it."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["generator"] = torch.get_rng_state()

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.state = checkpoint["generator"]

    def on_fit_start(self, trainer, pl_module):
        if hasattr(self, "state"):
            torch.set_rng_state(self.state)


class Data(L.LightningDataModule):
    def __init__(self, make, num_workers):
        super().__init__()
        self.make, self.num_workers = make, num_workers

    def train_dataloader(self):
        loader = self.make(self.num_workers)
        loader.read_ahead = partial(lightning_reads_ahead, self.trainer)
        loader.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)
        return loader

    def val_dataloader(self):
        return self.make(self.num_workers, shuffle=False)


def train(folder, make, num_workers, checkpoint=None, on_validation=False, **trainer):
    torch.manual_seed(11)
    module = Tiny()
    keep = {} if on_validation else {"every_n_train_steps": 1, "save_on_train_epoch_end": False}
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **keep)
    L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[KeepGenerator(), saver],
        **{"max_epochs": 3, **trainer},
    ).fit(module, datamodule=Data(make, num_workers), ckpt_path=checkpoint)
    return module


def assert_resumes_exactly(tmp_path, make, num_workers, step, **options):
    straight = train(tmp_path / "straight", make, num_workers, **options)
    resumed = train(tmp_path / "resumed", make, num_workers, tmp_path / "straight" / f"step={step}.ckpt", **options)
    assert resumed.batches == straight.batches[step:]
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@LOADERS
@WORKERS
@pytest.mark.parametrize("step", [5, 19], ids=["first epoch", "second epoch"])
def test_training_resumed_in_the_middle_of_an_epoch_ends_in_the_same_weights(tmp_path, make, num_workers, step):
    assert_resumes_exactly(tmp_path, make, num_workers, step)


@LOADERS
@pytest.mark.parametrize("on_validation", [False, True], ids=["after the last step", "after validation"])
def test_training_resumed_at_the_end_of_an_epoch_ends_in_the_same_weights(tmp_path, make, on_validation):
    assert_resumes_exactly(tmp_path, make, 0, 14, on_validation=on_validation)


@LOADERS
@pytest.mark.parametrize(("first", "second"), [(5, 9), (5, 17)], ids=["same epoch", "next epoch"])
def test_a_resumed_run_resumes_exactly_again(tmp_path, make, first, second):
    straight = train(tmp_path / "straight", make, 0)
    train(tmp_path / "once", make, 0, tmp_path / "straight" / f"step={first}.ckpt")
    twice = train(tmp_path / "twice", make, 0, tmp_path / "once" / f"step={second}.ckpt")
    assert twice.batches == straight.batches[second:]
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), twice.parameters(), strict=True))


@LOADERS
def test_training_with_validation_inside_the_epoch_resumes_exactly(tmp_path, make):
    assert_resumes_exactly(tmp_path, make, 0, 17, val_check_interval=5)


@LOADERS
def test_training_on_a_part_of_each_epoch_resumes_exactly(tmp_path, make):
    assert_resumes_exactly(tmp_path, make, 0, 8, limit_train_batches=6)


@LOADERS
def test_training_with_accumulated_gradients_resumes_exactly(tmp_path, make):
    straight = train(tmp_path / "a", make, 0, accumulate_grad_batches=2)
    resumed = train(tmp_path / "b", make, 0, tmp_path / "a" / "step=9.ckpt", accumulate_grad_batches=2)
    assert resumed.batches == straight.batches[-len(resumed.batches) :]
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
