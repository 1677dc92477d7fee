"""Gated MLPs: which ones are fused, that they compute what they did, and that the product is not kept."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from petune import fuse, unfuse
from petune.adapters.lora import mlp as gating
from petune.adapters.lora.mlp import FusedGatedMlp, activation_name, fused_class
from tests.adapters.lora_models import DEVICE, LLAMA, adapted, gradient, output
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES

ALL = ("gate_proj", "up_proj", "down_proj")


class Mlp(nn.Module):
    def __init__(self, activation="silu"):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(7, 11), nn.Linear(7, 11, bias=False), nn.Linear(11, 5)
        self.act_fn = ACT2FN[activation]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.fixture
def calls(monkeypatch):
    """Names of the operators that ran."""
    names = []

    def spied(name):
        operator = getattr(gating, name)

        def spy(*args):
            names.append(name)
            return operator(*args)

        return spy

    for name in ("gated", "gated_lora"):
        monkeypatch.setattr(gating, name, spied(name))
    return names


def twins(activation="silu", targets=ALL, dtype=torch.float32, **fields):
    """The same adapted MLP twice: fused, and PEFT's own."""
    torch.manual_seed(0)
    base, pair = Mlp(activation).to(dtype), []
    for _ in range(2):
        torch.manual_seed(1)
        config = LoraConfig(**({"r": 2, "target_modules": list(targets), "init_lora_weights": False} | fields))
        pair.append(get_peft_model(copy.deepcopy(base), config))
    fuse(pair[0])
    return pair


def agree(ours, theirs, tolerance=TOLERANCE[torch.float32], dtype=torch.float32):
    x = torch.randn(3, 4, 7, dtype=dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    out, reference = ours(leaves[0]), theirs(leaves[1])
    direction = torch.randn_like(out)
    for y in (out, reference):
        (y * direction).sum().backward()
    assert relative_error(out, reference) <= tolerance
    assert relative_error(leaves[0].grad, leaves[1].grad) <= tolerance
    assert relative_error(gradient(ours), gradient(theirs)) <= tolerance


# --- what runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["silu", "swish", "gelu", "gelu_pytorch_tanh"])
def test_the_fused_mlp_gives_what_the_plain_one_gives(activation, calls):
    ours, theirs = twins(activation, dtype=torch.float64)
    agree(ours, theirs, TOLERANCE[torch.float64], torch.float64)
    assert calls == ["gated_lora"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("gate_proj",), ["gated"]),
        (("gate_proj", "up_proj"), ["gated"]),
        (("down_proj",), ["gated_lora"]),
        (("up_proj", "down_proj"), ["gated_lora"]),
    ],
    ids=str,
)
def test_some_projections_are_enough(targets, expected, calls):
    agree(*twins(targets=targets))
    assert calls == expected


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"])
def test_every_mlp_of_these_families_is_fused(family, calls):
    model = adapted(LoraConfig, FAMILIES[family])
    assert fuse(model).mlps == 2
    output(model, FAMILIES[family])
    assert calls == ["gated_lora"] * 2


def test_backward_keeps_gate_and_up_but_neither_activation_nor_product():
    kept = []
    for model in twins():
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, shapes=shapes: (shapes.append(t.shape), t)[1], lambda t: t
        ):
            model(torch.randn(3, 4, 7))
        kept.append(sum(shape.numel() == 3 * 4 * 11 for shape in shapes))
    assert kept[0] == 2 < kept[1]


def test_dropout_of_the_down_projection_is_on_in_training_only(calls):
    ours, theirs = twins(lora_dropout=0.5)
    x = torch.randn(3, 7)
    assert relative_error(ours.eval()(x), theirs.eval()(x)) <= TOLERANCE[torch.float32]
    assert relative_error(ours.train()(x), ours(x)) > 0.01
    assert calls == ["gated_lora"] * 3


def test_no_tokens_at_all_are_fine(calls):
    for model in twins():
        x = torch.randn(0, 7, requires_grad=True)
        y = model(x)
        y.sum().backward()
        assert (y.shape, x.grad.shape) == ((0, 5), (0, 7))
    assert calls == ["gated_lora"]


def test_autocast_gives_pefts_dtype(calls):
    ours, theirs = twins()
    x = torch.randn(3, 7)
    with torch.autocast(DEVICE, torch.bfloat16):
        out, reference = ours(x), theirs(x)
    assert out.dtype == reference.dtype == torch.bfloat16
    assert relative_error(out, reference) <= 4 * TOLERANCE[torch.bfloat16]
    assert calls == ["gated_lora"]


# --- what does not -------------------------------------------------------------------------------------------------


def _activation_hook(mlp):
    mlp.act_fn.register_forward_hook(lambda module, args, out: out * 2.0)


def _other_activation(mlp):
    mlp.act_fn = nn.ReLU()


def _no_lora_left(mlp):
    for name in ALL:
        setattr(mlp, name, getattr(mlp, name).base_layer)
    mlp.gate_proj.weight.requires_grad_()


