"""block="mirror": side blocks of the model's own layer class, with all widths divided."""

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from petune.adapters.side import LadderBlock, LadderSideConfig
from petune.adapters.side.mirror import MirrorBlock, SlimLinear, head_size, slim_block
from tests.adapters.harness import base_tensors, build, inputs, output, train
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES, Head

SLIMMED = tuple(family for family in FAMILIES if family != "swin")
ROTARY = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3")
DECODERS = ("gpt2", *ROTARY)
SEQ2SEQ = ("t5", "t5_gated", "bart", "whisper")


def config(**fields: Any) -> LadderSideConfig:
    return LadderSideConfig(**{"block": "mirror", "reduction_factor": 2, "side_layers": [0, 1], **fields})


def mirrored(family: str, head: Head = "cls", dtype: torch.dtype = torch.float32, **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(build(family, head, dtype), config(**fields)).eval()


def mirrors(model: nn.Module) -> list[MirrorBlock]:
    return [module for module in model.modules() if isinstance(module, MirrorBlock)]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", SLIMMED)
def test_it_starts_as_the_base_and_trains_the_side_network_alone(family: str) -> None:
    model, batch = mirrored(family), inputs(family)
    with model.disable_adapter():
        base = output(model, batch)
    assert torch.equal(output(model, batch), base)
    before = base_tensors(model)
    losses = train(model, batch, steps=5, lr=1e-2)
    assert losses[-1] < losses[0]
    model.train()(**batch).loss.backward()
    assert [
        name for name, parameter in trained(model).items() if parameter.grad is None or not parameter.grad.any()
    ] == []
    assert [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []
    assert all(torch.equal(before[name], tensor) for name, tensor in base_tensors(model).items())


@pytest.mark.parametrize("family", SLIMMED)
def test_every_size_but_the_number_of_heads_is_divided(family: str) -> None:
    model = mirrored(family, "none")
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LadderBlock)]
    assert layers
    for layer in layers:
        slim = dict(layer.petune_ladder_rung["default"].block.block.named_parameters())
        wide = {name: p for name, p in layer.get_base_layer().named_parameters() if "relative_attention" not in name}
        assert slim.keys() == wide.keys()
        for name, parameter in slim.items():
            assert tuple(parameter.shape) == tuple(size // 2 for size in wide[name].shape), name


@pytest.mark.parametrize(("family", "linear", "std"), [("bert", "query", 0.02), ("t5", "SelfAttention.k", 16**-0.5)])
def test_weights_start_as_its_family_starts_models(family: str, linear: str, std: float) -> None:
    model = mirrored(family, "none")
    weights = [p for m in mirrors(model) for name, p in m.named_parameters() if name.endswith(f"{linear}.weight")]
    assert abs(torch.cat(weights).std().item() / std - 1) < 0.1


@pytest.mark.parametrize("family", ROTARY)
def test_a_slim_head_turns_as_its_family_turns_heads_of_that_size(family: str) -> None:
    model, batch, found = mirrored(family, "none"), inputs(family, "none"), []
    mirrors(model)[0].block.register_forward_pre_hook(
        lambda _, __, named: found.extend(named["position_embeddings"]), with_kwargs=True
    )
    model(**batch)
    base: Any = model.get_base_model()
    slim = copy.deepcopy(base.config)
    slim.head_dim = head_size(base.config) // 2
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    expected = type(base.rotary_emb)(slim)(torch.zeros(1, 1, 1), positions)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", [*DECODERS, *SEQ2SEQ])
def test_the_same_tokens_with_and_without_a_cache(family: str, beams: int) -> None:
    model, batch = mirrored(family, "lm", init_weights=False), inputs(family, "lm", batch_size=2)
    del batch["labels"]  # pyright: ignore[reportIndexIssue]
    options: Any = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    cached, plain = (model.generate(**batch, **options, use_cache=flag) for flag in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    for one, other in zip(cached.logits, plain.logits, strict=True):
        assert relative_error(one, other) < TOLERANCE[torch.float32]
    with model.disable_adapter():
        base = model.generate(**batch, **options)
    assert not torch.equal(base.logits[-1], cached.logits[-1])


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "t5"])
def test_a_static_cache_gives_the_same_tokens(family: str) -> None:
    model, batch = mirrored(family, "lm", init_weights=False), inputs(family, "lm", batch_size=2)
    del batch["labels"]  # pyright: ignore[reportIndexIssue]
    options: Any = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    static = model.generate(**batch, **options, cache_implementation="static")
    assert torch.equal(static, model.generate(**batch, **options, use_cache=False))


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3", "t5", "whisper", "dinov2"])
def test_a_checkpoint_restores_the_outputs_to_the_bit(family: str, tmp_path: Any) -> None:
    model, batch = mirrored(family, init_weights=False), inputs(family)
    train(model, batch)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(build(family), tmp_path, **options)
        assert torch.equal(output(again.eval(), batch), output(model, batch))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "phi3", "t5", "bart", "dinov2"])
