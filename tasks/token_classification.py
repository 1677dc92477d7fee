"""One tag per word: cross entropy, accuracy, and precision, recall and F1 of entities."""

from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForTokenClassification, PreTrainedModel

from petune.tasks.base import gather
from petune.tasks.classification import Classification, Stage
from petune.tasks.metrics import load_metric
from petune.tasks.token_batches import IGNORED, first_tokens
from petune.tasks.token_task import TokenTask

_ENTITY_TAGS = ("B-", "I-")


class TokenClassification(TokenTask, Classification):
    """Tag the words of sentences. Batches hold `input_ids`, `attention_mask` and `labels` [batch, tokens], with -100
    for tokens that do not count; to evaluate and predict also `row`, `word_ids` and `words`, see
    `TokenClassificationData`.

    Logs train/loss, a mean over tokens; val/loss; val/accuracy over words; val/entity_precision, val/entity_recall and
    val/entity_f1 where the tags are O, B-… and I-…, val/macro_f1 over words where they are not; and the same under
    test/. Words beyond max_length are not measured. A word is predicted by its first token.

    Args:
        model: local folder or hub id of a pretrained encoder or decoder; from Python also a `PreTrainedModel`.
        labels: tags in the order of their numbers; None for those the model knows. The command line links them from
            the data.
        class_weights: weight of each tag in the training loss, in the order of labels; balanced for words / (tags *
            words of the tag), counted in the training rows; None for equal ones. The validation loss has none.
        kwargs: of `AdapterTask`.

    Raises:
        ValueError: labels are fewer than two, or named twice; a weight is negative, or they are not as many.
    """

    task_type = "TOKEN_CLS"
    auto_class: ClassVar[Any] = AutoModelForTokenClassification
    main_metrics: ClassVar[dict[str, Literal["max", "min"]]] = {"entity_f1": "max", "macro_f1": "max"}
    ignored_label = IGNORED

    _weights: Tensor | None

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel,
        labels: list[str] | None = None,
        class_weights: Literal["balanced"] | list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, labels, **kwargs)
        given = torch.tensor(class_weights) if isinstance(class_weights, list) else None
        if given is not None and (bool((given < 0).any()) or len(given) != len(labels or given)):
            raise ValueError(
                f"TokenClassification.class_weights={class_weights} must be one number of 0 or more for each of "
                f"labels={labels}; or balanced."
            )
        self.class_weights = class_weights
        self.register_buffer("_weights", given, persistent=False)
        self._sentences: list[tuple[Tensor, Tensor]] = []  # row and number of words, of each sentence

    def on_fit_start(self) -> None:
        """As `AdapterTask.on_fit_start`, and weigh the tags.

        Raises:
            ValueError: class_weights are balanced and the data does not count its tags, or they are not as many.
        """
        super().on_fit_start()
        if self.class_weights == "balanced":
            data: Any = getattr(self.trainer, "datamodule", None)
            if not hasattr(data, "tag_counts"):
                raise ValueError(
                    "TokenClassification.class_weights=balanced asks the data module for tag_counts() and there is "
                    "none; train with TokenClassificationData, or list the weights."
                )
            counts = torch.from_numpy(data.tag_counts()).to(self.device)
            self._weights = counts.sum() / (len(counts) * counts.clamp(min=1)).float()
        if self._weights is not None and len(self._weights) != len(self.labels):
            raise ValueError(
                f"TokenClassification.class_weights has {len(self._weights)} weights and there are "
                f"{len(self.labels)} labels; give each one."
            )

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits, [batch, tokens, labels], float32."""
        return self.token_logits(self.model_inputs(batch))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Weighted cross entropy of the batch's tokens and what the adapter adds, a scalar."""
        loss = token_loss(self(batch), batch["labels"], self._weights) + self.auxiliary_loss()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, list[list[Any]]]:
        """`words`, their `tags` and the tags' `probability`, a list of each for every row; None for a word cut off."""
        probabilities, best = (each.cpu() for each in self(batch).softmax(-1).max(-1))
        word_ids = batch["word_ids"].cpu()
        first = first_tokens(word_ids)
        found: dict[str, list[list[Any]]] = {"words": batch["words"], "tags": [], "probability": []}
        for row, words in enumerate(batch["words"]):
            tags: list[str | None] = [None] * len(words)
            sure: list[float | None] = [None] * len(words)
            for token in first[row].nonzero().flatten().tolist():
                word = int(word_ids[row, token])
                tags[word] = self.labels[int(best[row, token])]
                sure[word] = round(float(probabilities[row, token]), 6)
            found["tags"].append(tags)
            found["probability"].append(sure)
        return found

    def describe(self) -> dict[str, Any]:
        """As `Classification.describe`, with the weights."""
        described = super().describe()
        described["init_args"]["class_weights"] = self.class_weights
        return described

    def _evaluation_step(self, batch: Mapping[str, Any], stage: Stage) -> None:
        logits, labels = self(batch), batch["labels"]
        counted = labels != IGNORED
        loss = token_loss(logits, labels)
        self.log(f"{stage}/loss", loss, batch_size=max(int(counted.sum()), 1), sync_dist=True)
        if "word_ids" in batch:  # of a word whose tokens are all labelled, the first decides
            counted = counted & first_tokens(batch["word_ids"])
        self._predictions.append(logits.argmax(-1)[counted])
        self._references.append(labels[counted])
        seen = sum(len(rows) for rows, _ in self._sentences) + (self.global_rank << 40)  # where rows have no number
        rows = batch["row"] if "row" in batch else torch.arange(len(labels), device=labels.device) + seen
        self._sentences.append((rows, counted.sum(1)))

    def _log_metrics(self, stage: Stage) -> None:
        if not self._predictions:
            return
        rows, lengths = (gather(torch.cat(each)).tolist() for each in zip(*self._sentences, strict=True))
        predictions, references = (
            [self.labels[number] for number in gather(torch.cat(each)).tolist()]
            for each in (self._predictions, self._references)
        )
        self._predictions, self._references, self._sentences = [], [], []
        # by row, since several processes may have seen one row, so that each had equally many
        sentences: dict[int, tuple[list[str], list[str]]] = {}
        start = 0
        for row, length in zip(rows, lengths, strict=True):
            words = slice(start, start + length)
            sentences[row] = predictions[words], references[words]
            start += length
        for name, value in tag_metrics(list(sentences.values()), self.labels).items():
            self.log(f"{stage}/{name}", value, prog_bar=name.endswith("f1"))


