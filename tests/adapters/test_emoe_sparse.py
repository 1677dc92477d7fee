"""The ways out: merged dense, merged with its routing, and sparse, where only chosen experts are computed."""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from petune.adapters.emoe.routed import RoutedConv1D, RoutedLinear
from petune.adapters.emoe.sparse import ExpertsIn, ExpertsOut, sparsify
from petune.kernels import chooser
from tests.adapters.emoe_models import adapted, chosen_by, config, head_of, routed_layers, routers
from tests.adapters.harness import assert_same_tensors, build, inputs, output, snapshot
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES

EXACT = TOLERANCE[torch.float32]
GONE = (
    "routing removed (EMoE2Dense): outputs change unless top_k == num_experts; merge_and_unload(keep_routing=True) "
    "keeps it."
)
KEPT: list[dict[str, Any]] = [
    *({"router": "random"}, {"router": "learned"}, {"score": "inter_abs"}, {"score": "up"}, {"score_bias": True}),
    {"r": 0, "train_ffn": True},
]
SPARSE: list[dict[str, Any]] = [
    *({"top_k": 1}, {"top_k": 3}, {"num_experts": 16, "top_k": 5}, {"score_bias": True}),
    *({"router": "random"}, {"router": "learned"}, {"cluster": "contiguous"}),
]


@contextmanager
def said() -> Iterator[list[str]]:
    """The warnings about routing and sparsity."""
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lines
    lines += [str(one.message) for one in caught if "rout" in str(one.message) or "sparsify" in str(one.message)]


def tuner_of(model: PeftModel) -> Any:
    return model.base_model


# --------------------------------------------------------------------------------------------------------- merged


@pytest.mark.parametrize("family", ["bert", "gpt2", "phi3"])
def test_merged_the_model_is_dense_with_lora_folded_in_and_says_so_once(family: str):
    batch = inputs(family)
    model = adapted(family, target_modules="all-linear")
    dense = copy.deepcopy(model)
    for router in routers(dense):
        router.top_k = 4
    expected = output(dense, batch)
    with said() as lines:
        merged = model.merge_and_unload()
    assert len(lines) == 1
    assert lines[0] == GONE
    assert relative_error(output(merged, batch), expected) <= EXACT
    assert snapshot(merged).keys() == snapshot(build(family)).keys()


def test_a_dense_adapter_is_merged_without_a_word():
    model = adapted("bert", top_k=4)
    with said() as lines:
        model.merge_adapter()
        model.unmerge_adapter()
        model.merge_and_unload()
    assert lines == []


def test_merged_in_place_the_model_is_dense_until_it_is_unmerged():
    batch = inputs("bert")
    model = adapted("bert", target_modules="all-linear")
    expected = output(model, batch)
    with said() as lines:
        model.merge_adapter()
    assert len(lines) == 1
    assert chosen_by(model, batch) == []
    assert relative_error(output(model, batch), expected) > 1e-3
    model.unmerge_adapter()
    assert relative_error(output(model, batch), expected) <= EXACT


@pytest.mark.parametrize("family", FAMILIES)
def test_with_its_routing_kept_the_merged_model_computes_the_same(family: str):
    # in double precision: AST makes 1.2e-5 of the rounding of one float32 sum
    batch = {name: x.double() if x.is_floating_point() else x for name, x in inputs(family, head_of(family)).items()}
    model = adapted(family, target_modules="all-linear").double()
    expected, chosen = output(model, batch), chosen_by(model, batch)
    with said() as lines:
        merged = tuner_of(model).merge_and_unload(keep_routing=True)
    assert lines == []
    assert relative_error(output(merged, batch), expected) <= EXACT
    assert all(torch.equal(a, b) for a, b in zip(chosen_by(merged, batch), chosen, strict=True))
    stock = build(family, head_of(family))
    assert type(merged) is type(stock)
    assert not any(p.requires_grad for p in merged.parameters())
    loaded = stock.load_state_dict(merged.state_dict(), strict=False)
    assert loaded.missing_keys == []
    assert [name.partition("router.")[2] for name in loaded.unexpected_keys] == ["labels"] * len(chosen)


@pytest.mark.parametrize("fields", KEPT, ids=str)
def test_every_router_and_score_is_kept(fields: dict[str, Any]):
    batch = inputs("llama")
    model = adapted("llama", **fields)
    expected = output(model, batch)
    merged = tuner_of(model).merge_and_unload(keep_routing=True)
    assert relative_error(output(merged, batch), expected) <= EXACT
    assert relative_error(output(copy.deepcopy(merged), batch), expected) <= EXACT
    assert relative_error(output(pickle.loads(pickle.dumps(merged)), batch), expected) <= EXACT


