"""`HierarchicalBlock`: a block of a ViT that the pyramid beside it reads."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from petune.adapters.side.hierarchical_config import HierarchicalSideConfig
from petune.adapters.side.hierarchical_flow import Progress
from petune.adapters.side.hierarchical_net import HierarchicalNet, Plan, Through
from petune.frozen_block import Call, FrozenBlock


class HierarchicalBlock(FrozenBlock):
    """A block with what every adapter has on it: on the first its side network; else what is learned through it

    With detach=False the block runs with tokens of the adapter before its own, which are taken off again, and with the
    adapter's copies of its norms in their place. The base is not written to.
    """

    adapter_layer_names = ("petune_hside_net", "petune_hside_through")
    other_param_names = ("added_tokens",)
    progress: Progress
    """Set by the tuner; shared by all blocks."""
    norm_paths: tuple[str, ...]
    """Of the norms in the block; set by the tuner."""
    plan: Plan
    """Of the adapter that is added next; set by the tuner."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.petune_hside_net = nn.ModuleDict()
        self.petune_hside_through = nn.ModuleDict()
        self.added_tokens: dict[str, int] = {}

    def create(self, name: str, config: HierarchicalSideConfig) -> None:
        self.added_tokens[name] = 0 if config.detach else config.meta_tokens
        if self.index == 0:
            self.petune_hside_net[name] = HierarchicalNet(config, self.plan)
        if not config.detach:
            base = self.get_base_layer()
            norms = [base.get_submodule(path) for path in self.norm_paths]
            self.petune_hside_through[name] = Through(config.meta_tokens, self.plan.hidden_size, norms)

    def is_recorded(self, name: str, x: Tensor) -> bool:
        return bool(self.added_tokens[name]) or super().is_recorded(name, x)

    def enter(self, name: str, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """With the adapter's tokens before the hidden states.

        Raises:
            ValueError: there is an attention mask, which says nothing of these tokens.
        """
        if not self.added_tokens[name]:
            return args, kwargs
        if call.named.get("attention_mask") is not None:
            raise ValueError(
                "HierarchicalSideConfig.detach=False puts tokens before those that the attention_mask is for; leave "
                "the mask out, or set detach=True."
            )
        meta = self._through(name).meta.to(call.x).expand(len(call.x), -1, -1)
        x = torch.cat([meta, call.x], dim=1)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def follow(self, name: str, call: Call, y: Tensor) -> Tensor:
        if self.index == 0:
            self.progress.enter(self.net(name))
        self.progress.read(self.index, y)
        y = y[:, self.added_tokens[name] :]
        return self.progress.leave(y) if self.is_last else y

    @property
    def is_last(self) -> bool:
        """Whether it is the model's last block."""
        return self.index == self.plan.blocks - 1

    def net(self, name: str) -> HierarchicalNet:
        """The side network of an adapter, on the first block."""
        found = self.petune_hside_net[name]
        assert isinstance(found, HierarchicalNet)
        return found

    def _run(self, update: Callable[[Any], Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        norms = self._norms()
        if not norms:
            return super()._run(update, args, kwargs)
        run = partial(functional_call, self.base_layer, norms, tuple(args), dict(kwargs))
        if not self.base_layer._forward_hooks:
            return update(run())
        handle = self.base_layer.register_forward_hook(lambda _block, _args, output: update(output), prepend=True)
        try:
            return run()
        finally:
            handle.remove()

    def _norms(self) -> dict[str, Tensor]:
        """Parameters of the live adapter's norms by the names of those that they stand in for, in their dtype."""
        name = self.live_adapters()[0]
        if name not in self.petune_hside_through:
            return {}
        base = self.get_base_layer()
        prefix = next(path for path, module in self.base_layer.named_modules() if module is base)
        return {
            f"{prefix}.{path}.{key}".lstrip("."): parameter.to(base.get_parameter(f"{path}.{key}").dtype)
            for path, norm in zip(self.norm_paths, self._through(name).norms, strict=True)
            for key, parameter in norm.named_parameters()
        }

    def _through(self, name: str) -> Through:
        found = self.petune_hside_through[name]
        assert isinstance(found, Through)
        return found

    def get_delta_weight(self, name: str) -> Tensor:
        """Raises NotImplementedError: the update is no weight."""
        raise NotImplementedError(
            f"adapter {name!r} is a side network, a path of its own that depends on the input, and no weight: it "
            "cannot be merged; use unload() for the base model, or keep the adapter."
        )

    def _get_available_adapters(self) -> set[str]:
        return set(self.added_tokens)
