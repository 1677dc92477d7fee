"""`Progress`: how far the pyramid beside a ViT has come in the forward that runs."""

from typing import Any

import torch
from torch import Tensor

from petune.adapters.side.hierarchical_net import HierarchicalNet

# Pixels that the longer side needs so that the fourth scale is smaller than the third, and the other to leave one
# position: each halving rounds up, but the stem's second, which rounds down.
_LONGER, _SHORTER = 19, 3


class Progress:
    """How far the side network has come in the forward that runs; one forward of a model at a time."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []
        """Of the stages that have ended, [batch, dim, height, width]."""
        self.is_kept = False
        """Whether the maps are wanted after the forward."""
        self._image: Tensor | None = None
        self._grid = (0, 0)
        self._net: HierarchicalNet | None = None
        self._x: Tensor | None = None
        self._pooled: Tensor | None = None
        self._awaited: int | None = None  # block that has to run next

    def begin(self, image: Tensor, grid: tuple[int, int]) -> None:
        """Note what the model's patch convolution was given, and the grid of patches that it made.

        Raises:
            ValueError: the image is too small for four scales.
        """
        self.reset()
        height, width = image.shape[-2:]
        if max(height, width) < _LONGER or min(height, width) < _SHORTER:
            raise ValueError(
                f"an image of {height} x {width} pixels is too small for four scales; the least is {_LONGER} for the "
                f"longer side and {_SHORTER} for the other: resize the images."
            )
        self._image, self._grid = image, grid

    def enter(self, net: HierarchicalNet) -> None:
        """Start from the image, before the first block is read.

        Raises:
            RuntimeError: there is none.
        """
        if self._image is None:
            raise RuntimeError(
                "the blocks ran without the model's patch convolution before them, so the side network has no pixels "
                "to start from; call the whole model, or turn the adapter off with disable_adapter()."
            )
        self._net, self._awaited = net, 0
        image, self._image = self._image, None
        self._descend(image)

    def read(self, block: int, y: Tensor) -> None:
        """Take in what a block gave, [batch, tokens, hidden_size], meta tokens first where there are any.

        Raises:
            RuntimeError: another block was to run, or the tokens are not those of the grid.
        """
        if self._awaited != block or self._net is None:
            raise RuntimeError(
                f"block {block} ran where the side network awaited block {self._awaited}; it reads the blocks in "
                "their order, each once a forward: run the whole model, without skipping layers."
            )
        self._awaited = block + 1
        ends, stage = self._net.ends, len(self.maps)
        if block >= ends[-1]:
            return
        if y.shape[1] <= self._grid[0] * self._grid[1]:
            raise RuntimeError(
                f"block {block} gave {y.shape[1]} tokens for {self._grid[0]} x {self._grid[1]} patches; the side "
                "network needs all of them, behind a class token: run the model without masking or dropping patches."
            )
        assert self._x is not None
        start, y = ends[stage - 1] if stage else 0, y.to(self._x.device)
        self._x = self._net.stage(stage).read(block - start, self._x, y, self._net.meta_tokens, self._grid)
        if block + 1 == ends[stage]:
            self._descend(self._end(stage))

    def leave(self, y: Tensor) -> Tensor:
        """What goes on from the last block: y, with the class token updated where the side network ends in an `Exit`.

        Args:
            y: hidden states, [batch, tokens, hidden_size].
        """
        net, self._awaited = self._net, None
        assert net is not None
        pooled = self.maps[-1].flatten(2).mean(-1)
        if not self.is_kept:
            self.maps = []
        if net.exit is None:
            self._pooled = pooled
            return y
        return torch.cat([y[:, :1] + net.exit(pooled).to(y)[:, None], y[:, 1:]], dim=1)

    def classify(self) -> Tensor | None:
        """Logits of the adapter's own head, [batch, labels]; None where the model's classifier keeps its place."""
        pooled, self._pooled = self._pooled, None
        if pooled is None or self._net is None or self._net.head is None:
            return None
        return self._net.head(pooled)

    def finish(self) -> None:
        """End the forward.

        Raises:
            RuntimeError: it ended before the last block.
        """
        awaited = self._awaited
        if awaited is not None:
            self.reset()
            raise RuntimeError(
                f"the model returned before block {awaited}, so the side network's output went nowhere; run all of "
                "its blocks, or turn the adapter off with disable_adapter()."
            )

    def reset(self) -> None:
        """Drop everything, before a forward and after one that failed."""
        is_kept = self.is_kept
        self.__init__()
        self.is_kept = is_kept

    def _descend(self, image: Tensor) -> None:
        """Enter the next stage that reads a block, through those that read none."""
        assert self._net is not None
        for stage in range(len(self.maps), len(self._net.stages)):
            self._x = self._net.stage(stage).embed(image)
            if self._net.stage(stage).bridge is not None:
                return
            image = self._end(stage)

    def _end(self, stage: int) -> Tensor:
        assert self._net is not None
        self.maps.append(self._net.stage(stage).norm(self._x).permute(0, 3, 1, 2))
        self._x = None
        return self.maps[-1]

    def __getstate__(self) -> dict[str, Any]:
        return Progress().__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> "Progress":
        found = memo[id(self)] = Progress()  # a tensor with a graph behind it cannot be copied
        return found
