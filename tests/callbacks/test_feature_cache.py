"""FeatureCaching: later epochs skip the frozen blocks under Lightning, shuffled, resumed and validated."""

import csv
import json
import re

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from petune.adapters.side import LadderSideConfig
from petune.callbacks import FeatureCaching
from petune.frozen_block import FrozenBlock
from petune.tasks import TextClassification
from petune.tasks.data import TextClassificationData
from tests.callbacks import runs
from tests.tasks import tiny

ROWS = 43  # two whole batches and one of eleven
BLOCKS = 2


def config(**options):
    return LadderSideConfig(**{"reduction_factor": 4, "side_layers": [0], "task_type": "SEQ_CLS", **options})


def module(**options):
    torch.manual_seed(3)
    return runs.Module(config(**options))


def loader(rows=ROWS, **options):
    generator = torch.Generator().manual_seed(11)
    return DataLoader(runs.dataset(rows), runs.BATCH, shuffle=True, generator=generator, **options)


class Forwards(Callback):
    """Forwards of the blocks with gradients and without, in each epoch."""

    def __init__(self):
        self.training, self.validation, self._count = [], [], [0, 0]

    def on_fit_start(self, trainer, pl_module):
        for layer in pl_module.modules():
            if isinstance(layer, FrozenBlock):
                layer.register_forward_pre_hook(self._enter)
                layer.get_base_layer().register_forward_hook(self._add)

    def _enter(self, *_):
        self._outer = torch.is_grad_enabled()  # the block itself never has gradients

    def _add(self, *_):
        self._count[not self._outer] += 1

    def on_train_epoch_start(self, trainer, pl_module):
        self._count = [0, 0]

    def on_train_epoch_end(self, trainer, pl_module):
        self.training.append(self._count[0])
        self.validation.append(self._count[1])


def fit(task, *callbacks, data=None, validation=None, resume=None, **options):
    counts = Forwards()
    L.seed_everything(7, verbose=False)
    trainer = runs.trainer(counts, *callbacks, **options)
    trainer.fit(task, loader() if data is None else data, validation, ckpt_path=resume)
    return counts


def test_epochs_behind_the_first_run_no_block_and_have_the_same_losses():
    task, reference = module(), module()
    counts = fit(task, FeatureCaching())
    assert counts.training == [3 * BLOCKS, 0, 0]
    assert fit(reference).training == [3 * BLOCKS] * 3
    assert task.losses == pytest.approx(reference.losses, rel=1e-5)
    ours, theirs = task.state_dict(), reference.state_dict()
    assert [name for name in theirs if not torch.allclose(ours[name], theirs[name], atol=1e-5)] == []
    assert task.model.base_model.backbone.tape is None


def test_validation_runs_in_full_and_takes_no_room():
    task, caching = module(), FeatureCaching()
    counts = fit(task, caching, validation=DataLoader(runs.dataset(20), runs.BATCH))
    assert counts.training == [3 * BLOCKS, 0, 0]
    assert counts.validation == [2 * BLOCKS] * 3
    assert caching.cache is None


def test_gathered_gradients_change_nothing():
    task, reference = module(), module()
    assert fit(task, FeatureCaching(), accumulate_grad_batches=2).training == [3 * BLOCKS, 0, 0]
    fit(reference, accumulate_grad_batches=2)
    assert task.losses == pytest.approx(reference.losses, rel=1e-5)


@pytest.mark.parametrize("step", [4, 6, 9], ids=["inside the first epoch", "at its end", "inside the second"])
def test_a_resumed_run_goes_on_with_its_folder_as_one_in_one_go(tmp_path, step):
    def run(folder, resume=None):
        counts = Forwards()
        task = runs.fit(
            tmp_path / folder,
            every_steps=1,
            module=module(),
            callbacks=[FeatureCaching(str(tmp_path / folder / "features")), counts],
            resume=resume,
        )
        return task, counts.training

    reference, forwards = run("reference")
    assert forwards == [6 * BLOCKS, 0, 0]
    (tmp_path / "resumed").mkdir()
    (tmp_path / "reference" / "features").rename(tmp_path / "resumed" / "features")
    resumed, forwards = run("resumed", tmp_path / "reference" / f"step={step}.ckpt")
    assert resumed.losses == pytest.approx(reference.losses[step:], rel=1e-5)
    assert sum(forwards) == BLOCKS  # of the first batch, which is compared


def test_a_run_resumed_with_memory_begins_anew(tmp_path):
    def run(resume=None):
        counts = Forwards()
        task = runs.fit(tmp_path, every_steps=3, module=module(), callbacks=[FeatureCaching(), counts], resume=resume)
        return task, counts.training

    reference, _ = run()
    resumed, forwards = run(tmp_path / "step=9.ckpt")
    assert resumed.losses == pytest.approx(reference.losses[9:], rel=1e-5)
    assert forwards[0] == 3 * BLOCKS  # the rest of the second epoch
    assert 0 < forwards[1] <= 6 * BLOCKS


