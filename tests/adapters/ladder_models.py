"""What the tests of ladders share: models with several blocks, adapted ones, and what blocks give."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from petune.adapters.side import LadderSideConfig
from petune.topology import find_topology
from tests.families import FAMILIES, Family, Head

DEPTH = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")


def family(name: str, blocks: int = 2, **fields: Any) -> Family:
    """A family with that many blocks a stack and other fields of its config."""
    known = FAMILIES[name]
    depth = {key: blocks for key in DEPTH if key in known.config}
    return dataclasses.replace(known, config={**known.config, **depth, **fields})


def config(**fields: Any) -> LadderSideConfig:
    return LadderSideConfig(**{"reduction_factor": 4, **fields})


def beside(base: PreTrainedModel, **fields: Any) -> PeftModel:
    """In eval mode, with a ladder that changes the output unless fields say otherwise."""
    torch.manual_seed(1)
    return get_peft_model(base, config(**{"init_weights": False, **fields})).eval()


def adapted(name: str, head: Head = "lm", blocks: int = 2, **fields: Any) -> PeftModel:
    return beside(family(name, blocks).build(head=head), **fields)


def without(batch: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in names}


@contextmanager
def block_outputs(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Name of a block in the base -> (first hidden states in, last out) of the next forwards."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    base = model.get_base_model() if isinstance(model, PeftModel) else model

    def see(name: str, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        found[name] = (x.detach(), (output if isinstance(output, Tensor) else output[0]).detach())

    handles = [
        base.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, output, name=name: see(name, args, kwargs, output), with_kwargs=True
        )
        for name in find_topology(base).blocks
    ]
    yield found
    for handle in handles:
        handle.remove()


def saved_bytes(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """Bytes kept for backward by a forward in training: each storage once, parameters and buffers left out."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(**batch).loss  # stays, or its storages would be freed and their addresses used again
    assert loss.requires_grad
    return sum(kept.values())
