"""Tasks: what a model learns and from which data, ready for Lightning's trainer; loaded at the first use of a name."""

if __name__ != "petune.tasks":
    raise ImportError(
        f"This folder is installed as petune.tasks and was imported as {__name__}; use `import petune.tasks`."
    )

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from petune.tasks.base import AdapterTask
    from petune.tasks.data import TextClassificationData, TextPairData
    from petune.tasks.segmentation_data import SegmentationData
    from petune.tasks.semantic_segmentation import SemanticSegmentation
    from petune.tasks.text_classification import TextClassification
    from petune.tasks.text_embedding import TextEmbedding

__all__ = [
    "AdapterTask",
    "SegmentationData",
    "SemanticSegmentation",
    "TextClassification",
    "TextClassificationData",
    "TextEmbedding",
    "TextPairData",
]

_HOME = {
    "AdapterTask": "base",
    "SegmentationData": "segmentation_data",
    "SemanticSegmentation": "semantic_segmentation",
    "TextClassification": "text_classification",
    "TextClassificationData": "data",
    "TextEmbedding": "text_embedding",
    "TextPairData": "data",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"petune.tasks.{_HOME[name]}"), name)
    raise AttributeError(f"petune.tasks has no {name!r}; it has {', '.join(__all__)}.")
