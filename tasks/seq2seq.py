"""A text for each text: cross entropy of the target's tokens, ROUGE and BLEU of what the model writes."""

from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from petune.tasks.base import AdapterTask
from petune.tasks.metrics import load_metric
from petune.tasks.models import fresh_modules
from petune.tasks.seq2seq_data import IGNORED

Stage = Literal["val", "test"]


class Seq2Seq(AdapterTask):
    """Write a target text for each source text. Batches hold `input_ids`, `attention_mask` and, to train or evaluate,
    `labels` [batch, target tokens] with -100 for padding; to evaluate also `row` and `references`, see `Seq2SeqData`.

    Logs train/loss and val/loss, the mean over the tokens of a batch and of the whole set; where texts are written
    val/rouge1, val/rouge2, val/rougeL and val/bleu; and the same under test/, for which texts are always written.

    Args:
        model: local folder or hub id of a pretrained encoder and decoder, such as T5 or BART; from Python also a
            `PreTrainedModel`.
        label_smoothing: share of the training target that is spread over the vocabulary, 0..1.
        generate_in_validation: write texts in validation as well, which takes a forward for each token of them.
        max_new_tokens: tokens of a written text, 1 or more.
        num_beams: beams that a text is searched with; 1 takes the likeliest token each time.
        kwargs: of `AdapterTask`.

    Raises:
        ValueError: an argument is out of its range.
    """

    task_type = "SEQ_2_SEQ_LM"
    auto_class: ClassVar[Any] = AutoModelForSeq2SeqLM
    length_arguments = ("max_source_length", "max_target_length")
    main_metrics: ClassVar[dict[str, Literal["max", "min"]]] = {"rougeL": "max"}
    has_own_head = False

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel,
        label_smoothing: float = 0.0,
        generate_in_validation: bool = False,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"Seq2Seq.label_smoothing={label_smoothing} is no share; use 0 up to below 1.")
        for name, count in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
            if count < 1:
                raise ValueError(f"Seq2Seq.{name}={count} writes nothing; use 1 or more.")
        self.label_smoothing, self.generate_in_validation = label_smoothing, generate_in_validation
        self.max_new_tokens, self.num_beams = max_new_tokens, num_beams
        self._written: dict[int, tuple[str, str]] = {}  # row -> what the model wrote, and the reference
        self._losses = MeanMetric()

    def find_head(self, model: PreTrainedModel, fresh: list[str]) -> list[str]:
        """The output embedding, unless there is an adapter: it is pretrained. And all that the checkpoint lacks."""
        output = model.get_output_embeddings()
        heads = [name for name, module in model.named_modules() if module is output and self.trained != "adapter"]
        return [*heads, *(name for name in fresh_modules(model, fresh) if name not in heads)]

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits of the batch's labels, each from those before it, [batch, target tokens, vocabulary]."""
        shifted = self._base.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return self.model(**self.model_inputs(batch), decoder_input_ids=shifted).logits

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Smoothed cross entropy of the batch's tokens and what the adapter adds, a scalar."""
        loss = self._token_losses(batch, self.label_smoothing).mean() + self.auxiliary_loss()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Count anew, in tensors of this loop: those of inference mode cannot be counted on in outside of it."""
        self._losses.reset()

    def on_test_epoch_start(self) -> None:
        """As `on_validation_epoch_start`."""
        self._losses.reset()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss and, if asked, write texts and keep them for the metrics."""
        self._evaluation_step(batch, "val", write=self.generate_in_validation)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss, write texts and keep them for the metrics."""
        self._evaluation_step(batch, "test", write=True)

    def on_validation_epoch_end(self) -> None:
        """Log ROUGE and BLEU, if texts were written."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log ROUGE and BLEU."""
        self._log_metrics("test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, list[str]]:
        """`text`, what the model writes for each source."""
        return {"text": self.write(batch)}

    def write(self, batch: Mapping[str, Any]) -> list[str]:
        """What the model writes for each source, without special tokens."""
        inputs = {name: value for name, value in self.model_inputs(batch).items() if not name.startswith("decoder_")}
        model: Any = self.model
        ids = model.generate(**inputs, max_new_tokens=self.max_new_tokens, num_beams=self.num_beams, do_sample=False)
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def describe(self) -> dict[str, Any]:
        """As `AdapterTask.describe`, with the arguments of this task."""
        described = super().describe()
        for name in ("label_smoothing", "generate_in_validation", "max_new_tokens", "num_beams"):
            described["init_args"][name] = getattr(self, name)
        return described

    @property
    def _base(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def _token_losses(self, batch: Mapping[str, Any], smoothing: float = 0.0) -> Tensor:
        """Cross entropy of each token of the targets, [target tokens of the batch], float32."""
        labels: Tensor = batch["labels"]
        counted = labels != IGNORED
        return F.cross_entropy(
            self(batch)[counted].float(), labels[counted], reduction="none", label_smoothing=smoothing
        )

    def _evaluation_step(self, batch: Mapping[str, Any], stage: Stage, *, write: bool) -> None:
        self._losses.update(self._token_losses(batch))
        # Lightning computes it from the tokens of all batches and processes at the end, and starts anew
        self.log(f"{stage}/loss", self._losses, on_epoch=True, batch_size=len(batch["labels"]))
        if write:
            references = batch.get("references") or self._decoded(batch["labels"])
            rows = (
                batch["row"].tolist()
                if "row" in batch
                else range(len(self._written), len(self._written) + len(references))
            )
            self._written.update(zip(rows, zip(self.write(batch), references, strict=True), strict=True))

    def _decoded(self, labels: Tensor) -> list[str]:
        padding = cast("int", self.tokenizer.pad_token_id)
        return self.tokenizer.batch_decode(labels.masked_fill(labels == IGNORED, padding), skip_special_tokens=True)

    def _log_metrics(self, stage: Stage) -> None:
        """Of the rows of all processes; one that two were given, to make their batches even, counts once."""
        rows, self._written = _gather(self._written), {}
        if not rows:
            return
        predictions, references = zip(*rows.values(), strict=True)
        for name in ("rouge", "bleu"):
            values = load_metric(name).compute(predictions=list(predictions), references=list(references))
            for key, value in (values or {}).items():
                self.log(f"{stage}/{key}", float(value), prog_bar=key == "rougeL")


def _gather(own: dict[int, tuple[str, str]]) -> dict[int, tuple[str, str]]:
    """The rows of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    return {row: texts for part in parts for row, texts in part.items()}
