"""Where the parts of a transformer are, read from its module tree (`petune.blocks` reads one block).

Nothing is run and no weight is read: models on the meta device, quantised ones and ones that PEFT already wraps work;
names are relative to the model that was passed. Blocks are the items of the innermost ModuleLists whose items are of
one class and each hold attention and feed-forward linears.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import nn

from petune.blocks import (
    CONVOLUTIONS,
    NORM_OF_EMBEDDINGS,
    Block,
    ContradictionError,
    Node,
    hints,
    read_block,
    residual_reader,
    walk,
)

ROLES: dict[str, str] = {
    "blocks": "the transformer blocks, encoder before decoder",
    "attention_in": "query, key and value projections, fused or not, of self- and cross-attention",
    "attention_qv": "query and value projections, or the fused one",
    "attention_out": "attention output projections",
    "ffn_in": "first linear(s) of every feed-forward; gate and up where it is gated",
    "ffn_gate": "of a gated feed-forward, the linear before the activation (or the fused gate and up)",
    "ffn_out": "last linear of every feed-forward",
    "linears": "every linear inside the blocks",
    "norms": "norms on the residual stream, embedding and final norms included; not query/key norms",
    "embeddings": "token, position and patch embeddings",
    "head": "linears of the task or language-model head",
    "residual_writers": "what adds to the residual stream: embeddings, attention_out, ffn_out",
}


@dataclass(frozen=True)
class Topology:
    """Full module names of a model by role (`ROLES` says what each holds), in model order.

    Parameters that belong to no leaf module (cls token, position table of a ViT) have no module name and are not here.

    Attributes:
        ffn_residual: of every block whose structure tells, the module whose input is the residual stream that the
            feed-forward branches off (`petune.blocks.Block`).
        hidden_size: width of the last block.
        layout: the same names block by block.
    """

    blocks: tuple[str, ...]
    attention_in: tuple[str, ...]
    attention_qv: tuple[str, ...]
    attention_out: tuple[str, ...]
    ffn_in: tuple[str, ...]
    ffn_gate: tuple[str, ...]
    ffn_out: tuple[str, ...]
    linears: tuple[str, ...]
    norms: tuple[str, ...]
    embeddings: tuple[str, ...]
    head: tuple[str, ...]
    residual_writers: tuple[str, ...]
    ffn_residual: tuple[str, ...]
    hidden_size: int
    layout: tuple[Block, ...]

    @property
    def num_blocks(self) -> int:
        """How many blocks there are, encoder and decoder together."""
        return len(self.layout)

    def block(self, index: int) -> Block:
        """The block at `index`, counted as in `blocks`; negative counts from the end."""
        if not -self.num_blocks <= index < self.num_blocks:
            raise ValueError(f"Topology.block({index}): the model has blocks 0..{self.num_blocks - 1}.")
        return self.layout[index]


def find_topology(model: nn.Module) -> Topology:
    """Find blocks, projections, norms, embeddings and head of `model` by structure.

    Raises:
        ValueError: no transformer blocks, or shapes and names contradict each other; names the closest modules.
    """
    nodes = _nodes(model)
    layout = _blocks(model, nodes)
    embeddings, norms, head = _outside(nodes, layout)
    layout = _with_residuals(nodes, layout, head)
    order = {node.name: position for position, node in enumerate(nodes)}

    def gather(role: str, *more: str) -> tuple[str, ...]:
        names = [name for block in layout for name in getattr(block, role)]
        return tuple(sorted([*names, *more], key=order.__getitem__))

    return Topology(
        blocks=tuple(block.name for block in layout),
        attention_in=gather("attention_in"),
        attention_qv=gather("attention_qv"),
        attention_out=gather("attention_out"),
        ffn_in=gather("ffn_in"),
        ffn_gate=gather("ffn_gate"),
        ffn_out=gather("ffn_out"),
        linears=gather("linears"),
        norms=gather("norms", *norms),
        embeddings=tuple(node.name for node in embeddings),
        head=tuple(head),
        residual_writers=gather("attention_out", *gather("ffn_out"), *_writers(embeddings, _widths(layout))),
        ffn_residual=tuple(block.ffn_residual for block in layout if block.ffn_residual),
        hidden_size=layout[-1].width,
        layout=layout,
    )


def resolve_targets(model: nn.Module, roles: str | Sequence[str]) -> list[str]:
    """Full names of the modules that play any of `roles` (keys of `ROLES`), in model order, each once.

    Raises:
        ValueError: unknown role, a role no module plays, or a model without transformer blocks.
    """
    roles = [roles] if isinstance(roles, str) else list(roles)
    for role in roles:
        if role not in ROLES:
            near = difflib.get_close_matches(role, ROLES, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"resolve_targets: unknown role {role!r}, did you mean {near!r}? Roles: {', '.join(ROLES)}."
            )
    topology = find_topology(model)
    for role in roles:
        if not getattr(topology, role):
            present = ", ".join(other for other in ROLES if getattr(topology, other))
            raise ValueError(
                f"resolve_targets: no module of {type(model).__name__} has the role {role!r} ({ROLES[role]}); "
                f"it has {present}; pass one of these or target_modules."
            )
    found = {name for role in roles for name in getattr(topology, role)}
    return [name for name, _ in model.named_modules() if name in found]


def target_pattern(model: nn.Module, names: Sequence[str]) -> str:
    r"""A regex for PEFT's `target_modules` whose full matches among the modules of `model` are exactly `names`.

    BERT's `output.dense` become `encoder\.layer\.\d+\.output\.dense`, which leaves `attention.output.dense` out.

    Raises:
        ValueError: `names` is empty or holds a name that `model` does not have.
    """
    known = dict(model.named_modules())
    if missing := [name for name in names if name not in known]:
        raise ValueError(
            f"target_pattern: {type(model).__name__} has no module {missing[0]!r}; "
            f"the closest are {', '.join(closest_modules(model, missing[0]))}."
        )
    if not names:
        raise ValueError("target_pattern: no module names were given; pass at least one.")
    wanted = set(names)
    leaves: dict[str, dict[str, None]] = {}  # pattern of the parent -> last components, both in order of appearance
    for name in names:
        *path, leaf = name.split(".")
        pattern = r"\.".join(_index_pattern(name, at, wanted, known) for at in range(len(path)))
        leaves.setdefault(pattern, {})[re.escape(leaf)] = None
    parts = [
        (f"{parent}\\." if parent else "") + (next(iter(tails)) if len(tails) == 1 else f"(?:{'|'.join(tails)})")
        for parent, tails in leaves.items()
    ]
    pattern = "|".join(parts)
    exact = {name for name in known if re.fullmatch(pattern, name)} == wanted
    return pattern if exact else "|".join(map(re.escape, dict.fromkeys(names)))


def common_parent(*names: str) -> str:
    """Name of the innermost module that holds all the modules of these names; "" for the model itself."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def closest_modules(model: nn.Module, wanted: str | Sequence[str], n: int = 5) -> list[str]:
    """Up to `n` names of modules with parameters that are most like `wanted`, best first, one for all layers alike.

    Names of one meaning count as alike: for "query" a model of the newer spelling answers "layers.0.attention.q_proj".
    """
    asked = [wanted] if isinstance(wanted, str) else list(wanted)
    alike: dict[str, Node] = {}
    for node in _nodes(model):
        if node.features or node.module._parameters:
            alike.setdefault(re.sub(r"\d+", "N", node.name), node)
    ranked = sorted(alike.values(), key=lambda node: -max((_likeness(w, node.name) for w in asked), default=0))
    return [node.name for node in ranked if node.name][:n]