@pytest.mark.parametrize("change", [_activation_hook, _other_activation, _no_lora_left], ids=lambda f: f.__name__)
def test_a_changed_mlp_runs_its_own_forward(change, calls):
    ours, theirs = twins()
    for model in (ours, theirs):
        change(model.base_model.model)
    agree(ours, theirs)
    assert calls == []


def _down_hook(mlp):
    mlp.down_proj.register_forward_hook(lambda module, args, out: out * 2.0)


def _down_base_hook(mlp):
    mlp.down_proj.base_layer.register_forward_hook(lambda module, args, out: out * 2.0)


def _down_merged(mlp):
    mlp.down_proj.merge()


def _down_disabled(mlp):
    mlp.down_proj.enable_adapters(False)


@pytest.mark.parametrize(
    "change", [_down_hook, _down_base_hook, _down_merged, _down_disabled], ids=lambda f: f.__name__
)
def test_an_uncovered_down_projection_is_called_with_the_product(change, calls):
    ours, theirs = twins()
    for model in (ours, theirs):
        change(model.base_model.model)
    agree(ours, theirs)
    assert calls == ["gated"]


def test_an_argument_by_name_runs_the_mlps_own_forward(calls):
    ours, theirs = twins()
    x = torch.randn(3, 7)
    assert relative_error(ours.base_model.model(x=x), theirs(x)) <= TOLERANCE[torch.float32]
    assert calls == []


def test_the_compiler_gets_the_mlps_own_forward(calls):
    ours, theirs = twins()
    x = torch.randn(3, 7)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), theirs(x)) <= TOLERANCE[torch.float32]
    assert calls == []


def test_torch_func_and_global_hooks_run_the_mlps_own_forward(calls):
    ours, theirs = twins()
    x = torch.randn(3, 7)
    slopes = [torch.func.grad(lambda x, model=model: model(x).square().sum())(x) for model in (ours, theirs)]
    assert relative_error(*slopes) <= TOLERANCE[torch.float32]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert relative_error(ours(x), theirs(x)) <= TOLERANCE[torch.float32]
    finally:
        handle.remove()
    assert calls == []


def test_shapes_that_only_broadcast_are_multiplied_as_before(calls):
    ours, theirs = twins()
    for model in (ours, theirs):
        mlp = model.base_model.model
        mlp.up_proj = nn.Sequential(nn.Flatten(0, -2), nn.Linear(7, 11, bias=False).requires_grad_(False))
        mlp.up_proj[1].weight.fill_(0.5)
    x = torch.randn(1, 1, 7)
    assert relative_error(ours(x), theirs(x)) <= TOLERANCE[torch.float32]
    assert calls == []


# --- the class -----------------------------------------------------------------------------------------------------


def test_the_class_stands_before_the_original_and_is_one_for_all():
    model = adapted(LoraConfig, LLAMA)
    fuse(model)
    mlps = [module for module in model.modules() if isinstance(module, LlamaMLP)]
    assert {type(mlp) for mlp in mlps} == {fused_class(LlamaMLP)}
    assert type(mlps[0]).__name__ == "FusedLlamaMLP"
    assert type(mlps[0]).__mro__[1:3] == (FusedGatedMlp, LlamaMLP)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_fused_again(protocol, calls):
    ours, theirs = twins("gelu_pytorch_tanh")
    again = pickle.loads(pickle.dumps(ours, protocol))
    assert type(again.base_model.model) is type(ours.base_model.model)
    x = torch.randn(3, 7)
    assert relative_error(again(x), theirs(x)) <= TOLERANCE[torch.float32]
    assert calls == ["gated_lora"]


def test_a_deep_copy_shares_no_parameter():
    ours, theirs = twins()
    twin = copy.deepcopy(ours)
    assert type(twin.base_model.model) is type(ours.base_model.model)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in ours.parameters()}
    agree(twin, theirs)


def test_unloading_leaves_an_mlp_without_operators(calls):
    ours, theirs = twins()
    merged = ours.merge_and_unload()
    x = torch.randn(3, 7)
    assert relative_error(merged(x), theirs(x)) <= TOLERANCE[torch.float32]
    assert calls == []
    unfuse(merged)
    assert type(merged) is Mlp


# --- activations ---------------------------------------------------------------------------------------------------

KNOWN = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python": "",
    "gelu_new": "", "gelu_fast": "", "gelu_10": "", "gelu_python_tanh": "", "quick_gelu": "", "relu": "", "tanh": "",
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_an_activation_is_known_by_what_it_computes(name):
    activation = ACT2FN[name]
    known = activation_name(activation)
    assert known == KNOWN[name]
    x = torch.linspace(-4.0, 4.0, 101)
    formulas = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
    if known:
        assert torch.equal(activation(x), formulas[known](x))


def test_torchs_gelu_is_known_by_its_approximation_and_subclasses_are_not_known():
    assert activation_name(nn.GELU()) == "gelu"
    assert activation_name(nn.GELU(approximate="tanh")) == "gelu_tanh"

    class Louder(nn.SiLU):
        def forward(self, x):
            return 2.0 * super().forward(x)

    assert activation_name(Louder()) == ""
