"""ExportAdapter: the folder at the end of the fit, or at the best value of a metric."""

import math

import lightning as L
import pytest
import torch
from huggingface_hub import ModelCard
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from petune.callbacks import AdapterCheckpoint, ExportAdapter
from petune.export import CardInfo, load_adapter, load_run
from tests.callbacks import runs


def data():
    return DataLoader(runs.dataset(), runs.BATCH)


def adapter_tensors(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


class Scored(runs.Module):
    """Logs the given scores, one an epoch, and remembers its adapter at each."""

    def __init__(self, *scores):
        super().__init__()
        self.scores, self.seen = scores, []

    def validation_step(self, batch, index):
        self.log("score", self.scores[self.current_epoch])

    def on_validation_epoch_start(self):
        if not self.trainer.sanity_checking:
            self.seen.append({name: tensor.clone() for name, tensor in adapter_tensors(self.model).items()})


def test_the_end_of_a_fit_leaves_an_adapter_that_says_how_it_came_about(tmp_path):
    L.seed_everything(11, verbose=False)
    module = runs.Module()
    callback = ExportAdapter(tmp_path, card=CardInfo(task="text classification"))
    callback.run_config = {"model": {"learning_rate": 0.01}}
    runs.trainer(callback, AdapterCheckpoint(), epochs=1).fit(module, data(), data())
    loaded = load_adapter(tmp_path, runs.bert()).eval()
    ids = runs.dataset()[:4][0]
    assert torch.equal(loaded(input_ids=ids).logits, module.model.eval()(input_ids=ids).logits)
    run = load_run(tmp_path)
    assert run.seed == 11
    assert run.config == {"model": {"learning_rate": 0.01}}
    assert run.metrics.keys() == {"train_loss", "val_loss"}
    assert "| val_loss |" in ModelCard.load(tmp_path / "adapter" / "README.md").text
    assert callback.report.dead == ()


@pytest.mark.parametrize(("mode", "best"), [("max", 1), ("min", 2)])
def test_a_monitored_run_keeps_the_best_epoch(tmp_path, mode, best):
    module = Scored(0.5, 0.9, 0.1)
    runs.trainer(ExportAdapter(tmp_path, monitor="score", mode=mode)).fit(module, data(), data())
    kept = adapter_tensors(load_adapter(tmp_path, runs.bert()))
    assert all(torch.equal(kept[name], module.seen[best][name]) for name in kept)
    assert load_run(tmp_path).metrics["score"] == pytest.approx([0.5, 0.9, 0.1][best])


def test_a_score_that_is_no_number_is_never_the_best_and_the_end_is_kept(tmp_path):
    module = Scored(math.nan, math.nan, math.nan)
    runs.trainer(ExportAdapter(tmp_path, monitor="score")).fit(module, data(), data())
    kept = adapter_tensors(load_adapter(tmp_path, runs.bert()))
    assert all(torch.equal(kept[name], tensor) for name, tensor in adapter_tensors(module.model).items())


def test_the_best_value_outlives_a_resume():
    first, second = ExportAdapter(monitor="score", mode="max"), ExportAdapter(monitor="score", mode="max")
    first._best = 0.9
    second.load_state_dict(first.state_dict())
    assert not second._is_best(0.8)
    assert second._is_best(0.95)


def test_a_metric_that_nobody_logs_is_named_with_those_that_are(tmp_path):
    run = runs.trainer(ExportAdapter(tmp_path, monitor="acuracy"), num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=r"monitor='acuracy' was not logged; logged metrics: train_loss, val_loss"):
        run.fit(runs.Module(), data(), data())


def test_a_wrong_mode_is_refused():
    with pytest.raises(ValueError, match="mode='best' is neither 'min' nor 'max'"):
        ExportAdapter(mode="best")


def test_a_folder_of_something_else_is_refused_before_training(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "thesis.tex").write_text("years of work")
    module = runs.Module()
    with pytest.raises(FileExistsError, match=r"holds no adapter_config\.json"):
        runs.trainer(ExportAdapter(tmp_path)).fit(module, data())
    assert module.losses == []


def test_a_module_without_adapter_leaves_a_model(tmp_path):
    module = runs.Module()
    module.model = runs.bert()
    runs.trainer(ExportAdapter(tmp_path), epochs=1).fit(module, data())
    assert torch.equal(
        type(module.model).from_pretrained(tmp_path / "model").classifier.weight, module.model.classifier.weight
    )


def test_without_a_folder_it_goes_where_the_log_goes(tmp_path):
    callback = ExportAdapter()
    run = runs.trainer(callback, epochs=1, logger=CSVLogger(tmp_path, name="run", version=3))
    run.fit(runs.Module(), data())
    assert callback.report.directory == tmp_path / "run" / "version_3" / "adapter"