def test_a_routed_linear_stays_a_linear_and_follows_its_dtype():
    for family, kind, plain in (("bert", RoutedLinear, nn.Linear), ("gpt2", RoutedConv1D, Conv1D)):
        merged = tuner_of(adapted(family)).merge_and_unload(keep_routing=True)
        layers = [module for module in merged.modules() if isinstance(module, kind)]
        assert len(layers) == 2
        assert all(isinstance(one, plain) for one in layers)
        batch = inputs(family, dtype=torch.bfloat16)
        expected = output(merged, batch).float()
        assert relative_error(output(merged.bfloat16(), batch).float(), expected) < 0.05  # a few tokens may turn


def test_a_routed_model_is_saved_and_read_as_the_dense_stock_model(tmp_path: Path):
    model = adapted("bert", target_modules="all-linear")
    dense = copy.deepcopy(model).merge_and_unload()
    tuner_of(model).merge_and_unload(keep_routing=True).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert_same_tensors(loaded.state_dict(), dense.state_dict())


def test_the_adapters_to_keep_are_named():
    model = adapted("bert", layers=[1])
    model.add_adapter("second", config(layers=[0], init_weights=False))
    batch = inputs("bert")
    model.base_model.set_adapter(["default", "second"])
    both = output(model, batch)
    model.set_adapter("second")
    expected = output(model, batch)
    twin = copy.deepcopy(model)
    merged = tuner_of(twin).merge_and_unload(keep_routing=True, adapter_names=["default", "second"])
    assert relative_error(output(merged, batch), both) <= EXACT
    merged = tuner_of(model).merge_and_unload(keep_routing=True)
    assert relative_error(output(merged, batch), expected) <= EXACT
    assert sum(isinstance(module, RoutedLinear) for module in merged.modules()) == 1


# ------------------------------------------------------------------------------------------------------------ sparse


@pytest.fixture
def choose(monkeypatch) -> Callable[[str], list[Any]]:
    """Forces a form; gives the keys that were asked for."""

    def force(form: str) -> list[Any]:
        keys: list[Any] = []

        def chosen(key: Any, candidates: Any, default: str, device: Any, **_: Any) -> str:
            assert form in candidates
            keys.append(key)
            return form

        monkeypatch.setattr(chooser, "choose", chosen)
        return keys

    return force


def with_biases(model: PeftModel) -> PeftModel:
    """transformers starts them at zero, where no score would tell them."""
    for layer in routed_layers(model).values():
        if (bias := layer.base_layer.bias) is not None:
            nn.init.normal_(bias, std=0.3)
    return model


def kept(model: PeftModel) -> nn.Module:
    return tuner_of(model).merge_and_unload(keep_routing=True)


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family_sparse_is_masked_dense(family: str, form: str, choose: Any):
    batch = inputs(family, head_of(family))
    masked = kept(adapted(family, target_modules="all-linear"))
    expected, chosen = output(masked, batch), chosen_by(masked, batch)
    sparse = sparsify(copy.deepcopy(masked))
    count = len(routed_layers(adapted(family)))
    assert sum(isinstance(module, ExpertsOut) for module in sparse.modules()) == count
    keys = choose(form)
    assert relative_error(output(sparse, batch), expected) <= EXACT
    assert len(keys) == count
    assert all(torch.equal(a, b) for a, b in zip(chosen_by(sparse, batch), chosen, strict=True))


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("fields", SPARSE, ids=str)
def test_every_router_and_size_is_met(fields: dict[str, Any], form: str, choose: Any):
    for family in ("gpt2", "llama"):
        batch = inputs(family)
        model = with_biases(adapted(family, **fields))
        expected = output(model, batch)
        choose(form)
        assert relative_error(output(tuner_of(model).sparsify(), batch), expected) <= EXACT


def test_generation_token_by_token_is_the_same(choose: Any):
    batch = {name: v for name, v in inputs("llama", "lm").items() if name != "labels"}
    arguments = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    model = adapted("llama", "lm")
    expected = model.generate(**batch, **arguments)
    choose("sparse")
    assert torch.equal(tuner_of(model).sparsify().generate(**batch, **arguments), expected)


