"""What is read from the source of a forward: which children share an input, and which forward is a gated MLP."""

import functools

import pytest
from torch import nn
from torch.nn import functional as F

from petune.adapters.lora.source import GatedForm, gated_form, shared_inputs

# --- shared inputs -------------------------------------------------------------------------------------------------


def self_attention(self, x):
    q = self.q(x).view(2, -1)
    k, v = self.k(x), self.v(x)
    return q + k + v


def cross_attention(self, x, states=None):
    q = self.q(x)
    current = x if states is None else states
    if q is not None:
        k = self.k(current)
        v = self.v(current)
    return q + k + v


def keyword_arguments(self, x):
    return self.q(x, scale=2.0) + self.k(x, 3.0) + self.v(x)


def bound_anew(self, x):
    q = self.q(x)
    x = x + 1.0
    return q + self.k(x) + self.v(x)


def augmented(self, x):
    q = self.q(x)
    x += 1.0
    return q + self.k(x)


def bound_in_a_branch(self, x):
    q = self.q(x)
    if q is None:
        x = x + 1.0
    return q + self.k(x)


def bound_by_a_loop(self, x):
    q = self.q(x)
    for x in q:
        q = q + x
    return self.k(x)


def chained(self, x):
    x = self.q(x)
    x = self.k(x)
    return self.v(x)


def in_two_blocks(self, x):
    if self.training:
        return self.q(x) + self.k(x)
    return self.v(x)


def in_both_branches(self, x, y=None):
    if y is None:
        return self.q(x) + self.k(x)
    return self.q(x) + self.k(y)


def the_same_pair_twice(self, x, y=None):
    if y is None:
        return self.k(x) + self.v(x)
    return self.k(y) + self.v(y)


def maybe(self, x):
    return self.q(x) + (self.k(x) if self.training else 0.0) + sum(self.v(x) for _ in range(2))


def called_twice(self, x):
    return self.q(x) + self.q(x) + self.k(x) + self.v(x)


def guarded(self, x):
    try:
        q = self.q(x)
    except ValueError:
        q = self.k(x)
        q += self.v(x)
    return q


def expressions(self, x):
    return self.q(x + 1) + self.k(x + 1) + self.v.forward(x)


SHARED = {
    self_attention: (("q", "k", "v"),),
    cross_attention: (("k", "v"),),
    keyword_arguments: (),
    bound_anew: (("k", "v"),),
    augmented: (),
    bound_in_a_branch: (),
    bound_by_a_loop: (),
    chained: (),
    in_two_blocks: (("q", "k"),),
    in_both_branches: (),
    the_same_pair_twice: (("k", "v"),),
    maybe: (),
    called_twice: (("k", "v"),),
    guarded: (("k", "v"),),
    expressions: (),
}


def module_with(forward):
    return type("Parent", (nn.Module,), {"forward": forward})


@pytest.mark.parametrize("forward", SHARED, ids=lambda forward: forward.__name__)
def test_children_share_an_input_where_the_source_proves_it(forward):
    assert shared_inputs(module_with(forward)) == SHARED[forward]


def test_a_decorated_forward_is_read_through_its_decorator():
    @functools.wraps(self_attention)
    def wrapper(*args, **kwargs):
        return self_attention(*args, **kwargs)

    assert shared_inputs(module_with(wrapper)) == (("q", "k", "v"),)


def test_source_that_cannot_be_read_proves_nothing():
    namespace = {}
    exec("def forward(self, x):\n    return self.q(x) + self.k(x)", namespace)
    cls = module_with(namespace["forward"])
    assert shared_inputs(cls) is None
    assert gated_form(cls) is None
    assert shared_inputs(module_with(lambda self, x: self.q(x) + self.k(x))) is None


# --- the gated MLP -------------------------------------------------------------------------------------------------


def llama(self, x):
    down_proj = self.down(self.act(self.gate(x)) * self.up(x))
    return down_proj  # noqa: RET504 - it is written so


def documented(self, hidden):
    """What it does."""
    return self.down(self.act(self.gate(hidden)) * self.up(hidden))


def swapped(self, x):
    return self.down(self.up(x) * self.act(self.gate(x)))


def in_steps(self, x):
    gate = self.gate(x)
    up: object = self.up(x)
    gate = self.act(gate)
    x = gate * up
    return self.down(x)


@pytest.mark.parametrize("forward", [llama, documented, swapped, in_steps], ids=lambda forward: forward.__name__)
def test_the_form_is_found_through_local_names(forward):
    assert gated_form(module_with(forward)) == GatedForm("gate", "up", "down", "act")


def with_dropout(self, x):
    return self.down(self.dropout(self.act(self.gate(x)) * self.up(x)))


def after_dropout(self, x):
    return F.dropout(self.down(self.act(self.gate(x)) * self.up(x)))


def unused_call(self, x):
    self.counter = self.count(x)
    return self.down(self.act(self.gate(x)) * self.up(x))


def lost_call(self, x):
    lost = self.count(x)  # noqa: F841
    return self.down(self.act(self.gate(x)) * self.up(x))


def function_as_activation(self, x):
    return self.down(F.silu(self.gate(x)) * self.up(x))


def added(self, x):
    return self.down(self.act(self.gate(x)) + self.up(x))


def scaled(self, x):
    return self.down(self.act(self.gate(x)) * self.up(x)) * 2.0


def other_input(self, x):
    y = x + 1
    return self.down(self.act(self.gate(x)) * self.up(y))


def one_child_twice(self, x):
    return self.down(self.act(self.gate(x)) * self.gate(x))


def both_activated(self, x):
    return self.act(self.act(self.gate(x)) * self.up(x))


def two_arguments(self, x, y):
    return self.down(self.act(self.gate(x)) * self.up(x))


def open_arguments(self, x, **kwargs):
    return self.down(self.act(self.gate(x)) * self.up(x))


def branched(self, x):
    if self.training:
        x = x + 1
    return self.down(self.act(self.gate(x)) * self.up(x))


def nothing(self, x):
    self.down(self.act(self.gate(x)) * self.up(x))


OTHERS = (
    with_dropout, after_dropout, unused_call, lost_call, function_as_activation, added, scaled, other_input,
    one_child_twice, both_activated, two_arguments, open_arguments, branched, nothing,
)  # fmt: skip


@pytest.mark.parametrize("forward", OTHERS, ids=lambda forward: forward.__name__)
def test_any_other_forward_is_left_alone(forward):
    assert gated_form(module_with(forward)) is None


def test_a_decorated_forward_is_not_the_form():
    @functools.wraps(llama)
    def wrapper(self, x):
        return llama(self, x) * 2.0

    assert gated_form(module_with(wrapper)) is None
