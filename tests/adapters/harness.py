"""What the contract tests share: forward, training and comparing of models."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.adapters.cases import Case
from tests.families import FAMILIES, Head

Batch = Mapping[str, Tensor]


def targets(case: Case) -> dict[str, Any]:
    """Leave target_modules to the method where it finds them itself."""
    return {} if case.default_targets else {"target_modules": "all-linear"}


def build(family: str, head: Head = "cls", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return FAMILIES[family].build(head=head).to(dtype)


def inputs(family: str, head: Head = "cls", dtype: torch.dtype = torch.float32, batch_size: int = 3) -> Batch:
    batch = FAMILIES[family].inputs(batch_size, head=head)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def output(model: nn.Module, batch: Batch) -> Tensor:
    """Logits, or last hidden state of a model without a head, in the state (train or eval) the model is in."""
    with torch.no_grad():
        out = model(**batch)
    return out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state


def adapted(case: Case, family: str, head: Head = "cls", **fields: Any) -> PeftModel:
    """A PEFT model in eval mode whose adapter already changes the output."""
    torch.manual_seed(1)
    return get_peft_model(build(family, head), case.random_config(**{**targets(case), **fields})).eval()


def train(model: nn.Module, batch: Batch, steps: int = 3, lr: float = 5e-3) -> list[float]:
    """Losses of a few AdamW steps on one batch; equal for equal models, dropout included."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    losses: list[float] = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Gradients of the trainable parameters; the model is left without any."""
    model.zero_grad()
    loss().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def base_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Parameters and buffers of the base, without adapters, by the names they had before."""
    prefix = model.base_model.prefix
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor.clone()
        for name, tensor in model.get_base_model().state_dict().items()
        if prefix not in name and ".modules_to_save." not in name
    }


def assert_same_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
