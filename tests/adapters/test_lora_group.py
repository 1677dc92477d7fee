"""Projections of one input run as one operator, whatever the model does around them gives what PEFT gives."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from peft import LoraConfig
from torch import nn

from petune import FusedLoraConfig, fuse
from petune.adapters.lora import FusedLoraLinear
from petune.adapters.lora import layer as fused_layer
from tests.adapters.lora_models import (
    BERT,
    DEVICE,
    LLAMA,
    Attention,
    adapted,
    attention_twins,
    gradient,
    layers,
    output,
    with_two,
)
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES

SIZES = {
    "bert": [3] * 2,
    "gpt2": [],  # one packed projection
    "phi3": [],
    "llama": [3, 2] * 2,
    "t5": [2] * 6,  # keys and values read the same states, queries may not
    "t5_gated": [2] * 10,
    "bart": [2] * 6,
    "whisper": [2] * 6,
    "swin": [3] * 4,
}
SIZES |= dict.fromkeys(("roberta", "distilbert", "vit", "deit", "dinov2", "ast"), SIZES["bert"])
SIZES |= dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma", "gemma2"), SIZES["llama"])


@pytest.fixture
def calls(monkeypatch):
    """The sizes of the groups that were computed."""
    sizes = []
    operator = fused_layer.lora_group

    def spy(x, weights, *args):
        sizes.append(len(weights))
        return operator(x, weights, *args)

    monkeypatch.setattr(fused_layer, "lora_group", spy)
    return sizes


def twins(family=BERT, **fields):
    """The same adapted model twice: fused and grouped, and PEFT's own."""
    ours, theirs = (adapted(LoraConfig, family, **fields) for _ in range(2))
    fuse(ours)
    return ours, theirs


def groups(model):
    return list({id(layer.group): layer.group for layer in layers(model, FusedLoraLinear) if layer.group}.values())


def nothing_is_kept(model):
    return all(group._parent is None and group._pending is None for group in groups(model))


# --- the same numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_outputs_and_gradients_equal_pefts(family, dtype, calls):
    ours, theirs = twins(family, dtype=dtype)
    inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in family.inputs().items()}
    out, reference = ours(**inputs)[0], theirs(**inputs)[0]
    assert calls == SIZES[family.name]
    assert len(groups(ours)) == len(calls)
    direction = torch.randn_like(out)
    for y in (out, reference):
        (y * direction).sum().backward()
    assert relative_error(out, reference) <= TOLERANCE[dtype]
    assert relative_error(gradient(ours), gradient(theirs)) <= TOLERANCE[dtype]
    assert nothing_is_kept(ours)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", [BERT, LLAMA, FAMILIES["gemma"], FAMILIES["bart"]], ids=lambda family: family.name)
def test_bf16_is_no_further_from_float64_than_pefts(family, autocast, calls):
    exact = adapted(LoraConfig, family, dtype=torch.float64)
    reference = output(exact, family)
    direction = torch.randn_like(reference)
    (reference * direction).sum().backward()
    errors = []
    for model in twins(family, dtype=torch.float32 if autocast else torch.bfloat16):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            out = output(model, family)
        (out * direction).sum().backward()
        errors.append((relative_error(out, reference), relative_error(gradient(model), gradient(exact))))
    assert calls == SIZES[family.name]
    assert errors[0][0] <= 1.2 * errors[1][0] + TOLERANCE[torch.bfloat16]
    assert errors[0][1] <= 1.2 * errors[1][1] + TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("family", [LLAMA, FAMILIES["t5"], FAMILIES["bart"]], ids=lambda family: family.name)
