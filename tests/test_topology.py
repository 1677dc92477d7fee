"""Where things are in a model: explicit names for every family, spelling and wrapping; refusal of anything else."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn

from petune.topology import ROLES, find_topology
from tests.families import FAMILIES, Head

BLOCK_ROLES = ("attention_in", "attention_qv", "attention_out", "ffn_in", "ffn_gate", "ffn_out", "norms")


def row(qkv: str, qv: str, out: str, ffn_in: str, gate: str, ffn_out: str, norms: str) -> dict[str, list[str]]:
    return dict(zip(BLOCK_ROLES, map(str.split, (qkv, qv, out, ffn_in, gate, ffn_out, norms)), strict=True))


def qkv(prefix: str, names: str = "q_proj k_proj v_proj") -> str:
    return " ".join(f"{prefix}.{name}" for name in names.split())


BERT = row(
    qkv("attention.self", "query key value"),
    qkv("attention.self", "query value"),
    "attention.output.dense",
    "intermediate.dense",
    "",
    "output.dense",
    "attention.output.LayerNorm output.LayerNorm",
)
LLAMA = row(
    qkv("self_attn"),
    qkv("self_attn", "q_proj v_proj"),
    "self_attn.o_proj",
    "mlp.gate_proj mlp.up_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
    "input_layernorm post_attention_layernorm",
)
VIT = row(
    qkv("attention"),
    qkv("attention", "q_proj v_proj"),
    "attention.o_proj",
    "mlp.fc1",
    "",
    "mlp.fc2",
    "layernorm_before layernorm_after",
)
OLD_VIT = row(
    qkv("attention.attention", "query key value"),
    qkv("attention.attention", "query value"),
    "attention.output.dense",
    "intermediate.dense",
    "",
    "output.dense",
    "layernorm_before layernorm_after",
)
DISTILBERT = row(
    qkv("attention", "q_lin k_lin v_lin"),
    qkv("attention", "q_lin v_lin"),
    "attention.out_lin",
    "ffn.lin1",
    "",
    "ffn.lin2",
    "sa_layer_norm output_layer_norm",
)
GPT2 = row("attn.c_attn", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "", "mlp.c_proj", "ln_1 ln_2")
GEMMA2 = LLAMA | {
    "norms": [
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ]
}
PHI3 = LLAMA | {
    "attention_in": ["self_attn.qkv_proj"],
    "attention_qv": ["self_attn.qkv_proj"],
    "ffn_in": ["mlp.gate_up_proj"],
    "ffn_gate": ["mlp.gate_up_proj"],
}
DINOV2 = VIT | {"norms": ["norm1", "norm2"]}


def bart(*attentions: str) -> dict[str, list[str]]:
    return row(
        " ".join(qkv(name, "k_proj v_proj q_proj") for name in attentions),
        " ".join(qkv(name, "v_proj q_proj") for name in attentions),
        " ".join(f"{name}.out_proj" for name in attentions),
        "fc1",
        "",
        "fc2",
        " ".join(f"{name}_layer_norm" for name in (*attentions, "final")),
    )


def t5(inputs: str, gate: str, *attentions: str) -> dict[str, list[str]]:
    ffn = f"layer.{len(attentions)}.DenseReluDense"
    return row(
        " ".join(qkv(f"layer.{i}.{name}", "q k v") for i, name in enumerate(attentions)),
        " ".join(qkv(f"layer.{i}.{name}", "q v") for i, name in enumerate(attentions)),
        " ".join(f"layer.{i}.{name}.o" for i, name in enumerate(attentions)),
        qkv(ffn, inputs),
        qkv(ffn, gate) if gate else "",
        f"{ffn}.wo",
        " ".join(f"layer.{i}.layer_norm" for i in range(len(attentions) + 1)),
    )


BERT_TABLES = "embeddings.word_embeddings embeddings.position_embeddings embeddings.token_type_embeddings"
ROBERTA_TABLES = "embeddings.word_embeddings embeddings.token_type_embeddings embeddings.position_embeddings"
PATCHES = "embeddings.patch_embeddings.projection"
T5_TABLES = "shared encoder.embed_tokens decoder.embed_tokens"
BART_TABLES = "shared encoder.embed_tokens encoder.embed_positions decoder.embed_tokens decoder.embed_positions"
BART_NORMS = "encoder.layernorm_embedding decoder.layernorm_embedding"
WHISPER_TABLES = "encoder.conv1 encoder.conv2 encoder.embed_positions decoder.embed_tokens decoder.embed_positions"
T5_NORMS = "encoder.final_layer_norm decoder.final_layer_norm"

# family: {list of two blocks: names in each of its blocks}, norms outside the blocks, embeddings
EXPECTED: dict[str, tuple[dict[str, dict[str, list[str]]], str, str]] = {
    "bert": ({"encoder.layer": BERT}, "embeddings.LayerNorm", BERT_TABLES),
    "roberta": ({"encoder.layer": BERT}, "embeddings.LayerNorm", ROBERTA_TABLES),
    "distilbert": (
        {"transformer.layer": DISTILBERT},
        "embeddings.LayerNorm",
        "embeddings.word_embeddings embeddings.position_embeddings",
    ),
    "gpt2": ({"h": GPT2}, "ln_f", "wte wpe"),
    "llama": ({"layers": LLAMA}, "norm", "embed_tokens"),
    "mistral": ({"layers": LLAMA}, "norm", "embed_tokens"),
    "qwen2": ({"layers": LLAMA}, "norm", "embed_tokens"),
    "qwen3": ({"layers": LLAMA}, "norm", "embed_tokens"),
    "gemma": ({"layers": LLAMA}, "norm", "embed_tokens"),
    "gemma2": ({"layers": GEMMA2}, "norm", "embed_tokens"),
    "phi3": ({"layers": PHI3}, "norm", "embed_tokens"),
    "t5": (
        {
            "encoder.block": t5("wi", "", "SelfAttention"),
            "decoder.block": t5("wi", "", "SelfAttention", "EncDecAttention"),
        },
        T5_NORMS,
        T5_TABLES,
    ),
    "t5_gated": (
        {
            "encoder.block": t5("wi_0 wi_1", "wi_0", "SelfAttention"),
            "decoder.block": t5("wi_0 wi_1", "wi_0", "SelfAttention", "EncDecAttention"),
        },
        T5_NORMS,
        T5_TABLES,
    ),
    "bart": (
        {"encoder.layers": bart("self_attn"), "decoder.layers": bart("self_attn", "encoder_attn")},
        BART_NORMS,
        BART_TABLES,
    ),
    "whisper": (
        {"encoder.layers": bart("self_attn"), "decoder.layers": bart("self_attn", "encoder_attn")},
        "encoder.layer_norm decoder.layer_norm",
        WHISPER_TABLES,
    ),
    "vit": ({"layers": VIT}, "layernorm", PATCHES),
    "deit": ({"layers": VIT}, "layernorm", PATCHES),
    "dinov2": ({"encoder.layer": DINOV2}, "layernorm", PATCHES),
    "ast": ({"layers": VIT}, "layernorm", PATCHES),
    "swin": (
        {"encoder.layers.0.blocks": VIT, "encoder.layers.1.blocks": VIT},
        "embeddings.norm layernorm",
        PATCHES,
    ),
}

DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3")
HEADS: dict[tuple[str, Head], list[str]] = {
    ("bert", "cls"): ["classifier"],
    ("bert", "lm"): ["cls.predictions.transform.dense", "cls.predictions.decoder"],
    ("roberta", "cls"): ["classifier.dense", "classifier.out_proj"],
    ("roberta", "lm"): ["lm_head.dense", "lm_head.decoder"],
    ("distilbert", "cls"): ["pre_classifier", "classifier"],
    ("distilbert", "lm"): ["vocab_transform", "vocab_projector"],
    ("t5", "cls"): ["classification_head.dense", "classification_head.out_proj"],
    ("t5_gated", "cls"): ["classification_head.dense", "classification_head.out_proj"],
    ("bart", "cls"): ["classification_head.dense", "classification_head.out_proj"],
    ("whisper", "cls"): ["projector", "classifier"],
    ("whisper", "lm"): ["proj_out"],
    ("ast", "cls"): ["classifier.dense"],
    **{(name, "cls"): ["classifier"] for name in ("vit", "deit", "dinov2", "swin")},
    **{(name, "lm"): ["lm_head"] for name in ("t5", "t5_gated", "bart", *DECODERS)},
    **{(name, "cls"): ["score"] for name in DECODERS},
}


def expected_names(family: str, role: str) -> set[str]:
    stacks, norms, embeddings = EXPECTED[family]
    blocks = {f"{stack}.{index}": names for stack, names in stacks.items() for index in range(2)}
    outside = {"norms": norms, "embeddings": embeddings}.get(role, "").split()
    return {f"{block}.{name}" for block, names in blocks.items() for name in names.get(role, [])} | set(outside)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_expected_names_in_each_role(family: str):
    topology = find_topology(FAMILIES[family].build())
    assert topology.blocks == tuple(f"{stack}.{index}" for stack in EXPECTED[family][0] for index in range(2))
    for role in (*BLOCK_ROLES, "embeddings"):
        names = getattr(topology, role)
        assert set(names) == expected_names(family, role), role
        assert len(names) == len(set(names)), role
    in_blocks = {name for role in BLOCK_ROLES[:-1] for name in expected_names(family, role)}
    assert set(topology.linears) == in_blocks
    assert topology.head == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_writers_are_embeddings_attention_out_and_ffn_out_in_model_order(family: str):
    model = FAMILIES[family].build()
    topology = find_topology(model)
    writers = set(topology.embeddings + topology.attention_out + topology.ffn_out) - {"encoder.conv1"}  # feeds conv2
    order = [name for name, _ in model.named_modules()]
    assert topology.residual_writers == tuple(name for name in order if name in writers)


@pytest.mark.parametrize("family", FAMILIES)
def test_ffn_out_writes_the_width_of_its_block_and_the_last_width_is_the_hidden_size(family: str):
    model = FAMILIES[family].build()
    topology = find_topology(model)
    assert topology.hidden_size == model.config.hidden_size == topology.block(-1).width
    assert topology.num_blocks == len(topology.blocks)
    for block in topology.layout:
        assert block.ffn_out
        for name in block.ffn_out:
            module = model.get_submodule(name)
            assert getattr(module, "out_features", getattr(module, "nf", None)) == block.width
    assert {block.width for block in topology.layout} == ({16, 32} if family == "swin" else {32})


@pytest.mark.parametrize(("family", "head"), HEADS, ids="-".join)
def test_a_head_is_found_and_the_base_below_it_keeps_its_names(family: str, head: Head):
    model = FAMILIES[family].build(head=head)
    topology, base = find_topology(model), find_topology(FAMILIES[family].build())
    assert list(topology.head) == HEADS[family, head]
    for role in (*BLOCK_ROLES, "embeddings", "blocks"):
        names = tuple(name.removeprefix(f"{model.base_model_prefix}.") for name in getattr(topology, role))
        wanted = getattr(base, role)
        if (family, head) == ("whisper", "cls"):  # the encoder alone
            wanted = tuple(name for name in wanted if name.startswith("encoder."))
        assert names == wanted, role


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_read_from_the_weights(family: str):
    with torch.device("meta"):
        model = FAMILIES[family].build()
    assert next(model.parameters()).is_meta
    assert find_topology(model) == find_topology(FAMILIES[family].build())


def tree(**children: nn.Module | tuple[int, int]) -> nn.Module:
    """A module with these children; (in, out) is a linear."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, nn.Linear(*child) if isinstance(child, tuple) else child)
    return module


