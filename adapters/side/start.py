"""Side blocks that start as the strongest rows and columns of the model's own (Sung et al. 2022, section 3.3)."""

import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from petune.adapters.side.config import LadderSideConfig
from petune.adapters.side.flow import Place
from petune.adapters.side.mirror import MirrorBlock, family_config, head_size, slim_block
from petune.frozen_block import FrozenBlock
from petune.state import active_adapter, peft_config, plain_name

_LLAMA = (
    "input_layernorm self_attn.(q_proj,k_proj,v_proj) self_attn.q_norm self_attn.k_norm self_attn.o_proj "
    "post_attention_layernorm pre_feedforward_layernorm mlp.(gate_proj,up_proj) mlp.down_proj "
    "post_feedforward_layernorm"
)
_BERT = (
    "attention.self.(query,key,value) attention.output.dense attention.output.LayerNorm intermediate.dense "
    "output.dense output.LayerNorm"
)
_VIT = (
    "norm1 layernorm_before attention.(q_proj,k_proj,v_proj) attention.o_proj layer_scale1 norm2 layernorm_after "
    "mlp.fc1 mlp.weights_in*2 mlp.fc2 mlp.weights_out layer_scale2"
)
# What hidden states pass in a block, in this order: (a,b) act on the same input, m*3 is three matrices in one. What a
# block does not have is passed over.
ORDERS = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": "attention.(q_lin,k_lin,v_lin) attention.out_lin sa_layer_norm ffn.lin1 ffn.lin2 output_layer_norm",
    "gpt2": "ln_1 attn.c_attn*3 attn.c_proj ln_2 mlp.c_fc mlp.c_proj",
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), _LLAMA),
    "phi3": "input_layernorm self_attn.qkv_proj*3 self_attn.o_proj post_attention_layernorm mlp.gate_up_proj*2 "
    "mlp.down_proj",
    "t5": "layer.0.layer_norm layer.0.SelfAttention.(q,k,v) layer.0.SelfAttention.o "
    "layer.1.layer_norm layer.1.EncDecAttention.(q,k,v) layer.1.EncDecAttention.o layer.2.layer_norm "
    + " ".join(f"layer.{i}.DenseReluDense.{name}" for i in (1, 2) for name in ("wi", "(wi_0,wi_1)", "wo")),
    "bart": "self_attn.(q_proj,k_proj,v_proj) self_attn.out_proj self_attn_layer_norm "
    "encoder_attn.(q_proj,k_proj,v_proj) encoder_attn.out_proj encoder_attn_layer_norm fc1 fc2 final_layer_norm",
    "whisper": "self_attn_layer_norm self_attn.(q_proj,k_proj,v_proj) self_attn.out_proj "
    "encoder_attn_layer_norm encoder_attn.(q_proj,k_proj,v_proj) encoder_attn.out_proj final_layer_norm fc1 fc2",
    **dict.fromkeys(("vit", "deit", "dinov2", "audio-spectrogram-transformer"), _VIT),
}
_OF_HEADS = ("q_norm", "k_norm")  # norms of one head's features, not of hidden states


def make_mirror(config: LadderSideConfig, block: nn.Module, place: Place) -> MirrorBlock:
    """A slim copy of a block, which starts as `config.start` says, unless a checkpoint is about to be loaded into it.

    With "fisher" it starts at random, and waits for `fisher_start`.

    Raises:
        ValueError: the block cannot be slimmed; or start='l1' with weights that are not there, are quantised, or are
            of a family whose order is not known.
    """
    mirror = MirrorBlock(config, block, place)
    loading = config.inference_mode or any(parameter.is_meta for parameter in mirror.parameters())
    if config.start != "random":
        check_order(config, block)
    if config.start == "l1" and not loading:
        weights = block_parameters(block)
        unfit = next((name for name, p in weights.items() if p.is_meta or not p.is_floating_point()), None)
        if unfit is not None:
            config.refuse("start", f"needs float weights, and {unfit!r} has none; load the model as float, and first")
        cut(mirror, block, weights)
    mirror.awaits_start = config.start == "fisher" and not loading
    return mirror


def fisher_start(model: PeftModel, batches: Iterable[Mapping[str, Any]], samples: int = 1024) -> None:
    """Start the active ladder's mirrored blocks from what matters most to the model's loss

    The importance of a weight is Σ g² over single samples, g the gradient of the model's own loss there, without the
    adapter and without dropout. Weights, flags, gradients and modes of the model stay as they are.

    Args:
        model: with an active adapter of `LadderSideConfig(block="mirror", start="fisher")`.
        batches: with labels; each is run row by row.
        samples: rows to run at most.

    Raises:
        ValueError: another config; batches without labels, or none; a quantised base.
    """
    name, config = active_adapter(model), peft_config(model)
    if not isinstance(config, LadderSideConfig) or (config.block, config.start) != ("mirror", "fisher"):
        raise ValueError(
            f"fisher_start: adapter {name!r} does not start so; use LadderSideConfig(block='mirror', start='fisher')."
        )
    rungs = list(_rungs(model, name))
    sums = _fisher(model, config, [block for _, block, _ in rungs], islice(_rows(batches), samples))
    columns = None
    for (mirror, block, place), importance in zip(rungs, sums, strict=True):
        columns = cut(mirror, block, importance, None if place.rung == 0 else columns)
        mirror.awaits_start = False


