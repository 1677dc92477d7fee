"""PetuneBlock: what goes through a wrapped block unchanged, and how it sits in a model."""

import copy
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from petune.block_layer import PetuneBlock
from petune.blocks import width_of
from tests.adapters.block_shift import BlockShiftConfig, BlockShiftLayer
from tests.adapters.harness import build, inputs, output
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES

WIDTH = 7


class Pair(NamedTuple):
    hidden: Tensor
    scale: float


class Block(nn.Module):
    """Hidden states times a matrix, in the structure asked for."""

    def __init__(self, structure: str = "tensor") -> None:
        super().__init__()
        self.structure, self.attention_type, self._private = structure, "full", 1
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Any:
        y = self.dense(hidden_states) * scale
        structures = {"tensor": y, "tuple": (y, scale), "list": [y, scale], "named": Pair(y, scale), "dict": {"y": y}}
        return structures[self.structure]


def layer(block: nn.Module | None = None, *names: str) -> BlockShiftLayer:
    made = BlockShiftLayer(block or Block())
    for name in names or ("default",):
        made.update_layer(name, BlockShiftConfig(init_weights=False))
    made.set_adapter(list(names or ("default",)))
    return made


def blocks_of(model: nn.Module) -> list[PetuneBlock]:
    return [module for module in model.modules() if isinstance(module, PetuneBlock)]


@pytest.mark.parametrize("structure", ["tensor", "tuple", "list", "named"])
def test_the_output_keeps_its_structure_and_gains_the_updates(structure):
    adapted, x = layer(Block(structure), "a", "b"), torch.randn(3, 2, WIDTH)
    plain = Block()
    plain.load_state_dict(adapted.base_layer.state_dict())
    y = plain(x, scale=0.5)
    expected = y + sum(adapted.delta(name, x, y) for name in ("a", "b"))
    for out in (adapted(x, scale=0.5), adapted(x, 0.5), adapted(hidden_states=x, scale=0.5)):
        assert type(out) is type(adapted.base_layer(x))
        assert relative_error(out if structure == "tensor" else out[0], expected) <= TOLERANCE[torch.float32]
        assert structure == "tensor" or out[1:] == type(out[1:])([0.5])