def test_one_bit_side_networks_train_and_are_saved_packed(family: str, tmp_path: Any) -> None:
    model, batch = mirrored(family, bits=1, init_weights=False), inputs(family)
    linears = [m for mirror in mirrors(model) for m in mirror.block.modules() if type(m) is nn.Linear]
    assert linears == []
    assert any(isinstance(module, SlimLinear) for module in mirrors(model)[0].block.modules())
    losses = train(model, batch, lr=1e-2)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert torch.equal(output(again, batch), output(model, batch))


def test_biases_are_kept_beside_the_quantised_weights() -> None:
    model = mirrored("bert", bits=1)
    biases = [m.bias for m in mirrors(model)[0].block.modules() if isinstance(m, SlimLinear)]
    assert len(biases) == 6
    assert all(isinstance(bias, nn.Parameter) and bias.requires_grad for bias in biases)


def test_a_slim_linear_computes_what_a_linear_or_a_conv1d_does() -> None:
    quantization = LadderSideConfig(bits=32).quantization
    for linear in (mirrors(mirrored("gpt2"))[0].block.mlp.c_fc, nn.Linear(5, 3), nn.Linear(5, 3, bias=False)):
        if linear.bias is not None:
            nn.init.normal_(linear.bias)
        x = torch.randn(7, 16 if linear.weight.shape[0] == 16 else 5)
        torch.testing.assert_close(SlimLinear(linear, quantization)(x), linear(x))


@pytest.mark.parametrize("family", ["bert", "gemma2", "t5", "bart", "vit"])
def test_a_bfloat16_base_trains(family: str) -> None:
    model, batch = mirrored(family, dtype=torch.bfloat16), inputs(family, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in mirrors(model)[0].parameters()} == {torch.float32}
    losses = train(model, batch, steps=4, lr=1e-2)
    assert losses[-1] < losses[0]
    single = mirrored(family, init_weights=False)
    half = mirrored(family, dtype=torch.bfloat16, init_weights=False)
    half.load_state_dict(single.state_dict())
    out, reference = output(half, inputs(family, dtype=torch.bfloat16)), output(single, inputs(family))
    assert relative_error(out, reference) < 8 * TOLERANCE[torch.bfloat16]  # of all the blocks of the base, rounded


def test_under_autocast_it_trains() -> None:
    model, batch = mirrored("t5"), inputs("t5")
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model, batch, lr=1e-2)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "vit"])
def test_recorded_outputs_are_those_of_the_model(family: str) -> None:
    batch, flags = inputs(family, "none"), {"output_hidden_states": True}
    base, model = build(family, "none"), mirrored(family, "none")
    expected = base(**batch, **flags)
    for _ in range(2):
        found = model(**batch, **flags)
        for name in ("hidden_states", "encoder_hidden_states", "decoder_hidden_states"):
            assert len(getattr(found, name, None) or ()) == len(getattr(expected, name, None) or ()), name