def check_mirror(config: LadderSideConfig, block: nn.Module) -> None:
    """Refuse what `make_mirror` would, with nothing changed yet.

    Args:
        block: or what is wrapped around it.

    Raises:
        ValueError: the block cannot be slimmed, or not cut out of.
    """
    block = block.get_base_layer() if isinstance(block, BaseTunerLayer) else block
    with torch.device("meta"):
        slim_block(config, block, 0, reads_memory=True)
    if config.start != "random":
        check_order(config, block)


def check_order(config: LadderSideConfig, block: nn.Module) -> None:
    """Refuse to cut out of a block that is of an unknown family.

    Raises:
        ValueError: it is.
    """
    family = getattr(family_config(block), "model_type", None)
    if family not in ORDERS:
        known = ", ".join(ORDERS)
        config.refuse("start", f"knows the blocks of {known}, and these are of {family!r}; use start='random'")


@torch.no_grad()
def cut(
    mirror: MirrorBlock, block: nn.Module, importance: Mapping[str, Tensor], columns: Tensor | None = None
) -> Tensor:
    """Fill a slim block with the strongest rows of a block, and of those the columns that come from kept rows

    Of matrices on the same input, as query, key and value, the same rows are kept, the strongest of the product of
    their importances; those of a row add up by absolute value. Where several query heads share a key, all of them keep
    the rows of the features that the key keeps, and count together for them.

    Args:
        importance: of the block's parameters, by their names in it and of their shapes; the weights themselves do.
        columns: which of the hidden features go in, ascending; None for those that the block's first matrices weigh
            most.

    Returns:
        Which of them come out.
    """
    source = _Source(block, importance)
    stages = [stage for stage in _read_order(source.family.model_type) if source.has(stage)]
    kept = source.strongest_inputs(stages, mirror.reduction_factor) if columns is None else columns
    for stage in stages:
        kept = _keep(mirror, source, stage, kept)
    return kept


class _Stage(NamedTuple):
    """Modules that act on the same input."""

    names: tuple[str, ...]
    parts: int
    """How many matrices there are, each in a module or all in one."""


class _Matrix(NamedTuple):
    weight: Tensor  # [rows, columns]
    importance: Tensor  # likewise, 0 or more
    bias: Tensor | None

    def split(self, sizes: list[int]) -> "list[_Matrix]":
        """Those that lie in it one below the other."""
        biases = [None] * len(sizes) if self.bias is None else self.bias.split(sizes)
        parts = zip(self.weight.split(sizes), self.importance.split(sizes), biases, strict=True)
        return [_Matrix(*part) for part in parts]


