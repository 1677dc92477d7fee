"""Numbers over seeds, the metric that decides, and the plot and page made of them; nothing is trained."""

import itertools
import math
import statistics
import sys
from pathlib import Path

import pytest

from petune.comparison.figure import draw
from petune.comparison.plan import Trial
from petune.comparison.record import RESIDENT, Record, read_record, write_record
from petune.comparison.results import Comparison, Metric, Run, best_of, main_metric
from tests.comparison.records import record

ACCURACY = Metric("val/accuracy", "max")


def run(method: str, seed: int, found: Record | None, failure: str = "", chosen: bool = True) -> Run:
    return Run(Trial(method, seed, None, Path(method) / f"seed-{seed}", (), ""), found, failure, chosen)


def comparison(*runs: Run, folder: Path = Path()) -> Comparison:
    found = [run.record for run in runs if run.record is not None]
    return Comparison(folder, "Task on <rows>", main_metric(found, {"accuracy": "max"}), runs, {"command": "petune"})


def ten_methods() -> Comparison:
    runs = [
        run(f"method_{index}", seed, record(0.6 + 0.03 * (index * 7 % 10), seconds=2.0 + 0.1 * index,
            trainable_parameters=1000 * 2**index, weights_bytes=4096 * 2 ** (index % 4)))
        for index, seed in itertools.product(range(10), range(3))
    ]  # fmt: skip
    return comparison(*runs)


def test_a_summary_counts_finished_runs_alone_and_has_the_sample_deviation():
    values = [0.5, 0.7, 0.9]
    runs = [run("lora", seed, record(value)) for seed, value in enumerate(values)]
    (row,) = comparison(
        *runs, run("lora", 3, None, "out of memory"), run("lora", 4, record(0.1), chosen=False)
    ).summaries
    assert row.n == 3
    assert row.failures == ("out of memory",)
    assert row.mean["val/accuracy"] == pytest.approx(0.7)
    assert row.std["val/accuracy"] == pytest.approx(statistics.stdev(values))
    assert row.row()["failed"] == 1


def test_one_run_has_no_deviation():
    (row,) = comparison(run("lora", 0, record())).summaries
    assert row.std == {}


def test_the_first_metric_that_all_runs_logged_decides_test_data_before_validation():
    wanted = {"entity_f1": "max", "macro_f1": "max"}
    both = {"val/loss": 1.0, "val/macro_f1": 0.5, "test/macro_f1": 0.4}
    assert main_metric([record(metrics=both)], wanted) == Metric("test/macro_f1", "max")
    one_untested = [record(metrics=both), record(metrics={"val/loss": 1.0, "val/macro_f1": 0.5})]
    assert main_metric(one_untested, wanted) == Metric("val/macro_f1", "max")
    assert main_metric([record(metrics={"val/loss": 1.0})], wanted) == Metric("val/loss", "min")
    assert main_metric([], wanted) is None
    with pytest.raises(ValueError, match=r"main_metrics are entity_f1, macro_f1 and what all runs logged is val/cer;"):
        main_metric([record(metrics={"val/cer": 1.0})], wanted)


def test_the_best_run_is_the_largest_or_the_smallest_and_never_one_that_diverged():
    runs = [run("lora", seed, record(value)) for seed, value in enumerate([0.5, math.nan, 0.9])]
    assert best_of(runs, ACCURACY) is runs[2]
    assert best_of(runs, Metric("val/accuracy", "min")) is runs[0]
    assert best_of(runs[1:2], ACCURACY) is None
    assert best_of([run("lora", 0, None, "failed")], ACCURACY) is None


def boxes(axis) -> list:
    return [text.get_window_extent() for text in axis.texts]


def test_ten_methods_are_labelled_without_one_label_on_another():
    figure = draw(ten_methods().summaries, ACCURACY, memory=RESIDENT)
    figure.canvas.draw()
    for axis in figure.axes:
        assert sorted(text.get_text() for text in axis.texts) == sorted(f"method_{index}" for index in range(10))
        for one, other in itertools.combinations(boxes(axis), 2):
            assert not one.overlaps(other), axis.get_xlabel()
        assert all(axis.bbox.containsx(box.x0) and axis.bbox.containsx(box.x1) for box in boxes(axis))


def test_an_axis_is_logarithmic_where_its_values_are_far_apart():
    parameters, weights, memory, seconds = draw(ten_methods().summaries, ACCURACY, memory=RESIDENT).axes
    assert [axis.get_xscale() for axis in (parameters, weights, memory, seconds)] == ["log", "log", "linear", "linear"]
    assert memory.get_xlabel() == f"peak memory, MiB ({RESIDENT})"


def test_points_stand_at_mean_and_deviation():
    runs = [run("lora", seed, record(value)) for seed, value in enumerate([0.4, 0.8])]
    axis = comparison(*runs).figure().axes[0]
    (bars,) = axis.containers
    assert bars[0].get_xydata().tolist() == [[1000.0, pytest.approx(0.6)]]
    ends = bars[2][-1].get_segments()[0][:, 1]
    assert ends[1] - ends[0] == pytest.approx(2 * statistics.stdev([0.4, 0.8]))


def test_without_a_peak_the_bytes_kept_for_backward_are_drawn():
    found = comparison(run("lora", 0, record(peak_memory_bytes=None)))
    assert found.figure().axes[2].get_xlabel() == "kept for the backward pass, MiB"


def test_the_page_takes_names_and_failures_as_text(tmp_path):
    found = comparison(run("lora", 0, record()), run("bad", 0, None, "<b>no</b> & never"), folder=tmp_path)
    found.write()
    page = (tmp_path / "index.html").read_text()
    assert "&lt;b&gt;no&lt;/b&gt; &amp; never" in page
    assert "Task on &lt;rows&gt;" in page
    assert "<b>" not in page


def test_a_comparison_whose_runs_all_failed_is_written_without_a_plot(tmp_path):
    found = comparison(run("bad", 0, None, "no memory"), folder=tmp_path)
    found.write()
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "summary.csv", "index.html"}
    assert "No run finished." in (tmp_path / "index.html").read_text()
    with pytest.raises(ValueError, match="no run finished, so there is nothing to draw"):
        found.figure()


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "petune\[compare\]"'):
        comparison(run("lora", 0, record())).figure()


def test_what_was_measured_is_read_as_it_was_written(tmp_path):
    assert read_record(tmp_path) is None
    write_record(tmp_path, record(0.25))
    assert read_record(tmp_path) == record(0.25)
