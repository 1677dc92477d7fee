"""What the tests of the pyramid beside a ViT share: ViTs of several depths and sizes, and adapted ones."""

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    PreTrainedModel,
)

from petune.adapters.side import HierarchicalModel, HierarchicalSideConfig
from petune.adapters.side.hierarchical_net import HierarchicalNet
from tests.adapters.ladder_models import family
from tests.families import LABELS

DIMS, HEADS = [8, 12, 16, 20], [2, 3, 4, 5]
PAPER = {"detach": False, "fusion": "replace"}
REGISTERS = 3


def config(**fields: Any) -> HierarchicalSideConfig:
    return HierarchicalSideConfig(**{"dims": DIMS, "heads": HEADS, **fields})


def vit(name: str = "vit", blocks: int = 5, **fields: Any) -> PreTrainedModel:
    """An image classifier whose position table tells one place from another."""
    if name == "registers":
        sizes = {"hidden_size": 32, "num_hidden_layers": blocks, "num_attention_heads": 4, "mlp_ratio": 2}
        shape = {"image_size": 32, "patch_size": 8, "num_register_tokens": REGISTERS, "num_labels": LABELS}
        torch.manual_seed(0)
        model = Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**{**sizes, **shape, **fields}))
    else:
        model = family(name, blocks, **fields).build(head="cls")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model.eval()


def beside(base: PreTrainedModel, **fields: Any) -> PeftModel:
    """In eval mode, with a side network that changes the output unless fields say otherwise."""
    torch.manual_seed(1)
    return get_peft_model(base, config(**{"init_weights": False, **fields})).eval()


def adapted(name: str = "vit", blocks: int = 5, **fields: Any) -> PeftModel:
    return beside(vit(name, blocks), **fields)


def pictures(height: int = 32, width: int = 32, batch: int = 3) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(4)
    return {
        "pixel_values": torch.randn(batch, 3, height, width, generator=rng),
        "labels": torch.randint(LABELS, (batch,), generator=rng),
    }


def tuner(model: PeftModel) -> HierarchicalModel:
    found = model.base_model
    assert isinstance(found, HierarchicalModel)
    return found


def net(model: PeftModel, name: str = "default") -> HierarchicalNet:
    return tuner(model)._first.net(name)


def held(model: PeftModel) -> list[str]:
    """What the side network still holds of a forward."""
    state = vars(tuner(model).progress)
    return [name for name, value in state.items() if isinstance(value, Tensor) or (name == "maps" and value)]
