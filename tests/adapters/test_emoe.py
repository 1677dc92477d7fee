"""Emergent experts: the paper's equations in every form of feed-forward, where they are put, and what trains them."""

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from petune.adapters.emoe import EmoeLayer
from petune.adapters.emoe.feed_forward import find_feed_forwards
from tests.adapters.emoe_models import adapted, calls, config, head_of, kept, routed_layers, sum_of_experts
from tests.adapters.harness import base_tensors, build, inputs, output, snapshot, train
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES

EXACT = TOLERANCE[torch.float32]


def rows_of(linear: nn.Module) -> Tensor:
    """[out_features, in_features], an adapter's update included."""
    base = linear.get_base_layer() if isinstance(linear, EmoeLayer) else linear
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    if isinstance(linear, EmoeLayer) and linear.live_adapters():
        weight = weight + linear.get_delta_weight("default")
    return weight.detach()


def bias_of(linear: nn.Module) -> Tensor | None:
    bias = (linear.get_base_layer() if isinstance(linear, EmoeLayer) else linear).bias
    return None if bias is None else bias.detach()


# ------------------------------------------------------------------------------------------------------ the equations

PLAIN = {
    "bert": ("bert.encoder.layer.1.intermediate.dense", "bert.encoder.layer.1.output.dense"),
    "gpt2": ("transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"),
    "swin": ("swin.encoder.layers.1.blocks.1.mlp.fc1", "swin.encoder.layers.1.blocks.1.mlp.fc2"),
    "t5": tuple(f"transformer.encoder.block.1.layer.1.DenseReluDense.{name}" for name in ("wi", "wo")),
}
ACTIVATION = {"bert": F.gelu, "gpt2": lambda x: F.gelu(x, approximate="tanh"), "swin": F.gelu, "t5": F.relu}


@pytest.mark.parametrize("lora", ["on attention", "on the feed-forward too"])
@pytest.mark.parametrize("family", PLAIN)
def test_a_routed_feed_forward_is_the_sum_of_its_chosen_experts(family: str, lora: str):
    targets = None if lora == "on attention" else "all-linear"
    model = adapted(family, target_modules=targets).get_base_model()
    first, last = (model.get_submodule(name) for name in PLAIN[family])
    torch.nn.init.normal_(first.get_base_layer().weight, std=0.3)
    for linear in (first, last):
        if (bias := bias_of(linear)) is not None:
            torch.nn.init.normal_(bias, std=0.5)
    x = torch.randn(13, first.in_features)
    labels = first.router("default").labels
    with torch.no_grad():
        y = last(ACTIVATION[family](first(x)))
    expected = sum_of_experts(
        x, rows_of(first), bias_of(first), None, rows_of(last).T, bias_of(last), labels, 2, ACTIVATION[family]
    )
    assert relative_error(y, expected) <= 1e-6
    dense = last(ACTIVATION[family](first.get_base_layer()(x)))
    assert relative_error(y, dense) > 1e-2


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ("gate_proj", "up_proj", "down_proj")),
        ("t5_gated", ("wi_0", "wi_1", "wo")),
        ("phi3", ("gate_up_proj", None, "down_proj")),
    ],
)
def test_a_gated_feed_forward_is_the_sum_of_its_chosen_experts(family: str, names: tuple[str, str | None, str]):
    model = adapted(family, target_modules="all-linear").get_base_model()
    mlp = next(module for _, module in model.named_modules() if hasattr(module, names[0]))
    first, last = getattr(mlp, names[0]), getattr(mlp, names[2])
    x = torch.randn(13, first.in_features)
    keys = rows_of(first)
    keys, ups = (keys, rows_of(getattr(mlp, names[1]))) if names[1] else keys.chunk(2)
    activation = next(child for name, child in mlp.named_children() if "act" in name)
    labels = first.router("default").labels
    expected = sum_of_experts(x, keys, None, ups, rows_of(last).T, None, labels, 2, activation)
    with torch.no_grad():
        assert relative_error(mlp(x), expected) <= 1e-6


