"""What the front says about arguments that make no sense: one line, exit code 2, no traceback unless asked for."""

import sys

import pytest

from petune.cli import light, main


def one_error_line(capsys) -> str:
    err = capsys.readouterr().err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("petune: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fti"], "no command 'fti'. Did you mean 'fit'?"),
        (["xyzzy"], "Commands: fit, validate"),
        (["--verbose"], "unrecognized arguments: --verbose"),
        (["export"], "the following arguments are required: --adapter, --output"),
        (["export", "--adapter", "a", "--output", "b", "--format", "gguf"], "invalid choice: 'gguf'"),
        (["demo", "--task", "speech"], "invalid choice: 'speech'"),
        (["recipes", "show", "lorra"], "no recipe and no file is called 'lorra'. Did you mean 'lora'?"),
        (["recipes", "burn"], "invalid choice: 'burn'"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_one_sentence(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in one_error_line(capsys)


@pytest.mark.parametrize("arguments", [["--debug", "recipes", "show", "x"], ["recipes", "show", "x", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(arguments, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.strip().splitlines()[-1].startswith("petune: error: ")


def test_an_interrupt_is_one_line_and_exit_130(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(light, "print_env", interrupt)
    assert main(["env"]) == 130
    assert capsys.readouterr().err == "petune: interrupted; what was saved stays.\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("two\n  lines"), "petune: error: two lines\n"),
        (KeyError("r"), "petune: error: KeyError: 'r'. Run again with --debug for the traceback.\n"),
        (RuntimeError(), "petune: error: RuntimeError: . Run again with --debug for the traceback.\n"),
    ],
    ids=["a sentence", "a fault of the program", "no message"],
)
def test_a_failure_is_one_line_and_exit_1(monkeypatch, capsys, error, said):
    def fail():
        raise error

    monkeypatch.setattr(light, "print_env", fail)
    assert main(["env"]) == 1
    assert capsys.readouterr().err == said


def test_arguments_come_from_the_command_line_by_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["petune", "fti"])
    assert main() == 2
    assert "'fti'" in one_error_line(capsys)