def old_vit_block() -> nn.Module:
    return tree(
        attention=tree(
            attention=tree(query=(32, 32), key=(32, 32), value=(32, 32)), output=tree(dense=(32, 32), d=nn.Dropout())
        ),
        intermediate=tree(dense=(32, 48)),
        output=tree(dense=(48, 32), dropout=nn.Dropout()),
        layernorm_before=nn.LayerNorm(32),
        layernorm_after=nn.LayerNorm(32),
    )


def test_the_older_vit_spelling_is_found():
    vit = tree(
        embeddings=tree(patch_embeddings=tree(projection=nn.Conv2d(3, 32, 8, 8))),
        encoder=tree(layer=nn.ModuleList(old_vit_block() for _ in range(2))),
        layernorm=nn.LayerNorm(32),
        pooler=tree(dense=(32, 32)),
    )
    topology = find_topology(tree(vit=vit, classifier=(32, 3)))
    for role in BLOCK_ROLES:
        names = {f"vit.encoder.layer.{index}.{name}" for index in range(2) for name in OLD_VIT[role]}
        assert set(getattr(topology, role)) == names | ({"vit.layernorm"} if role == "norms" else set()), role
    assert topology.embeddings == ("vit.embeddings.patch_embeddings.projection",)
    assert topology.head == ("classifier",)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "whisper", "swin"])