def test_llamas_form_with_contiguous_experts_is_met_bit_by_bit():
    mlp = adapted("llama", cluster="contiguous").get_base_model().model.layers[0].mlp
    x = torch.randn(3, 7, 32)
    with torch.no_grad():
        gate, up = mlp.gate_proj.base_layer(x), mlp.up_proj(x)
        scores = gate.view(3, 7, 4, 12).mean(-1)
        mask = torch.zeros(3, 7, 4).scatter_(-1, scores.topk(2).indices, 1.0)
        inner = (mlp.act_fn(gate) * up).view(3, 7, 4, 12) * mask.unsqueeze(-1)
        assert torch.equal(mlp(x), mlp.down_proj(inner.flatten(-2)))


@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family_the_activation_reads_zero_for_experts_that_are_not_chosen(family: str):
    model = adapted(family, target_modules="all-linear")
    layers = routed_layers(model)
    assert len(layers) == len(find_feed_forwards(model.get_base_model()))
    for layer in layers.values():
        with calls(layer) as seen:
            output(model, inputs(family, head_of(family)))
        x, z = (one.flatten(0, -2) for one in seen[0])
        labels = layer.router("default").labels
        keys = rows_of(layer)
        dense = F.linear(x, keys, bias_of(layer))
        scores = x @ torch.stack([keys[: len(labels)][labels == e].mean(0) for e in range(4)]).T
        mask = kept(scores, labels, 2).repeat(1, len(keys) // len(labels))
        assert not z[~mask].any()
        assert relative_error(z, dense * mask) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_experts_every_family_is_its_base_bit_by_bit(family: str):
    batch = inputs(family, head_of(family))
    model = adapted(family, top_k=4, init_weights=True)
    assert torch.equal(output(model, batch), output(build(family, head_of(family)), batch))


def test_top_k_of_a_router_may_change_between_calls():
    batch = inputs("bert")
    model = adapted("bert", init_weights=True)
    routed = output(model, batch)
    for layer in routed_layers(model).values():
        layer.router("default").top_k = 4
    assert torch.equal(output(model, batch), output(build("bert"), batch))
    for layer in routed_layers(model).values():
        layer.router("default").top_k = 2
    assert torch.equal(output(model, batch), routed)


# ---------------------------------------------------------------------------------------------------- where it is put


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ("last_even:1", [2]),
        ("last_even:2", [0, 2]),
        ("last_even:9", [0, 2]),
        ("all", [0, 1, 2, 3]),
        ([3, 1], [1, 3]),
        (2, [2]),
    ],
)
def test_layers_are_chosen_by_number_or_from_the_end(layers: object, blocks: list[int]):
    base = FAMILIES["bert"].build()
    stack = base.encoder.layer
    stack.extend([FAMILIES["bert"].build(seed=1).encoder.layer[at] for at in range(2)])
    model = get_peft_model(base, config(layers=layers))
    assert list(routed_layers(model)) == [f"encoder.layer.{block}.intermediate.dense" for block in blocks]
    queries = [name for name, module in model.named_modules() if isinstance(module, EmoeLayer) and "query" in name]
    assert len(queries) == 4  # LoRA is not bound to the routed blocks
    assert model.peft_config["default"].routed_modules == list(routed_layers(model))


def test_both_feed_forwards_of_an_encoder_and_a_decoder_are_counted():
    model = get_peft_model(build("bart"), config(layers=[1, 2]))
    assert list(routed_layers(model)) == ["model.encoder.layers.1.fc1", "model.decoder.layers.0.fc1"]


