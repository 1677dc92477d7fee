"""Routing: an expert's score, what noise, dropout and other routers do, balance, and that a token stands alone."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from petune.adapters.emoe.router import Router, importance_and_load
from tests.adapters.emoe_models import (
    adapted,
    calls,
    choices,
    chosen_by,
    config,
    mean_by_expert,
    routed_layers,
    routers,
)
from tests.adapters.harness import build, gradients, inputs, output, train
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES, VOCAB

EXACT = TOLERANCE[torch.float32]


def router_of(model: nn.Module) -> Router:
    return next(iter(routers(model)))


def fresh(family: str = "bert", **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(build(family), config(**fields)).eval()


# --------------------------------------------------------------------------------------------------------- the score


@pytest.mark.parametrize("score_bias", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "phi3", "bart"])
def test_a_score_is_the_mean_pre_activation_of_the_live_layer_with_or_without_its_bias(family: str, score_bias: bool):
    model = adapted(family, target_modules="all-linear", score_bias=score_bias)
    layer = next(iter(routed_layers(model).values()))
    layer.router("default").top_k = 3
    if (bias := layer.base_layer.bias) is not None:
        torch.nn.init.normal_(bias)
    with choices(model) as found, calls(layer.base_layer) as base:
        output(model, inputs(family))
    x, z = base[0]
    z = z + x @ layer.get_delta_weight("default").T
    if bias is not None and not score_bias:
        z = z - bias.detach()
    labels = layer.router("default").labels
    expected = torch.stack([z[..., : len(labels)][..., labels == e].mean(-1) for e in range(4)], dim=-1)
    scores, chosen = found[0][0]
    assert relative_error(scores, expected) <= EXACT
    assert torch.equal(chosen, expected.topk(3).indices.sort(-1).values)


GATED = ["llama", "phi3", "t5_gated"]
OTHER_SCORES = [(family, score) for family in [*GATED, "bert", "gpt2"] for score in ("inter", "inter_abs")]
OTHER_SCORES += [(family, score) for family in GATED for score in ("up", "up_abs")]


@pytest.mark.parametrize("score_bias", [False, True])
@pytest.mark.parametrize(("family", "score"), OTHER_SCORES)
def test_other_scores_are_means_of_what_they_name(family: str, score: str, score_bias: bool):
    model = adapted(family, score=score, score_bias=score_bias, cluster="random")
    layer = next(iter(routed_layers(model).values()))
    if (bias := layer.base_layer.bias) is not None:
        torch.nn.init.normal_(bias)
    labels = layer.router("default").labels
    with choices(model) as found, calls(layer.base_layer) as base:
        output(model, inputs(family))
    x, z = base[0]
    gate = z if bias is None or score_bias else z - bias.detach()
    gate, up = gate.chunk(2, -1) if family == "phi3" else (gate, None)
    if family in ("llama", "t5_gated"):
        mlp = next(m for m in model.modules() if any(child is layer for child in m.children()))
        up = (mlp.up_proj if family == "llama" else mlp.wi_1)(x).detach()
    act = {"llama": F.silu, "phi3": F.silu, "bert": F.gelu}.get(family, lambda v: F.gelu(v, approximate="tanh"))
    values = up if score.startswith("up") else act(gate) if up is None else act(gate) * up
    values = values.abs() if score.endswith("abs") else values
    expected = mean_by_expert(values.movedim(-1, 0), labels).movedim(0, -1)
    assert relative_error(found[0][0][0], expected) <= EXACT


def test_scores_know_no_dropout():
    model = adapted("gpt2", target_modules=["c_fc"], lora_dropout=0.5).train()
    layer = next(iter(routed_layers(model).values()))
    x = torch.randn(5, 32)
    with choices(layer) as found:
        first = layer(x)
        second = layer(x)
        layer.eval()(x)
    assert not torch.equal(first, second)
    scores = [scores for scores, _ in found[0]]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


def test_equal_scores_go_to_the_lowest_experts():
    router = router_of(adapted("bert"))
    assert router(torch.zeros(1, 4)).tolist() == [[0, 1]]
    assert router(torch.tensor([[1.0, 3.0, 3.0, 3.0]])).tolist() == [[1, 2]]


def test_what_is_chosen_is_sorted_and_differs_from_token_to_token():
    chosen = chosen_by(adapted("llama"), inputs("llama", batch_size=9))[0].flatten(0, 1)
    assert (chosen.diff(dim=-1) > 0).all()
    assert len(chosen.unique(dim=0)) > 1


def test_in_half_precision_scores_are_float32():
    for dtype in (torch.bfloat16, torch.float16):
        model = get_peft_model(build("bert", dtype=dtype), config(target_modules="all-linear", init_weights=False))
        with choices(model.eval()) as found:
            output(model, inputs("bert", dtype=dtype))
        assert {scores.dtype for mine in found for scores, _ in mine} == {torch.float32}


def test_a_changed_base_weight_changes_the_keys():
    model = adapted("bert")
    layer = next(iter(routed_layers(model).values()))
    x = torch.randn(5, 32)
    with choices(layer) as found, torch.no_grad():
        layer(x)
        layer.base_layer.weight.mul_(2)
        layer(x)
        layer.base_layer.weight.data = layer.base_layer.weight.data / 2
        layer(x)
    (first, _), (doubled, _), (again, _) = found[0]
    assert relative_error(doubled, 2 * first) <= EXACT
    assert torch.equal(again, first)


# ------------------------------------------------------------------------------------------------- a token on its own


def texts(family: str, rows: int, padded: bool) -> dict[str, Tensor]:
    batch = FAMILIES[family].inputs(rows, seed=5)
    if not padded:
        ids = torch.randint(3, VOCAB, (rows, 11), generator=torch.Generator().manual_seed(6))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch


@pytest.mark.parametrize("padded", [False, True], ids=["of equal length", "padded"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_text_is_routed_the_same_alone_and_among_64(family: str, padded: bool):
    model = adapted(family, num_experts=8, top_k=2, cluster="random")
    batch = texts(family, 64, padded)
    together, logits = chosen_by(model, batch), output(model, batch)
    for row in (0, 3, 17, 63):
        length = int(batch["attention_mask"][row].sum())
        alone = {name: value[row : row + 1, :length] for name, value in batch.items()}
        for mine, all_rows in zip(chosen_by(model, alone), together, strict=True):
            assert torch.equal(mine[0], all_rows[row, :length])
        assert relative_error(output(model, alone)[0], logits[row]) <= EXACT


def test_an_image_is_routed_the_same_alone_and_among_64():
    model = adapted("vit", num_experts=8)
    batch = inputs("vit", batch_size=64)
    together, logits = chosen_by(model, batch), output(model, batch)
    alone = {name: value[41:42] for name, value in batch.items()}
    assert all(torch.equal(a[0], b[41]) for a, b in zip(chosen_by(model, alone), together, strict=True))
    assert relative_error(output(model, alone)[0], logits[41]) <= EXACT


@pytest.mark.parametrize("router", ["keys", "random", "learned"])
def test_the_order_of_a_batch_does_not_matter(router: str):
    model = adapted("bert", router=router)
    batch = inputs("bert", batch_size=16)
    order = torch.randperm(16)
    mixed = {name: value[order] for name, value in batch.items()}
    for one, other in zip(chosen_by(model, batch), chosen_by(model, mixed), strict=True):
        assert torch.equal(one[order], other)
    assert relative_error(output(model, mixed), output(model, batch)[order]) <= EXACT


# -------------------------------------------------------------------------------------------------- noise and dropout


def test_noise_of_the_configured_size_is_added_in_training_alone():
    model = adapted("bert", router_noise=0.8)
    layer = next(iter(routed_layers(model).values()))
    x = torch.randn(4000, 32)
    with choices(layer) as found, torch.no_grad():
        for _ in range(2):
            layer.eval()(x)
        for _ in range(2):
            layer.train()(x)
    (clean, _), (again, _), (noisy, _), (other, _) = found[0]
    assert torch.equal(clean, again)
    assert not torch.equal(noisy, other)
    assert abs((noisy - clean).std().item() - 0.8 / 4) < 0.01  # 16000 draws: five standard errors are 0.006
    assert abs((noisy - clean).mean().item()) < 0.01


def test_dropout_before_the_activation_is_of_the_kept_neurons_in_training_alone():
    model = adapted("bert", pre_act_dropout=0.25)
    layer = next(iter(routed_layers(model).values()))
    x = torch.randn(500, 32)
    with torch.no_grad():
        plain, dropped = layer.eval()(x), layer.train()(x)
    assert torch.equal(layer.eval()(x), plain)
    on = dropped != 0
    assert not on[plain == 0].any()
    assert relative_error(dropped[on], plain[on] / 0.75) <= EXACT
    assert abs(on.sum().item() / (plain != 0).sum().item() - 0.75) < 0.02  # 12000 draws


# ------------------------------------------------------------------------------------------------------ other routers


def test_a_random_router_is_frozen_drawn_from_its_seed_and_saved(tmp_path: Path):
    batch = inputs("bert")
    model = fresh(router="random", seed=7)
    before = [router.weight.clone() for router in routers(model)]
    assert not any("router" in name for name, _ in model.named_parameters())
    assert all(torch.equal(a, b.weight) for a, b in zip(before, routers(fresh(router="random", seed=7)), strict=True))
    assert not torch.equal(before[0], router_of(fresh(router="random", seed=8)).weight)
    with choices(model) as found, calls(next(iter(routed_layers(model).values()))) as seen:
        output(model, batch)
    assert relative_error(found[0][0][0], seen[0][0] @ before[0].T) <= EXACT
    train(model, batch)
    assert all(torch.equal(a, b.weight) for a, b in zip(before, routers(model), strict=True))
    model.save_pretrained(tmp_path)
    saved = PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    assert all(torch.equal(a, b.weight) for a, b in zip(before, routers(saved), strict=True))
    assert torch.equal(output(saved, batch), output(model, batch))


def test_a_learned_router_masks_with_zero_and_one_and_learns_through_the_sigmoid():
    model = fresh("llama", router="learned", cluster="contiguous", layers=[1])
    layer = next(iter(routed_layers(model).values()))
    x = torch.randn(6, 32)
    dense = layer.base_layer(x)
    weight = layer.router("default").weight
    scores = (x @ weight.T).detach().requires_grad_()
    keep = torch.zeros(6, 4).scatter_(1, scores.topk(2).indices, 1.0).repeat_interleave(12, dim=1)
    z = layer.train()(x)
    assert torch.equal(z, dense * keep)
    assert torch.equal(layer.eval()(x), z)
    upstream = torch.randn_like(z)
    (layer.train()(x) * upstream).sum().backward()
    gate = torch.sigmoid(scores).repeat_interleave(12, dim=1)
    (dense.detach() * keep * gate * upstream).sum().backward()
    assert relative_error(weight.grad, scores.grad.T @ x) <= EXACT
    assert weight.grad.any()


@pytest.mark.parametrize("top_k", [2, 4])
def test_a_learned_router_trains_is_saved_and_restored(top_k: int, tmp_path: Path):
    batch = inputs("bert")
    model = fresh(router="learned", r=0, top_k=top_k)
    before = [router.weight.detach().clone() for router in routers(model)]
    train(model, batch)
    after = [router.weight for router in routers(model)]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    model.save_pretrained(tmp_path)
    saved = PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    assert all(torch.equal(a, b.weight) for a, b in zip(after, routers(saved), strict=True))
    assert torch.equal(output(saved, batch), output(model, batch))


# ----------------------------------------------------------------------------------------------------------- balance


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def reference_loss(clean: Tensor, noisy: Tensor, top_k: int, sigma: float) -> Tensor:
    """(CV²(importance) + CV²(load)) / 2 of Riquelme et al. 2021, appendix A, token by token."""
    importance = torch.zeros(clean.shape[1])
    load = torch.zeros(clean.shape[1])
    for scores, with_noise in zip(clean, noisy, strict=True):
        importance = importance + torch.exp(scores) / torch.exp(scores).sum()
        threshold = with_noise.sort(descending=True).values[top_k - 1]
        if sigma:
            load = load + 1 - torch.distributions.Normal(0.0, 1.0).cdf((threshold - scores) / sigma)
    parts = [importance, load] if sigma else [importance]
    return torch.stack([(one.std() / one.mean()) ** 2 for one in parts]).mean()


@pytest.mark.parametrize("noise", [0.0, 1.0, 0.3])
def test_the_balance_loss_is_that_of_vision_moe(noise: float):
    clean = torch.randn(2, 9, 5)
    noisy = clean + torch.randn_like(clean) * noise / 5
    threshold = noisy.topk(2).values[..., -1]
    expected = reference_loss(clean.flatten(0, 1), noisy.flatten(0, 1), 2, noise / 5)
    assert relative_error(importance_and_load(clean, threshold, noise), expected) <= EXACT


def test_even_use_costs_nothing_and_one_expert_for_all_costs_the_most():
    even = torch.eye(4).repeat(3, 1) * 20
    one = torch.tensor([20.0, 0.0, 0.0, 0.0]).repeat(12, 1)
    assert importance_and_load(even, even.amax(-1), 0.0) < 1e-8
    assert importance_and_load(one, one.amax(-1), 0.0) == pytest.approx(4.0, rel=1e-3)  # the number of experts


def test_the_balance_loss_is_added_to_the_loss_in_training_and_nowhere_else():
    batch = inputs("bert")
    model, plain = without_dropout(fresh(balance_loss=0.3)), without_dropout(fresh())
    assert torch.equal(model.eval()(**batch).loss, plain.eval()(**batch).loss)
    assert model.base_model.auxiliary_loss() is None
    with choices(model) as found:
        loss = model.train()(**batch).loss
    parts = [reference_loss(scores.flatten(0, 1), scores.flatten(0, 1), 2, 0.0) for (scores, _), *_ in found]
    expected = plain.train()(**batch).loss + 0.3 * sum(parts)
    assert relative_error(loss, expected) <= EXACT
    assert relative_error(model.base_model.auxiliary_loss(), 0.3 * sum(parts)) <= EXACT
    assert plain.base_model.auxiliary_loss() is None
    model.eval()(**batch)
    assert model.base_model.auxiliary_loss() is None


@pytest.mark.parametrize("wrapper", [None, "SEQ_CLS", "transformers"])
def test_the_balance_loss_is_added_once_whoever_wraps_the_model_and_however_many_adapters(wrapper: str | None):
    batch = inputs("bert")
    model: Any = build("bert")
    if wrapper == "transformers":
        model.add_adapter(config(balance_loss=0.3), adapter_name="default")
        model.add_adapter(config(balance_loss=0.9), adapter_name="second")
        model.set_adapter("default")
    else:
        model = get_peft_model(model, config(balance_loss=0.3, task_type=wrapper))
        model.add_adapter("second", config(balance_loss=0.9))
    without_dropout(model)
    with choices(model) as found:
        loss = model(**batch).loss
    parts = [reference_loss(mine[0][0].flatten(0, 1), mine[0][0].flatten(0, 1), 2, 0.0) for mine in found if mine]
    assert len(parts) == 2
    with torch.no_grad():
        assert relative_error(loss - model.eval()(**batch).loss, 0.3 * sum(parts)) <= 10 * EXACT


@pytest.mark.parametrize("router", ["keys", "learned"])
def test_the_balance_loss_has_gradients_also_with_checkpointing_and_accumulation(router: str):
    batch = inputs("bert", batch_size=2)
    fields = {"router": router, "target_modules": ["query", "value", "intermediate.dense"], "init_weights": False}
    model = without_dropout(fresh(balance_loss=0.7, **fields))
    with_it = gradients(model, lambda: model(**batch).loss)
    plain = without_dropout(fresh(**fields))
    without = gradients(plain, lambda: plain(**batch).loss)
    model.zero_grad()
    model(**batch)
    model.base_model.auxiliary_loss().backward()
    alone = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any("router.default.weight" in name if router == "learned" else "b.default" in name for name in alone)
    for name, grad in alone.items():
        assert relative_error(with_it[name], without[name] + grad) <= 10 * EXACT
    twice = gradients(model, lambda: model(**batch).loss / 2 + model(**batch).loss / 2)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients(model, lambda: model(**batch).loss)
    for name, grad in with_it.items():
        assert relative_error(twice[name], grad) <= EXACT
        assert relative_error(checkpointed[name], grad) <= EXACT


def test_a_balance_loss_without_a_gradient_is_told():
    batch = inputs("bert", batch_size=2)
    model = fresh(balance_loss=0.7).train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.warns(UserWarning, match=r"balance_loss has no gradient: .*use_reentrant.* False"):
        model(**batch)
    with pytest.warns(UserWarning, match=r"balance_loss has no gradient: what is trained does not reach the scores"):
        fresh(balance_loss=0.7, r=0, modules_to_save=["classifier"]).train()(**batch)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", "balance_loss")
        model(**batch)


def test_balance_evens_the_use_of_experts():
    batch = inputs("bert", batch_size=8)
    model = without_dropout(fresh(balance_loss=3.0, router="learned", layers=[1], r=0))

    def unevenness() -> Tensor:
        with choices(model) as found:
            output(model, batch)
        return torch.softmax(found[0][0][0].flatten(0, 1), -1).sum(0).std()

    before = unevenness()
    train(model, batch, steps=20, lr=2e-2)
    assert unevenness() < 0.5 * before


def test_a_model_in_the_middle_of_training_is_copied_and_pickled():
    batch = inputs("bert", batch_size=2)
    model = fresh(balance_loss=0.1, router="learned").train()
    model(**batch).loss.backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin.eval(), batch), output(model.eval(), batch))