def test_a_model_wrapped_by_peft_has_the_same_names_below_the_wrapper(family: str):
    head = "cls" if family in ("bert", "swin") else "lm"
    plain = find_topology(FAMILIES[family].build(head=head))
    save = list(plain.head) if head == "cls" else None
    config = LoraConfig(r=2, target_modules=list(plain.linears + plain.embeddings[:1]), modules_to_save=save)
    wrapped = find_topology(get_peft_model(FAMILIES[family].build(head=head), config))
    for role in ROLES:
        assert getattr(wrapped, role) == tuple(f"base_model.model.{name}" for name in getattr(plain, role)), role


def test_a_saved_head_of_several_layers_is_named_inside_its_wrapper():
    model = get_peft_model(
        FAMILIES["roberta"].build(head="cls"), LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    )
    inside = "base_model.model.classifier.original_module"
    assert find_topology(model).head == (f"{inside}.dense", f"{inside}.out_proj")


def test_adapters_added_in_place_and_prompt_encoders_are_not_part_of_the_model():
    model = FAMILIES["llama"].build(head="lm")
    plain = find_topology(model)
    prompted = get_peft_model(
        FAMILIES["llama"].build(head="lm"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    assert isinstance(prompted, PeftModel)
    assert find_topology(prompted).embeddings == tuple(f"base_model.{name}" for name in plain.embeddings)
    model.add_adapter(LoraConfig(target_modules=["q_proj", "down_proj"]))
    assert find_topology(model) == plain


class Wrapper(nn.Module):
    """What a method makes of a block: PEFT's convention `base_layer`, a module of its own beside it."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer, self.adapter = base_layer, nn.Linear(32, 4)


def test_blocks_that_a_method_wraps_whole_keep_their_names():
    model = FAMILIES["vit"].build()
    plain = find_topology(model)
    model.layers = nn.ModuleList(Wrapper(block) for block in model.get_submodule("layers").children())
    wrapped = find_topology(model)
    assert wrapped.blocks == plain.blocks
    assert wrapped.block(1).ffn_in == ("layers.1.base_layer.mlp.fc1",)
    assert len(wrapped.linears) == len(plain.linears)
    flat = stack(q=(32, 32), v=(32, 32), o=(32, 32), up=(32, 64), down=(64, 32))
    flat.add_module("layers", nn.ModuleList(Wrapper(block) for block in flat.get_submodule("layers").children()))
    assert find_topology(flat).attention_out == ("layers.0.base_layer.o", "layers.1.base_layer.o")


class Quantised(nn.Module):
    """A linear as quantisation libraries make them: no nn.Linear, packed weight."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        assert isinstance(linear, nn.Linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(linear.weight.numel() // 2, dtype=torch.uint8))


def test_quantised_linears_are_found_by_their_sizes():
    model = FAMILIES["phi3"].build()
    plain = find_topology(model)
    for name in plain.linears:
        model.set_submodule(name, Quantised(model.get_submodule(name)))
    assert find_topology(model) == plain


def stack(**children: nn.Module | tuple[int, int]) -> nn.Module:
    """A model of two blocks, each with these children."""
    return tree(
        embed=nn.Embedding(9, 32), layers=nn.ModuleList(copy.deepcopy(tree(**children)) for _ in range(2)), out=(32, 9)
    )


class Attention(nn.Module):
    """Projections with names that say nothing, in a module whose class does."""

    def __init__(self):
        super().__init__()
        self.inputs, self.last = nn.Linear(32, 96), nn.Linear(32, 32)


MIXER = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "proj": (32, 32)}
PLAIN = {
    "named attention module": ({"attn": tree(a=(32, 32), b=(32, 32), c=(32, 32), d=(32, 32))}, "attn.d", ""),
    "named attention class": ({"sub": Attention()}, "sub.last", ""),
    "attention known by its projections": ({"mixer": tree(**MIXER)}, "mixer.proj", "mixer.q mixer.v"),
    "flat": ({"q": (32, 32), "k": (32, 32), "v": (32, 32), "o": (32, 32)}, "o", "q v"),
    "torch.nn.MultiheadAttention": ({"self_attn": nn.MultiheadAttention(32, 4)}, "self_attn.out_proj", ""),
}
FEED_FORWARDS = {
    "widening": ({"a": (32, 64), "b": (64, 32)}, "a", "b"),
    "narrowing": ({"a": (32, 8), "b": (8, 32)}, "a", "b"),
    "square, named": ({"fc2": (32, 32), "fc1": (32, 32)}, "fc1", "fc2"),
    "square, in order": ({"ff": nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))}, "ff.0", "ff.2"),
    "named like projections": (
        {"feed_forward": tree(key=(32, 64), value=(64, 32))},
        "feed_forward.key",
        "feed_forward.value",
    ),
    "named like a gated one": ({"w1": (32, 64), "w2": (64, 32)}, "w1", "w2"),
    "with a router beside": ({"up": (32, 64), "down": (64, 32), "router": (32, 5)}, "up", "down"),
}


