"""Texts as vectors: matching pairs close together, everything else apart; measured by retrieval."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, ClassVar, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForTextEncoding, PretrainedConfig, PreTrainedModel

from petune.tasks.base import AdapterTask, gather
from petune.tasks.metrics import load_metric, retrieval_ranks
from petune.tasks.models import has_pooler
from petune.tasks.positions import max_tokens

Stage = Literal["val", "test"]


class TextEmbedding(AdapterTask):
    """Embed texts by the mean of their token states. Batches are pairs: {"query": {...}, "document": {...}}.

    Training is contrastive: each query's document against all documents of the batch, and the other way round.
    Logs train/loss; val/loss, val/recall_at_1, val/recall_at_5, val/mrr over all documents of the set; and the same
    under test/. The head of train: head is a linear map of the embedding that starts as the identity.

    Args:
        model: local folder or hub id of a pretrained encoder; from Python also a `PreTrainedModel`.
        scale: inverse temperature of the cosine similarities, above 0.
        kwargs: of `AdapterTask`.

    Raises:
        ValueError: scale is not above 0.
    """

    task_type = "FEATURE_EXTRACTION"
    auto_class: ClassVar[Any] = AutoModel
    main_metrics: ClassVar[dict[str, Literal["max", "min"]]] = {"recall_at_1": "max"}

    def __init__(self, model: str | PathLike[str] | PreTrainedModel, scale: float = 20.0, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        if scale <= 0:
            raise ValueError(f"TextEmbedding.scale={scale} is out of range; use a number above 0, such as 20.")
        self.scale = scale
        self.projection: nn.Module = nn.Identity()
        self._queries: list[Tensor] = []
        self._documents: list[Tensor] = []
        self._texts: list[Tensor] = []

    def architecture(self, config: PretrainedConfig) -> tuple[Any, dict[str, Any]]:
        """The model without the parts that mean pooling does not use: a pooler, a decoder."""
        if config.is_encoder_decoder:
            return AutoModelForTextEncoding, {}
        return self.auto_class, {"add_pooling_layer": False} if has_pooler(type(config)) else {}

    def find_head(self, model: PreTrainedModel, fresh: list[str]) -> list[str]:
        """The projection where it is what trains; the model itself has no head."""
        return ["projection"] if self.trained == "head" else []

    def make_baseline(self, model: PreTrainedModel) -> PreTrainedModel:
        """As `AdapterTask.make_baseline`; the head is a projection that changes nothing yet."""
        model.requires_grad_(self.trained == "all")
        if self.trained == "head":
            size: int = model.config.get_text_config().hidden_size
            projection = nn.Linear(size, size, bias=False)
            nn.init.eye_(projection.weight)
            self.projection = projection
        return model

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Σ mask · state / Σ mask, scaled to length one; [batch, hidden_size], float32."""
        states = self.model(**self.model_inputs(inputs)).last_hidden_state.float()
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).unsqueeze(-1)
        states = states[:, -mask.shape[1] :]  # prompt tuning puts its virtual tokens in front
        pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return F.normalize(self.projection(pooled).float(), dim=-1)

    def training_step(self, batch: Mapping[str, Mapping[str, Tensor]], batch_idx: int) -> Tensor:
        """The contrastive loss of the batch and what the adapter adds, on average over the two sides; a scalar."""
        queries, extra = self(batch["query"]), self.auxiliary_loss()
        documents = self(batch["document"])
        loss = self._loss(batch, queries, documents) + (extra + self.auxiliary_loss()) / 2
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["query"]["input_ids"]))
        return loss

    def validation_step(self, batch: Mapping[str, Mapping[str, Tensor]], batch_idx: int) -> None:
        """Log the loss and keep the embeddings for the metrics."""
        self._evaluation_step(batch, "val")

    def test_step(self, batch: Mapping[str, Mapping[str, Tensor]], batch_idx: int) -> None:
        """Log the loss and keep the embeddings for the metrics."""
        self._evaluation_step(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log val/recall_at_1, val/recall_at_5 and val/mrr."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log test/recall_at_1, test/recall_at_5 and test/mrr."""
        self._log_metrics("test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """`query_embedding`, `document_embedding`, [batch, hidden_size]; only one of them if the batch has one text.

        A batch of plain texts (`input_ids`, …) gives one entry, `embedding`.
        """
        if "input_ids" in batch:
            return {"embedding": self(batch).cpu()}
        return {f"{name}_embedding": self(batch[name]).cpu() for name in ("query", "document") if name in batch}

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 64, max_length: int | None = None) -> Tensor:
        """Embed texts without a trainer, dropout off.

        Args:
            texts: any number.
            batch_size: texts a forward pass.
            max_length: tokens kept of a text; None for what tokenizer and model take.

        Returns:
            [texts, hidden_size], float32, on the CPU, in the order of `texts`.

        Raises:
            TypeError: texts is one string.
        """
        if isinstance(texts, str):
            raise TypeError("TextEmbedding.encode takes a list of texts and got one string; put it in a list.")
        model = self.build()
        base = cast("PreTrainedModel", model.get_base_model() if isinstance(model, PeftModel) else model)
        config = base.config.get_text_config()
        if not texts:
            return torch.empty(0, config.hidden_size)
        takes = max_tokens(model) or self.tokenizer.model_max_length
        limit = max_length or min(self.tokenizer.model_max_length, takes)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # little padding
        modes = {module: module.training for module in self.modules()}
        self.eval()
        found: list[Tensor] = []
        for start in range(0, len(order), batch_size):
            chunk = [texts[index] for index in order[start : start + batch_size]]
            tokens = self.tokenizer(chunk, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            found.append(self({name: tensor.to(self.device) for name, tensor in tokens.items()}).cpu())
        for module, training in modes.items():
            module.training = training
        embeddings = torch.cat(found)
        return embeddings[torch.tensor(order).argsort()]

    def describe(self) -> dict[str, Any]:
        """As `AdapterTask.describe`, with the scale."""
        described = super().describe()
        described["init_args"]["scale"] = self.scale
        return described

    def _loss(self, batch: Mapping[str, Mapping[str, Tensor]], queries: Tensor, documents: Tensor) -> Tensor:
        same = _equal_rows(batch["query"]["input_ids"]) | _equal_rows(batch["document"]["input_ids"])
        return contrastive_loss(queries, documents, self.scale, same)

    def _evaluation_step(self, batch: Mapping[str, Mapping[str, Tensor]], stage: Stage) -> None:
        queries, documents = self(batch["query"]), self(batch["document"])
        loss = self._loss(batch, queries, documents)
        self.log(f"{stage}/loss", loss, batch_size=len(queries), sync_dist=True)
        self._queries.append(queries)
        self._documents.append(documents)
        self._texts.append(_text_ids(batch["document"]).to(documents.device))

    def _log_metrics(self, stage: Stage) -> None:
        if not self._queries:
            return
        queries, documents = gather(torch.cat(self._queries)), gather(torch.cat(self._documents))
        texts = gather(torch.cat(self._texts))
        self._queries, self._documents, self._texts = [], [], []
        _, relevant = texts.unique(return_inverse=True)  # equal documents are one candidate, no rivals
        candidates = documents.new_empty(int(relevant.max()) + 1, documents.shape[1])
        candidates[relevant] = documents
        ranks = retrieval_ranks(queries, candidates, relevant)
        values = load_metric("retrieval").compute(predictions=ranks.tolist())
        for key, value in (values or {}).items():
            self.log(f"{stage}/{key}", float(value), prog_bar=key == "recall_at_1")


def contrastive_loss(queries: Tensor, documents: Tensor, scale: float, same: Tensor | None = None) -> Tensor:
    """½ CE(scale · Q Dᵀ, diagonal) + ½ CE(scale · D Qᵀ, diagonal): symmetric InfoNCE with in-batch negatives.

    Args:
        queries: unit vectors, [batch, hidden_size].
        documents: unit vectors, [batch, hidden_size]; row i answers query i.
        scale: inverse temperature.
        same: [batch, batch] bool; pairs that are no negatives of each other, such as equal texts.

    Returns:
        A scalar, float32.
    """
    with torch.autocast(queries.device.type, enabled=False):
        scores = scale * queries.float() @ documents.float().T
    diagonal = torch.arange(len(scores), device=scores.device)
    if same is not None:
        scores = scores.masked_fill(same & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device), -torch.inf)
    return (F.cross_entropy(scores, diagonal) + F.cross_entropy(scores.T, diagonal)) / 2


def _equal_rows(ids: Tensor) -> Tensor:
    return (ids.unsqueeze(0) == ids.unsqueeze(1)).all(-1)


def _text_ids(inputs: Mapping[str, Tensor]) -> Tensor:
    """One number a text, [batch], int64, whatever its padding: equal for equal texts."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    return torch.tensor([hash(tuple(ids[keep].tolist())) for ids, keep in zip(inputs["input_ids"], mask, strict=True)])
