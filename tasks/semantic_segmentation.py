"""One class per pixel: cross entropy and mean intersection over union."""

import inspect
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, ClassVar, Literal, cast

from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from petune.adapters.side import HierarchicalSideConfig
from petune.tasks.base import AdapterTask
from petune.tasks.checks import check_label_ids
from petune.tasks.models import has_pooler
from petune.tasks.pictures import IGNORED
from petune.tasks.segmentation_model import MapHead, SegmentationModel, patch_map, resize

Stage = Literal["val", "test"]


class SemanticSegmentation(AdapterTask):
    """Classify the pixels of images. Batches hold `pixel_values` [batch, channels, height, width] and `labels`
    [batch, height, width], int64, with -100 for pixels that do not count.

    The head sees the four maps of a `HierarchicalSideConfig`, or, with any other adapter or none, the patches of the
    last hidden state as one map. Logs train/loss; val/loss, val/mean_iou; and the same under test/. The pixels of the
    whole set are counted together, and a class that is in no label and no prediction of it is left out of the mean.

    Args:
        model: local folder or hub id of a pretrained vision transformer; from Python also a `PreTrainedModel`.
        labels: names of the classes in the order of their numbers; None for those the model knows. The command line
            links them from the data.
        head_width: channels in the head.
        kwargs: of `AdapterTask`.

    Raises:
        ValueError: labels are fewer than two, or named twice; head_width is below 1.
    """

    task_type: ClassVar[Any] = None  # PEFT's task types are those of texts
    auto_class: ClassVar[Any] = AutoModel
    main_metrics: ClassVar[dict[str, Literal["max", "min"]]] = {"mean_iou": "max"}
    calls_model = False

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel,
        labels: list[str] | None = None,
        head_width: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
            raise ValueError(f"SemanticSegmentation.labels={labels} must be two or more different names.")
        if head_width < 1:
            raise ValueError(
                f"SemanticSegmentation.head_width={head_width} leaves the head no channel; use 1 or more."
            )
        self._labels = None if labels is None else list(labels)
        self.head_width = head_width

    @property
    def labels(self) -> list[str]:
        """Class names in the order of the logits; the model's own only after `build()`."""
        if self._labels is None:
            id2label = cast("dict[int, str]", self.model.config.id2label)
            return [id2label[index] for index in range(len(id2label))]
        return self._labels

    @property
    def tokenizer(self) -> Any:
        """None: images have none."""
        return None

    def architecture(self, config: PretrainedConfig) -> tuple[Any, dict[str, Any]]:
        """The model without a pooler, which pixels have no use for."""
        return self.auto_class, {"add_pooling_layer": False} if has_pooler(type(config)) else {}

    def load_base(self, weights: bool = True) -> tuple[PreTrainedModel, list[str]]:
        """As `AdapterTask.load_base`; the model is a `SegmentationModel`."""
        model, fresh = super().load_base(weights)
        body = cast("PreTrainedModel", model.base_model)  # of a classifier object, what stands before its head
        config: Any = body.config
        classes = len(self._labels or config.id2label)
        channels = self._own_channels or [getattr(config, "hidden_size", None) or config.hidden_sizes[-1]]
        self._iou = MulticlassJaccardIndex(classes, ignore_index=IGNORED, validate_args=False)
        segmenter = SegmentationModel(body, MapHead(channels, self.head_width, classes))
        return segmenter, [f"{segmenter.base_model_prefix}.{name}" for name in fresh]

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits at the size of the images, [batch, classes, height, width], float32."""
        pixels: Tensor = batch["pixel_values"]
        return resize(self._head(self.feature_maps(pixels)).float(), pixels.shape[-2:])

    def feature_maps(self, pixel_values: Tensor) -> Sequence[Tensor]:
        """What the head sees: the adapter's own maps, or the last hidden state as one map; see `MapHead.forward`."""
        height, width = pixel_values.shape[-2:]
        inputs: dict[str, Any] = {"pixel_values": pixel_values}
        config: Any = self.model.config
        if (height, width) != _pair(config.image_size) and "interpolate_pos_encoding" in self._body_accepts:
            inputs["interpolate_pos_encoding"] = True
        if self._own_channels:
            tuner: Any = self.model.base_model
            return tuner.features(**inputs)
        states: Tensor = self.model(**inputs).last_hidden_state
        return [patch_map(states, height, width, _pair(config.patch_size))]

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Cross entropy of the batch's pixels and what the adapter adds, a scalar."""
        loss = self._loss(self(batch), batch["labels"]) + self.auxiliary_loss()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Count anew, in tensors of this loop: those of inference mode cannot be counted on in outside of it."""
        self._iou.reset()

    def on_test_epoch_start(self) -> None:
        """As `on_validation_epoch_start`."""
        self._iou.reset()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss and count the pixels of each class."""
        self._evaluation_step(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss and count the pixels of each class."""
        self._evaluation_step(batch, "test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, list[Tensor]]:
        """`mask`, the likeliest class of each pixel, [height, width], int64, one an image.

        A mask has the size in the batch's `size` [batch, 2], which is that of the image before it was resized, or else
        that of `pixel_values`.
        """
        logits = self(batch)
        sizes = batch["size"].tolist() if "size" in batch else [logits.shape[-2:]] * len(logits)
        resized = (resize(one[None], size) for one, size in zip(logits, sizes, strict=True))
        return {"mask": [one[0].argmax(0).cpu() for one in resized]}

    def describe(self) -> dict[str, Any]:
        """As `AdapterTask.describe`, with the labels and the width of the head."""
        described = super().describe()
        if self._labels is not None or "model" in self._modules:
            described["init_args"]["labels"] = list(self.labels)
        described["init_args"]["head_width"] = self.head_width
        return described

    @property
    def _own_channels(self) -> Sequence[int]:
        """Channels of the maps that the adapter makes; none where it makes no maps."""
        config = self.adapter
        return config.dims if self.trained == "adapter" and isinstance(config, HierarchicalSideConfig) else ()

    @property
    def _base(self) -> SegmentationModel:
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return cast("SegmentationModel", model)

    @property
    def _head(self) -> nn.Module:
        return self._base.decode_head

    @property
    def _body_accepts(self) -> frozenset[str]:
        return frozenset(inspect.signature(type(self._base.body).forward).parameters)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the pixels that count; 0 where none does."""
        check_label_ids(labels, logits.shape[1], type(self).__name__, IGNORED)
        counted = (labels != IGNORED).sum().clamp(min=1)
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / counted

    def _evaluation_step(self, batch: Mapping[str, Any], stage: Stage) -> None:
        logits, labels = self(batch), batch["labels"]
        self.log(f"{stage}/loss", self._loss(logits, labels), batch_size=len(labels), sync_dist=True)
        self._iou.update(logits.argmax(1), labels)
        # Lightning computes it from the pixels of all batches and processes at the end, and starts anew
        self.log(f"{stage}/mean_iou", self._iou, prog_bar=True, on_epoch=True, batch_size=len(labels))


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, as configurations have them: one number for both, or two."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
