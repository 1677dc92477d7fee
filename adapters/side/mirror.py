"""`MirrorBlock`: a side block of the model's own layer class, with all widths divided."""

import copy
import inspect
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from petune.adapters.side.config import LadderSideConfig
from petune.adapters.side.flow import Place, Step
from petune.hooks import remove_hooks
from petune.quantized.linear import QuantizedLinear
from petune.quantized.quantizer import Quantization

# names of sizes in the configs of transformers; those of heads stay as they are in number
_SIZES = (
    *("hidden_size", "intermediate_size", "head_dim", "query_pre_attn_scalar"),
    *("dim", "hidden_dim", "n_embd", "n_inner", "d_model", "d_ff", "d_kv"),
    *("ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"),
)
_HEADS = ("num_attention_heads", "decoder_attention_heads")
_ADDED = ("attention_mask", "encoder_attention_mask", "position_bias", "encoder_decoder_position_bias")  # to scores
_CONSTRUCTED_WITH = {"self", "config", "layer_idx", "has_relative_attention_bias"}


class MirrorBlock(nn.Module):
    """A block of the model's own class whose hidden, inner and head sizes are divided by the reduction factor

    The number of heads stays, so that masks and T5's bias of positions, which is the model's own and frozen, are those
    of the block that is read. A slim head turns by every r-th frequency of the rotary positions, which are those that
    its family gives a head of that size.

    Raises:
        ValueError: the class of the block cannot be slimmed, or not by this factor.
    """

    def __init__(self, config: LadderSideConfig, block: nn.Module, place: Place) -> None:
        super().__init__()
        self.reduction_factor = config.reduction_factor
        self.awaits_start = False
        """Whether `petune.adapters.side.start.fisher_start` is still to be called."""
        self.block = _family_init(slim_block(config, block, place.position, reads_memory=place.reads_memory))
        if config.quantization.active:
            for path, module in list(self.block.named_modules()):
                if isinstance(module, (nn.Linear, Conv1D)):
                    self.block.set_submodule(path, SlimLinear(module, config.quantization))
        self.names = frozenset(inspect.signature(type(block).forward).parameters)
        # not a module of this one: it is the model's, and frozen
        self._positions = tuple(m for m in block.modules() if getattr(m, "has_relative_attention_bias", False))

    def forward(self, s: Tensor, context: Step) -> Tensor:
        """Args: s, [batch, tokens, width]."""
        self._keep_apart()
        if self.training and self.awaits_start:
            self._warn(context)
        call = context.call
        named = {**call.named, "hidden_states": s}
        if call.named.get("past_key_values") is not None:
            named["past_key_values"] = SideCache(context)
        if "position_embeddings" in self.names:
            named["position_embeddings"] = tuple(
                part[..., :: self.reduction_factor].to(s.dtype) for part in call.named["position_embeddings"]
            )
        if "encoder_hidden_states" in self.names:
            memory = context.memory
            named["encoder_hidden_states"] = None if memory is None else memory.to(s.dtype)
        if "position_bias" in self.names and named.get("position_bias") is None:
            named["position_bias"] = self._bias_of_positions(context)
        for name in _ADDED:
            if isinstance(added := named.get(name), Tensor) and added.is_floating_point() and added.dtype != s.dtype:
                named[name] = added.to(s.dtype).clamp(min=torch.finfo(s.dtype).min)
        output = self.block(**named)
        return output[0] if isinstance(output, tuple) else output

    def slim(self, name: str, parameter: str) -> Tensor:
        """A parameter of module `name` of the slim block; a linear's weight as [out_features, in_features]."""
        module: Any = self.block.get_submodule(name)
        if parameter != "weight" or not isinstance(module, (SlimLinear, Conv1D)):
            return getattr(module, parameter)
        return module.product.weight if isinstance(module, SlimLinear) else module.weight.T

    @torch.no_grad()
    def _bias_of_positions(self, context: Step) -> Tensor:
        """What T5's first block of a stack makes, [1, heads, queries, keys], and hands on to all others."""
        if not self._positions:
            raise RuntimeError(
                "block='mirror' needs the bias of positions that the blocks of T5 hand on to one another, and it was "
                "not computed, as where a feature cache stands in for the blocks; use block='generic', or no cache."
            )
        attention: Any = self._positions[0]
        call = context.call
        queries, cache, mask = call.x.shape[1], call.named.get("past_key_values"), call.tensor("attention_mask")
        seen = queries if cache is None else cache.get_seq_length(context.place.position)
        keys = seen if mask is None else mask.shape[-1]
        return attention.compute_bias(queries, keys, device=call.x.device, past_seen_tokens=seen - queries)

    def _warn(self, context: Step) -> None:
        self.awaits_start = False
        if context.place.fuses and context.place.rung == 0:  # one of them all
            warnings.warn(
                "the side blocks have start='fisher' and were not started, so they train from random weights; call "
                "petune.adapters.side.fisher_start(model, batches) before the training.",
                stacklevel=2,
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(name.startswith(prefix) for name in state_dict):
            self.awaits_start = False
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _keep_apart(self) -> None:
        """Undo what transformers does to all modules of a class: hooks that record outputs, checkpointing."""
        for module in self.block.modules():
            if module._forward_hooks:
                remove_hooks(module, lambda hook: getattr(hook, "__module__", "") == _RECORDERS)
            if vars(module).get("gradient_checkpointing"):
                vars(module)["gradient_checkpointing"] = False


_RECORDERS = "transformers.utils.output_capturing"


class SideCache:
    """What the attentions of a mirrored block take for a cache: the first to ask attends to its own sequence, and
    those after it to the encoder's, whose keys and values are computed anew, being as narrow as the side network."""

    def __init__(self, context: Step) -> None:
        self._context = context
        self._updated = False

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values to attend to, [batch, heads, tokens, head], for those of this call."""
        if self._updated:
            return keys, values
        self._updated = True
        return self._context.cached(keys, values)

    def get_seq_length(self, *_: Any) -> int:
        """0: T5 asks, for a bias of positions that it is given."""
        return 0


class SlimLinear(nn.Module):
    """y = x Ŵᵀ + b, Ŵ of few bits: in the place of a Linear or Conv1D; packed weights have no place for b"""

    def __init__(self, linear: nn.Linear | Conv1D, quantization: Quantization) -> None:
        super().__init__()
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        self.product = QuantizedLinear(weight.shape[1], weight.shape[0], quantization)
        if not weight.is_meta:
            with torch.no_grad():
                self.product.weight.copy_(weight)
        self.register_parameter("bias", linear.bias)

    @property
    def weight(self) -> Tensor | None:
        """The latent, whose dtype T5 asks for; None of packed weights."""
        return self.product._parameters.get("weight")

    def forward(self, x: Tensor) -> Tensor:
        y, bias = self.product(x), self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)


def slim_block(config: LadderSideConfig, block: nn.Module, position: int, *, reads_memory: bool) -> Any:
    """A block of the class of this one, narrower by the reduction factor, as torch initialises it.

    Args:
        position: of the block in its stack.
        reads_memory: whether it attends to an encoder.

    Raises:
        ValueError: the class cannot be slimmed, or not by this factor.
    """
    kind = type(block)
    asks = inspect.signature(kind.__init__).parameters
    more = [name for name, p in asks.items() if p.default is p.empty and name not in _CONSTRUCTED_WITH]
    family = family_config(block)
    if more or family is None:
        what = f"is built from {', '.join(more)} as well" if more else "has no config of transformers"
        config.refuse("block", f"cannot slim a {kind.__name__}, which {what}; use block='generic'")
    assert family is not None
    slim = _slim_config(config, family, rotary="position_embeddings" in inspect.signature(kind.forward).parameters)
    if getattr(slim, "add_cross_attention", False) and not reads_memory:
        slim.add_cross_attention = False
    made = kind(slim, **({"layer_idx": position} if "layer_idx" in asks else {}))
    if (wide := _same_size(made, block)) is not None and config.reduction_factor > 1:
        config.refuse("block", f"cannot slim a {kind.__name__}, whose {wide} keeps a size; use block='generic'")
    return made


def _same_size(slim: nn.Module, block: nn.Module) -> str | None:
    """Name of a linear that is not narrower on both sides."""
    sizes = {name: m.weight.shape for name, m in block.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    return next(
        (
            name
            for name, module in slim.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
            and any(one == other for one, other in zip(module.weight.shape, sizes.get(name, ()), strict=False))
        ),
        None,
    )


def family_config(block: nn.Module) -> Any:
    """The config of transformers that a block was built from; None if it keeps none."""
    found = (getattr(module, "config", None) for module in block.modules())
    return next((config for config in found if isinstance(config, PreTrainedConfig)), None)


def _slim_config(config: LadderSideConfig, family: PreTrainedConfig, *, rotary: bool) -> PreTrainedConfig:
    slim, factor = copy.deepcopy(family), config.reduction_factor
    sizes = {name: value for name in _SIZES if isinstance(value := vars(family).get(name), int)}
    heads = {n for name in _HEADS if isinstance(n := getattr(family, name, None), int)}
    must: dict[str, int] = {name: value for name, value in sizes.items() if name != "query_pre_attn_scalar"}
    if not must.keys() & {"head_dim", "d_kv"}:
        hidden: Any = family.hidden_size  # pyright: ignore[reportAttributeAccessIssue]
        must |= {f"the size of a head, hidden_size / {n}": hidden // n for n in heads}
    if rotary:  # pairs of a slim head turn together
        must["half of what rotary positions turn in a head"] = _turned(family) // 2
    odd = next((name for name, value in must.items() if value % factor), None)
    if odd is not None:
        usable = [n for n in range(2, min(must.values()) + 1) if all(value % n == 0 for value in must.values())]
        use = f"use {', '.join(map(str, usable))}" if usable else "no factor does: use block='generic'"
        config.refuse("reduction_factor", f"does not divide {odd} = {must[odd]}, which block='mirror' needs; {use}")
    for name, value in sizes.items():
        setattr(slim, name, max(1, value // factor))
    return slim


def head_size(family: Any) -> int:
    """Features of an attention head."""
    return vars(family).get("head_dim") or vars(family).get("d_kv") or family.hidden_size // family.num_attention_heads


def _turned(family: Any) -> int:
    """How many of the features of a head rotary positions turn."""
    parameters = getattr(family, "rope_parameters", None) or {}
    return int(head_size(family) * parameters.get("partial_rotary_factor", 1.0))


def _family_init(block: nn.Module) -> nn.Module:
    """The block with weights as its family's models start."""
    kinds = vars(sys.modules[type(block).__module__]).values()
    own = [kind for kind in kinds if isinstance(kind, type) and PreTrainedModel in kind.__bases__]
    return block.apply(own[0](family_config(block))._init_weights) if own else block
