"""One transformer block, read from shapes; names settle what shapes leave open and may not contradict them.

The width w of a block is the size most of its linears share: a linear w -> f reads the residual stream, one f -> w
writes it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

# What the last component of a name, or the last two, says about a linear of an attention or a feed-forward.
ATTENTION_HINTS = {
    "query": re.compile(r"q|wq|to_q|q_(proj|lin|attn)|query(_proj)?"),
    "key": re.compile(r"k|wk|to_k|k_(proj|lin)|key(_proj)?"),
    "value": re.compile(r"v|wv|to_v|v_(proj|lin)|value(_proj)?"),
    "fused": re.compile(r"c_attn|q?kv|to_q?kv|q?kv_proj|query_key_value|Wqkv|in_proj"),
    "out": re.compile(r"o|wo|Wo|to_out|c_proj|proj|dense|output\.dense|o(ut)?_(proj|lin)"),
}
FFN_HINTS = {
    "gate": re.compile(r"gate(_up)?_proj|wi_0|w1|weights_in"),
    "in": re.compile(r"up_proj|wi|wi_1|Wi|w3|fc1|c_fc|lin(ear)?1|fc_in|intermediate\.dense|dense_h_to_4h"),
    "out": re.compile(r"down_proj|wo|Wo|w2|fc2|c_proj|lin(ear)?2|fc_out|output\.dense|dense_4h_to_h|weights_out"),
}
FLAT_ATTENTION_OUT = re.compile(r"o|o(ut)?_(proj|lin)")  # attention even where no module around it says so

ATTENTION = re.compile(r"attention|attn|^att$", re.IGNORECASE)
FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE)
QK_NORM = re.compile(r"^(q|k|query|key)_?(layer_?)?(norm|ln)", re.IGNORECASE)
# What a norm's name says of where it stands. Llama's post_attention_layernorm is the feed-forward's own.
ATTENTION_NORM = re.compile(r"(?<!post_)att(n|ention)|input")
FFN_NORM = re.compile(r"(?<!post_)(ffn|mlp|feed_?forward)")
AFTER_FFN_NORM = re.compile(r"post_(ffn|mlp|feed_?forward)")
BEFORE_NORM = re.compile(r"before")  # ViT's layernorm_before: of a pre-norm block, whatever follows the stack
NORM_OF_EMBEDDINGS = re.compile(r"norm_emb")  # BART's layernorm_embedding, which stands behind its blocks
PRE_NORM_CLASS = re.compile(r"Pre(Layer)?Norm|StableLayerNorm")
PEFT_WRAPPED = ("base_layer", "original_module")  # in PEFT's tuner layers; in its modules_to_save


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Block:
    """Full module names of one transformer block by role (`petune.topology.ROLES`), in model order.

    Attributes:
        name: the block.
        stack: the list it stands in, such as "encoder.block".
        width: size of the residual stream here; differs between blocks only in hierarchical models (Swin).
        ffn_residual: module whose input is the residual stream that the feed-forward branches off: its norm, or its
            first linear where what it reads is not normed (post-norm); "" where there are several feed-forwards.
    """

    name: str
    stack: str
    width: int
    attention_in: tuple[str, ...]
    attention_qv: tuple[str, ...]
    attention_out: tuple[str, ...]
    ffn_in: tuple[str, ...]
    ffn_gate: tuple[str, ...]
    ffn_out: tuple[str, ...]
    norms: tuple[str, ...]
    linears: tuple[str, ...]
    ffn_residual: str


class Node(NamedTuple):
    """A module under the name a user targets it by; `module` is what PEFT wraps if it wraps it."""

    name: str
    module: nn.Module

    @property
    def parent(self) -> str:
        """Name of the module around it; "" at the top."""
        return _parent(self.name)

    @property
    def features(self) -> tuple[int, int] | None:
        """(in, out) of a linear: nn.Linear, a quantised one, or GPT-2's Conv1D; None for anything else."""
        for names in (("in_features", "out_features"), ("nx", "nf")):
            reads, writes = (getattr(self.module, name, None) for name in names)
            if isinstance(reads, int) and isinstance(writes, int):
                return reads, writes
        return None

    @property
    def norm_width(self) -> int | None:
        """Size of what a LayerNorm or RMSNorm of any library normalises; None for anything else."""
        if "norm" not in type(self.module).__name__.lower() or self.module._modules:
            return None
        shape: Any = getattr(self.module, "normalized_shape", None)
        shape = shape or getattr(getattr(self.module, "weight", None), "shape", None)
        return int(shape[-1]) if shape else None