def token_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ w_y · −log p(y) / Σ w_y over the tokens that count; 0 where none does.

    Args:
        logits: [batch, tokens, labels].
        labels: [batch, tokens]; -100 does not count.
        weights: w, [labels]; None for ones.
    """
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weights, ignore_index=IGNORED, reduction="sum")
    counted = labels[labels != IGNORED]
    divisor = (torch.ones_like(counted, dtype=logits.dtype) if weights is None else weights[counted]).sum()
    return total / divisor.clamp(min=torch.finfo(logits.dtype).tiny)


def tag_metrics(sentences: list[tuple[list[str], list[str]]], labels: list[str]) -> dict[str, float]:
    """Accuracy over words; and the entities' precision, recall and F1, or macro F1 where tags mark no entities.

    Args:
        sentences: predicted and true tags of each.
        labels: all tags.
    """
    predictions = [predicted for predicted, _ in sentences]
    references = [true for _, true in sentences]
    numbers = {label: number for number, label in enumerate(labels)}
    flat = {
        "predictions": [numbers[tag] for tags in predictions for tag in tags],
        "references": [numbers[tag] for tags in references for tag in tags],
    }
    found: dict[str, Any] = {}
    if flat["predictions"]:
        found |= load_metric("accuracy").compute(**flat) or {}
        if all(label == "O" or label.startswith(_ENTITY_TAGS) for label in labels):
            found |= load_metric("entities").compute(predictions=predictions, references=references) or {}
        else:
            found |= load_metric("macro_f1").compute(**flat) or {}
    return {name: float(value) for name, value in found.items()}
