"""One label per row, whatever a row is: cross entropy, accuracy and macro F1."""

from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar, Literal, cast

import torch
from peft import PeftConfig
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from petune.tasks.base import AdapterTask, gather
from petune.tasks.checks import check_label_ids
from petune.tasks.metrics import load_metric

Stage = Literal["val", "test"]


class Classification(AdapterTask):
    """Classify rows. Batches hold the model's inputs and, to train or evaluate, `labels` [batch], int64.

    Logs train/loss; val/loss, val/accuracy, val/macro_f1; and the same under test/. A subclass gives `task_type` and
    `auto_class`.

    Args:
        model: local folder or hub id of a pretrained model; from Python also a `PreTrainedModel`.
        labels: names in the order of their numbers; None for those the model knows. The command line links them from
            the data.
        kwargs: of `AdapterTask`.

    Raises:
        ValueError: labels are fewer than two, or named twice.
    """

    main_metrics: ClassVar[dict[str, Literal["max", "min"]]] = {"accuracy": "max"}
    ignored_label: ClassVar[int | None] = None
    """A label in batches that does not count."""

    def __init__(
        self, model: str | PathLike[str] | PreTrainedModel, labels: list[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model, **kwargs)
        if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
            raise ValueError(f"{type(self).__name__}.labels={labels} must be two or more different names.")
        self._labels = None if labels is None else list(labels)
        self._predictions: list[Tensor] = []
        self._references: list[Tensor] = []

    @property
    def labels(self) -> list[str]:
        """Label names in the order of the probabilities; the model's own only after `build()`."""
        if self._labels is None:
            id2label = cast("dict[int, str]", self.model.config.id2label)
            return [id2label[index] for index in range(len(id2label))]
        return self._labels

    def base_config(self) -> PretrainedConfig:
        """The configuration of the base model, with the labels in it."""
        config = super().base_config()
        if self._labels is not None:
            _name_labels(config, self._labels)
        return config

    def load_base(self, weights: bool = True) -> tuple[PreTrainedModel, list[str]]:
        """As `AdapterTask.load_base`.

        Raises:
            ValueError: a model object's head has another number of labels.
        """
        model, fresh = super().load_base(weights)
        if self._labels is not None:
            if model.config.num_labels != len(self._labels):
                raise ValueError(
                    f"{type(self).__name__}.labels has {len(self._labels)} names and the {type(model).__name__} given "
                    f"has {model.config.num_labels} outputs; make it with num_labels={len(self._labels)}."
                )
            _name_labels(model.config, self._labels)
        return model, fresh

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """As `GuardedModule`, and refuse labels that the model has no output for.

        Raises:
            ValueError: names the label and its row.
        """
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if isinstance(labels, Tensor) and len(labels):
            check_label_ids(labels, len(self.labels), type(self).__name__, self.ignored_label)
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits, [batch, labels], float32."""
        return self.model(**self.model_inputs(batch)).logits.float()

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Cross entropy of the batch and what the adapter adds, a scalar."""
        loss = F.cross_entropy(self(batch), batch["labels"]) + self.auxiliary_loss()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss and keep the predictions for the metrics."""
        self._evaluation_step(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss and keep the predictions for the metrics."""
        self._evaluation_step(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log val/accuracy and val/macro_f1."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log test/accuracy and test/macro_f1."""
        self._log_metrics("test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """`label`, the likeliest name of each row; `probabilities`, [batch, labels], in the order of `labels`."""
        probabilities = self(batch).softmax(-1).cpu()
        return {"label": [self.labels[i] for i in probabilities.argmax(-1).tolist()], "probabilities": probabilities}

    def describe(self) -> dict[str, Any]:
        """As `AdapterTask.describe`, with the labels."""
        described = super().describe()
        if self._labels is not None or "model" in self._modules:
            described["init_args"]["labels"] = list(self.labels)
        return described

    def _evaluation_step(self, batch: Mapping[str, Any], stage: Stage) -> None:
        logits, labels = self(batch), batch["labels"]
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self._predictions.append(logits.argmax(-1))
        self._references.append(labels)

    def _log_metrics(self, stage: Stage) -> None:
        if not self._predictions:
            return
        predictions, references = gather(torch.cat(self._predictions)), gather(torch.cat(self._references))
        self._predictions, self._references = [], []
        for name in ("accuracy", "macro_f1"):
            values = load_metric(name).compute(predictions=predictions.tolist(), references=references.tolist())
            for key, value in (values or {}).items():
                self.log(f"{stage}/{key}", float(value), prog_bar=key == "accuracy")


class FileClassification(Classification):
    """Classify what files hold, images or sounds. PEFT's task types are those of texts, so the head is named here."""

    task_type: ClassVar[Any] = None

    @property
    def tokenizer(self) -> Any:
        """None: files have none."""
        return None

    def unadapted(self, model: PreTrainedModel) -> list[str]:
        """Modules that "all-linear" leaves alone: the head, which is trained in full."""
        return self.head

    def prepare_adapter(self, config: PeftConfig, model: PreTrainedModel) -> None:
        """Have the head trained in full, as PEFT does it for the heads of texts."""
        adapter: Any = config
        if self.head and hasattr(adapter, "modules_to_save"):
            adapter.modules_to_save = list(dict.fromkeys([*(adapter.modules_to_save or []), *self.head]))
        if getattr(adapter, "target_modules", None) == "all-linear" and not isinstance(adapter.exclude_modules, str):
            adapter.exclude_modules = {*(adapter.exclude_modules or ()), *self.unadapted(model)}


def _name_labels(config: PretrainedConfig, labels: list[str]) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
