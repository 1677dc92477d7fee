"""Causal language modelling from the command line: fit on a file, validate, predict, and talk to what it left."""

import io
import json
import re
import sys

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from petune.cli import main
from petune.cli.chat import Chat
from petune.export import CardInfo, save_adapter
from petune.tasks.generation import Generation
from tests.families import FAMILIES
from tests.tasks import chats

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
ROWS = [{"instruction": NUMBERS[i % 8], "output": NUMBERS[(i + 1) % 8]} for i in range(64)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama whose tokenizer has no chat template."""
    return chats.save(tmp_path_factory.mktemp("tiny_llama"), chat_template=None)


@pytest.fixture(scope="module")
def fit(base, tmp_path_factory):
    rows = chats.write(tmp_path_factory.mktemp("rows") / "train.jsonl", ROWS)

    def arguments(output, *more):
        return [
            *("fit", "-c", "causal_lm", "-c", "lora", f"--model.model={base}", f"--data.train_file={rows}"),
            *("--data.chat_template=chatml", "--data.max_length=64", "--data.validation_split=0.125"),
            *("--model.adapter.target_modules=all-linear", "--model.learning_rate=0.02", "--model.max_new_tokens=8"),
            "--data.batch_size=4",
            *("--trainer.max_epochs=10", f"--output={output}", *more),
        ]

    return arguments


@pytest.fixture(scope="module")
def run(fit, tmp_path_factory):
    """The folder of a finished run: it counts."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(fit(folder)) == 0
    return folder


def talk(monkeypatch, capsys, run, *lines, terminal=False, more=()):
    """What is answered to these lines of standard input, and what is said beside it."""
    given = io.StringIO("".join(f"{line}\n" for line in lines))
    given.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", given)
    capsys.readouterr()
    code = main(["chat", "--adapter", str(run), "--max-new-tokens=8", *more])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out.splitlines(), captured.err


def test_a_run_logs_perplexity_and_leaves_the_adapter_with_the_template_it_was_trained_by(run, base):
    assert "val/perplexity" in (run / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert all("lora_" in name for name in load_file(run / "adapter" / "adapter_model.safetensors"))
    content = yaml.safe_load((run / "adapter" / "petune.yaml").read_text())
    assert content["config"]["model"]["class_path"] == "petune.tasks.CausalLM"
    assert content["config"]["data"]["init_args"]["chat_template"] == "chatml"
    assert 1 < content["metrics"]["val/perplexity"] < 3
    assert AutoTokenizer.from_pretrained(run / "adapter").chat_template == chats.TEMPLATES["chatml"]
    assert AutoTokenizer.from_pretrained(base).chat_template is None


def test_validate_takes_the_adapter_folder(run, capsys):
    trained = yaml.safe_load((run / "adapter" / "petune.yaml").read_text())["metrics"]["val/loss"]
    assert main(["validate", "--adapter", str(run)]) == 0
    printed = re.search(r"val/loss\W+([\d.]+)", capsys.readouterr().out)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(trained, rel=1e-4)


def test_predict_answers_every_row_of_a_file_in_its_order(run, tmp_path):
    given = [{"instruction": "three", "id": 7}, {"instruction": "six", "id": 8}, {"instruction": "one", "id": 9}]
    rows, output = chats.write(tmp_path / "new.jsonl", given), tmp_path / "answers.jsonl"
    assert main(["predict", "--adapter", str(run), f"--input={rows}", f"--output={output}"]) == 0
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert answers == [{**row, "generated": text} for row, text in zip(given, ("four", "seven", "two"), strict=True)]


def test_packing_trains_as_well(fit, tmp_path, capsys):
    assert main(fit(tmp_path / "run", "--data.packing=true", "--trainer.max_steps=2")) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_packing_for_an_adapter_that_mixes_rows_stops_with_one_line(fit, tmp_path, capsys):
    more = ("--model.adapter=peft.PromptTuningConfig", "--model.adapter.num_virtual_tokens=4", "--data.packing=true")
    arguments = [argument for argument in fit(tmp_path / "run", *more) if "target_modules" not in argument]
    assert main(arguments) == 1
    assert "packing=true does not go with PromptTuningConfig" in capsys.readouterr().err


def test_rows_that_are_too_long_stop_with_one_line(fit, tmp_path, capsys):
    assert main(fit(tmp_path / "run", "--data.max_length=12", "--data.too_long=error")) == 1
    error = capsys.readouterr().err
    assert "train.jsonl, line 1: has" in error
    assert "Traceback" not in error


# ---- chat


def test_a_prompt_is_answered_once(run, capsys):
    capsys.readouterr()
    assert main(["chat", "--adapter", str(run / "adapter"), "--prompt", "four", "--max-new-tokens=8"]) == 0
    assert capsys.readouterr().out == "five\n"


def test_lines_of_standard_input_are_answered_until_they_end(run, monkeypatch, capsys):
    code, answers, errors = talk(monkeypatch, capsys, run, "two", "", "/reset", "five", "/reset", "seven")
    assert (code, answers, errors) == (0, ["three", "six", "eight"], "")


def test_quit_ends_and_an_unknown_command_is_told_the_known_ones(run, monkeypatch, capsys):
    code, answers, errors = talk(monkeypatch, capsys, run, "/help", "two", "/quit", "five")
    assert (code, answers) == (0, ["three"])
    assert errors == "petune: no command /help; there are /reset, /quit.\n"


def test_a_person_is_asked_and_told_the_commands(run, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda asking: print(asking, end="") or next(lines))
    lines = iter(["two", "/quit"])
    code, answers, errors = talk(monkeypatch, capsys, run, terminal=True)
    assert (code, answers) == (0, ["> three", "> "])
    assert errors == "/reset: forget what was said; /quit: end\n"


def test_a_base_can_be_named(run, base, monkeypatch, capsys):
    assert talk(monkeypatch, capsys, run, "two", more=["--model", base])[1] == ["three"]
    code, _, errors = talk(monkeypatch, capsys, run, "two", more=["--model", "./nowhere"])
    assert code == 1
    assert "nowhere" in errors


@pytest.fixture(scope="module")
def conversation():
    """A chat with random weights, to look at what it remembers."""

    def start(template=chats.TEMPLATES["chatml"], system=None, **options):
        model = get_peft_model(chats.model(), LoraConfig(task_type="CAUSAL_LM")).eval()
        return Chat(model, chats.tokenizer(template), Generation(**{"max_new_tokens": 4, **options}), system)

    return start


def test_what_was_said_is_part_of_the_next_prompt(conversation, capsys):
    chat = conversation(system="Be short.")
    said = chat.answer("One?")
    assert capsys.readouterr().out.strip() == said
    chat.answer("Two?")
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
    assert chat.turns[1]["content"] == said
    text = chat.tokenizer.decode(chat._prompt())
    assert text.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>")
    chat.reset()
    assert chat.turns == []


def test_the_oldest_turns_are_forgotten_where_there_is_no_room(conversation, capsys):
    chat = conversation(system="Be short.")
    for number in range(8):
        chat.answer(f"Question {number}?")
    assert len(chat.turns) < 16
    assert chat.turns[-2]["content"] == "Question 7?"
    assert "Be short." in chat.tokenizer.decode(chat._prompt())
    assert "(forgot the first 1 questions: no room for more)" in capsys.readouterr().err


def test_a_question_without_room_is_refused_and_not_remembered(conversation):
    chat = conversation()
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens and the model has room for 252 beside an answer"):
        chat.answer("word " * 200)
    assert chat.turns == []


def test_the_talk_goes_on_after_such_a_question(run, monkeypatch, capsys):
    code, answers, errors = talk(monkeypatch, capsys, run, "word " * 200, "two")
    assert (code, answers) == (0, ["three"])
    assert errors.startswith("petune: error: the prompt has")


def test_without_a_template_each_text_is_gone_on_with(conversation):
    chat = conversation(None)
    chat.answer("One")
    chat.answer("Two")
    assert chat.turns[0]["content"] == "Two"
    chat.turns = chat.turns[:1]
    assert chat.tokenizer.decode(chat._prompt()) == "<s>Two"


def test_a_temperature_draws_other_answers(conversation):
    drawn = {conversation(temperature=5.0).answer("One?") for _ in range(4)}
    assert len(drawn) > 1


BAD = {
    "no folder": (["--adapter=nowhere"], 1, "no adapter folder nowhere"),
    "no tokens": (["--max-new-tokens=0"], 2, "--max-new-tokens=0 leaves no answer; use 1 or more"),
    "cold": (["--temperature=-1"], 2, "--temperature=-1.0 is negative"),
    "no prompt": (["--prompt= "], 2, "--prompt is empty"),
    "no number": (["--max-new-tokens=many"], 2, "invalid int value: 'many'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_stop_with_one_line(run, case, capsys):
    more, code, message = BAD[case]
    assert main(["chat", f"--adapter={run}", *more]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_adapter_of_another_task_is_refused(tmp_path, capsys):
    model = get_peft_model(FAMILIES["bert"].build(head="cls"), LoraConfig(task_type="SEQ_CLS"))
    save_adapter(model, tmp_path / "adapter", run_config=None, card=CardInfo())
    assert main(["chat", "--adapter", str(tmp_path / "adapter")]) == 2
    assert "was trained for SEQ_CLS, not for CAUSAL_LM; use `petune predict`" in capsys.readouterr().err


def test_system_needs_a_template(conversation):
    with pytest.raises(Exception, match="--system needs a chat template"):
        conversation(None, system="Be short.")
