"""Ladder side-tuning: the equations, what starts as what, and that nothing of the backbone is kept for backward."""

import math
import warnings
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import petune
from petune.adapters.side import LadderBlock
from petune.quantized.linear import QuantizedLinear
from tests.adapters.harness import (
    assert_same_tensors,
    base_tensors,
    build,
    gradients,
    inputs,
    output,
    snapshot,
    train,
)
from tests.adapters.ladder_models import adapted, beside, block_outputs, config, family, saved_bytes
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES

EXACT = TOLERANCE[torch.float64]
T = 0.1  # of the gates

# ------------------------------------------------------------------------------------------------------- the equations


def attend(weights: dict[str, Tensor], x: Tensor, memory: Tensor, seen: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √d) v, head by head; seen: bool, [batch, queries, keys]."""
    query, out = x @ weights["query"].T, []
    keys, values = (memory @ half.T for half in weights["key_value"].chunk(2))
    for q, k, v in zip(*(part.chunk(heads, dim=-1) for part in (query, keys, values)), strict=True):
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
        out.append(scores.softmax(dim=-1) @ v)
    return torch.cat(out, dim=-1) @ weights["out"].T


class Ladder:
    """The side network of one stack, from its tensors by name and what the frozen blocks gave."""

    def __init__(self, model: PeftModel, blocks: list[str], heads: int) -> None:
        state, self.heads = snapshot(model.get_base_model()), heads
        self.parts: list[dict[str, Tensor]] = []
        for name in blocks:
            mine = {
                key.removeprefix(f"{name}.petune_ladder_"): t for key, t in state.items() if key.startswith(f"{name}.")
            }
            self.parts.append({key.replace(".default", "").removesuffix(".weight"): t for key, t in mine.items()})

    def norm(self, part: dict[str, Tensor], name: str, s: Tensor) -> Tensor:
        return F.layer_norm(s, s.shape[-1:], part[name], part[f"{name}.bias"])

    def attention(self, part: dict[str, Tensor], kind: str, *args: Tensor) -> Tensor:
        return attend(
            {name: part[f"rung.block.{kind}.{name}"] for name in ("query", "key_value", "out")}, *args, self.heads
        )

    def __call__(
        self, taps: list[tuple[Tensor, Tensor]], seen: Tensor, memory: Any = None, crossed: Any = None
    ) -> Tensor:
        s = taps[0][0] @ self.parts[0]["entry.down"].T
        for part, (_, h) in zip(self.parts, taps, strict=True):
            if "rung.down" not in part:
                continue
            gate = torch.sigmoid(part["rung.alpha"] / T)
            s = gate * s + (1 - gate) * (h @ part["rung.down"].T)
            x = self.norm(part, "rung.block.attention_norm", s)
            s = s + self.attention(part, "attention", x, x, seen)
            if memory is not None:
                x = self.norm(part, "rung.block.memory_norm", s)
                s = s + self.attention(part, "memory_attention", x, memory, crossed)
            x = self.norm(part, "rung.block.ffn_norm", s)
            s = s + (x @ part["rung.block.ffn_in"].T).relu() @ part["rung.block.ffn_out"].T
        return self.norm(self.parts[-1], "exit.norm", s)


def shaken(model: PeftModel) -> PeftModel:
    """With gates that are neither open nor shut."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "alpha":
                parameter.copy_(0.15 * torch.randn(1, generator=rng))
            elif "norm" in name and "petune" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return model