def test_each_row_of_a_mixed_batch_takes_its_own_adapter():
    adapted, x = layer(Block("tuple"), "a", "b"), torch.randn(3, 2, WIDTH)
    mixed = adapted(x, adapter_names=["b", "__base__", "a"])[0]
    y = adapted.base_layer(x)[0]
    expected = torch.stack([y[0] + adapted.delta("b", x[0], y[0]), y[1], y[2] + adapted.delta("a", x[2], y[2])])
    assert relative_error(mixed, expected) <= TOLERANCE[torch.float32]
    with pytest.raises(ValueError, match="adapter_names has 1 entries for a batch of 3 rows"):
        adapted(x, adapter_names=["a"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_an_adapter_starts_in_the_dtype_of_its_block_and_float32_gives_the_dtype_back(dtype):
    adapted = layer(Block().to(dtype))
    assert adapted.petune_blockshift_d["default"].dtype == dtype
    adapted.petune_blockshift_d.float()
    adapted.petune_blockshift_e.float()
    assert adapted(torch.randn(2, WIDTH, dtype=dtype)).dtype == dtype


def test_what_is_no_hidden_state_is_refused_with_the_blocks_name():
    with pytest.raises(TypeError, match="BlockShiftLayer got nothing as input of a Block; pass its hidden states"):
        layer()(scale=0.5)
    with pytest.raises(TypeError, match=r"got a dict from a Block; .* alone or as the first of a tuple or list"):
        layer(Block("dict"))(torch.randn(1, WIDTH))


def test_public_attributes_are_the_blocks_and_private_ones_are_not():
    adapted = layer()
    assert adapted.attention_type == "full"
    assert adapted.dense is adapted.base_layer.dense
    assert adapted.hidden_size == WIDTH
    assert not hasattr(adapted, "_private")
    for absent in ("in_features", "out_features", "weight", "nonsense"):
        assert not hasattr(adapted, absent)
    assert not hasattr(BlockShiftLayer.__new__(BlockShiftLayer), "anything")  # no endless search before __init__


def test_a_copy_and_a_pickle_compute_the_same_and_share_nothing():
    adapted, x = layer(), torch.randn(2, WIDTH)
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(twin(x), adapted(x))
        assert twin.base_layer is not adapted.base_layer
        assert twin.attention_type == "full"


def test_merging_is_refused_and_unmerging_warns():
    adapted = layer()
    with pytest.raises(NotImplementedError, match=r"BlockShiftLayer: .*'default' is no weight.*use unload\(\)"):
        adapted.merge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        adapted.unmerge()
    assert not adapted.supports_lora_conversion()


def test_an_adapter_follows_the_mode_of_its_block_and_leaves_the_modes_inside_alone():
    block = Block().train()
    block.dense.eval()
    adapted = layer(block)
    assert [adapted.training, block.training, block.dense.training] == [True, True, False]
    assert adapted.shift_dropout["default"].training
    adapted.eval()
    adapted.update_layer("later", BlockShiftConfig(shift_dropout=0.5))
    assert not adapted.shift_dropout["later"].training


@pytest.mark.parametrize("family", FAMILIES)
def test_unloading_gives_back_the_very_blocks(family):
    base = build(family, head="none")
    before = list(base.modules())
    model = get_peft_model(base, BlockShiftConfig())
    assert len(blocks_of(model)) > 1
    unloaded = list(model.unload().modules())
    assert len(unloaded) == len(before)
    assert all(left is right for left, right in zip(unloaded, before, strict=True))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit", "whisper"])
def test_the_hidden_states_that_transformers_records_hold_the_updates(family):
    model = get_peft_model(build(family, head="none"), BlockShiftConfig(init_weights=False)).eval()
    given: list[Tensor] = []
    blocks_of(model)[0].register_forward_hook(lambda _, __, out: given.append(out if torch.is_tensor(out) else out[0]))
    with torch.no_grad():
        out = model(**inputs(family, head="none"), output_hidden_states=True)
    states = getattr(out, "hidden_states", None) or out.encoder_hidden_states
    assert torch.equal(states[1], given[0])
    unloaded = model.unload()
    with torch.no_grad():
        plain = build(family, head="none")(**inputs(family, head="none")).last_hidden_state
        assert torch.equal(unloaded(**inputs(family, head="none")).last_hidden_state, plain)


def test_a_hook_on_the_block_sees_the_sum_and_none_of_ours_stays():
    adapted, x = layer(Block("tuple")), torch.randn(2, WIDTH)
    expected = adapted(x)[0]
    seen: list[Tensor] = []
    handle = adapted.base_layer.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    assert torch.equal(adapted(x)[0], expected)
    assert torch.equal(seen[0], expected)
    handle.remove()
    assert not adapted.base_layer._forward_hooks


def test_layers_to_transform_chooses_blocks():
    model = get_peft_model(build("bert"), BlockShiftConfig(layers_to_transform=[1])).get_base_model()
    assert [name for name, m in model.named_modules() if isinstance(m, PetuneBlock)] == ["bert.encoder.layer.1"]


def test_checkpointing_reaches_the_block_inside():
    base = build("llama").train()
    model = get_peft_model(base, BlockShiftConfig())
    base.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(layer.base_layer.gradient_checkpointing for layer in blocks_of(model))
    calls: list[str] = []
    blocks_of(model)[1].base_layer.self_attn.register_forward_hook(lambda *_: calls.append("run"))
    model(**inputs("llama")).loss.backward()
    assert len(calls) == 2  # once forward, once to recompute


def test_a_block_may_hold_another_methods_adapters_and_not_the_other_way_round():
    base, batch = build("bert"), inputs("bert")
    base.add_adapter(LoraConfig(target_modules=["query"], init_lora_weights=False), adapter_name="lora")
    expected = output(base.eval(), batch)
    model = get_peft_model(base, BlockShiftConfig()).eval()
    assert torch.equal(output(model, batch), expected)
    unloaded = model.unload()
    assert not blocks_of(unloaded)
    assert any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
    assert torch.equal(output(unloaded, batch), expected)


def test_an_adapter_inside_an_adapted_block_or_around_one_is_refused():
    model = get_peft_model(build("bert"), BlockShiftConfig(target_modules=["layer.0"]))
    message = r"'bert\.encoder\.layer\.0\..*query' lies inside an adapted module, so add this adapter before that one"
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", BlockShiftConfig(target_modules=r".*layer\.0.*query"))
    model = get_peft_model(build("bert"), BlockShiftConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"layer\.0' has an adapter of the same method inside, on '.*query'"):
        model.add_adapter("second", BlockShiftConfig(target_modules=["layer.0"]))


def test_a_module_without_linears_or_norms_has_no_width():
    assert width_of(Block()) == WIDTH
    with pytest.raises(ValueError, match="a Conv2d has neither linear layers nor norms to tell its hidden size by"):
        width_of(nn.Conv2d(1, 1, 1))