@pytest.mark.parametrize("attention", PLAIN)
@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
def test_a_plain_torch_transformer_is_understood_where_it_is_unambiguous(attention: str, feed_forward: str):
    mixing, out, qv = PLAIN[attention]
    mlp, first, last = FEED_FORWARDS[feed_forward]
    topology = find_topology(stack(**mixing, norm=nn.LayerNorm(32), **mlp))
    assert topology.blocks == ("layers.0", "layers.1")
    block = topology.block(1)
    assert block.attention_out == (f"layers.1.{out}",)
    assert set(block.attention_qv) == {f"layers.1.{name}" for name in qv.split()}
    assert (block.ffn_in, block.ffn_gate, block.ffn_out) == ((f"layers.1.{first}",), (), (f"layers.1.{last}",))
    assert block.norms == ("layers.1.norm",)
    assert (topology.embeddings, topology.head, topology.hidden_size) == (("embed",), ("out",), 32)


def test_the_norms_tell_the_width_where_every_inner_size_is_the_same():
    attention = tree(o_proj=(64, 32), qkv_proj=(32, 192), extra=(64, 64))
    block = find_topology(stack(attn=attention, norm=nn.RMSNorm(32), down=(64, 32), up=(32, 64))).block(0)
    assert (block.width, block.ffn_in, block.attention_in) == (32, ("layers.0.up",), ("layers.0.attn.qkv_proj",))