def masks(name: str, batch: dict[str, Tensor], stack: int, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """What every token of a stack sees of it, and of the encoder: bool, [batch, queries, keys]."""
    padding = batch.get("attention_mask", torch.ones(3, queries if not stack else keys)).bool()[:, None, :]
    past = torch.ones(queries, queries, dtype=torch.bool).tril().expand(3, -1, -1)
    if stack:
        return past, padding.expand(-1, queries, -1)
    return (past & padding if name == "llama" else padding.expand(-1, queries, -1)), padding


@pytest.mark.parametrize("fusion", ["residual", "replace", "merge_last"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit", "whisper"])
def test_a_ladder_is_the_equations_of_the_paper(name, fusion):
    base = family(name, 5).build().double()
    batch = {key: v.double() if v.is_floating_point() else v for key, v in inputs(name, "none").items()}
    with block_outputs(base) as frozen:
        output(base, batch)
    model = shaken(beside(base, num_heads=4, fusion=fusion))
    with block_outputs(model) as found:
        output(model, batch)
    names, side = list(frozen), torch.empty(3, 0, 0)
    assert all(torch.equal(found[block][1], frozen[block][1]) for block in names[:-1])
    for number, stack in enumerate([names[:5], names[5:]] if len(names) > 5 else [names]):
        taps = [frozen[block] for block in stack]
        seen, crossed = masks(name, batch, number, taps[0][0].shape[1], side.shape[1])
        side = Ladder(model, stack, 4)(taps, seen, *((side, crossed) if number else ()))
    exits, h = model.get_base_model().get_submodule(names[-1]).petune_ladder_exit["default"], frozen[names[-1]][1]
    up = side @ exits.up.weight.detach().T
    gate = torch.sigmoid(exits.alpha.detach() / T) if fusion == "merge_last" else torch.ones(())
    expected = h + up if fusion == "residual" else gate * up + (1 - gate) * h
    kept = batch["attention_mask"].bool() if name in ("bert", "llama") else slice(None)
    assert relative_error(found[names[-1]][1][kept], expected[kept]) <= EXACT
    assert relative_error(up, h) > 0.1


@pytest.mark.parametrize(("asked", "read"), [(None, {1, 2, 3}), ([1], {1}), ([0, 4], {0, 4}), ([2, 1, 2], {1, 2})])
def test_the_blocks_that_are_read_are_the_ones_asked_for(asked, read):
    model = adapted("bert", "none", 5, side_layers=asked)
    blocks = model.get_base_model().encoder.layer
    assert {i for i, block in enumerate(blocks) if block.petune_ladder_rung} == read
    assert model.base_model.read_blocks == read | {4}
    assert [bool(block.petune_ladder_entry) for block in blocks] == [True, False, False, False, False]
    assert [bool(block.petune_ladder_exit) for block in blocks] == [False, False, False, False, True]


@pytest.mark.parametrize(
    ("blocks", "read"), [(1, (0,)), (2, (1,)), (4, (1, 2, 3)), (12, (1, 2, 3, 5, 6, 7, 9, 10, 11))]
)
def test_every_fourth_block_is_left_out_as_in_the_paper(blocks, read):
    assert config().rungs(blocks) == read


# ----------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_ladder_changes_no_bit(name):
    base, batch = build(name, "none"), inputs(name, "none")
    expected = output(base, batch)
    model = get_peft_model(base, config()).eval()
    assert torch.equal(output(model, batch), expected)


@pytest.mark.parametrize("fusion", ["replace", "merge_last"])
def test_the_papers_fusions_start_from_noise(fusion):
    base, batch = build("bert", "none"), inputs("bert", "none")
    expected = output(base, batch)
    model = get_peft_model(base, config(fusion=fusion)).eval()
    assert relative_error(output(model, batch), expected) > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_of_a_ladder_gets_a_gradient_and_nothing_else_does(name):
    head = "cls" if "cls" in FAMILIES[name].heads else "lm"
    model = adapted(name, head, fusion="merge_last")
    grads = gradients(model, lambda: model(**inputs(name, head)).loss)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == trained
    assert all(".petune_ladder_" in key for key in trained)
    assert [key for key, grad in grads.items() if not grad.any()] == []


def test_the_sizes_are_those_of_the_config():
    model = adapted("bert", "none", 5, reduction_factor=2, num_heads=8, ffn_ratio=3)
    block = model.get_base_model().encoder.layer[1].petune_ladder_rung["default"].block
    assert (block.attention.heads, block.attention.query.weight.shape) == (8, (16, 16))
    assert block.ffn_in.weight.shape == (48, 16)
    default = adapted("bert", "none", 5, reduction_factor=2).get_base_model().encoder.layer[1]
    assert default.petune_ladder_rung["default"].block.attention.heads == 1  # heads of 16


@pytest.mark.parametrize("bits", [1, 4])
def test_every_linear_of_the_side_network_takes_few_bits(bits):
    model = adapted("t5", bits=bits)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".petune_ladder_" in name
    }
    assert len(linears) == 2 * (1 + 1 + 5) + 3 + 1  # entry, down and five of a block; cross-attention; up
    assert all(isinstance(m, QuantizedLinear) and m.bias is None for m in linears.values())
    levels = [len(module.quantized().unique()) for module in linears.values()]
    assert max(levels) <= 2**bits


def test_a_packed_ladder_is_a_few_bits_of_its_float_twin_on_disk(tmp_path):
    sizes: dict[int, int] = {}
    for bits in (1, 32):
        base = family("bert", 4, hidden_size=128, intermediate_size=128).build()
        beside(base, reduction_factor=2, bits=bits).save_pretrained(tmp_path / str(bits))
        sizes[bits] = (tmp_path / str(bits) / "adapter_model.safetensors").stat().st_size
    assert sizes[1] < sizes[32] / 12  # the norms are float32


# -------------------------------------------------------------------------------------------------------- the training


def deep_bert(blocks: int) -> nn.Module:
    return family("bert", blocks, hidden_size=64, intermediate_size=256).build(head="cls")


def test_no_activation_of_the_backbone_is_kept_for_backward():
    batch = inputs("bert", "cls", batch_size=8)
    ratios: list[float] = []
    for blocks in (4, 8, 16):
        lora = get_peft_model(deep_bert(blocks), peft.LoraConfig(r=8, target_modules=["query", "value"]))
        ladder = get_peft_model(deep_bert(blocks), petune.LadderSideConfig(reduction_factor=8))
        ratios.append(saved_bytes(ladder, batch) / saved_bytes(lora, batch))
    assert ratios[1] <= 0.45
    assert ratios[0] > ratios[1] > ratios[2]


def test_of_a_block_that_is_not_read_nothing_is_kept_and_of_one_that_is_what_it_gave():
    batch, tap = inputs("bert", "cls", batch_size=8), 8 * 11 * 64 * 4

    def kept(blocks: int, *read: int) -> int:
        model = get_peft_model(deep_bert(blocks), config(reduction_factor=16, side_layers=list(read)))
        return saved_bytes(model, batch)

    assert kept(9, 3) == kept(5, 3) == kept(9, 7)
    more = kept(9, 3, 5) - kept(9, 3)
    assert tap < more == kept(9, 2, 3, 5) - kept(9, 3, 5) < 4 * tap


def test_the_backbones_dropout_is_off_in_training_and_the_heads_is_on():
    model = adapted("bert", "cls", 3, dropout=0.2).train()
    on = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.training]
    assert on == ["base_model.model.dropout"]
    with block_outputs(model) as first:
        model(**inputs("bert"))
    with block_outputs(model) as second:
        model(**inputs("bert"))
    names = list(first)
    assert all(torch.equal(first[name][1], second[name][1]) for name in names[:-1])
    assert not torch.equal(first[names[-1]][1], second[names[-1]][1])  # the side network's own
    model.eval()
    assert not any(module.training for module in model.modules())


def test_modules_to_save_are_in_training_mode_wherever_they_stand():
    base = build("bert")
    model = get_peft_model(base, config(modules_to_save=["classifier", "pooler"])).train()
    assert base.bert.pooler.modules_to_save["default"].training
    assert base.classifier.modules_to_save["default"].training
    assert not base.bert.embeddings.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grads = gradients(model, lambda: model(**inputs("bert")).loss)
    assert any("pooler" in name for name in grads)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit", "swin"])
def test_training_lowers_the_loss_and_leaves_the_base_alone(name):
    head = "lm" if name in ("gpt2", "t5") else "cls"
    model = get_peft_model(family(name, 3).build(head=head), config(reduction_factor=2))
    before = base_tensors(model)
    losses = train(model, inputs(name, head), steps=30, lr=1e-2)
    assert losses[-1] < 0.95 * losses[0]
    assert_same_tensors(base_tensors(model), before)


def test_swins_side_network_follows_the_merging_of_patches():
    model, batch = adapted("swin", "cls"), inputs("swin")
    shapes: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, LadderBlock):
            for rung in module.petune_ladder_rung.values():
                rung.register_forward_hook(lambda _, __, s: shapes.append(tuple(s.shape)))
    output(model, batch)
    assert [shape[1] for shape in shapes] == [64, 16, 16]
    assert len({shape[2] for shape in shapes}) == 1
