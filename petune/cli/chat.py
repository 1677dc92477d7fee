"""`petune chat`: talk to a causal language model through its adapter, token by token."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TextStreamer

from petune.cli.errors import UsageError, one_line
from petune.cli.quiet import quiet
from petune.load import load_adapter, read_adapter_config
from petune.run import adapter_folder, read_run
from petune.tasks.chat_format import ChatFormat, Message, encode_plain
from petune.tasks.generation import Generation
from petune.tasks.models import load_tokenizer
from petune.tasks.positions import max_tokens

COMMANDS = {"/reset": "forget what was said", "/quit": "end"}


def run_chat(options: argparse.Namespace) -> int:
    """Answer `--prompt`, or line after line of standard input until it ends.

    Args:
        options: adapter, model, prompt, system, max_new_tokens, temperature.

    Raises:
        UsageError: the adapter is of another task, a number is out of its range, or the prompt is empty.
        ValueError: the prompt is longer than the model's positions reach.
    """
    try:
        generation = Generation(options.max_new_tokens, options.temperature)
    except ValueError as error:
        raise UsageError(f"--{str(error).replace('_', '-', 2)}") from error
    if options.prompt is not None and not options.prompt.strip():
        raise UsageError("--prompt is empty; give it a question, or leave it out to talk.")
    with quiet():
        chat = Chat(*load(options.adapter, options.model), generation, options.system)
        if options.prompt is not None:
            chat.answer(options.prompt)
        else:
            _talk(chat)
    return 0


def load(adapter: str, base: str | None) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The model with its adapter, and the tokenizer saved with it, else the base's.

    Args:
        adapter: adapter folder, or the folder of a run.
        base: folder or hub id of the base model; None for the one that the adapter was trained on.

    Raises:
        UsageError: the adapter is of another task than causal language modelling.
    """
    folder = adapter_folder(Path(adapter).expanduser())
    config = read_adapter_config(folder)
    if str(getattr(config.task_type, "value", config.task_type)) != "CAUSAL_LM":
        raise UsageError(
            f"--adapter={adapter} was trained for {config.task_type}, not for CAUSAL_LM; use `petune predict` with it."
        )
    content = read_run(folder) or {}
    options = content.get("config", {}).get("model", {}).get("init_args", {})
    model = load_adapter(folder, base, dtype=options.get("dtype", "auto"), **(options.get("model_kwargs") or {}))
    name = (
        str(folder)
        if (folder / "tokenizer_config.json").is_file()
        else base or str(model.get_base_model().name_or_path)
    )
    if torch.cuda.is_available():
        model.to("cuda")
    return model.eval(), load_tokenizer(name)


class Chat:
    """A conversation: what was said, and how an answer is made.

    Without a chat template nothing is remembered: each text is gone on with as it is.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        generation: how it writes.
        system: what the model is told before the first turn.
    """

    def __init__(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, generation: Generation, system: str | None = None
    ) -> None:
        self.model, self.tokenizer, self.generation = model, tokenizer, generation
        self.format = None if tokenizer.chat_template is None else ChatFormat(tokenizer)
        if system and self.format is None:
            raise UsageError("--system needs a chat template, and the tokenizer has none; put it into the prompt.")
        self._first: list[Message] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Message] = []
        if generation.temperature:
            torch.seed()  # else every start would draw the same answers

    def reset(self) -> None:
        """Forget all turns but the system's."""
        self.turns = []

    def answer(self, text: str) -> str:
        """Print the answer as it is written, remember both, and return it.

        Raises:
            ValueError: the text alone is longer than the model's positions reach.
        """
        self.turns.append({"role": "user", "content": text})
        try:
            ids = torch.tensor([self._prompt()], device=next(self.model.parameters()).device)
        except ValueError:
            self.turns.pop()
            raise
        generate: Any = self.model.generate
        written = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=self.generation.config(self.model, self.tokenizer),
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),  # type: ignore[arg-type]
        )
        said = str(self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)).strip()
        self.turns.append({"role": "assistant", "content": said})
        return said

    def _prompt(self) -> list[int]:
        """Tokens of as many of the last turns as the model has room for beside an answer."""
        if self.format is None:
            self.turns = self.turns[-1:]
        ids, limit = self._encode(), max_tokens(self.model)
        room = None if limit is None else limit - self.generation.max_new_tokens
        forgotten = 0
        while room is not None and len(ids) > room and len(self.turns) > 1:
            self.turns, forgotten = self.turns[2:], forgotten + 1  # a question with its answer
            ids = self._encode()
        if room is not None and len(ids) > room:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and the model has room for {room} beside an answer of "
                f"{self.generation.max_new_tokens}; say less, or lower --max-new-tokens."
            )
        if forgotten:
            print(f"(forgot the first {forgotten} questions: no room for more)", file=sys.stderr)
        return ids

    def _encode(self) -> list[int]:
        if self.format is None:
            return encode_plain(self.tokenizer, self.turns[-1]["content"], None).input_ids
        return self.format.prompt([*self._first, *self.turns])


def _talk(chat: Chat) -> None:
    if sys.stdin.isatty():
        print("; ".join(f"{name}: {meaning}" for name, meaning in COMMANDS.items()), file=sys.stderr)
    for line in _lines():
        if line == "/quit":
            return
        if line == "/reset":
            chat.reset()
        elif line.startswith("/"):
            print(f"petune: no command {line}; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        elif line:
            try:
                chat.answer(line)
            except ValueError as error:  # this one text cannot be answered; the next may
                print(f"petune: error: {one_line(error)}", file=sys.stderr)


def _lines() -> Iterator[str]:
    """Lines of standard input, asked for where a person types them."""
    asking = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(asking).strip()
        except EOFError:
            return