def test_norms_inside_attention_are_not_residual_norms():
    flat = {"q": (32, 32), "k": (32, 32), "v": (32, 32), "o": (32, 32), "q_norm": nn.RMSNorm(32)}
    topology = find_topology(stack(**flat, k_ln=nn.LayerNorm(32), ln=nn.LayerNorm(32), up=(32, 64), down=(64, 32)))
    assert topology.block(0).norms == ("layers.0.ln",)
    attention = tree(**MIXER, inner=nn.LayerNorm(32))
    assert find_topology(stack(attn=attention, ln=nn.LayerNorm(32), up=(32, 64), down=(64, 32))).norms == (
        "layers.0.ln",
        "layers.1.ln",
    )


def test_what_else_reads_the_stream_in_an_attention_is_no_projection_of_it():
    block = find_topology(stack(attn=tree(**MIXER, positions=(32, 32)), up=(32, 64), down=(64, 32))).block(0)
    assert block.attention_in == tuple(f"layers.0.attn.{name}" for name in "qkv")
    assert "layers.0.attn.positions" in block.linears


def experts() -> nn.Module:
    module = nn.Module()
    module.gate_up_proj = nn.Parameter(torch.zeros(4, 96, 32))
    return module


def misstated() -> nn.Module:
    model = FAMILIES["bert"].build()
    model.config.hidden_size = 64
    return model