class ContradictionError(Exception):
    """A block's shapes and names say different things."""


def walk(name: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[Node]:
    """All modules at and below `module` in model order, each once; what PEFT added inside its layers is left out."""
    if module in seen:
        return
    seen.add(module)
    for wrapped in PEFT_WRAPPED:
        if (inner := module._modules.get(wrapped)) is not None:
            below = name if Node(name, inner).features or not inner._modules else f"{name}.{wrapped}"
            nodes = list(walk(below, inner, seen))
            yield from [Node(name, node.module) if node.name == below else node for node in nodes]
            return
    node = Node(name, module)
    yield node
    if node.features is None:
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child, seen)


def has_width(block: nn.Module) -> bool:
    """Whether `block`, read alone, has linears or norms to tell the size of its residual stream by."""
    return any(node.features or node.norm_width for node in walk("", block, set()))


def width_of(block: nn.Module) -> int:
    """Size of the residual stream that `block`, read alone, works on.

    Raises:
        ValueError: it has neither linears nor norms.
    """
    if not has_width(block):
        raise ValueError(f"a {type(block).__name__} has neither linear layers nor norms to tell its hidden size by.")
    return _width(walk("", block, set()))


def read_block(stack: str, block: Node, nodes: Sequence[Node]) -> Block | None:
    """Sort the modules of `block` (all of the model's are in `nodes`) by role.

    Returns:
        None if it lacks attention or feed-forward linears, as an item of a list that is no transformer block does.
        `ffn_residual` is left to `residual_reader`, which looks beyond the block.

    Raises:
        ContradictionError: it has both, but shapes and names disagree.
    """
    inside = {_path_in(block, node.name): node for node in nodes if node.name.startswith(f"{block.name}.")}
    linears = {path: node for path, node in inside.items() if node.features}
    roots = _attention_roots(inside, linears)
    ffn = {path: node for path, node in linears.items() if path not in roots}
    if not roots:
        return None
    width = _width(inside.values())
    _refuse_experts(inside.values(), width)
    attention_in: list[str] = []
    attention_out: list[str] = []
    for root in dict.fromkeys(roots.values()):
        group = {path: linears[path] for path in linears if roots.get(path) == root}
        reads, writes = _read_attention(group, width)
        attention_in += reads
        attention_out += writes
    ffn_in, ffn_gate, ffn_out = _read_ffn(ffn, width)
    if not (attention_out and ffn_in and ffn_out):
        return None
    attention_parents = {inside[path].parent for path in attention_in} - {block.name}
    norms = [
        path
        for path, node in inside.items()
        if node.norm_width == width and node.parent not in attention_parents and not QK_NORM.match(_leaf(path))
    ]
    roles = {
        "attention_in": attention_in,
        "attention_qv": [path for path in attention_in if _hint(path, ATTENTION_HINTS) in ("query", "value", "fused")],
        "attention_out": attention_out,
        "ffn_in": ffn_in,
        "ffn_gate": ffn_gate,
        "ffn_out": ffn_out,
        "norms": norms,
        "linears": list(linears),
    }
    names = {role: tuple(inside[path].name for path in inside if path in paths) for role, paths in roles.items()}
    return Block(name=block.name, stack=stack, width=width, ffn_residual="", **names)