def test_gradient_checkpointing_stays_out_of_it() -> None:
    plain, checked, batch = mirrored("llama"), mirrored("llama"), inputs("llama")
    checked.get_base_model().gradient_checkpointing_enable()
    for mirror in mirrors(checked):
        mirror.block.gradient_checkpointing = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has no use here, once
        assert train(checked, batch) == train(plain, batch)
    assert not any(
        getattr(m, "gradient_checkpointing", False) for mirror in mirrors(checked) for m in mirror.modules()
    )


def test_its_dropout_is_live_in_training_alone() -> None:
    model, batch = mirrored("bert", "none", init_weights=False), inputs("bert", "none")
    assert torch.equal(output(model, batch), output(model, batch))
    model.train()
    assert not torch.equal(output(model, batch), output(model, batch))
    assert not any(
        m.training for layer in model.modules() if isinstance(layer, LadderBlock) for m in [layer.base_layer]
    )


# --- the network of the paper, written down once more ---


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def attend(x: Tensor, y: Tensor, p: dict[str, Tensor], name: str, bias: Tensor | float, seen: Tensor) -> Tensor:
    q, k, v = (
        (z @ p[f"{name}.{part}.weight"].T).unflatten(-1, (4, -1)).transpose(1, 2)
        for part, z in (("q", x), ("k", y), ("v", y))
    )
    scores = (q @ k.transpose(-1, -2) + bias).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ p[f"{name}.o.weight"].T


def t5_block(
    block: nn.Module, x: Tensor, bias: Tensor, seen: Tensor, memory: Tensor | None, pad: Tensor | None
) -> Tensor:
    p: dict[str, Tensor] = dict(block.named_parameters())
    y, last = rms(x, p["layer.0.layer_norm.weight"]), 1
    x = x + attend(y, y, p, "layer.0.SelfAttention", bias, seen)
    if memory is not None and pad is not None:
        y, last = rms(x, p["layer.1.layer_norm.weight"]), 2
        x = x + attend(y, memory, p, "layer.1.EncDecAttention", 0.0, pad)
    y = rms(x, p[f"layer.{last}.layer_norm.weight"]) @ p[f"layer.{last}.DenseReluDense.wi.weight"].T
    return x + y.relu() @ p[f"layer.{last}.DenseReluDense.wo.weight"].T