def test_only_the_chosen_experts_are_computed(choose: Any):
    sparse = tuner_of(adapted("bert", num_experts=8, top_k=2)).sparsify()
    inner: list[int] = []
    for block in sparse.bert.encoder.layer:
        block.intermediate.register_forward_hook(lambda _, __, out: inner.append(out.shape[-1]))
    choose("sparse")
    output(sparse, inputs("bert"))
    choose("dense")
    output(sparse, inputs("bert"))
    assert inner == [48 // 4] * 2 + [48] * 2


def test_the_form_is_chosen_once_for_sizes_that_share_a_power_of_two(monkeypatch):
    sparse = tuner_of(adapted("vit", layers=[1])).sparsify()
    linears = [module for module in sparse.modules() if isinstance(module, ExpertsIn)]
    trials: list[set[str]] = []

    def first(candidates: Any) -> str:
        for run in candidates.values():
            assert torch.isfinite(run()).all()
        trials.append(set(candidates))
        return "sparse"

    monkeypatch.setattr(chooser, "_fastest_on_cpu", first)
    monkeypatch.setattr(chooser, "_chosen", {})
    for tokens in (33, 64, 40, 33):
        linears[0](torch.randn(tokens, 32))
    assert trials == [{"sparse", "dense"}]
    linears[0](torch.randn(5, 32))
    assert len(trials) == 2
    monkeypatch.setenv("PETUNE_TUNE", "0")
    linears[0](torch.randn(500, 32))
    assert len(trials) == 2


def test_both_forms_that_are_timed_compute_the_same():
    for family in ("gpt2", "llama", "phi3"):
        sparse = tuner_of(adapted(family)).sparsify()
        first = next(module for module in sparse.modules() if isinstance(module, ExpertsIn))
        x = torch.randn(9, 32)
        chosen = first.router(torch.randn(9, 4))
        experts: Any = first.experts
        assert relative_error(experts._all_in_pairs(x, chosen), experts._all_neurons(x, chosen)) <= EXACT


def test_a_batch_has_no_say_in_what_a_text_gets(choose: Any):
    choose("sparse")
    sparse = tuner_of(adapted("bert", num_experts=8)).sparsify()
    batch = inputs("bert", batch_size=64)
    logits, chosen = output(sparse, batch), chosen_by(sparse, batch)
    length = int(batch["attention_mask"][37].sum())
    alone = {name: value[37:38, :length] for name, value in batch.items() if name != "labels"}
    assert relative_error(output(sparse, alone)[0], logits[37]) <= EXACT
    assert all(torch.equal(a[0], b[37, :length]) for a, b in zip(chosen_by(sparse, alone), chosen, strict=True))


def test_two_threads_do_not_mix_their_calls(choose: Any):
    choose("sparse")
    sparse = tuner_of(adapted("bert")).sparsify()
    batches = [inputs("bert", batch_size=size) for size in (3, 5)]
    expected = [output(sparse, batch) for batch in batches]
    gate, results = threading.Barrier(2, timeout=60), [list[Tensor]() for _ in batches]

    def pause(_: nn.Module, __: Any, ___: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            gate.wait()  # both threads stand between the first linear and the last

    for block in sparse.bert.encoder.layer:
        block.intermediate.register_forward_hook(pause)

    def run(index: int) -> None:
        results[index] += [output(sparse, batches[index]) for _ in range(4)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [len(mine) for mine in results] == [4, 4]
    for mine, logits in zip(results, expected, strict=True):
        assert all(torch.equal(one, logits) for one in mine)


def test_a_call_that_breaks_off_leaves_nothing_for_the_next(choose: Any):
    choose("sparse")
    batch = inputs("bert")
    sparse = tuner_of(adapted("bert")).sparsify()
    expected = output(sparse, batch)
    last = sparse.bert.encoder.layer[1].output.dense
    handle = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        output(sparse, batch)
    handle.remove()
    assert torch.equal(output(sparse, batch), expected)


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_a_tensor_that_is_written_anew_is_routed_anew(form: str, choose: Any):
    choose(form)
    masked = kept(adapted("llama", "none"))
    sparse = sparsify(copy.deepcopy(masked))
    x = torch.empty(7, 32)
    for _ in range(2):
        x.normal_()
        with torch.no_grad():
            assert relative_error(sparse.layers[0].mlp(x), masked.layers[0].mlp(x)) <= EXACT


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_copies_and_pickles_stand_on_their_own(form: str, choose: Any):
    choose(form)
    batch = inputs("llama")
    sparse = tuner_of(adapted("llama")).sparsify()
    expected = output(sparse, batch)
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(output(twin, batch), expected)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert torch.equal(output(sparse, batch), expected)


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_half_precision_routes_as_the_masked_form_does(dtype: torch.dtype, when: str, form: str, choose: Any):
    for family in ("bert", "phi3"):
        batch = inputs(family, dtype=dtype)
        masked = kept(with_biases(adapted(family, score_bias=True)))
        sparse = sparsify(copy.deepcopy(masked).to(dtype if when == "before" else torch.float32)).to(dtype)
        masked = masked.to(dtype)
        choose(form)
        assert relative_error(output(sparse, batch).float(), output(masked, batch).float()) <= 4 * TOLERANCE[dtype]
        first = next(module for module in masked.modules() if isinstance(module, RoutedLinear))
        other = next(module for module in sparse.modules() if isinstance(module, ExpertsIn))
        x = torch.randn(50, 32, dtype=dtype)
        expected, found = (chosen_by_layer(layer, x) for layer in (first, other))
        assert torch.equal(found, expected)


def chosen_by_layer(layer: nn.Module, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = routers(layer)[0].register_forward_hook(lambda _, __, out: found.append(out))
    with torch.no_grad():
        layer(x)
    handle.remove()
    return found[0]


def test_autocast_is_met(choose: Any):
    choose("sparse")
    batch = inputs("bert")
    masked = kept(adapted("bert"))
    sparse = sparsify(copy.deepcopy(masked))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = output(masked, batch), output(sparse, batch)
    assert relative_error(found.float(), expected.float()) <= TOLERANCE[torch.bfloat16]


def test_where_gradients_are_asked_for_all_neurons_are_computed_and_masked(choose: Any):
    keys = choose("sparse")
    masked = kept(adapted("bert", head="none"))
    sparse = sparsify(copy.deepcopy(masked))
    embeddings = masked.embeddings(inputs("bert")["input_ids"]).detach()
    grads, upstream = [], torch.randn(embeddings.shape)
    for model in (masked, sparse):
        x = embeddings.clone().requires_grad_()
        (model(inputs_embeds=x).last_hidden_state * upstream).sum().backward()
        grads.append(x.grad)
    assert keys == []
    assert relative_error(grads[1], grads[0]) <= EXACT
    assert grads[0].any()


def test_no_tokens_are_no_trouble():
    sparse = tuner_of(adapted("llama", "none")).sparsify()
    mlp = sparse.layers[0].mlp
    assert mlp(torch.empty(0, 5, 32)).shape == (0, 5, 32)


# --------------------------------------------------------------------------------------------------- left as it is


def test_a_model_without_routing_is_refused():
    with pytest.raises(
        ValueError, match=r"sparsify found no routed feed-forward in BertModel; pass what merge_and_unl"
    ):
        sparsify(FAMILIES["bert"].build())


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("llama", {"score": "inter"}, r"score='inter' looks at every neuron"),
        ("bert", {"top_k": 4}, r"every expert is chosen"),
    ],
)
def test_routing_that_gains_nothing_stays_dense_with_a_warning(family: str, fields: Any, reason: str):
    batch = inputs(family)
    model = adapted(family, **fields)
    expected = output(model, batch)
    with pytest.warns(UserWarning, match=rf"sparsify leaves the feed-forward at '.*' dense: {reason}\."):
        sparse = tuner_of(model).sparsify()
    assert not any(isinstance(module, ExpertsIn) for module in sparse.modules())
    assert relative_error(output(sparse, batch), expected) <= EXACT


class NormedMlp(nn.Module):
    """A feed-forward that norms its inner values, as no mask before the activation can cut."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.c_fc, self.c_proj, self.act, self.dropout = mlp.c_fc, mlp.c_proj, mlp.act, mlp.dropout
        self.norm = nn.LayerNorm(128)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.norm(self.act(self.c_fc(x))))


def test_a_middle_that_is_not_elementwise_stays_dense_with_a_warning():
    base = build("gpt2")
    base.transformer.h[0].mlp = NormedMlp(base.transformer.h[0].mlp)
    model = get_peft_model(base, config()).eval()
    batch = inputs("gpt2")
    expected = output(model, batch)
    with pytest.warns(UserWarning, match=r"at 'transformer.h.0.mlp.c_fc' dense: '.*norm' weighs its neurons one by"):
        sparse = tuner_of(model).sparsify()
    assert [name for name, m in sparse.named_modules() if isinstance(m, ExpertsIn)] == ["transformer.h.1.mlp.c_fc"]
    assert relative_error(output(sparse, batch), expected) <= EXACT


def test_a_linear_with_a_hook_stays_dense_with_a_warning():
    merged = kept(adapted("bert"))
    merged.bert.encoder.layer[0].output.dense.register_forward_hook(lambda _, __, out: out * 2)
    batch = inputs("bert")
    expected = output(merged, batch)
    with pytest.warns(UserWarning, match=r"dense: '.*layer.0.output.dense' is a Linear, or has hooks\."):
        sparse = sparsify(merged)
    assert relative_error(output(sparse, batch), expected) <= EXACT
    assert sum(isinstance(module, ExpertsIn) for module in sparse.modules()) == 1
