"""start="l1" and "fisher": side blocks of block="mirror" that are cut out of the model's own by importance."""

import copy
import warnings
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from petune.adapters.side import LadderBlock, LadderSideConfig, start
from petune.adapters.side.start import ORDERS, block_parameters, check_mirror, cut, fisher_start
from tests.adapters.harness import build, inputs, output, train
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES, Head

SLIMMED = [family for family in FAMILIES if family != "swin"]
GROUPED = ["llama", "qwen2", "qwen3", "gemma2"]  # several query heads share a key


def config(**fields: Any) -> LadderSideConfig:
    return LadderSideConfig(**{"block": "mirror", "reduction_factor": 2, "side_layers": [0, 1], **fields})


def mirrored(family: str, head: Head = "cls", base: Any = None, **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(uneven(build(family, head)) if base is None else base, config(**fields)).eval()


def uneven(model: Any) -> Any:
    """The model with no two weights alike, so that a value tells where it was cut out of."""
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LadderBlock)]


def mirror(layer: Any) -> Any:
    return layer.petune_ladder_rung["default"].block


def slim(layer: Any) -> dict[str, Tensor]:
    return {name.replace(".product.", "."): p.detach() for name, p in mirror(layer).block.named_parameters()}


# --- the paper's way, written down once more for T5 ---


def strongest(rows: Tensor, factor: int) -> list[int]:
    norms = [float(row.abs().sum()) for row in rows]
    dropped = sorted(range(len(norms)), key=lambda row: norms[row])[: round(len(norms) * (1 - 1 / factor))]
    return sorted(set(range(len(norms))) - set(dropped))


def cut_t5(weights: dict[str, Tensor], measure: dict[str, Tensor], kept: list[int]) -> tuple[Any, list[int]]:
    """(weights of half the size, hidden features that come out)    (Sung et al. 2022, section 3.3)"""
    out: dict[str, Tensor] = {}

    def prune(names: list[str], columns: list[int]) -> list[int]:
        product: Any = 1
        for name in names:
            product = product * measure[f"{name}.weight"][:, columns]
        rows = strongest(product, 2)
        for name in names:
            out[f"{name}.weight"] = weights[f"{name}.weight"][rows][:, columns]
        return rows

    decoder = "layer.2.layer_norm.weight" in weights
    for number, name in enumerate(("SelfAttention", "EncDecAttention") if decoder else ("SelfAttention",)):
        attention, norm = f"layer.{number}.{name}", f"layer.{number}.layer_norm.weight"
        out[norm] = weights[norm][kept]
        kept = prune([f"{attention}.o"], prune([f"{attention}.{part}" for part in "qkv"], kept))
    ffn, norm = f"layer.{1 + decoder}.DenseReluDense", f"layer.{1 + decoder}.layer_norm.weight"
    out[norm] = weights[norm][kept]
    return out, prune([f"{ffn}.wo"], prune([f"{ffn}.wi"], kept))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_it_keeps_what_the_paper_keeps(stack: str, bits: int) -> None:
    model = mirrored("t5", "none", bits=bits)
    layer = layers(model)[0 if stack == "encoder" else 2]
    weights = block_parameters(layer.get_base_layer())
    measure = {name: torch.randn_like(weight) for name, weight in weights.items()}
    kept = sorted(torch.randperm(32)[:16].tolist())
    expected, leaves = cut_t5(weights, measure, kept)
    assert cut(mirror(layer), layer.get_base_layer(), measure, torch.tensor(kept)).tolist() == leaves
    found = slim(layer)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_of_equal_rows_the_first_are_dropped() -> None:
    assert start._strongest(torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0]), 3).tolist() == [1, 3, 4]


def test_without_features_to_go_on_from_the_most_read_ones_go_in() -> None:
    layer = layers(mirrored("t5", "none", start="l1"))[0]
    weights = block_parameters(layer.get_base_layer())
    read = sum(weights[f"layer.0.SelfAttention.{part}.weight"].abs().sum(dim=0) for part in "qkv")
    assert isinstance(read, Tensor)
    expected, _ = cut_t5(weights, weights, strongest(read[:, None], 2))
    assert all(torch.equal(slim(layer)[name], weight) for name, weight in expected.items())