def logged(folder):
    with (folder / "run" / "version_0" / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_the_loggers_get_the_hit_ratio_and_the_bytes(tmp_path):
    fit(module(), FeatureCaching(dtype="float16"), logger=CSVLogger(tmp_path, name="run", version=0))
    rows = [row for row in logged(tmp_path) if "feature_cache/bytes" in row]
    assert [row["feature_cache/hit_ratio"] for row in rows] == [0.0, 1.0, 1.0]
    assert [row["step"] for row in rows] == [3, 6, 9]
    assert {row["feature_cache/bytes"] for row in rows} == {ROWS * 2 * runs.LENGTH * 32 * 2}  # both blocks, two bytes


def said(capture):
    return [line for line in capture.splitlines() if line.startswith("feature cache")]


def test_the_size_is_announced_with_the_first_step(capfd, caplog):
    fit(module(), FeatureCaching(), epochs=2)
    found = said(capfd.readouterr().err + "\n" + "\n".join(caplog.messages))
    pattern = r"feature cache: 43 rows x 2 blocks x 10 tokens x 32 = 107.5 KiB of float32 in RAM, [\d.]+ GiB free"
    assert found
    assert all(re.fullmatch(pattern, line) for line in found)


class Twice(runs.Module):
    """A step that calls the model on two texts a row, as training of embeddings does."""

    def training_step(self, batch, index):
        other = batch[0].flip(1)
        return super().training_step(batch, index) + super().training_step([other, batch[1]], index)


def test_a_step_that_calls_the_model_twice_has_twice_the_rows(caplog):
    task = Twice(config())
    caching = FeatureCaching()
    counts = fit(task, caching)
    assert counts.training == [6 * BLOCKS, 0, 0]
    assert [line for line in caplog.messages if "feature cache: 86 rows" in line]


class Stream(IterableDataset):
    def __iter__(self):
        yield from loader()


def test_a_stream_has_its_rows_announced_one_by_one(caplog):
    counts = fit(module(), FeatureCaching(), data=DataLoader(Stream(), batch_size=None))
    assert counts.training[1:] == [0, 0]
    assert [line for line in caplog.messages if "KiB a row of float32 in RAM" in line]


def test_a_task_of_the_project_has_its_rows_counted(tmp_path, caplog):
    texts = [" ".join(tiny.WORDS[(row * 7 + word) % 40] for word in range(3 + row % 10)) for row in range(50)]
    lines = [json.dumps({"text": text, "label": "ab"[row % 2]}) for row, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    base = tiny.save_body(tmp_path / "base")
    data = TextClassificationData(
        tokenizer=base, train_file=str(tmp_path / "rows.jsonl"), batch_size=8, max_length=16, validation_split=0.2
    )
    task = TextClassification(base, labels=data.labels, adapter=LadderSideConfig(reduction_factor=2))
    counts = Forwards()
    tiny.trainer(tmp_path, max_epochs=3, callbacks=[FeatureCaching(), counts]).fit(task, datamodule=data)
    assert counts.training[0] > 0
    assert counts.training[1:] == [0, 0]
    assert counts.validation[2] > 0
    assert [line for line in caplog.messages if "feature cache: 40 rows x" in line]


def test_rows_that_are_told_go_before_those_of_the_loader():
    with pytest.raises(ValueError, match="met 32 different rows, and the data set has 20: the inputs change"):
        fit(module(), FeatureCaching(rows=20))


def test_a_cache_that_will_not_fit_stops_the_run_with_the_number():
    task, caching = module(), FeatureCaching(max_gib=0.00005)
    with pytest.raises(
        ValueError, match=r"does not fit: 43 rows x 2 blocks x 10 tokens x 32 = 107.5 KiB .* 52.4 KiB at"
    ):
        fit(task, caching)
    assert len(task.losses) == 1
    assert caching.cache is None
    assert [hook for m in task.modules() for hook in m._forward_hooks.values() if hasattr(hook, "cache")] == []


class Augmented(runs.Module):
    def training_step(self, batch, index):
        return super().training_step([batch[0].roll(self.current_epoch, 1), batch[1]], index)


def test_inputs_that_change_from_epoch_to_epoch_stop_the_run():
    with pytest.raises(ValueError, match="the inputs change from epoch to epoch"):
        fit(Augmented(config()), FeatureCaching())


def test_a_model_without_a_side_network_is_refused():
    with pytest.raises(MisconfigurationException, match="FeatureCache found no side network in PeftModel"):
        fit(runs.Module(), FeatureCaching())


def test_a_folder_of_another_model_is_refused(tmp_path):
    fit(module(), FeatureCaching(str(tmp_path)), epochs=1)
    other = runs.Module(config(), base=runs.bert(seed=5))
    with pytest.raises(MisconfigurationException, match="was made with a model of other weights"):
        fit(other, FeatureCaching(str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "FeatureCaching.dtype='float32' is not kept; use None, 'float16' or 'bfloat16'"),
        ({"max_gib": 0.0}, "FeatureCaching.max_gib=0.0 leaves room for nothing; use above 0, or None"),
        ({"rows": 0}, "FeatureCaching.rows=0 is no data set; use 1 or more, or None"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FeatureCaching(**options)


def test_a_second_fit_begins_anew():
    task, caching = module(), FeatureCaching()
    assert fit(task, caching, epochs=2).training == [3 * BLOCKS, 0]
    assert fit(task, caching, epochs=2).training == [3 * BLOCKS, 0]
