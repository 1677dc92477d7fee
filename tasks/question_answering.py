"""The answer of a question as a span of its context: exact match and F1."""

import math
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForQuestionAnswering, PretrainedConfig, PreTrainedModel

from petune.tasks.classification import Stage
from petune.tasks.metrics import load_metric
from petune.tasks.token_task import TokenTask

_HEAD = "qa_outputs"


class QuestionAnswering(TokenTask):
    """Find answers in contexts. Batches hold `input_ids`, `attention_mask` [windows, tokens], and to train
    `start_positions` and `end_positions` [windows]; to evaluate and predict also what `QuestionBatch` tells of rows.

    A window's spans score start logit + end logit, and no answer scores as the span of its [CLS] token alone. A row's
    answer is the best span of all its windows; or none, where the lowest score of no answer among the windows is
    above the best span's by more than null_threshold (Devlin et al. 2019, section 4.3).

    Logs train/loss, the mean cross entropy of start and end; val/loss, val/exact_match, val/f1, as SQuAD defines them;
    and the same under test/.

    Args:
        model: local folder or hub id of a pretrained encoder or decoder; from Python also a `PreTrainedModel`.
        max_answer_length: tokens of an answer at most.
        null_threshold: by how much no answer must score above the best span; None to answer always.
        kwargs: of `AdapterTask`.

    Raises:
        ValueError: max_answer_length is below 1.
    """

    task_type = "QUESTION_ANS"
    auto_class: ClassVar[Any] = AutoModelForQuestionAnswering
    main_metrics: ClassVar[dict[str, Literal["max", "min"]]] = {"f1": "max"}

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel,
        max_answer_length: int = 30,
        null_threshold: float | None = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        if max_answer_length < 1:
            raise ValueError(
                f"QuestionAnswering.max_answer_length={max_answer_length} leaves an answer no token; use 1 or more."
            )
        self.max_answer_length, self.null_threshold = max_answer_length, null_threshold
        self._windows: dict[int, dict[int, dict[str, Any]]] = {}  # row -> number of the window -> what was found
        self._answers: dict[int, list[str]] = {}

    def base_config(self) -> PretrainedConfig:
        """The configuration of the base model, with two outputs a token."""
        config = super().base_config()
        config.num_labels = 2
        return config

    def find_head(self, model: PreTrainedModel, fresh: list[str]) -> list[str]:
        """As `AdapterTask.find_head`; of T5, too, whose head is no child beside a body."""
        found = super().find_head(model, fresh)
        known = _HEAD in found or not hasattr(model, _HEAD)
        return found if known else [*found, _HEAD]

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Start and end logits, [windows, tokens, 2], float32; -inf for padding."""
        asked = {name for name in batch if name in ("start_positions", "end_positions")}
        inputs = {name: value for name, value in self.model_inputs(batch).items() if name not in asked}
        output = self.model(**inputs)
        tokens = batch["input_ids"].shape[1]  # a prompt that the adapter puts before them has logits as well
        logits = torch.stack([output.start_logits[:, -tokens:], output.end_logits[:, -tokens:]], -1).float()
        return logits.masked_fill(batch["attention_mask"][..., None] == 0, -math.inf)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Mean cross entropy of the starts and the ends and what the adapter adds, a scalar."""
        loss = span_loss(self(batch), batch) + self.auxiliary_loss()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss and keep the best span of every window."""
        self._evaluation_step(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss and keep the best span of every window."""
        self._evaluation_step(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log val/exact_match and val/f1."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log test/exact_match and test/f1."""
        self._log_metrics("test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, list[Any]]:
        """Of each window its best span: `answer`, `start`, `score`; and `null_score`, `log_total`: see `combine`."""
        windows = self._read_windows(self(batch), batch)
        return {name: [window[name] for window in windows] for name in windows[0]}

    def combine(self, windows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """The answer of a row from what `predict_step` gave for its windows, one mapping each.

        Returns:
            answer, empty for none; start, its first character in the context, None for none; score, its probability
            0..1 among all spans and no answers of the windows.
        """
        found = list(windows)
        best = max(found, key=lambda window: window["score"])
        null = min(window["null_score"] for window in found)
        total = float(torch.logsumexp(torch.tensor([window["log_total"] for window in found]), 0))
        no_span = best["start"] is None
        if no_span or (self.null_threshold is not None and null - best["score"] > self.null_threshold):
            return {"answer": "", "start": None, "score": round(math.exp(null - total), 6)}
        score = round(math.exp(best["score"] - total), 6)
        return {"answer": best["answer"], "start": best["start"], "score": score}

    def describe(self) -> dict[str, Any]:
        """As `AdapterTask.describe`, with what chooses an answer."""
        described = super().describe()
        described["init_args"] |= {
            "max_answer_length": self.max_answer_length,
            "null_threshold": self.null_threshold,
        }
        return described

    def _evaluation_step(self, batch: Mapping[str, Any], stage: Stage) -> None:
        logits = self(batch)
        self.log(f"{stage}/loss", span_loss(logits, batch), batch_size=len(logits), sync_dist=True)
        rows, parts = batch["row"].tolist(), batch["part"].tolist()
        found = self._read_windows(logits, batch)
        for row, part, window, answers in zip(rows, parts, found, batch["answers"], strict=True):
            self._windows.setdefault(row, {})[part] = window
            self._answers[row] = answers

    def _read_windows(self, logits: Tensor, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        in_context = batch["offsets"][..., 0] >= 0
        scores, firsts, lasts = best_spans(logits, in_context, self.max_answer_length)
        at_null = batch["null_position"][:, None, None].expand(-1, 1, 2)
        nulls = logits.gather(1, at_null).sum((1, 2))
        counted = in_context.scatter(1, batch["null_position"][:, None], True)
        totals = logits.masked_fill(~counted[..., None], -math.inf).logsumexp(1).sum(1)
        values = torch.stack([scores, nulls, totals], 1).tolist()
        offsets = batch["offsets"].cpu()
        found: list[dict[str, Any]] = []
        for i, (score, null, total) in enumerate(values):
            start, end = int(offsets[i, firsts[i], 0]), int(offsets[i, lasts[i], 1])
            span = {"answer": batch["context"][i][start:end], "start": start}
            if score == -math.inf:  # the window has no token of a context
                span = {"answer": "", "start": None}
            found.append({**span, "score": score, "null_score": null, "log_total": total})
        return found

    def _log_metrics(self, stage: Stage) -> None:
        windows, answers = _of_all_processes(self._windows, self._answers)
        self._windows, self._answers = {}, {}
        if not windows:
            return
        given = [self.combine(windows[row].values())["answer"] for row in sorted(windows)]
        right = [answers[row] for row in sorted(windows)]
        for name, value in (load_metric("squad").compute(predictions=given, references=right) or {}).items():
            self.log(f"{stage}/{name}", float(value), prog_bar=name == "f1")


def span_loss(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """(−log p(start) − log p(end)) / 2, mean over the windows.

    Args:
        logits: of start and end, [windows, tokens, 2].
        batch: start_positions and end_positions, [windows].
    """
    starts, ends = logits.unbind(-1)
    return (F.cross_entropy(starts, batch["start_positions"]) + F.cross_entropy(ends, batch["end_positions"])) / 2


def best_spans(logits: Tensor, allowed: Tensor, max_answer_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The span with the highest start logit + end logit of each window, over all of at most max_answer_length tokens.

    Args:
        logits: of start and end, [windows, tokens, 2].
        allowed: whether a span may start or end at a token, [windows, tokens].
        max_answer_length: tokens of a span at most, 1 or more.

    Returns:
        Score, first token and last token, [windows] each; the score is -inf where no token is allowed.
    """
    starts, ends = logits.masked_fill(~allowed[..., None], -math.inf).unbind(-1)
    # every start with the ends from it on: [windows, tokens, max_answer_length]
    following = F.pad(ends, (0, max_answer_length - 1), value=-math.inf).unfold(1, max_answer_length, 1)
    scores, best = (starts[..., None] + following).flatten(1).max(1)
    firsts = best // max_answer_length
    return scores, firsts, (firsts + best % max_answer_length).clamp(max=logits.shape[1] - 1)


def _of_all_processes(windows: dict[int, Any], answers: dict[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
    """What all processes found: of a row whose windows went to several, all of them."""
    parts: list[Any] = [(windows, answers)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (windows, answers))
    merged: dict[int, dict[int, Any]] = {}
    for found, _ in parts:
        for row, some in found.items():
            merged.setdefault(row, {}).update(some)
    return merged, {row: texts for _, given in parts for row, texts in given.items()}
