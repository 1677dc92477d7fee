"""The progress bar shows the whole run, and costs no more than an eye can see."""

import lightning as L
from torch.utils.data import DataLoader

from petune.callbacks import ProgressBar
from petune.callbacks import progress as module
from tests.callbacks.runs import Module, dataset


class Counting(ProgressBar):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, dict[str, object]]] = []

    def get_metrics(self, trainer, pl_module):
        metrics = super().get_metrics(trainer, pl_module)
        if trainer.training:
            self.asked.append((trainer.global_step, metrics))
        return metrics


def fit(bar: Counting, tmp_path) -> None:
    trainer = L.Trainer(accelerator="cpu", max_epochs=2, callbacks=[bar], logger=False, enable_checkpointing=False,
                        enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(Module(), DataLoader(dataset(160), batch_size=8))


def test_quick_steps_are_not_all_shown_but_the_last_of_an_epoch_is(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SHORTEST_S", 1e9)
    bar = Counting()
    bar._shown = module.time.monotonic()
    fit(bar, tmp_path)
    assert {step for step, _ in bar.asked} == {20, 40}


def test_slow_steps_are_all_shown_with_rate_and_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SHORTEST_S", 0.0)
    bar = Counting()
    fit(bar, tmp_path)
    assert {step for step, _ in bar.asked} == set(range(1, 41))
    _, metrics = bar.asked[5]
    assert metrics["lr"] == "1.0e-02"
    assert metrics["eta"] != "?"