def _nodes(model: nn.Module) -> list[Node]:
    start, base = "", model
    if callable(getattr(model, "get_base_model", None)):  # a PeftModel: its prompt encoder is not the model's
        base = model.get_base_model()  # pyright: ignore[reportCallIssue]
        start = next(name for name, module in model.named_modules() if module is base)
    return list(walk(start, base, set()))


def _blocks(model: nn.Module, nodes: Sequence[Node]) -> tuple[Block, ...]:
    try:
        found = _stacks(nodes)
        if not found:
            raise ContradictionError("there is none")
        blocks = [block for stack in found.values() for block in stack]
        stated = getattr(getattr(model, "config", None), "hidden_size", None)
        if isinstance(stated, int) and stated not in _widths(blocks):
            raise ContradictionError(f"its blocks have width {blocks[-1].width}, but config.hidden_size is {stated}")
    except ContradictionError as reason:
        near = ", ".join(closest_modules(model, ("attention.q_proj", "attention.query", "mlp.fc1", "output.dense")))
        raise ValueError(
            f"find_topology looked in {type(model).__name__} for a ModuleList of blocks with attention and "
            f"feed-forward linears: {reason}; the closest modules are {near or 'none'}; pass target_modules."
        ) from None
    order = {node.name: position for position, node in enumerate(nodes)}
    return tuple(sorted(blocks, key=lambda block: order[block.name]))


def _stacks(nodes: Sequence[Node]) -> dict[str, list[Block]]:
    """Blocks by the list they stand in; a list around such a list (the stages of Swin) is not one."""
    lists = [node for node in nodes if isinstance(node.module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))]
    found: dict[str, list[Block]] = {}
    for stack in sorted(lists, key=lambda node: -node.name.count(".")):
        items = [node for node in nodes if node.parent == stack.name and node is not stack]
        outer = any(stack.name in _around(inner) for inner in found)
        if outer or len({type(item.module) for item in items}) != 1:
            continue
        blocks = [read_block(stack.name, item, nodes) for item in items]
        if None not in blocks:
            found[stack.name] = [block for block in blocks if block]
    return found