def ladder(
    layers: list[Any],
    h: Tensor,
    seen: Tensor,
    memories: tuple[Tensor, Tensor] | None = None,
    pad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(what the frozen T5 stack gives, what the side network does)    (Sung et al. 2022, section 3.2)"""
    bias = layers[0].get_base_layer().layer[0].SelfAttention.compute_bias(h.shape[1], h.shape[1])
    memory, side_memory = memories or (None, None)
    s = h @ layers[0].petune_ladder_entry["default"].down.weight.T
    for layer in layers:
        h = t5_block(layer.get_base_layer(), h, bias, seen, memory, pad)
        if "default" in layer.petune_ladder_rung:
            rung = layer.petune_ladder_rung["default"]
            gate = torch.sigmoid(rung.alpha / 0.1)
            s = gate * s + (1 - gate) * (h @ rung.down.weight.T)
            s = t5_block(rung.block.block, s, bias, seen, side_memory, pad)
    return h, s


@pytest.mark.parametrize("side_layers", [[0, 1, 2], [1, 2], [0, 2]], ids=str)
def test_it_is_the_network_of_the_paper(side_layers: list[int]) -> None:
    torch.manual_seed(3)
    base = AutoModel.from_config(AutoConfig.for_model("t5", **{**FAMILIES["t5"].config, "num_layers": 3})).eval()
    model: Any = get_peft_model(base, config(side_layers=side_layers, fusion="replace")).eval()
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LadderBlock)]
    for layer in layers:
        if "default" in layer.petune_ladder_exit:  # the paper's T5 has the norm of T5 here
            layer.petune_ladder_exit["default"].norm = nn.RMSNorm(16, eps=1e-6)
        if "default" in layer.petune_ladder_rung:
            nn.init.normal_(layer.petune_ladder_rung["default"].alpha, std=0.1)
    for parameter in model.parameters():
        if parameter.dim() == 1 and len(parameter) > 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    batch, found = inputs("t5", "none"), []
    base.decoder.final_layer_norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(**batch)

    pad, tokens = batch["attention_mask"].bool()[:, None, None], batch["decoder_input_ids"].shape[1]
    h, s = ladder(layers[:3], base.shared(batch["input_ids"]), pad)
    memories = (base.encoder.final_layer_norm(h), layers[2].petune_ladder_exit["default"].norm(s))
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    _, s = ladder(layers[3:], base.shared(batch["decoder_input_ids"]), causal, memories, pad)
    end = layers[5].petune_ladder_exit["default"]
    expected = end.norm(s) @ end.up.weight.T

    assert relative_error(found[0], expected) < 1e-6
    parameters = list(trained(model).values())
    ours, theirs = (torch.autograd.grad(y.square().sum(), parameters) for y in (found[0], expected))
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(one, other) < TOLERANCE[torch.float32]


def test_a_rung_after_the_first_needs_the_bias_of_positions_of_t5() -> None:
    model, batch = mirrored("t5", side_layers=[1]), inputs("t5")
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LadderBlock)]

    class Tape:
        def replay(self, index: int, x: Tensor) -> Tensor | None:
            return x if index == 0 else None

        def record(self, index: int, y: Tensor) -> None:
            """Nothing is kept."""

    model.eval()(**batch)  # so that the first block's form of output is known
    layers[0].backbone.tape = Tape()
    with pytest.raises(RuntimeError, match=r"bias of positions .* feature cache .* use block='generic'"):
        model(**batch)


# --- what cannot be slimmed ---


def test_a_block_of_windows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"block='mirror' cannot slim a SwinLayer, .* use block='generic'"):
        mirrored("swin")


def test_a_block_without_a_config_is_refused() -> None:
    block = nn.TransformerEncoderLayer(8, 2)
    with pytest.raises(ValueError, match=r"is built from d_model, nhead as well; use block='generic'"):
        slim_block(config(), block, 0, reads_memory=False)
    with pytest.raises(ValueError, match=r"cannot slim a SiLU, which has no config of transformers; use block="):
        slim_block(config(), nn.SiLU(), 0, reads_memory=False)


@pytest.mark.parametrize(
    ("family", "factor", "message"),
    [
        ("bert", 16, r"reduction_factor=16 .* hidden_size / 4 = 8, .*; use 2, 4, 8\."),
        ("t5", 16, r"reduction_factor=16 does not divide d_kv = 8, .*; use 2, 4, 8\."),
        ("llama", 8, r"reduction_factor=8 does not divide half of what rotary .* = 4, .*; use 2, 4\."),
    ],
)
def test_a_factor_that_does_not_divide_names_those_that_do(family: str, factor: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mirrored(family, reduction_factor=factor)


def test_an_inner_size_that_nothing_divides_is_refused() -> None:
    base = AutoModel.from_config(AutoConfig.for_model("bert", **{**FAMILIES["bert"].config, "intermediate_size": 47}))
    with pytest.raises(ValueError, match=r"intermediate_size = 47, .*; no factor does: use block='generic'"):
        get_peft_model(base, config())


def test_a_size_that_is_not_known_by_its_name_is_refused() -> None:
    class Strange(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            self.fc1 = nn.Linear(config.hidden_size, config.mlp_width)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.fc1(hidden_states)

    family = AutoConfig.for_model("bert", **FAMILIES["bert"].config, mlp_width=48)
    with pytest.raises(ValueError, match=r"cannot slim a Strange, whose fc1 keeps a size; use block='generic'"):
        slim_block(config(), Strange(family), 0, reads_memory=False)


def test_a_decoder_alone_is_slimmed_without_its_cross_attention() -> None:
    options = {**FAMILIES["bert"].config, "is_decoder": True, "add_cross_attention": True}
    block = AutoModel.from_config(AutoConfig.for_model("bert", **options)).encoder.layer[0]
    assert not hasattr(slim_block(config(), block, 0, reads_memory=False), "crossattention")
    assert hasattr(slim_block(config(), block, 0, reads_memory=True), "crossattention")
