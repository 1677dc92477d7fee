"""What a module's forward does with its children, read from its source: the proof that grouping and gating ask for."""

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from torch import nn

# what stands inside may run never, once or often
_CONDITIONAL = (ast.Lambda, ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")


class GatedForm(NamedTuple):
    """Names of the children in down(activation(gate(x)) * up(x))."""

    gate: str
    up: str
    down: str
    activation: str


@cache
def shared_inputs(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...] | None:
    """Names of children that `cls.forward` calls with one variable of one value, in the order of their calls.

    All calls of a tuple stand in one block of statements, so that all of them run or none, and the variable is not
    bound anew between them. A child that is called in two places with different companions is in no tuple. None if
    the source cannot be read.
    """
    function = _function(cls)
    if function is None:
        return None
    found = dict.fromkeys(tuple(names) for names in _shared(function.body, function.args.args[0].arg))
    calls = Counter(name for names in found for name in names)
    single = (tuple(name for name in names if calls[name] == 1) for names in found)
    return tuple(names for names in single if len(names) > 1)


@cache
def gated_form(cls: type[nn.Module]) -> GatedForm | None:
    """The children's names if `cls.forward(self, x)` is down(activation(gate(x)) * up(x)) and nothing else."""
    function = _function(cls)
    if function is None or hasattr(cls.forward, "__wrapped__") or function.decorator_list:
        return None
    arguments = function.args
    if (
        arguments.posonlyargs
        or arguments.vararg
        or arguments.kwonlyargs
        or arguments.kwarg
        or len(arguments.args) != 2
    ):
        return None
    me, x = (argument.arg for argument in arguments.args)
    # four calls in all: nothing is computed that the returned value does not show
    if sum(isinstance(node, ast.Call) for node in ast.walk(function)) != 4:
        return None
    down, product = _call(_returned(function.body), me)
    if not isinstance(product, ast.BinOp) or not isinstance(product.op, ast.Mult):
        return None
    for left, right in ((product.left, product.right), (product.right, product.left)):
        activation, inner = _call(left, me)
        gate, gate_input = _call(inner, me)
        up, up_input = _call(right, me)
        names = (gate, up, down, activation)
        if all(names) and len(set(names)) == 4 and _is_name(gate_input, x) and _is_name(up_input, x):
            return GatedForm(*names)
    return None


def _function(cls: type[nn.Module]) -> ast.FunctionDef | None:
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))
        node = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):  # no file, not written in Python, or a lambda
        return None
    return node if isinstance(node, ast.FunctionDef) and node.args.args else None


def _shared(body: list[ast.stmt], me: str) -> Iterator[list[str]]:
    calls: dict[str, list[str]] = {}
    for statement in body:
        blocks = list(_blocks(statement))
        for block in blocks:
            yield from _shared(block, me)
        if not blocks:
            for child, variable in _child_calls(statement, me):
                calls.setdefault(variable, []).append(child)
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load) and node.id in calls:
                yield calls.pop(node.id)
    yield from calls.values()


def _blocks(statement: ast.AST) -> Iterator[list[ast.stmt]]:
    for field in _BLOCKS:
        for part in [getattr(statement, field, [])]:
            if part and isinstance(part[0], ast.stmt):
                yield part
            else:  # an exception handler or a case of a match
                for holder in part:
                    yield from _blocks(holder)


def _child_calls(node: ast.AST, me: str) -> Iterator[tuple[str, str]]:
    """(child, variable) for every `self.child(variable)` that is sure to run."""
    if isinstance(node, _CONDITIONAL):
        return
    if isinstance(node, ast.Call):
        child, argument = _call(node, me)
        if child and isinstance(argument, ast.Name):
            yield child, argument.id
    for inner in ast.iter_child_nodes(node):
        yield from _child_calls(inner, me)


def _call(node: ast.AST | None, me: str) -> tuple[str, ast.expr | None]:
    """(child, argument) of `self.child(argument)`; ("", None) for anything else."""
    match node:
        case ast.Call(ast.Attribute(ast.Name(owner), child), [argument], []) if owner == me:
            return child, argument
        case _:
            return "", None


def _is_name(node: ast.expr | None, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _returned(body: list[ast.stmt]) -> ast.expr | None:
    """The returned expression with every local variable replaced by what it was bound to."""
    values: dict[str, ast.expr] = {}
    for statement in body:
        match statement:
            case ast.Expr(ast.Constant()):  # the docstring
                pass
            case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, ast.expr() as value):
                values[name] = _Inlined(values).visit(value)
            case ast.Return(ast.expr() as value) if statement is body[-1]:
                return _Inlined(values).visit(value)
            case _:
                return None
    return None


class _Inlined(ast.NodeTransformer):
    def __init__(self, values: dict[str, ast.expr]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.values.get(node.id, node)
