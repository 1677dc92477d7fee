"""A vision model with a head that gives every pixel a class."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel


class MapHead(nn.Module):
    """logits = W₂ gelu(Σⱼ resize(W₁ⱼ mapⱼ))    (all-MLP decoder; Xie et al. 2021, arXiv 2105.15203, section 3.2)

    Every map is projected to one width, resized bilinearly to the largest of them, and summed, which is what a
    concatenation with a projection behind it comes to.

    Args:
        channels: of each map.
        width: of the sum.
        classes: of the output.
    """

    def __init__(self, channels: Sequence[int], width: int, classes: int) -> None:
        super().__init__()
        # 1 × 1 convolutions are linear maps of each pixel, and no adapter for linear layers takes them for its targets
        self.project = nn.ModuleList(nn.Conv2d(size, width, 1) for size in channels)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits at the size of the largest map, [batch, classes, height, width].

        Args:
            maps: [batch, channels of the map, its height, its width] each.
        """
        dtype = self.classify.weight.dtype
        projected = [project(map.to(dtype)) for project, map in zip(self.project, maps, strict=True)]
        size = max((map.shape[-2:] for map in projected), key=lambda shape: shape.numel())
        return self.classify(F.gelu(reduce(torch.add, (resize(map, size) for map in projected))))


class SegmentationModel(PreTrainedModel):
    """A vision model beside its `decode_head`; calling it calls the vision model.

    Which maps the head sees is the task's to say: they may come from the adapter. The class makes the head part of
    what PEFT wraps, saves and loads, and keeps it out of what tells one base from another.

    Args:
        body: a vision model without a head.
        decode_head: see `MapHead`.
    """

    base_model_prefix = "body"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    # what the body supports was settled when it was made
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, body: PreTrainedModel, decode_head: nn.Module) -> None:
        super().__init__(body.config)
        self.body = body
        self.decode_head = decode_head
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        return self.body(pixel_values=pixel_values, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the body has its weights, and the head's layers start as they were made."""


def patch_map(states: Tensor, height: int, width: int, patch_size: tuple[int, int]) -> Tensor:
    """Hidden states as a map, [batch, hidden_size, height / patch height, width / patch width].

    Args:
        states: [batch, prefix tokens + patches, hidden_size], the patches row by row behind any number of class,
            distillation and register tokens; or a map already.
        height: of the image, in pixels.
        width: of the image, in pixels.
        patch_size: height and width of a patch, in pixels.

    Raises:
        ValueError: there are fewer tokens than patches.
    """
    if states.dim() == 4:
        return states
    rows, columns = height // patch_size[0], width // patch_size[1]
    if states.shape[1] < rows * columns:
        raise ValueError(
            f"the model gave {states.shape[1]} tokens for the {rows} x {columns} patches of a {height} x {width} "
            "image, so it merges patches on its way; use a plain vision transformer: ViT, DeiT or DINOv2."
        )
    return states[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))


def resize(map: Tensor, size: Sequence[int]) -> Tensor:
    """The map at another size, bilinearly; itself where it has that size."""
    if tuple(map.shape[-2:]) == tuple(size):
        return map
    return F.interpolate(map, size=tuple(size), mode="bilinear", align_corners=False)
