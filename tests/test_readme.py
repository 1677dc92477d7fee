"""The README's Python runs and prints what it says."""

import doctest
import json
import statistics
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testfile(str(README), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted >= 10
    assert result.failed == 0


def test_the_readme_shows_the_two_commands():
    text = README.read_text()
    assert "make demo" in text
    assert "make test" in text


def test_the_figures_are_those_of_the_committed_runs():
    text, results = README.read_text(), README.parent / "benchmarks" / "results"
    gates = json.loads((results / "lora_cpu.json").read_text())["gates"]
    assert all(gate["passed"] for gate in gates.values())
    kept = [gate["value"] for name, gate in gates.items() if name.endswith("to PEFT")]
    assert f"{gates['time float32']['value']:.2f}x (fp32) and {gates['time bfloat16']['value']:.2f}x (bf16)" in text
    assert f"{min(kept):.2f}x to {max(kept):.2f}x of the bytes" in text
    runs = json.loads((results / "demo.json").read_text())["retrieval"]
    for row in runs[0]["rows"]:
        scores = [other["scores"]["R@1"] for run in runs for other in run["rows"] if other["name"] == row["name"]]
        assert f"{statistics.mean(scores):.3f}".lstrip("0") in text, row["name"]
    untouched = {row["name"]: f"{row['scores']['R@1']:.3f}".lstrip("0") for row in runs[2]["rows"]}
    untouched_text = " ".join(text.split())
    assert (
        f"frozen {untouched['frozen encoder']}, linear map {untouched['frozen + linear map']}, "
        f"`lora` {untouched['lora']}" in untouched_text
    )
    assert f"full fine-tuning {untouched['full fine-tuning']}." in untouched_text