def test_generation_with_a_cache_gives_pefts_tokens(family, calls):
    ours, theirs = twins(family, head="lm")
    batch = {"input_ids": family.inputs()["input_ids"], "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(**batch), theirs.generate(**batch))
    assert len(calls) > len(SIZES[family.name])
    assert not any(group.off for group in groups(ours))


def test_the_input_is_not_written_to():
    model, _ = attention_twins()
    x = torch.randn(4, 7, requires_grad=True)
    before = x.detach().clone()
    model(x).square().sum().backward()
    assert torch.equal(x, before)


def test_an_output_may_be_written_to():
    class Scaled(Attention):
        def forward(self, x):
            q = self.q(x).mul_(3.0)
            return q.sum() + self.k(x).sum() + self.v(x).add_(1.0).sum()

    ours, theirs = attention_twins(Scaled())
    x = torch.randn(4, 7)
    for model in (ours, theirs):
        model(x).backward()
    assert relative_error(gradient(ours), gradient(theirs)) <= TOLERANCE[torch.float32]


def test_a_group_shares_one_dropout_mask(calls):
    model, _ = attention_twins(lora_dropout=0.5)
    q, v = model.base_model.model.q, model.base_model.model.v
    v.load_state_dict(q.state_dict())
    x = torch.ones(64, 7)
    y = model.train()(x)
    assert relative_error(y[:, :5], y[:, 8:]) <= TOLERANCE[torch.float32]
    assert relative_error(q(x), v(x)) > 0.01  # alone each draws its own
    assert relative_error(model(x), y) > 0.01  # every call draws a new one
    assert calls == [3, 3]


# --- checkpointing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", [BERT, LLAMA, FAMILIES["bart"]], ids=lambda family: family.name)
def test_checkpointing_replays_the_groups(family, use_reentrant, calls):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(FusedLoraConfig, family, lora_dropout=0.3).train()
        fuse(model)
        if checkpointing:
            model.base_model.model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(4)
        output(model, family, use_cache=False).square().mean().backward()
        gradients.append(gradient(model))
        assert nothing_is_kept(model)
    assert torch.equal(*gradients)
    assert sorted(calls) == sorted(3 * SIZES[family.name])
    assert not any(group.off for group in groups(model))


def test_two_forwards_before_one_backward_are_replayed_too():
    gradients = []
    for checkpointing in (False, True):
        model = adapted(FusedLoraConfig, BERT, lora_dropout=0.3).train()
        fuse(model)
        if checkpointing:
            model.base_model.model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(4)
        (output(model) * output(model)).mean().backward()
        gradients.append(gradient(model))
    assert torch.equal(*gradients)


# --- nothing is kept -----------------------------------------------------------------------------------------------


def test_an_exception_in_the_parent_leaves_nothing_behind_and_the_group_on(calls):
    model, reference = attention_twins()
    x = torch.randn(4, 7)
    gone = weakref.ref(x)
    with pytest.raises(OverflowError):
        model(x, fail=True)
    assert nothing_is_kept(model)
    del x
    gc.collect()
    assert gone() is None
    x = torch.randn(4, 7)
    assert relative_error(model(x), reference(x)) <= TOLERANCE[torch.float32]
    assert calls == [3, 3]


def test_outputs_that_nobody_asks_for_switch_the_group_off(calls):
    model, reference = attention_twins()
    x = torch.randn(4, 7)
    for _ in range(2):
        assert relative_error(model(x, skip=True), reference(x, skip=True)) <= TOLERANCE[torch.float32]
    assert calls == [3]
    assert nothing_is_kept(model)
    assert fuse(model).apart == {"base_model.model": "its forward ended before all projections were called"}


def test_an_input_that_changes_between_the_calls_switches_the_group_off(calls):
    model, reference = attention_twins()
    x = torch.randn(4, 7)
    with torch.no_grad():
        out, expected = model(x.clone(), change=True), reference(x.clone(), change=True)
    assert relative_error(out, expected) <= TOLERANCE[torch.float32]
    report = fuse(model)
    assert (report.groups, len(groups(model))) == (0, 1)
    assert str(report) == (
        "fused: 3/3 layers; 1 left apart (base_model.model): its projections were not called once each with one input"
    )
    model(x)
    assert calls == [3]


def test_another_input_than_the_source_shows_is_computed_alone(calls):
    class Deceiving(Attention):
        def forward(self, x):
            def change():
                nonlocal x
                x = x + 1.0

            q = self.q(x)
            change()
            return torch.cat([q, self.k(x), self.v(x)], dim=-1)

    ours, theirs = attention_twins(Deceiving())
    x = torch.randn(4, 7)
    for _ in range(2):
        assert relative_error(ours(x), theirs(x)) <= TOLERANCE[torch.float32]
    assert calls == [3]
    assert nothing_is_kept(ours)


@pytest.mark.parametrize("mode", ["grad", "autocast", "inference"])
def test_an_output_holds_only_under_the_modes_it_was_computed_in(mode, calls):
    class Switching(Attention):
        def forward(self, x):
            q = self.q(x)
            switch = {
                "grad": torch.no_grad,
                "autocast": lambda: torch.autocast(DEVICE, torch.bfloat16),
                "inference": torch.inference_mode,
            }[mode]()
            switch.__enter__()
            k = self.k(x)
            switch.__exit__(None, None, None)
            return q, k, self.v(x)

    ours, theirs = attention_twins(Switching())
    x = torch.randn(4, 7)
    for y, reference in zip(ours(x), theirs(x), strict=True):
        assert (y.dtype, y.requires_grad, y.is_inference()) == (
            reference.dtype,
            reference.requires_grad,
            reference.is_inference(),
        )
        assert relative_error(y, reference) <= TOLERANCE[y.dtype]
    assert calls == [3]


def test_inference_tensors_are_grouped(calls):
    model, reference = attention_twins()
    with torch.inference_mode():
        x = torch.randn(4, 7)
        assert relative_error(model(x), reference(x)) <= TOLERANCE[torch.float32]
    assert calls == [3]


def test_a_layer_called_outside_of_its_parent_computes_alone(calls):
    model, reference = attention_twins()
    x = torch.randn(4, 7)
    assert relative_error(model.base_model.model.q(x), reference.base_model.model.q(x)) <= TOLERANCE[torch.float32]
    assert calls == []
    assert nothing_is_kept(model)


def test_a_replica_that_shares_the_group_computes_alone(calls):
    model, _ = attention_twins()
    attention = model.base_model.model
    replica = copy.copy(attention.q)  # as DataParallel makes them: another module with the same attributes
    x = torch.randn(4, 7)
    attention.q.group._open(attention, (x,))
    assert relative_error(replica(x), attention.q(x)) <= TOLERANCE[torch.float32]
    assert calls == []


# --- per layer where a layer is not as the others -------------------------------------------------------------------


def _hook(model):
    model.k.register_forward_hook(lambda *_: None)


def _pre_hook(model):
    model.k.register_forward_pre_hook(lambda _, args: (args[0] * 2.0,))


def _backward_hook(model):
    model.k.register_full_backward_hook(lambda *_: None)


def _inner_hook(model):
    model.v.lora_A["default"].register_forward_hook(lambda *_: None)


def _dropout(model):
    model.v.lora_dropout["default"] = nn.Dropout(0.5)


def _dtype(model):
    model.v.lora_A["default"].double()
    model.v.lora_B["default"].double()


def _disabled(model):
    model.v.enable_adapters(False)


def _merged(model):
    model.v.merge()


def _deleted(model):
    model.v.delete_adapter("default")


def _replaced(model):
    model.v = model.v.base_layer


def _compiled(model):
    model.k.compile(backend="eager")


def _wrapped(model):
    model.k = nn.Sequential(model.k)


@pytest.mark.parametrize(
    "change",
    [
        _hook, _pre_hook, _backward_hook, _inner_hook, _dtype, _disabled, _merged, _deleted, _replaced, _compiled,
        _wrapped,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_one_layer_that_differs_lets_all_compute_alone(change, calls):
    ours, theirs = attention_twins()
    for model in (ours, theirs):
        change(model.base_model.model)
    x = torch.randn(4, 7, requires_grad=True)
    assert relative_error(ours(x), theirs(x)) <= TOLERANCE[torch.float32]
    assert calls == []
    assert nothing_is_kept(ours)


def test_another_dropout_lets_all_compute_alone(calls):
    model, _ = attention_twins()
    _dropout(model.base_model.model)
    model.train()(torch.randn(4, 7))
    assert calls == []
    model.eval()(torch.randn(4, 7))
    assert calls == [3]


def test_hooks_on_a_layer_run_once_a_call():
    model, _ = attention_twins()
    seen = []
    model.base_model.model.v.register_forward_hook(lambda *_: seen.append(1))
    model(torch.randn(4, 7))
    assert seen == [1]


def test_global_hooks_see_every_inner_module_as_in_peft(calls):
    ours, theirs = attention_twins()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        for model in (ours, theirs):
            seen.clear()
            model(torch.randn(4, 7))
            assert seen.count("Linear") == 9 + 3 * (model is theirs)  # PEFT's layer is called Linear too
    finally:
        handle.remove()
    assert calls == []


# --- PEFT's own operations -----------------------------------------------------------------------------------------


def test_adapters_come_go_and_mix_as_in_peft(calls):
    ours, theirs = (with_two(LoraConfig).eval() for _ in range(2))
    fuse(ours)

    def agree(**kwargs):
        assert relative_error(output(ours, **kwargs), output(theirs, **kwargs)) <= TOLERANCE[torch.float32]
        grouped, _ = len(calls), calls.clear()
        return grouped

    assert agree() == 2
    assert agree(adapter_names=["default", "other"]) == 0
    for step, grouped in (
        (lambda model: model.set_adapter("other"), 0),  # it is on the query alone
        (lambda model: model.base_model.set_adapter(["default", "other"]), 2),
        (lambda model: model.merge_adapter(), 0),
        (lambda model: model.unmerge_adapter(), 2),
        (lambda model: model.delete_adapter("other"), 2),
        (lambda model: model.base_model.disable_adapter_layers(), 0),
        (lambda model: model.base_model.enable_adapter_layers(), 2),
    ):
        for model in (ours, theirs):
            step(model)
        assert agree() == grouped
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_copies_and_pickles_are_grouped_and_independent(calls):
    model, _ = twins(BERT)
    expected = output(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert torch.equal(output(twin), expected)
        assert calls == [3, 3]
        assert not {id(group) for group in groups(twin)} & {id(group) for group in groups(model)}
        groups(twin)[0].off = "on purpose"
        assert not any(group.off for group in groups(model))


def test_a_copy_of_one_layer_does_not_bring_its_parent():
    model, _ = twins(BERT)
    layer = layers(model)[0]
    assert len(pickle.dumps(layer)) < 2 * sum(p.numel() * p.element_size() for p in layer.parameters()) + 10_000
    x = torch.randn(3, 32)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_the_grouped_model_compiles_into_one_graph_of_layers(calls):
    model, _ = twins(LLAMA)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = output(model, LLAMA, use_cache=False)
    calls.clear()
    assert relative_error(output(compiled, LLAMA, use_cache=False), expected) <= TOLERANCE[torch.float32]
    assert calls == []
    assert nothing_is_kept(model)
    output(model, LLAMA)
    assert calls == SIZES["llama"]


def test_a_compiled_function_in_an_eager_parent_computes_layers_alone(calls):
    model, _ = attention_twins()
    attention, x = model.base_model.model, torch.randn(4, 7)
    expected = attention.q(x)
    compiled = torch.compile(lambda x: attention.q(x), backend="aot_eager", fullgraph=True)
    attention.q.group._open(attention, (x,))
    assert relative_error(compiled(x), expected) <= TOLERANCE[torch.float32]
    assert calls == []
    assert attention.q.group._pending is None


def test_torch_func_differentiates_the_parent(calls):
    ours, theirs = attention_twins()
    x = torch.randn(4, 7)
    slopes = [torch.func.grad(lambda x, model=model: model(x).square().sum())(x) for model in (ours, theirs)]
    assert relative_error(*slopes) <= TOLERANCE[torch.float32]
    assert calls == []


def test_ddp_gets_pefts_gradients(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ours, theirs = attention_twins()
        x = torch.randn(4, 7)
        nn.parallel.DistributedDataParallel(ours)(x).square().sum().backward()
        theirs(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert relative_error(gradient(ours), gradient(theirs)) <= TOLERANCE[torch.float32]