class _Source:
    """A block that is cut out of."""

    def __init__(self, block: nn.Module, importance: Mapping[str, Tensor]) -> None:
        self.modules = {_plain(name): module for name, module in block.named_modules()}
        self.weights, self.importance = block_parameters(block), importance
        self.family = family_config(block)

    def has(self, stage: _Stage) -> bool:
        """Whether the block has these modules."""
        return all(name in self.modules for name in stage.names)

    def vectors(self, name: str) -> dict[str, Tensor]:
        """The parameters of a norm, or the scales of a layer, by their names in it; {} of a linear."""
        found = {key: self.weights[f"{name}.{key}"] for key, _ in self.modules[name].named_parameters()}
        return found if all(parameter.dim() == 1 for parameter in found.values()) else {}

    def matrices(self, stage: _Stage) -> list[_Matrix]:
        """Weights and importances, [out_features, in_features], of a stage's linears."""
        found = [self._matrix(name) for name in stage.names]
        if len(found) == stage.parts:
            return found
        rows = len(found[0].weight)
        if stage.parts == 2:
            return found[0].split([rows // 2] * 2)
        queries = self.family.num_attention_heads * head_size(self.family)
        return found[0].split([queries, *[(rows - queries) // 2] * 2])

    def strongest_inputs(self, stages: list[_Stage], factor: int) -> Tensor:
        """Which hidden features the block's first matrices weigh most."""
        first = next(stage for stage in stages if not self.vectors(stage.names[0]))
        sums = torch.cat([matrix.importance for matrix in self.matrices(first)]).sum(dim=0)
        return _strongest(sums, len(sums) // factor)

    def _matrix(self, name: str) -> _Matrix:
        weight, importance = self.weights[f"{name}.weight"], self.importance[f"{name}.weight"].float().abs()
        if isinstance(self.modules[name], Conv1D):
            weight, importance = weight.T, importance.T
        return _Matrix(weight, importance, self.weights.get(f"{name}.bias"))


def _keep(mirror: MirrorBlock, source: _Source, stage: _Stage, kept: Tensor) -> Tensor:
    """Fill the modules of a stage: of the features that go in, `kept` are; gives which of those that come out."""
    name, factor = stage.names[0], mirror.reduction_factor
    if vectors := source.vectors(name):
        for key, vector in vectors.items():
            of_head = name.endswith(_OF_HEADS)  # evenly, as the frequencies of rotary positions are
            mirror.slim(name, key).copy_(vector[::factor] if of_head else vector[kept])
        return kept
    matrices = [m._replace(weight=m.weight[:, kept], importance=m.importance[:, kept]) for m in source.matrices(stage)]
    if stage.parts == 3:
        rows = _attention_rows([matrix.importance for matrix in matrices], head_size(source.family), factor)
    else:
        product = torch.stack([matrix.importance for matrix in matrices]).prod(dim=0)
        size = len(mirror.slim(name, "weight")) * len(stage.names) // stage.parts
        rows = [_strongest(product.sum(dim=1), size)] * stage.parts
    cut_out = [
        (matrix.weight[which], None if matrix.bias is None else matrix.bias[which])
        for matrix, which in zip(matrices, rows, strict=True)
    ]
    each = stage.parts // len(stage.names)
    for number, name in enumerate(stage.names):
        weights, biases = zip(*cut_out[number * each : (number + 1) * each], strict=True)
        mirror.slim(name, "weight").copy_(torch.cat(weights))
        if biases[0] is not None:
            mirror.slim(name, "bias").copy_(torch.cat(biases))
    return rows[0]


def _attention_rows(importances: list[Tensor], head: int, factor: int) -> list[Tensor]:
    """Kept rows of query, key and value, by their importances, [rows, columns]."""
    query, key, value = importances
    heads = len(key) // head
    groups = len(query) // len(key)  # query heads that share a key
    shared = query.unflatten(0, (heads, groups, head)).sum(dim=1).flatten(0, 1) if groups > 1 else query
    rows = _strongest((shared * key * value).sum(dim=1), len(key) // factor)
    if groups == 1:
        return [rows] * 3
    of_head, feature = ((part.view(heads, 1, -1)) for part in (rows // head, rows % head))
    member = torch.arange(groups, device=rows.device).view(1, -1, 1)
    return [((of_head * groups + member) * head + feature).flatten(), rows, rows]


def _strongest(strengths: Tensor, size: int) -> Tensor:
    """Indices of the `size` largest, ascending; of equal ones the later."""
    return torch.argsort(strengths, stable=True)[len(strengths) - size :].sort().values


def _read_order(family: str) -> Iterator[_Stage]:
    for word in ORDERS[family].split():
        together = re.fullmatch(r"(.*)\((.*)\)", word)
        name, _, parts = word.partition("*")
        names = tuple(together[1] + name for name in together[2].split(",")) if together else (name,)
        yield _Stage(names, len(names) if together else int(parts or 1))


def block_parameters(block: nn.Module) -> dict[str, Tensor]:
    """The parameters of a block, by the names that they have without what is wrapped around its modules."""
    return {_plain(name): parameter.detach() for name, parameter in block.named_parameters()}


def _plain(name: str) -> str:
    return ".".join(part for part in plain_name(name).split(".") if part != "base_layer")


def _rungs(model: PeftModel, name: str) -> Iterator[tuple[MirrorBlock, nn.Module, Place]]:
    """The mirrored blocks of an adapter, in order, with the blocks that they read."""
    for module in model.modules():
        if isinstance(module, FrozenBlock) and name in getattr(module, "petune_ladder_rung", ()):
            layer: Any = module
            yield layer.petune_ladder_rung[name].block, layer.get_base_layer(), layer.names[name]


def _fisher(
    model: PeftModel, config: LadderSideConfig, blocks: Sequence[nn.Module], samples: Iterable[dict[str, Any]]
) -> list[dict[str, Tensor]]:
    """Σ g² of each block's parameters, float32, by their names in the block."""
    parameters = [p for block in blocks for p in block.parameters()]
    if not all(parameter.is_floating_point() for parameter in parameters):
        config.refuse("start", "needs gradients of the base, which is quantised; use start='random'")
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    count = 0
    with _left_as_it_was(model), model.disable_adapter():
        for parameter in parameters:
            parameter.requires_grad_(True)
        for sample in samples:
            loss = model(**{name: _to(value, parameters[0].device) for name, value in sample.items()}).loss
            gradients: Any = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient.float().square())
            count += 1
    if not count:
        raise ValueError("fisher_start: there are no batches; pass those that the adapter will be trained on.")
    rest = iter(sums)
    return [{name: next(rest) for name in block_parameters(block)} for block in blocks]


def _rows(batches: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Batches of one row each."""
    for batch in batches:
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            raise ValueError(
                f"fisher_start: a batch of {', '.join(batch)} has no labels, and importance is of the model's loss; "
                "pass labels, or use start='l1'."
            )
        for row in range(len(labels)):
            yield {
                name: value[row : row + 1] if isinstance(value, Tensor) and len(value) == len(labels) else value
                for name, value in batch.items()
            }


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def _left_as_it_was(model: nn.Module) -> Generator[None]:
    """Eval mode, nothing that requires grad, and gradients to be had; afterwards modes and flags as before."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
