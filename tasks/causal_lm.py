"""The next token: cross entropy and perplexity of answers, and generation."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from petune.tasks.base import AdapterTask
from petune.tasks.causal_data import CausalLMData
from petune.tasks.causal_rows import IGNORED
from petune.tasks.generation import Generation
from petune.tasks.models import fresh_modules
from petune.tasks.packing import check_packing
from petune.tasks.positions import check_asked

Stage = Literal["val", "test"]


class CausalLM(AdapterTask):
    """Learn to answer, or to go on with texts. Batches are those of `CausalLMData`.

    Logs train/loss, the mean over the batch's learned tokens; val/loss, the mean over those of the whole set, and
    val/perplexity, its exponential; and the same under test/. Logits are computed where a token is learned and nowhere
    else, except in a compiled model. The head of train: head is the output embedding, which many models share with the
    input embedding.

    Args:
        model: local folder or hub id of a pretrained decoder; from Python also a `PreTrainedModel`.
        max_new_tokens: of a prediction, tokens at most.
        temperature: of a prediction; 0 for the likeliest token each time.
        top_p: of a prediction with a temperature, share of the probability that is drawn from.
        kwargs: of `AdapterTask`.

    Raises:
        ValueError: an argument is out of its range.
    """

    task_type = "CAUSAL_LM"
    auto_class: ClassVar[Any] = AutoModelForCausalLM
    main_metrics: ClassVar[dict[str, Literal["max", "min"]]] = {"perplexity": "min"}
    has_own_head = False

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedModel,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.generation = Generation(max_new_tokens, temperature, top_p)
        self._mean_loss = MeanMetric()
        self._chat_tokenizer: PreTrainedTokenizerBase | None = None
        self._packs_checked = False

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """As `AdapterTask.tokenizer`; once there is data, with the chat template that it uses, so that it is saved."""
        return super().tokenizer if self._chat_tokenizer is None else self._chat_tokenizer

    def setup(self, stage: str) -> None:
        """Take over the tokenizer of the data."""
        data = self._data
        if data is not None:
            self._chat_tokenizer = data.text_tokenizer

    def find_head(self, model: PreTrainedModel, fresh: list[str]) -> list[str]:
        """The output embedding, unless there is an adapter: it is pretrained. And all that the checkpoint lacks."""
        output = model.get_output_embeddings()
        heads = [name for name, module in model.named_modules() if module is output and self.trained != "adapter"]
        return [*heads, *(name for name in fresh_modules(model, fresh) if name not in heads)]

    def on_fit_start(self) -> None:
        """As `AdapterTask.on_fit_start`, and see `check_data`."""
        super().on_fit_start()
        self.check_data()

    def on_validation_start(self) -> None:
        """See `check_data`."""
        self.check_data()

    def on_test_start(self) -> None:
        """See `check_data`."""
        self.check_data()

    def on_predict_start(self) -> None:
        """See `check_data`."""
        self.check_data()

    def check_data(self) -> None:
        """The rows of the data fit the model.

        Raises:
            ValueError: they may be longer than the model's positions reach, or have tokens that it does not know.
        """
        check_asked(self.asked_lengths, self.model, self.longest_text)
        data, known = self._data, self._vocab_size
        if data is not None and len(data.text_tokenizer) > known:
            raise ValueError(
                f"the tokenizer has {len(data.text_tokenizer)} tokens and {self._base_name} knows {known}; use the "
                "model's own tokenizer."
            )

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Logits of every position, [batch, tokens, vocabulary], dtype of the model."""
        return self._logits(batch)[:, -batch["input_ids"].shape[1] :]

    def token_losses(self, batch: Mapping[str, Any]) -> Tensor:
        """Cross entropy of each token that is learned, [learned tokens], float32, in the order of the labels."""
        following = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # the label of each position's next token
        learned = following != IGNORED
        head = self._base.get_output_embeddings()
        only = _Only(learned)
        if self.compile_options or not isinstance(head, nn.Module):  # each hook would compile the model anew
            logits = self._logits(batch)
        else:
            with head.register_forward_pre_hook(only):
                logits = self._logits(batch)
        logits = logits[0] if only.used else logits[:, -learned.shape[1] :][learned]
        return F.cross_entropy(logits.float(), following[learned], reduction="none")

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Mean loss of the batch's learned tokens and what the adapter adds, a scalar."""
        self._check_packs(batch)
        losses = self.token_losses(batch)
        loss = losses.sum() / max(len(losses), 1) + self.auxiliary_loss()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Count anew, in tensors of this loop: those of inference mode cannot be counted on in outside of it."""
        self._mean_loss.reset()

    def on_test_epoch_start(self) -> None:
        """As `on_validation_epoch_start`."""
        self._mean_loss.reset()

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Count the losses of the batch's tokens."""
        self._check_packs(batch)
        self._mean_loss.update(self.token_losses(batch))

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Count the losses of the batch's tokens."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log val/loss and val/perplexity."""
        self._log_loss("val")

    def on_test_epoch_end(self) -> None:
        """Log test/loss and test/perplexity."""
        self._log_loss("test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, list[str]]:
        """`generated`, the text that follows each prompt.

        Raises:
            ValueError: prompt and answer together are longer than the model's positions reach.
        """
        width, limit = batch["input_ids"].shape[1], self.longest_text
        if limit is not None and width + self.generation.max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {width} tokens and max_new_tokens={self.generation.max_new_tokens} are more than the "
                f"{limit} tokens that {self._base_name} has positions for; lower one of them, or max_length."
            )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            # PEFT puts the virtual tokens before the padding, and what stands between changes the answer
            written = [
                self._write(row[keep][None], keep[keep][None])[0] for row, keep in zip(ids, mask == 1, strict=True)
            ]
        else:
            written = self._write(ids, mask)
        texts = [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in written]
        return {"generated": [text.strip() for text in texts]}

    def describe(self) -> dict[str, Any]:
        """As `AdapterTask.describe`, with the options of generation."""
        described = super().describe()
        for name in ("max_new_tokens", "temperature", "top_p"):
            described["init_args"][name] = getattr(self.generation, name)
        return described

    @property
    def _data(self) -> CausalLMData | None:
        """The data module; None where the trainer was given loaders, or there is no trainer."""
        data = getattr(self._trainer, "datamodule", None)
        return data if isinstance(data, CausalLMData) else None

    @property
    def _base(self) -> PreTrainedModel:
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return cast("PreTrainedModel", model)

    @property
    def _vocab_size(self) -> int:
        config: Any = self._base.config
        return config.get_text_config().vocab_size

    @property
    def _base_name(self) -> str:
        return self.model_name or type(self._base).__name__

    def _logits(self, batch: Mapping[str, Any]) -> Tensor:
        # With a cache, which models make unless told not to, transformers ignores that position_ids begin anew, and
        # every row of a pack sees those before it.
        cache: dict[str, Any] = {"use_cache": False} if "use_cache" in self._accepted else {}
        return self.model(**self.model_inputs(batch), **cache).logits

    def _write(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What follows the prompts, [batch, new tokens]."""
        config = self.generation.config(self.model, self.tokenizer)
        generate: Any = self.model.generate
        return generate(input_ids=ids, attention_mask=mask.long(), generation_config=config)[:, ids.shape[1] :]

    def _check_packs(self, batch: Mapping[str, Any]) -> None:
        if "position_ids" in batch and not self._packs_checked:
            check_packing(self.model, self._vocab_size, len(batch["input_ids"]))
            self._packs_checked = True

    def _log_loss(self, stage: Stage) -> None:
        loss = self._mean_loss.compute()  # over all processes
        self._mean_loss.reset()
        self.log(f"{stage}/loss", loss)
        self.log(f"{stage}/perplexity", torch.exp(loss), prog_bar=True)


@dataclass
class _Only:
    """A hook that gives the output embedding the states of some positions alone, [1, learned tokens, hidden].

    Args:
        learned: these positions, [batch, tokens].
        used: whether the model has called it.
    """

    learned: Tensor
    used: bool = False

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.used = True
        states = args[0][:, -self.learned.shape[1] :]  # prompt learning puts virtual tokens before the others
        return states[self.learned][None], *args[1:]