def _outside(nodes: Sequence[Node], layout: Sequence[Block]) -> tuple[list[Node], list[str], list[str]]:
    """Embeddings, norms and head among the modules that are in no block."""
    widths = _widths(layout)
    inside = tuple(f"{block.name}." for block in layout)
    outside = [(position, node) for position, node in enumerate(nodes) if not node.name.startswith(inside)]
    position_of = {node.name: position for position, node in outside}
    first, last = position_of[layout[0].name], position_of[layout[-1].name]

    embeddings = [
        node for position, node in outside if position < last and _is_embedding(node, position < first, widths)
    ]
    head = [
        node.name
        for position, node in outside
        if node.features and position > last and "pool" not in node.name.lower()
    ]
    head_start = min((position_of[name] for name in head), default=len(nodes))
    trunk = {around for block in layout for around in _around(block.stack)}
    norms = [
        node.name
        for position, node in outside
        # BART's embedding norm stands behind its blocks, Swin's merging norms beside them on another width, and the
        # transform of a masked-LM head has a norm of its own
        if node.norm_width in widths and (position < first or (node.parent in trunk and position < head_start))
    ]
    return embeddings, norms, head


def _with_residuals(nodes: Sequence[Node], layout: Sequence[Block], head: Sequence[str]) -> tuple[Block, ...]:
    kinds = {node.name: type(node.module).__name__ for node in nodes}
    names = [node.name for node in nodes]
    body = nodes[: names.index(head[0])] if head else nodes
    last = {block.stack: names.index(block.name) for block in layout}
    normed = {
        stack: any(_ends(node, stack, position > end, layout) for position, node in enumerate(body))
        for stack, end in last.items()
    }
    return tuple(
        replace(block, ffn_residual=residual_reader(block, kinds[block.name], normed[block.stack])) for block in layout
    )


def _ends(node: Node, stack: str, after: bool, layout: Sequence[Block]) -> bool:
    """Whether a module before or `after` a stack of blocks is a norm on what the stack gives, a pooler's included."""
    if node.norm_width not in _widths(layout) or NORM_OF_EMBEDDINGS.search(node.name):
        return False
    trunk = [*_around(stack), stack]
    if not after:  # OPT lists it before the blocks
        return node.parent in trunk and node.name.rpartition(".")[2].startswith("final")
    path = node.name.split(".")
    branch = next(name for at in range(len(path)) if (name := ".".join(path[: at + 1])) not in trunk)
    return not any(f"{block.name}.".startswith(f"{branch}.") for block in layout)  # not the decoder's, of an encoder


def _widths(layout: Sequence[Block]) -> set[int]:
    return {block.width for block in layout}


def _around(name: str) -> list[str]:
    """Names of the modules around `name`, the model ("") first; none for the model itself."""
    path = name.split(".") if name else []
    return [".".join(path[:depth]) for depth in range(len(path))]


def _is_embedding(node: Node, first: bool, widths: set[int]) -> bool:
    """Embedding tables; patch and frame convolutions; before the first block also linears that write the width."""
    if hasattr(node.module, "embedding_dim") or isinstance(node.module, CONVOLUTIONS):
        return True
    return first and node.features is not None and node.features[1] in widths


def _writers(embeddings: Sequence[Node], widths: set[int]) -> list[str]:
    """Those embeddings whose output joins the residual stream: of a stem of convolutions only the last."""
    last = {node.parent: node for node in embeddings if isinstance(node.module, CONVOLUTIONS)}

    def writes(node: Node) -> int | None:
        if isinstance(node.module, CONVOLUTIONS):
            return node.module.out_channels if last[node.parent] is node else None
        return node.features[1] if node.features else getattr(node.module, "embedding_dim", None)

    return [node.name for node in embeddings if writes(node) in widths]


def _index_pattern(name: str, at: int, wanted: set[str], known: Iterable[str]) -> str:
    """Component `at` of `name` as a regex: an index becomes all the indices at its place in `wanted`."""
    path = name.split(".")
    if not path[at].isdigit():
        return re.escape(path[at])
    place = re.compile(
        r"\.".join(r"(\d+)" if at == i else (r"\d+" if c.isdigit() else re.escape(c)) for i, c in enumerate(path))
    )
    indices = {match[1] for other in wanted if (match := place.fullmatch(other))}
    everywhere = {match[1] for other in known if (match := place.fullmatch(other))}
    if indices == everywhere:
        return r"\d+"
    return indices.pop() if len(indices) == 1 else f"(?:{'|'.join(sorted(indices, key=int))})"


def _likeness(wanted: str, name: str) -> float:
    """Likeness (0..1) of `wanted` to as many last components of `name`; 1 more if both are names of one meaning."""
    tail = ".".join(name.split(".")[-len(wanted.split(".")) :])
    return difflib.SequenceMatcher(None, wanted, tail).ratio() + bool(hints(wanted) & hints(name))