def test_experts_are_balanced_in_every_family():
    for family in FAMILIES:
        for layer in routed_layers(adapted(family)).values():
            labels = layer.router("default").labels
            assert labels.dtype == torch.int32
            assert torch.bincount(labels.long()).tolist() == [len(labels) // 4] * 4


def test_clusters_come_from_the_keys_by_the_seed_or_not_at_all():
    def labels(**fields: object) -> Tensor:
        return next(iter(routed_layers(adapted("gpt2", **fields)).values())).router("default").labels

    by_key = labels()
    assert torch.equal(by_key, labels())
    assert not torch.equal(by_key, labels(cluster="random"))
    assert torch.equal(labels(cluster="random", seed=3), labels(cluster="random", seed=3))
    assert not torch.equal(labels(cluster="random", seed=3), labels(cluster="random", seed=4))
    assert torch.equal(labels(cluster="contiguous"), torch.arange(128) // 32)


def test_keys_that_come_in_groups_become_the_experts():
    base = FAMILIES["gpt2"].build()
    centres, groups = torch.randn(4, 32), torch.randperm(128) % 4
    with torch.no_grad():
        base.h[0].mlp.c_fc.weight.copy_((centres[groups] + 0.05 * torch.randn(128, 32)).T)
    model = get_peft_model(base, config(layers=[0]))
    labels = model.get_base_model().h[0].mlp.c_fc.router("default").labels
    pairs = torch.stack([groups, labels.long()]).unique(dim=1)
    assert pairs.shape[1] == 4  # one expert for each group


# ------------------------------------------------------------------------------------------------ what trains with it


def trained(model: nn.Module) -> set[str]:
    return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}


def test_what_trains_is_lora_the_feed_forward_or_the_router_as_the_config_says():
    assert trained(adapted("llama")) == {"petune_emoe_a", "petune_emoe_b"}
    assert trained(adapted("llama", r=0, train_ffn=True)) == {"petune_emoe_dense"}
    names = [n for n, p in adapted("llama", router="learned", r=0).named_parameters() if p.requires_grad]
    assert names == [
        f"base_model.model.model.layers.{i}.mlp.gate_proj.petune_emoe_router.default.weight" for i in range(2)
    ]
    heads = adapted("bert", r=0, task_type="SEQ_CLS")
    assert {n.split(".")[-4] for n, p in heads.named_parameters() if p.requires_grad} == {"classifier"}


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
def test_a_trained_feed_forward_moves_its_own_keys_and_is_merged_exactly(family: str):
    batch = inputs(family)
    model = get_peft_model(build(family), config(r=0, train_ffn=True, top_k=4)).eval()
    count = len(find_feed_forwards(build(family))[0].linears)
    assert sum(isinstance(module, EmoeLayer) for module in model.modules()) == 2 * count
    losses = train(model, batch, steps=6)
    assert losses[-1] < losses[0]
    expected = output(model, batch)
    assert relative_error(output(model.merge_and_unload(), batch), expected) <= EXACT
    routed = adapted(family, r=0, train_ffn=True)
    layer = next(iter(routed_layers(routed).values()))
    x = torch.randn(5, layer.in_features)
    labels = layer.router("default").labels
    scores = x @ torch.stack([rows_of(layer)[: len(labels)][labels == e].mean(0) for e in range(4)]).T
    mask = kept(scores, labels, 2).repeat(1, layer.out_features // len(labels))
    assert torch.equal(layer(x) != 0, mask)


@pytest.mark.parametrize("family", ["bert", "gpt2", "phi3"])
def test_experts_that_are_not_chosen_take_no_gradient(family: str):
    layer = next(iter(routed_layers(adapted(family, r=0, train_ffn=True, top_k=1)).values()))
    z = layer(torch.randn(2, layer.in_features))
    z.square().sum().backward()
    unused = ~(z != 0).any(0)
    grad = layer.petune_emoe_dense["default"].grad
    assert unused.sum() >= len(unused) / 2  # two tokens, four experts
    assert not grad[unused].any()
    assert grad[~unused].any(1).all()


def test_lora_on_the_attention_alone_learns_through_the_routed_feed_forward():
    batch = inputs("gpt2")
    base = build("gpt2")
    before = snapshot(base)
    model = get_peft_model(base, config())
    losses = train(model, batch, steps=10, lr=2e-2)
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(before[name], tensor) for name, tensor in base_tensors(model).items())


def test_another_active_adapters_lora_counts_in_the_keys_too():
    model = adapted("llama", layers=[0])
    model.add_adapter("second", config(layers=[1], target_modules=["gate_proj"], init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    layer = model.get_base_model().model.layers[0].mlp.gate_proj
    x = torch.randn(9, 32)
    keys = layer.get_base_weight() + layer.get_delta_weight("second")
    labels = layer.router("default").labels
    scores = x @ torch.stack([keys[labels == e].mean(0) for e in range(4)]).T
    assert torch.equal(layer(x) != 0, kept(scores, labels, 2))