def residual_reader(block: Block, kind: str, ends_in_norm: bool) -> str:
    """Name for `Block.ffn_residual`, "" if it cannot be told.

    Args:
        block: what `read_block` found.
        kind: name of the block's class.
        ends_in_norm: whether a norm follows the stack, as it does where blocks norm what their branches read.
    """
    if len(block.ffn_out) != 1:
        return ""
    first, last = block.ffn_in[0], block.ffn_out[0]
    inner = [norm for norm in block.norms if _path_in(block, norm) != _leaf(norm)]
    beside = _parent(first) != _parent(last) and any(_parent(norm) == _parent(last) for norm in inner)
    named = PRE_NORM_CLASS.search(kind) or any(BEFORE_NORM.search(_leaf(norm)) for norm in block.norms)
    if beside or not (ends_in_norm or named):  # post-norm: BERT's output.LayerNorm; BART
        return first
    around = [norm for norm in inner if first.startswith(f"{_parent(norm)}.")]  # T5's layer.1.layer_norm
    around = around or [norm for norm in block.norms if FFN_NORM.search(_leaf(norm))]
    if around:
        return around[0]
    before = [norm for norm in block.norms if not AFTER_FFN_NORM.search(_leaf(norm))]
    if len(before) == 1 < len(block.norms):  # OLMo-2 norms what its two branches write, not what they read
        return first
    before = [norm for norm in before if not ATTENTION_NORM.search(_path_in(block, norm))] or before
    return before[-1] if before else ""


def hints(name: str) -> set[str]:
    """What a module of this name may do, as "attention.query" or "ffn.out"; empty for a name that says nothing."""
    tables = (("attention", ATTENTION_HINTS), ("ffn", FFN_HINTS))
    return {
        f"{part}.{role}"
        for part, table in tables
        for role, names in table.items()
        if any(names.fullmatch(tail) for tail in _tails(name))
    }


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _path_in(block: Node | Block, name: str) -> str:
    path = name.removeprefix(f"{block.name}.")
    for wrapped in PEFT_WRAPPED:  # a method may wrap the whole block
        path = path.removeprefix(f"{wrapped}.")
    return path


def _tails(path: str) -> tuple[str, str]:
    return ".".join(path.split(".")[-2:]), _leaf(path)


def _hint(path: str, table: dict[str, re.Pattern[str]]) -> str | None:
    return next((role for tail in _tails(path) for role, names in table.items() if names.fullmatch(tail)), None)


def _attention_roots(inside: dict[str, Node], linears: dict[str, Node]) -> dict[str, str]:
    """Path of every attention linear -> path of the attention module it belongs to ("" if that is the block)."""
    projections = {path for path in linears if _hint(path, ATTENTION_HINTS) not in (None, "out")}
    mixers = {path.rpartition(".")[0] for path in projections} - {""}
    roots: dict[str, str] = {}
    for path in linears:
        parents = path.split(".")[:-1]
        for depth, component in enumerate(parents, start=1):
            above = ".".join(parents[:depth])
            around = type(inside[above].module).__name__ if above in inside else ""
            if ATTENTION.search(component) or ATTENTION.search(around):
                roots[path] = above
                break
            if FEED_FORWARD.search(component):
                break
        else:
            parent = ".".join(parents)
            flat = not parent and (FLAT_ATTENTION_OUT.fullmatch(path) or ATTENTION.search(path))
            if path in projections or parent in mixers or flat:
                roots[path] = parent
    return roots


def _width(nodes: Iterable[Node]) -> int:
    """The size most linears share; the norms decide where attention and feed-forward have one inner size too."""
    counts: Counter[int] = Counter()
    for node in nodes:
        counts.update(list(dict.fromkeys(node.features or ())))  # a square linear counts once
        counts.update([node.norm_width] if node.norm_width else [])
    return counts.most_common(1)[0][0]