# --- every family ---


def places(part: Tensor, whole: Tensor) -> Tensor:
    """Where each value of `part` is in `whole`, counted along the flattened; fails where one is not."""
    order = whole.flatten().sort()
    at = torch.searchsorted(order.values, part.flatten()).clamp(max=whole.numel() - 1)
    assert torch.equal(order.values[at], part.flatten())
    return order.indices[at].view(part.shape)


@pytest.mark.parametrize("family", SLIMMED)
def test_every_matrix_is_rows_and_columns_of_the_models(family: str) -> None:
    model = mirrored(family, "none", start="l1")
    for layer in layers(model):
        source = block_parameters(layer.get_base_layer())
        for name, part in slim(layer).items():
            at = places(part, source[name])
            if part.dim() == 2:
                rows, columns = at // source[name].shape[1], at % source[name].shape[1]
                assert torch.equal(rows, rows[:, :1].expand_as(rows)), name
                assert torch.equal(columns, columns[:1].expand_as(columns)), name
                for which in (rows[:, 0], columns[0]):
                    assert len(which.unique()) == len(which), name


@pytest.mark.parametrize("family", SLIMMED)
def test_a_bias_comes_from_the_rows_of_its_weight(family: str) -> None:
    layer = layers(mirrored(family, "none", start="l1"))[0]
    source, found = block_parameters(layer.get_base_layer()), slim(layer)
    for name in [
        name for name in found if name.endswith(".bias") and found.get(name[:-4] + "weight", name) is not name
    ]:
        weight = name[:-4] + "weight"
        if found[weight].dim() == 2:
            conv = family == "gpt2"
            at = places(found[weight], source[weight])
            rows = (at % source[weight].shape[1])[0] if conv else (at // source[weight].shape[1])[:, 0]
            assert torch.equal(places(found[name], source[name]), rows), name


@pytest.mark.parametrize("family", SLIMMED)
def test_what_a_matrix_reads_is_what_the_one_before_it_writes(family: str) -> None:
    layer = layers(mirrored(family, "none", start="l1"))[-1]
    source, found = block_parameters(layer.get_base_layer()), slim(layer)
    stages = [stage for stage in start._read_order(FAMILIES[family].model_type) if f"{stage.names[0]}.weight" in found]
    linears = [stage for stage in stages if found[f"{stage.names[0]}.weight"].dim() == 2]
    norms = [stage for stage in stages if stage not in linears]
    assert len(linears) in (4, 6)
    assert len(norms) >= 2

    def sides(name: str) -> tuple[Tensor, Tensor]:
        weight = f"{name}.weight"
        one, all_of_it = found[weight], source[weight]
        if family == "gpt2":
            one, all_of_it = one.T, all_of_it.T
        at = places(one, all_of_it.contiguous())
        return (at // all_of_it.shape[1])[:, 0], (at % all_of_it.shape[1])[0]

    for before, after in pairwise(linears):
        written, read = sides(before.names[0])[0], sides(after.names[0])[1]
        assert torch.equal(written[: len(read)], read), after  # a fused one writes more below
        for other in after.names[1:]:
            assert torch.equal(sides(other)[1], read), other


@pytest.mark.parametrize("family", [*GROUPED, "phi3"])
def test_query_heads_keep_the_features_of_the_key_they_share(family: str) -> None:
    layer = layers(mirrored(family, "none", start="l1"))[0]
    attention, source, found = layer.get_base_layer().self_attn, block_parameters(layer.get_base_layer()), slim(layer)
    head, groups = attention.head_dim, attention.num_key_value_groups
    assert groups == 2
    name = "self_attn.qkv_proj.weight" if family == "phi3" else "self_attn.{}_proj.weight"
    rows: dict[str, Tensor] = {}
    for part in "qkv":
        key = name.format(part)
        rows[part] = (places(found[key], source[key]) // source[key].shape[1])[:, 0]
    if family == "phi3":
        parts = rows["q"].split([16, 8, 8])
        rows = {part: which - offset for part, which, offset in zip("qkv", parts, (0, 32, 48), strict=True)}
    assert torch.equal(rows["k"], rows["v"])
    slim_head = head // 2
    for row, queried in enumerate(rows["q"].tolist()):
        shared = row // slim_head // groups * slim_head + row % slim_head  # the key feature it is multiplied with
        keyed = int(rows["k"][shared])
        assert (queried // head // groups, queried % head) == (keyed // head, keyed % head)


def test_norms_of_heads_keep_every_rth_feature() -> None:
    layer = layers(mirrored("qwen3", "none", start="l1"))[0]
    source = layer.get_base_layer().self_attn.q_norm.weight
    assert torch.equal(mirror(layer).block.self_attn.q_norm.weight, source[::2])


# --- fisher ---


def batches(family: str, sizes: Iterable[int]) -> list[Any]:
    return [FAMILIES[family].inputs(size, seed=seed, head="cls") for seed, size in enumerate(sizes)]


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_importance_is_the_sum_of_squared_gradients_of_single_samples(family: str) -> None:
    base = build(family)
    reference: Any = copy.deepcopy(base)
    model = mirrored(family, base=base, start="fisher")
    kept: list[Any] = []
    fisher_start(model, batches(family, (3, 2)))
    blocks = [layer.get_base_layer() for layer in layers(model)]
    names = {block: next(n for n, m in model.get_base_model().named_modules() if m is block) for block in blocks}
    sums: dict[str, Tensor] = {}
    for batch in batches(family, (3, 2)):
        for row in range(len(batch["labels"])):
            reference.zero_grad()
            reference(**{name: value[row : row + 1] for name, value in batch.items()}).loss.backward()
            for name, parameter in reference.named_parameters():
                if parameter.grad is not None:
                    sums[name] = sums.get(name, torch.zeros_like(parameter)) + parameter.grad.square()
    again = mirrored(family, base=copy.deepcopy(reference), start="random")
    columns = None
    for layer, block in zip(layers(again), blocks, strict=True):
        path = names[block].removesuffix(".base_layer")
        measure = {name: sums[f"{path}.{name}"] for name in block_parameters(block)}
        place = layer.names["default"]
        columns = cut(mirror(layer), layer.get_base_layer(), measure, None if place.rung == 0 else columns)
        kept.append(columns)
    for ours, theirs in zip(layers(model), layers(again), strict=True):
        for name, weight in slim(ours).items():
            assert relative_error(weight, slim(theirs)[name]) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_the_model_as_it_was(training: bool) -> None:
    model = mirrored("bert", start="fisher").train(training)
    layers(model)[0].petune_ladder_entry["default"].training = not training

    def state() -> list[Any]:
        return [
            [module.training for module in model.modules()],
            [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()],
            model.active_adapters,
        ]

    before, weights = state(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fisher_start(model, batches("bert", (2,)))
    assert state() == before
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(weights[name], tensor)]
    assert changed
    assert [name for name in changed if ".block.block." not in name] == []


def test_no_more_samples_are_run_than_asked_for() -> None:
    model, runs = mirrored("bert", start="fisher"), []
    model.get_base_model().register_forward_hook(lambda *_: runs.append(1))
    fisher_start(model, batches("bert", (2, 2, 2)), samples=3)
    assert len(runs) == 3


def test_a_started_ladder_starts_as_the_base_and_trains() -> None:
    for fields in ({"start": "l1"}, {"start": "fisher"}):
        model, batch = mirrored("t5", base=build("t5"), **fields), inputs("t5")
        if fields["start"] == "fisher":
            fisher_start(model, [batch])
        with model.disable_adapter():
            base = output(model, batch)
        assert torch.equal(output(model, batch), base)
        losses = train(model, batch, lr=1e-2)
        assert losses[-1] < losses[0]


# --- when it is not called, and when it cannot be done ---


def warned(model: nn.Module, steps: int = 2) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        train(model, inputs("bert"), steps=steps)
    return [str(one.message) for one in found if "fisher_start" in str(one.message)]


def test_training_without_the_fisher_start_warns_once(tmp_path: Any) -> None:
    model = mirrored("bert", base=build("bert"), start="fisher")
    output(model, inputs("bert"))
    assert len(warned(model)) == 1
    assert (
        "call petune.adapters.side.fisher_start(model, batches)"
        in warned(mirrored("bert", base=build("bert"), start="fisher"))[0]
    )
    model.save_pretrained(tmp_path)
    assert warned(PeftModel.from_pretrained(build("bert"), tmp_path, is_trainable=True)) == []
    started = mirrored("bert", base=build("bert"), start="fisher")
    fisher_start(started, batches("bert", (1,)))
    assert warned(started) == []


def test_nothing_is_cut_where_a_checkpoint_is_loaded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mirrored("bert", base=build("bert"), start="l1")
    train(model, inputs("bert"))
    model.save_pretrained(tmp_path)

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(start, "cut", refuse)
    for options in ({}, {"low_cpu_mem_usage": True}, {"low_cpu_mem_usage": True, "is_trainable": True}):
        again = PeftModel.from_pretrained(build("bert"), tmp_path, **options).eval()
        assert torch.equal(output(again, inputs("bert")), output(model, inputs("bert")))


def test_weights_on_the_meta_device_cannot_be_cut() -> None:
    with torch.device("meta"):
        base = build("bert")
    with pytest.raises(
        ValueError, match=r"start='l1' needs float weights, and 'attention.self.query.weight' has none"
    ):
        mirrored("bert", base=base, start="l1")


def test_a_quantised_base_cannot_be_cut() -> None:
    base: Any = build("bert")
    model = mirrored("bert", base=copy.deepcopy(base), start="fisher")
    for one in (base, model.get_base_model()):
        layer = one.get_submodule("bert.encoder.layer.1")
        linear = getattr(layer, "base_layer", layer).output.dense
        linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"start='l1' needs float weights, and 'output.dense.weight' has none"):
        mirrored("bert", base=base, start="l1")
    with pytest.raises(ValueError, match=r"start='fisher' needs gradients of the base, which is quantised"):
        fisher_start(model, batches("bert", (1,)))


def test_a_family_of_unknown_order_is_refused() -> None:
    base = AutoModel.from_config(AutoConfig.for_model("opt", **OPT))
    with pytest.raises(
        ValueError, match=r"start='l1' knows the blocks of bert, .*, and these are of 'opt'; use start="
    ):
        mirrored("opt", base=base, start="l1")
    mirrored("opt", base=base)  # at random it is slimmed all the same


OPT = {"vocab_size": 99, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "ffn_dim": 48} | {
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def test_what_cannot_be_made_is_known_before() -> None:
    swin, opt = build("swin", "none"), AutoModel.from_config(AutoConfig.for_model("opt", **OPT))
    with pytest.raises(ValueError, match=r"cannot slim a SwinLayer"):
        check_mirror(config(), swin.get_submodule("encoder.layers.0.blocks.0"))
    with pytest.raises(ValueError, match=r"knows the blocks of"):
        check_mirror(config(start="fisher"), opt.get_submodule("decoder.layers.0"))
    check_mirror(config(), opt.get_submodule("decoder.layers.0"))


def test_every_family_that_can_be_slimmed_has_an_order() -> None:
    assert {FAMILIES[family].model_type for family in SLIMMED} == set(ORDERS)


def test_batches_need_labels_and_there_must_be_some() -> None:
    model, batch = mirrored("bert", start="fisher"), dict(inputs("bert"))
    del batch["labels"]
    with pytest.raises(ValueError, match=r"a batch of input_ids, attention_mask has no labels, .* or use start='l1'"):
        fisher_start(model, [batch])
    with pytest.raises(ValueError, match=r"there are no batches; pass those"):
        fisher_start(model, [])


def test_another_start_is_not_started_so() -> None:
    with pytest.raises(ValueError, match=r"adapter 'default' does not start so; use LadderSideConfig\(block='mirror'"):
        fisher_start(mirrored("bert", start="l1"), batches("bert", (1,)))
