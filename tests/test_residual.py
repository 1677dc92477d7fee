"""The residual stream that a feed-forward branches off: which module reads it, by name and by what is added to it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel

from petune.topology import Block, Topology, find_topology
from tests.families import FAMILIES

READERS = {
    "bert": ["intermediate.dense"],
    "roberta": ["intermediate.dense"],
    "distilbert": ["ffn.lin1"],
    "gpt2": ["ln_2"],
    **{name: ["post_attention_layernorm"] for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")},
    "gemma2": ["pre_feedforward_layernorm"],
    "t5": ["layer.1.layer_norm", "layer.2.layer_norm"],
    "t5_gated": ["layer.1.layer_norm", "layer.2.layer_norm"],
    "bart": ["fc1"],
    "whisper": ["final_layer_norm"],
    **{name: ["layernorm_after"] for name in ("vit", "deit", "ast", "swin")},
    "dinov2": ["norm2"],
}

_SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = _SIZES | {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1}
_GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
_OPT = _TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32}
_SEQ2SEQ = {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 0} | {
    f"{side}_{size}": value
    for side in ("encoder", "decoder")
    for size, value in (("attention_heads", 4), ("ffn_dim", 48))
}
_CONV = {"conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [8, 4], "num_feat_extract_layers": 2}
_SOUND = _SIZES | _CONV | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
_IMAGE = _SIZES | {"image_size": 32, "patch_size": 8}

# What each shows: (model type, config, reader in the first block)
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "norms on what the branches write": ("olmo2", _TEXT, "mlp.gate_proj"),
    "norms on both ends of the branches": ("glm4", _TEXT | {"head_dim": 8}, "post_attention_layernorm"),
    "one norm for parallel branches": ("phi", _TEXT, "input_layernorm"),
    "two norms for parallel branches": (
        "falcon",
        _TEXT | {"new_decoder_architecture": True, "num_kv_heads": 2},
        "ln_mlp",
    ),
    "norms listed in another order": ("falcon", _TEXT | {"parallel_attn": False}, "post_attention_layernorm"),
    "a parallel branch without its own norm": ("gptj", _GPT2 | {"rotary_dim": 4, "n_positions": 32}, "ln_1"),
    "cross-attention behind the norm": ("gpt2", _GPT2 | {"add_cross_attention": True, "n_inner": 48}, "ln_2"),
    "a final norm listed before the blocks": ("opt", _OPT, "final_layer_norm"),
    "no final norm": ("opt", _OPT | {"do_layer_norm_before": False}, "fc1"),
    "a final norm beside the embeddings'": ("mbart", _SEQ2SEQ, "final_layer_norm"),
    "post-norm in encoder and decoder": ("marian", _SEQ2SEQ | {"decoder_start_token_id": 0}, "fc1"),
    "a norm inside of the feed-forward's first half": ("roberta-prelayernorm", _TEXT, "intermediate.LayerNorm"),
    "a norm inside of the attention": ("esm", _TEXT, "LayerNorm"),
    "a norm in the pooler instead of a final one": ("beit", _IMAGE, "layernorm_after"),
    "neither": ("data2vec-vision", _IMAGE, "layernorm_after"),
    "a norm named after the feed-forward": ("modernbert", _TEXT | {"sep_token_id": 2}, "mlp_norm"),
    "a class named for its norm": ("wav2vec2", _SOUND | {"do_stable_layer_norm": True}, "final_layer_norm"),
    "the same without": ("wav2vec2", _SOUND, "feed_forward.intermediate_dense"),
    "one block used twice": ("albert", _TEXT | {"embedding_size": 16}, "ffn"),
}


def batch(kind: str) -> dict[str, Tensor]:
    if kind in ("beit", "data2vec-vision"):
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    if kind == "wav2vec2":
        return {"input_values": torch.randn(2, 800)}
    ids = torch.randint(3, 90, (2, 9))
    decoder = {"decoder_input_ids": ids} if kind in ("mbart", "marian") else {}
    return {
        "input_ids": ids,
        **decoder,
        **({"encoder_hidden_states": torch.randn(2, 5, 32)} if kind == "gpt2" else {}),
    }


class Terms(TorchDispatchMode):
    """Notes the terms of every sum."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            self.seen += [term.detach().clone() for term in args[:2] if isinstance(term, Tensor)]
        return func(*args, **(kwargs or {}))