def _refuse_experts(nodes: Iterable[Node], width: int) -> None:
    for node in nodes:
        for name, parameter in node.module._parameters.items():
            stacked = parameter is not None and parameter.dim() == 3 and width in parameter.shape
            if stacked and not isinstance(node.module, CONVOLUTIONS):
                raise ContradictionError(f"{node.name + '.' + name!r} stacks the matrices of several experts")


def _read_attention(group: dict[str, Node], width: int) -> tuple[list[str], list[str]]:
    """(inputs, output) of one attention: by name, else the output is its last linear that writes the width."""
    roles = {path: _hint(path, ATTENTION_HINTS) for path in group}
    named_in = [path for path, role in roles.items() if role not in (None, "out")]
    writers = [path for path, node in group.items() if node.features and node.features[1] == width]
    out = [path for path, role in roles.items() if role == "out"]
    out = out or [path for path in writers if path not in named_in][-1:]
    if len(out) > 1:
        raise ContradictionError(f"cannot tell which of {_names(group, out)} is the attention output")
    if wrong := [path for path in out if path not in writers]:
        raise ContradictionError(
            f"{_names(group, wrong)} is named like an attention output but does not write size {width}"
        )
    readers = [path for path, node in group.items() if node.features and node.features[0] == width and path not in out]
    if wrong := [path for path in named_in if roles[path] == "query" and path not in readers]:
        raise ContradictionError(
            f"{_names(group, wrong)} is named like a query projection but does not read size {width}"
        )
    return named_in or readers, out


def _read_ffn(group: dict[str, Node], width: int) -> tuple[list[str], list[str], list[str]]:
    """(inputs, gates, outputs) of a block's feed-forward: w -> f, or w -> 2f for fused gate and up, then f -> w."""
    shapes = {path: node.features or (0, 0) for path, node in group.items()}
    roles = {path: _ffn_role(group[path], path, width) for path in group}
    if len(group) == 2 and set(roles.values()) == {"square"}:  # w -> w -> w: only the order is left to go by
        roles = dict(zip(group, ("in", "out"), strict=True))
    outputs = [path for path, role in roles.items() if role == "out"]
    inner = {shapes[path][0] for path in outputs}
    inputs = [path for path, role in roles.items() if role == "in" and _feeds(shapes[path][1], inner)]
    if "square" in roles.values() and not (inputs and outputs):
        raise ContradictionError(
            f"cannot tell the feed-forward's first linear from its last among {_names(group, group)}"
        )
    for path, role in roles.items():  # an unnamed w -> n is a router or the like; a named one should have fitted
        if role == "in" and path not in inputs and outputs and _hint(path, FFN_HINTS):
            raise ContradictionError(
                f"{_names(group, [path])} writes size {shapes[path][1]}, which no output linear reads"
            )
    siblings = Counter(group[path].parent for path in inputs)
    gates = [
        path
        for path in inputs
        if (siblings[group[path].parent] > 1 and _hint(path, FFN_HINTS) == "gate") or shapes[path][1] not in inner
    ]
    return inputs, gates, outputs


def _ffn_role(node: Node, path: str, width: int) -> str | None:
    """What the linear is: "in", "out", "square" (an unnamed w -> w), or None where it misses the residual stream."""
    reads, writes = (size == width for size in node.features or (0, 0))
    named = _hint(path, FFN_HINTS)
    named = "in" if named == "gate" else named
    by_shape = {(True, False): "in", (False, True): "out", (True, True): named or "square"}.get((reads, writes))
    if named and named != by_shape:
        raise ContradictionError(
            f"{node.name!r} is named like a feed-forward's {named}put but has (in, out) = {node.features} "
            f"in a block of width {width}"
        )
    return by_shape


def _feeds(size: int, inner: set[int]) -> bool:
    return size in inner or (size % 2 == 0 and size // 2 in inner)


def _names(group: dict[str, Node], paths: Iterable[str]) -> str:
    return ", ".join(repr(group[path].name) for path in paths)