QKV = dict.fromkeys(("q_proj", "k_proj", "v_proj"), (32, 32))
REFUSED = {
    "a CNN": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "there is none; the closest modules are"),
    "an MLP": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), "there is none.* 0"),
    "no modules": (nn.Identity, "there is none; the closest modules are none"),
    "swapped names": (lambda: stack(attn=tree(**MIXER), fc1=(64, 32), fc2=(32, 64)), "fc1' is named like"),
    "nobody reads fc1": (
        lambda: stack(attn=tree(**MIXER), fc1=(32, 64), fc2=(48, 32)),
        "fc1' writes size 64, which no",
    ),
    "three squares": (
        lambda: stack(attn=tree(**MIXER), a=(32, 32), b=(32, 32), c=(32, 32)),
        "cannot tell the feed-forward's first linear from its last among 'layers.0.a', 'layers.0.b', 'layers.0.c'",
    ),
    "two attention outputs": (
        lambda: stack(attn=tree(**QKV, o_proj=(32, 32), out_proj=(32, 32)), fc1=(32, 64), fc2=(64, 32)),
        "cannot tell which of 'layers.0.attn.o_proj', 'layers.0.attn.out_proj' is the attention output",
    ),
    "an output beside the stream": (
        lambda: stack(attn=tree(**QKV, o_proj=(32, 24)), fc1=(32, 64), fc2=(64, 32)),
        "o_proj' is named like an attention output but does not write size 32",
    ),
    "a query from elsewhere": (
        lambda: stack(attn=tree(q=(24, 32), k=(32, 32), v=(32, 32), o=(32, 32)), fc1=(32, 64), fc2=(64, 32)),
        "attn.q' is named like a query projection but does not read size 32",
    ),
    "experts": (lambda: stack(attn=tree(**MIXER), mlp=experts()), "mlp.gate_up_proj' stacks the matrices"),
    "config disagrees": (misstated, "width 32, but config.hidden_size is 64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_clear_transformer_is_refused_with_the_closest_names(case: str):
    build, reason = REFUSED[case]
    with pytest.raises(ValueError, match=r"(?s)find_topology looked in .*" + reason + ".*pass target_modules"):
        find_topology(build())


def test_a_block_out_of_range_is_refused():
    topology = find_topology(FAMILIES["t5"].build())
    assert (topology.block(2).stack, topology.block(-1).name) == ("decoder.block", "decoder.block.1")
    with pytest.raises(ValueError, match=r"blocks 0\.\.3"):
        topology.block(4)
