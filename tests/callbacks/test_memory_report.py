"""MemoryReport and the counting below it, against numbers computed by hand."""

import io

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from petune.callbacks import MemoryReport, ProgressBar
from petune.callbacks.memory_report import count_tokens, peak_memory_bytes
from petune.memory import count_parameters, saved_for_backward_bytes
from tests.callbacks import runs


def test_a_linear_layer_keeps_its_input_and_no_parameter():
    layer, x = nn.Linear(7, 5), torch.randn(3, 7)
    assert saved_for_backward_bytes(lambda: layer(x), layer) == 3 * 7 * 4
    assert saved_for_backward_bytes(lambda: layer(x)) == 3 * 7 * 4  # W is kept for dx only, which nobody asks for
    x.requires_grad_(True)
    assert saved_for_backward_bytes(lambda: layer(x)) == (3 * 7 + 5 * 7) * 4
    assert saved_for_backward_bytes(lambda: layer(x), [layer.weight]) == 3 * 7 * 4


def test_a_storage_kept_by_several_operations_counts_once():
    x = torch.randn(4, 8, requires_grad=True)

    def run():
        y = x * 1.0  # keeps nothing of x
        return y.exp().sum() + (y * y).sum() + y.view(8, 4).square().sum()

    assert saved_for_backward_bytes(run) == 2 * 4 * 8 * 4  # y once, exp(y) once


def test_nothing_is_kept_without_gradients():
    layer = nn.Linear(7, 5)
    with torch.no_grad():
        assert saved_for_backward_bytes(lambda: layer(torch.randn(3, 7)), layer) == 0


def test_parameters_are_counted_by_what_they_are():
    module = runs.Module()
    counts = count_parameters(module)
    rank, hidden, layers = 4, 32, 2
    factors, head = layers * 2 * 2 * rank * hidden, hidden * 3 + 3
    assert counts["trainable"] == factors + head
    assert counts["adapter"] == factors + head  # the head is a modules_to_save
    assert counts["adapter_bytes"] == 4 * counts["adapter"]
    assert counts["total"] == sum(p.numel() for p in module.parameters())


class Words(runs.Module):
    def training_step(self, batch, index):
        return super().training_step((batch["input_ids"], batch["labels"]), index)


def collate(rows):
    x = torch.stack([row[0] for row in rows])
    mask = torch.ones_like(x)
    mask[:, -3:] = 0
    return {"input_ids": x, "attention_mask": mask, "labels": torch.stack([row[1] for row in rows])}


def test_the_report_of_a_run_is_complete_logged_and_printed(tmp_path, capsys):
    module, report = Words(), MemoryReport()
    run = runs.trainer(report, epochs=1, logger=CSVLogger(tmp_path, name="run", version=0))
    run.fit(module, DataLoader(runs.dataset(), runs.BATCH, collate_fn=collate))
    counts = count_parameters(module)
    assert report.report["trainable_parameters"] == counts["trainable"]
    assert report.report["adapter_bytes"] == counts["adapter_bytes"]
    assert report.report["peak_memory_bytes"] > counts["total_bytes"]
    assert report.report["tokens_per_second"] > 0
    batch = collate([runs.dataset()[i] for i in range(runs.BATCH)])
    inputs = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    again = saved_for_backward_bytes(lambda: module.model.train()(**inputs), module)
    assert report.report["saved_for_backward_bytes"] == again
    assert "cost/saved_for_backward_bytes" in (tmp_path / "run" / "version_0" / "metrics.csv").read_text()
    assert "saved for backward" in capsys.readouterr().out


def test_the_measurement_changes_nothing_of_the_training(tmp_path):
    plain = runs.fit(tmp_path / "one")
    measured = runs.fit(tmp_path / "two", callbacks=[MemoryReport(print_table=False)])
    assert measured.losses == plain.losses


def test_a_failed_step_ends_the_measurement():
    class Broken(runs.Module):
        def training_step(self, batch, index):
            raise RuntimeError("broken")

    report = MemoryReport()
    with pytest.raises(RuntimeError, match="broken"):
        runs.trainer(report).fit(Broken(), DataLoader(runs.dataset(), runs.BATCH))
    assert report._saved is None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.ones(2, requires_grad=True).exp()
    assert len(kept) == 1  # hooks are a stack: one left behind would be out of order here


def test_tokens_are_counted_without_padding_and_through_pairs():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    pair = {"query": {"input_ids": mask, "attention_mask": mask}, "document": {"input_ids": torch.ones(2, 5)}}
    assert count_tokens(pair) == 3 + 10
    assert count_tokens({"pixel_values": torch.ones(2, 3, 8, 8)}) == 0
    assert count_tokens(torch.ones(3)) == 0


def test_peak_memory_is_in_bytes():
    assert 50 * 2**20 < peak_memory_bytes(torch.device("cpu")) < 2**40


def test_the_progress_bar_shows_loss_learning_rate_and_time_left():
    class Bar(ProgressBar):
        def get_metrics(self, trainer, pl_module):
            metrics = super().get_metrics(trainer, pl_module)
            shown.append(metrics)
            return metrics

    class Logged(runs.Module):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.log("loss", loss, prog_bar=True)
            return loss

    shown = []
    run = runs.trainer(Bar(refresh_rate=1), epochs=2, enable_progress_bar=True)
    run.fit(Logged(), DataLoader(runs.dataset(), runs.BATCH))
    during = [metrics for metrics in shown if "eta" in metrics]
    assert any(metrics["eta"].count(":") == 2 for metrics in during)
    assert {"loss", "lr"} <= during[-1].keys()
    assert during[0]["lr"] == "1.0e-02"
    assert all("v_num" not in metrics for metrics in shown)


def test_the_table_names_its_units():
    report = MemoryReport()
    report.report = {"adapter_bytes": 3 * 2**20, "tokens_per_second": 1234.0}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    assert "3.00 MiB" in text
    assert "1,234" in text
