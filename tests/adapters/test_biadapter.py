"""The bottleneck adapter: the paper's formula in pre- and post-norm blocks, what it reads, and that no hook stays."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel, Swinv2Config, Swinv2Model

from petune import BiAdapterConfig, tuner
from petune.adapters.onebit import BiAdapterLayer
from petune.adapters.onebit.bottleneck import Reader
from petune.quantized.linear import PackedLinear, QuantizedLinear
from petune.quantized.packing import pack
from petune.topology import find_topology
from tests.adapters.harness import Batch, build, gradients, inputs, output, snapshot, train
from tests.adapters.test_contract_errors import Int8Backend, Int8Linear
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES

WEIGHTS = "adapter_model.safetensors"
BITS = [1, 2, 4, 8, 32]
PLACEMENTS: dict[str, dict[str, Any]] = {
    "residual": {},
    "ffn": {"adapter_input": "ffn"},
    "pfeiffer": {"placement": "pfeiffer"},
    "houlsby": {"placement": "houlsby"},
}
EXACT = TOLERANCE[torch.float32]


def config(**fields: Any) -> BiAdapterConfig:
    """One whose update shows."""
    return BiAdapterConfig(**{"r": 5, "dropout": 0.0, "init_weights": False, **fields})


def adapted(family: str = "vit", **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(build(family), config(**fields)).eval()


def layers(model: nn.Module) -> list[BiAdapterLayer]:
    return [module for module in model.modules() if isinstance(module, BiAdapterLayer)]


def readers(model: nn.Module) -> list[str]:
    """Names of the modules that an adapter watches, one for each hook."""
    return [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, Reader)
    ]


def update(layer: BiAdapterLayer, x: Tensor, name: str = "default") -> Tensor:
    """scale · relu(x D̂ᵀ) Ûᵀ, written out."""
    down, up = layer.petune_biadapter_down[name].quantized(), layer.petune_biadapter_up[name].quantized()
    return layer.scale[name] * (torch.relu(x @ down.T) @ up.T)


def held(model: nn.Module) -> int:
    """Tensors that wait for their layer."""
    return sum(len(layer._seen) for layer in layers(model))


# -------------------------------------------------------------------------------------------------------- the formula


def vit_block(block: Any, x: Tensor, placement: str) -> Tensor:
    attention, mlp = block.attention, block.mlp
    if placement == "houlsby":
        found: list[Tensor] = []
        handle = attention.o_proj.base_layer.register_forward_hook(lambda _, __, h: found.append(h))
        attention(block.layernorm_before(x))
        handle.remove()
        x = x + found[0] + update(attention.o_proj, found[0])
    else:
        x = x + attention(block.layernorm_before(x))[0]
    normed = block.layernorm_after(x)
    h = mlp.fc2.base_layer(F.gelu(mlp.fc1(normed)))
    return x + h + update(mlp.fc2, {"residual": x, "ffn": normed}.get(placement, h))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_pre_norm_block_is_the_one_written_by_hand(placement: str, bits: int):
    model = adapted("vit", bits=bits, scale=3.0, **PLACEMENTS[placement])
    block = model.get_base_model().vit.layers[1]
    x = torch.randn(2, 7, 32, requires_grad=True)
    expected = vit_block(block, x, placement)
    assert relative_error(block(x), expected) <= EXACT
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (block(x), expected)]
    assert relative_error(*grads) <= EXACT
    with model.disable_adapter():
        assert relative_error(block(x), expected) > 1e-3


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_post_norm_block_is_the_one_written_by_hand(placement: str):
    model = adapted("bert", scale=0.5, **PLACEMENTS[placement])
    block = model.get_base_model().bert.encoder.layer[1]
    x, dense = torch.randn(2, 7, 32), block.output.dense
    if placement == "houlsby":
        out = block.attention.output
        h = out.dense.base_layer(block.attention.self(x)[0])
        a = out.LayerNorm(x + h + update(out.dense, h))
    else:
        a = block.attention(x)[0]
    h = dense.base_layer(F.gelu(block.intermediate.dense(a)))
    read = h if placement in ("pfeiffer", "houlsby") else a  # nothing is normed on the way to the feed-forward
    expected = block.output.LayerNorm(a + h + update(dense, read))
    assert relative_error(block(x), expected) <= EXACT


def test_what_the_block_does_to_its_feed_forward_it_does_to_the_update():
    model = adapted("gemma2")
    block = model.get_base_model().model.layers[0]
    seen: dict[str, Tensor] = {}
    block.pre_feedforward_layernorm.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    block.mlp.down_proj.base_layer.register_forward_hook(lambda _, __, out: seen.update(h=out))
    block.register_forward_hook(lambda _, __, out: seen.update(y=out[0] if isinstance(out, tuple) else out))
    output(model, inputs("gemma2"))
    branch = block.post_feedforward_layernorm(seen["h"] + update(block.mlp.down_proj, seen["x"]))
    assert relative_error(seen["y"], seen["x"] + branch) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family_the_layer_reads_the_residual_stream_of_its_block(family: str):
    model = get_peft_model(FAMILIES[family].build(), config()).eval()
    base = model.get_base_model()
    topology = find_topology(base)
    assert sorted(readers(base)) == sorted(topology.ffn_residual)
    read, wrote = {}, {}
    for block in topology.layout:
        layer = base.get_submodule(block.ffn_out[0])
        base.get_submodule(block.ffn_residual).register_forward_pre_hook(
            lambda _, args, layer=layer: read.update({layer: args[0]})
        )
        layer.base_layer.register_forward_hook(lambda _, __, h, layer=layer: read.update({(layer, "h"): h}))
        layer.register_forward_hook(lambda layer, _, y: wrote.update({layer: y}))
    output(model, FAMILIES[family].inputs())
    assert len(wrote) == len(topology.layout)
    for layer, y in wrote.items():
        assert relative_error(y, read[layer, "h"] + update(layer, read[layer])) <= EXACT


def test_dropout_is_on_the_bottleneck_behind_the_relu():
    layer = layers(adapted("vit", placement="pfeiffer", dropout=0.5, r=8, bits=8).train())[0]
    h = torch.randn(64, 32)
    down, up = layer.petune_biadapter_down["default"].quantized(), layer.petune_biadapter_up["default"].quantized()
    inner = torch.relu(h @ down.T)
    kept = layer.delta("default", h) @ torch.linalg.pinv(up).T  # Û has full column rank
    ratio = kept[inner > 1e-2] / inner[inner > 1e-2]
    assert torch.minimum(ratio.abs(), (ratio - 2).abs()).max() <= 1e-3  # of a pseudo-inverse of eight columns
    assert 0.3 < (ratio > 1).float().mean() < 0.7
    assert torch.equal(layer.eval().delta("default", h), update(layer, h))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_fresh_adapter_is_an_exact_no_op_and_learns_from_there(placement: str, bits: int):
    batch = inputs("vit")
    model = get_peft_model(build("vit"), BiAdapterConfig(bits=bits, **PLACEMENTS[placement])).eval()
    assert torch.equal(output(model, batch), output(build("vit"), batch))
    losses = train(model, batch, steps=8, lr=1e-2)
    assert losses[-1] < losses[0] - 1e-2


def test_both_projections_take_gradients_and_the_base_none():
    batch = inputs("bert")
    model = adapted("bert")
    grads = gradients(model, lambda: model(**batch).loss)
    assert len(grads) == 4  # two blocks, down and up
    assert all(grad.any() for grad in grads.values())
    fresh = get_peft_model(build("bert"), BiAdapterConfig()).eval()
    started = [grad.any().item() for _, grad in sorted(gradients(fresh, lambda: fresh(**batch).loss).items())]
    assert started == [False, True] * 2  # down waits for up


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_reloaded_adapter_is_exact_and_saved_with_the_same_bytes(placement: str, bits: int, tmp_path: Path):
    batch = inputs("bert")
    model = get_peft_model(build("bert"), BiAdapterConfig(r=3, bits=bits, **PLACEMENTS[placement]))
    train(model, batch)
    model.save_pretrained(tmp_path / "first")
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "first").eval()
    assert torch.equal(output(loaded, batch), output(model, batch))
    loaded.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("first", "second"))
    assert first == second


def test_a_quantised_head_is_trained_and_saved_with_the_adapter(tmp_path: Path):
    batch = inputs("vit")
    model = get_peft_model(build("vit"), BiAdapterConfig(r=3, bi_head="classifier"))
    train(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("vit"), tmp_path).eval()
    assert torch.equal(output(loaded, batch), output(model, batch))
    assert loaded.get_base_model().classifier.modules_to_save["default"].quantized().unique().numel() == 2


def test_one_bit_at_the_sizes_of_vit_b_is_the_papers_payload(tmp_path: Path):
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 8, "vocab_size": 4}
    base = LlamaModel(LlamaConfig(**sizes, num_attention_heads=1, head_dim=8))
    model = get_peft_model(base, BiAdapterConfig(r=32, init_weights=False))
    model.save_pretrained(tmp_path)
    assert 73_920 < (tmp_path / WEIGHTS).stat().st_size < 73_920 + 300  # 24 of 32 · 768 bits and two floats


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_the_layer_computes_the_same_from_bits_alone(bits: int, granularity: Any):
    batch = inputs("vit", dtype=torch.bfloat16)
    torch.manual_seed(1)
    fields = {"bits": bits, "granularity": granularity}
    model = get_peft_model(build("vit", dtype=torch.bfloat16), config(**fields)).eval()
    expected = output(model, batch)
    for layer in layers(model):
        for projections in (layer.petune_biadapter_down, layer.petune_biadapter_up):
            projections["default"] = packed(projections["default"])
    assert not any("petune_biadapter" in name for name, _ in model.named_parameters())
    assert torch.equal(output(model, batch), expected)
    assert layers(model)[0]._adapter_input("default", torch.randn(2, 32).bfloat16()).dtype == torch.float32


def packed(linear: nn.Module) -> PackedLinear:
    assert isinstance(linear, QuantizedLinear)
    q, stats = linear.quantization, linear.statistics()
    found = PackedLinear(linear.in_features, linear.out_features, q)
    found.bits, found.stats = pack(q.codes(linear.weight, stats).flatten(), q.bits), stats.detach()
    return found


# ------------------------------------------------------------------------------------------------------- what is read


def test_two_adapters_that_read_the_same_share_one_hook_and_the_last_takes_it_away():
    model = adapted("vit")
    expected = output(model, inputs("vit"))
    norms, firsts = ([f"vit.layers.{i}.{name}" for i in range(2)] for name in ("layernorm_after", "mlp.fc1"))
    model.add_adapter("second", config())
    assert readers(model) == norms
    model.add_adapter("third", config(adapter_input="ffn"))
    model.add_adapter("fourth", config(placement="pfeiffer"))
    assert sorted(readers(model)) == sorted(norms + firsts)
    model.delete_adapter("default")
    assert sorted(readers(model)) == sorted(norms + firsts)
    model.delete_adapter("second")
    assert readers(model) == firsts
    model.delete_adapter("third")
    assert readers(model) == []
    torch.manual_seed(1)
    model.add_adapter("again", config())
    model.set_adapter("again")
    assert readers(model) == norms
    assert torch.equal(output(model, inputs("vit")), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_unload_gives_the_stock_model_without_any_hook(placement: str):
    before = snapshot(build("vit"))
    native = build("vit")
    native.add_adapter(config(), adapter_name="mine")
    native.delete_adapter("mine")
    assert readers(native) == []
    base = adapted("vit", **PLACEMENTS[placement]).unload()
    assert snapshot(base).keys() == before.keys()
    assert [type(module) for module in base.modules()] == [type(module) for module in build("vit").modules()]
    assert not any(module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in base.modules())


def test_a_norm_that_is_trained_as_well_is_still_read():
    batch = inputs("vit")
    model = adapted("vit", modules_to_save=["layernorm_after", "classifier"])
    expected = output(adapted("vit"), batch)
    assert torch.equal(output(model, batch), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, batch), expected)
    model.add_adapter("second", config(placement="pfeiffer", modules_to_save=["layernorm_after", "classifier"]))
    model.set_adapter("second")
    model.delete_adapter("default")
    assert relative_error(output(model, batch), expected) > 1e-3
    assert (len(readers(model)), held(model)) == (2, 0)  # the second's norms are copies, and hand over to nobody
    base = model.unload()
    assert readers(base) == []
    assert torch.equal(output(base, batch), output(build("vit"), batch))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_reads_its_own_stream(copied: Any):
    model = adapted("vit").train()
    model.get_base_model().vit.layers[0].layernorm_after(2 * torch.ones(1, 3, 32, requires_grad=True))
    twin = copied(model)  # a tensor with a graph behind it, held when a forward breaks off, could not be copied
    assert (held(model), held(twin)) == (1, 0)
    hooks = [hook for m in twin.modules() for hook in m._forward_pre_hooks.values() if isinstance(hook, Reader)]
    assert [hook.layer for hook in hooks] == layers(twin)
    twin.delete_adapter("default")
    assert (readers(twin), len(readers(model))) == ([], 2)
    block = copy.deepcopy(model.eval().get_base_model().vit.layers[0])
    x = torch.randn(1, 3, 32)
    assert torch.equal(block(x), model.get_base_model().vit.layers[0](x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_nothing_is_held_after_a_forward_or_a_backward(reentrant: bool):
    batch = inputs("bert")
    model = adapted("bert").train()
    output(model, batch)
    assert held(model) == 0
    with model.disable_adapter():
        output(model, batch)
        model.get_base_model().bert.encoder.layer[0].intermediate(torch.randn(1, 2, 32))
        assert held(model) == 0
    model.base_model.set_adapter([])
    output(model, batch)
    assert held(model) == 0
    model.set_adapter("default")
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    assert held(model) == 0


def test_a_stream_is_held_for_each_device_and_replicas_find_theirs():
    model = adapted("vit")
    block = model.get_base_model().vit.layers[0]
    layer, x = block.mlp.fc2, torch.randn(1, 3, 32)
    inner = torch.randn(1, 3, 48)
    replica = layer._replicate_for_data_parallel()
    replica._parameters = dict(layer._parameters)
    block.layernorm_after(x)
    block.layernorm_after.to("meta")(x.to("meta"))
    assert held(model) == 2
    assert torch.equal(replica(inner), layer.base_layer(inner) + update(layer, x))
    assert list(layer._seen) == [("residual", torch.device("meta"))]


def test_each_row_takes_the_stream_of_its_row_whatever_its_adapter_reads():
    batch = inputs("vit", batch_size=4)
    model = adapted("vit")
    alone = {"__base__": output(build("vit"), batch), "default": output(model, batch)}
    for name, fields in (("ffn", PLACEMENTS["ffn"]), ("houlsby", PLACEMENTS["houlsby"])):
        model.add_adapter(name, config(**fields))
        model.set_adapter(name)
        alone[name] = output(model, batch)
    rows = ["houlsby", "default", "__base__", "ffn"]
    mixed = output(model, {**batch, "adapter_names": rows})
    assert relative_error(mixed, torch.stack([alone[name][i] for i, name in enumerate(rows)])) <= EXACT


def test_active_adapters_of_two_placements_add_up():
    model = adapted()
    model.add_adapter("behind", config(placement="pfeiffer", scale=2.0))
    model.base_model.set_adapter(["default", "behind"])
    block = model.get_base_model().vit.layers[0]
    layer, x, inner = block.mlp.fc2, torch.randn(2, 3, 32), torch.randn(2, 3, 48)
    block.layernorm_after(x)
    h = layer.base_layer(inner)
    assert relative_error(layer(inner), h + update(layer, x) + update(layer, h, "behind")) <= EXACT


def test_a_reader_that_another_method_has_wrapped_is_read_inside():
    model = build("bert")
    first = get_peft_model(model, LoraConfig(r=2, target_modules=["intermediate.dense"]))
    torch.manual_seed(1)
    second = get_peft_model(first.get_base_model(), config())
    assert readers(second) == [f"bert.encoder.layer.{i}.intermediate.dense.base_layer" for i in range(2)]
    assert torch.equal(output(second.eval(), inputs("bert")), output(adapted("bert"), inputs("bert")))


@pytest.mark.slow
def test_the_model_compiles_into_one_graph():
    model = adapted("vit")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(output(compiled, inputs("vit")), output(model, inputs("vit"))) <= EXACT
    assert held(model) == 0


def test_a_quantised_base_is_adapted_as_it_stands(monkeypatch: pytest.MonkeyPatch):
    backend = Int8Backend()
    monkeypatch.setattr(
        tuner, "resolve_quantization_backend", lambda m, **_: backend if isinstance(m, Int8Linear) else None
    )
    base = build("vit")
    for block in base.vit.layers:
        block.mlp.fc2 = Int8Linear(block.mlp.fc2)
    expected, model = output(base, inputs("vit")), get_peft_model(base, BiAdapterConfig()).eval()
    assert [type(layer.base_layer) for layer in layers(model)] == [Int8Linear] * 2
    assert torch.equal(output(model, inputs("vit")), expected)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placement": "parallel"}, r"placement='parallel' must be one of 'adaptformer', 'pfeiffer', 'houlsby'"),
        ({"adapter_input": "residuals"}, r"adapter_input='residuals' must be one of .*; the closest is 'residual'"),
        (
            {"placement": "houlsby", "adapter_input": "ffn"},
            r"adapter_input='ffn' is read by placement='adaptformer' only",
        ),
        ({"r": 0}, r"r=0 must be a positive integer"),
        ({"bits": 3}, r"bits=3 must be one of 1, 2, 4, 8, 32"),
        ({"dropout": 1.0}, r"dropout=1\.0 must be a number in \[0\.0, 1\.0\)"),
    ],
)
def test_a_field_out_of_range_is_named(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"BiAdapterConfig.{message}"):
        BiAdapterConfig(**fields)


def refuses(model: nn.Module, message: str, **fields: Any) -> None:
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, BiAdapterConfig(**fields))
    assert [type(module) for module in model.modules()] == modules
    assert readers(model) == []


def test_a_target_with_no_feed_forward_beside_it_is_named_with_one_that_has():
    message = (
        r"placement='adaptformer' .* target 'bert.*query' is the last linear of none; name such as '.*output.dense'"
    )
    refuses(build("bert"), message, target_modules=["query", "output.dense"])
    model = get_peft_model(build("bert"), config(placement="pfeiffer", target_modules=["query"]))
    assert len(layers(model)) == 2


class Macaron(nn.Module):
    """Two blocks of attention between two feed-forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.layers:
            block.attn, block.norm = nn.MultiheadAttention(32, 4), nn.LayerNorm(32)
            for name in ("before", "after"):
                block.add_module(name, nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)))


