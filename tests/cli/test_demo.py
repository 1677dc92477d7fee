"""`petune demo` hands its options to the demonstration; what that does is tested beside it."""

import pytest

from petune.cli import demo, main


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    seen: list[dict] = []
    monkeypatch.setattr(demo, "run_demo", lambda **options: seen.append(options))
    return seen


def test_the_defaults_are_the_demonstrations_own(calls):
    assert main(["demo"]) == 0
    defaults = {"task": "retrieval", "compare": False, "budget_s": 180.0, "seed": 0, "methods": None, "output": None}
    assert calls == [defaults]


def test_the_options_are_handed_on(calls):
    arguments = ["demo", "--task=vision", "--compare", "--budget=5", "--seed=3", "--method=lora", "--method", "pat"]
    assert main([*arguments, "--output=here"]) == 0
    expected = {"task": "vision", "compare": True, "budget_s": 5.0, "seed": 3, "methods": ["lora", "pat"]}
    assert calls == [{**expected, "output": "here"}]


def test_a_failing_demo_is_one_line(monkeypatch, capsys):
    def fail(**_):
        raise ImportError("the demo needs the encoder of the extra: pip install petune[demo]")

    monkeypatch.setattr(demo, "run_demo", fail)
    assert main(["demo"]) == 1
    err = capsys.readouterr().err
    assert err == "petune: error: the demo needs the encoder of the extra: pip install petune[demo]\n"