def terms_behind(model: nn.Module, block: Block, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The reader's input, and all terms of the sums between the feed-forward's output and the block's."""
    terms = Terms()
    at: dict[str, Any] = {}

    def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        at["x"] = args[0].clone()

    def start(*_: Any) -> None:
        at["start"] = len(terms.seen)

    def stop(*_: Any) -> None:
        at["stop"] = len(terms.seen)

    handles = [
        model.get_submodule(block.ffn_residual).register_forward_pre_hook(read),
        model.get_submodule(block.ffn_out[0]).register_forward_hook(start),
        model.get_submodule(block.name).register_forward_hook(stop),
    ]
    with terms, torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return at["x"], terms.seen[at["start"] : at["stop"]]


def check(model: nn.Module, topology: Topology, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # of norms: no output may look like its input
                parameter.add_(0.3 * torch.randn_like(parameter))
    for block in topology.layout:
        x, terms = terms_behind(model, block, inputs)
        assert any(term.shape == x.shape and torch.equal(term, x) for term in terms), block.name


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_reader_gets_is_what_the_feed_forward_is_added_to(family: str):
    model = FAMILIES[family].build()
    topology = find_topology(model)
    assert topology.ffn_residual == tuple(block.ffn_residual for block in topology.layout)
    found = {block.ffn_residual.removeprefix(f"{block.name}.") for block in topology.layout}
    assert sorted(found) == READERS[family]
    check(model, topology, FAMILIES[family].inputs())


@pytest.mark.parametrize("case", OTHERS)
def test_other_architectures_are_read_as_they_compute(case: str):
    kind, config, reader = OTHERS[case]
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **config)).eval()
    topology = find_topology(model)
    assert topology.ffn_residual[0] == f"{topology.blocks[0]}.{reader}"
    check(model, topology, batch(kind))


@pytest.mark.parametrize("head", ["cls", "lm"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "bart", "llama"])
def test_the_norm_of_a_head_says_nothing_about_the_blocks(family: str, head: Any):
    topology = find_topology(FAMILIES[family].build(head=head))
    found = {block.ffn_residual.removeprefix(f"{block.name}.") for block in topology.layout}
    assert sorted(found) == READERS[family]


def block(**children: nn.Module | tuple[int, int]) -> nn.Module:
    module = nn.Module()
    module.attn = nn.MultiheadAttention(32, 4)
    for name, child in children.items():
        module.add_module(name, nn.Linear(*child) if isinstance(child, tuple) else child)
    return module


def reader_of(last: nn.Module, **children: nn.Module | tuple[int, int]) -> str:
    """Of the first of two blocks with `last` behind them."""
    model = nn.Module()
    model.layers, model.last = nn.ModuleList(copy.deepcopy(block(**children)) for _ in range(2)), last
    return find_topology(model).layout[0].ffn_residual


def test_a_feed_forward_in_one_sequence_with_its_norm():
    ff = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
    assert reader_of(nn.LayerNorm(32), norm=nn.LayerNorm(32), ff=ff) == "layers.0.ff.0"
    assert reader_of(nn.Identity(), norm=nn.LayerNorm(32), ff=ff) == "layers.0.ff.1"


def test_a_norm_behind_the_last_linear_counts_whatever_follows_the_blocks():
    class Part(nn.Module):
        def __init__(self, dense: tuple[int, int], norm: bool) -> None:
            super().__init__()
            self.dense, self.LayerNorm = nn.Linear(*dense), nn.LayerNorm(32) if norm else nn.Identity()

    parts = {"intermediate": Part((32, 48), norm=False), "output": Part((48, 32), norm=True)}
    assert reader_of(nn.LayerNorm(32), **parts) == "layers.0.intermediate.dense"


def test_a_final_norm_of_another_width_ends_nothing():
    sizes: dict[str, tuple[int, int]] = {"fc1": (32, 48), "fc2": (48, 32)}
    assert reader_of(nn.LayerNorm(32), norm1=nn.LayerNorm(32), norm2=nn.LayerNorm(32), **sizes) == "layers.0.norm2"
    assert reader_of(nn.LayerNorm(24), norm1=nn.LayerNorm(32), norm2=nn.LayerNorm(32), **sizes) == "layers.0.fc1"


def test_where_the_structure_does_not_tell_there_is_no_reader():
    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))

    assert reader_of(nn.LayerNorm(32), fc1=(32, 48), fc2=(48, 32)) == ""
    assert reader_of(nn.LayerNorm(32), norm=nn.LayerNorm(32), macaron=mlp(), mlp=mlp()) == ""
    model = nn.Module()
    model.layers = nn.ModuleList(block(norm=nn.LayerNorm(32), macaron=mlp(), mlp=mlp()) for _ in range(2))
    assert find_topology(model).ffn_residual == ()