def test_a_block_of_two_feed_forwards_has_no_one_residual():
    message = r"adapter_input='residual' cannot be told for target 'layers.0.before.2', .*; use 'ffn', or placement="
    refuses(Macaron(), message)
    model = get_peft_model(Macaron(), config(adapter_input="ffn"))
    assert readers(model) == [f"layers.{i}.{name}.0" for i in range(2) for name in ("before", "after")]


def test_a_model_without_blocks_is_refused_beside_and_adapted_behind():
    toy = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    message = (
        r"placement='adaptformer' runs beside feed-forwards, but find_topology .* there is none; .* use 'pfeiffer'"
    )
    refuses(toy, message, target_modules=["0"])
    x = torch.randn(2, 6)
    expected = toy(x)
    assert relative_error(get_peft_model(toy, config(placement="pfeiffer", target_modules=["0"]))(x), expected) > 1e-3


def test_merging_is_refused_with_a_sentence():
    model = adapted("vit")
    before = output(model, inputs("vit"))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=r"contains a ReLU and cannot be merged; use unload\(\)"):
            merge()
    assert torch.equal(output(model, inputs("vit")), before)


def test_a_stream_that_was_not_seen_or_does_not_fit_is_an_error():
    model = adapted("vit")
    block = model.get_base_model().vit.layers[0]
    layer, inner = block.mlp.fc2, torch.randn(2, 3, 48)
    with pytest.raises(RuntimeError, match=r"the input of 'vit.layers.0.layernorm_after' .* has seen nothing"):
        layer(inner)
    block.layernorm_after(torch.randn(2, 4, 32))
    with pytest.raises(RuntimeError, match=r"output of shape \[2, 3, 32\], but has seen \[2, 4, 32\]"):
        layer(inner)


def test_a_block_that_is_not_built_as_it_looks_says_so_in_the_first_forward():
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4}
    batch: Batch = {"pixel_values": torch.randn(1, 3, 32, 32)}
    model = get_peft_model(Swinv2Model(Swinv2Config(**sizes)), config())  # its layernorm_after is a post-norm
    with pytest.raises(RuntimeError, match="use another adapter_input"):
        model(**batch)
    model = get_peft_model(model.unload(), config(adapter_input="ffn"))
    assert torch.isfinite(model(**batch).last_hidden_state).all()
