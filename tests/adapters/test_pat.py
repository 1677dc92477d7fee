"""Pruning-aware tuning in training: the layers' equations, what is masked where, and that a mask is saved as it is."""

import copy
import textwrap
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from petune.adapters.pat import PatConfig, PatLinear, PatNorm
from petune.adapters.pat.layer import Hybrid, masked_norm, norm_kind
from petune.adapters.pat.sites import find_sites
from petune.topology import find_topology
from tests import fresh
from tests.adapters.harness import assert_same_tensors, base_tensors, build, gradients, inputs, output, snapshot
from tests.adapters.pat_models import (
    KEPT,
    PRUNABLE,
    adam,
    adapted,
    config,
    harden,
    last_head,
    masked,
    pat_train,
    shaken,
)
from tests.conftest import TOLERANCE, relative_error

EXACT = TOLERANCE[torch.float32]

# ---------------------------------------------------------------------------------------------------- hybrid modules


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_a_hybrid_module_is_the_matrix_of_the_paper(variant):
    torch.manual_seed(1)
    hybrid = Hybrid(PatConfig(variant=variant, hsm_rank=3, init_weights=False), 13).double()
    u, mask = torch.randn(2, 5, 13, dtype=torch.float64), torch.rand(13, dtype=torch.float64)
    eye, scale = torch.eye(13, dtype=torch.float64), torch.diag(hybrid.scale)
    if variant == "code":
        matrix = scale @ torch.diag(mask) @ (eye + hybrid.up @ hybrid.down)
    else:
        matrix = torch.diag(mask) @ (hybrid.up @ scale @ hybrid.down + eye)
    assert relative_error(hybrid(u, mask), u @ matrix.T) <= TOLERANCE[torch.float64]
    assert relative_error(matrix, eye) > 0.1


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_a_fresh_hybrid_module_is_the_identity_to_the_bit(variant):
    hybrid = Hybrid(PatConfig(variant=variant), 160)
    u = torch.randn(7, 160)
    assert torch.equal(hybrid(u, torch.ones(160)), u)
    assert hybrid.down.shape == (8, 160)  # 5 % of the width


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_the_identity_loss_is_the_distance_to_orthonormal_maps(variant):
    torch.manual_seed(1)
    hybrid = Hybrid(PatConfig(variant=variant, hsm_rank=3, init_weights=False), 13)
    rows, columns = (w - torch.eye(3) for w in (hybrid.down @ hybrid.down.T, hybrid.up.T @ hybrid.up))
    norms = [w.flatten().norm() for w in (rows, columns)]
    expected = norms[0] ** 2 / 9 if variant == "code" else norms[0] + norms[1]
    assert hybrid.identity_loss().item() == pytest.approx(expected.item(), rel=1e-5)
    fresh = Hybrid(PatConfig(variant="paper", hsm_rank=3), 13)
    assert (fresh.up.T @ fresh.up - torch.eye(3)).norm() <= 1e-5  # so that the start has no penalty


def test_the_rank_is_five_percent_of_the_width_at_least_eight_and_never_above_the_width():
    assert [PatConfig().rank(width) for width in (4, 32, 4096)] == [4, 8, 205]
    assert PatConfig(hsm_rank=300).rank(2048) == 300


# ------------------------------------------------------------------------------------------------------------- norms

NORMS = {"layer": nn.LayerNorm, "llama": LlamaRMSNorm, "gemma": GemmaRMSNorm, "t5": T5LayerNorm}
KINDS = {"layer": "layer", "llama": "rms", "gemma": "rms_plus_one", "t5": "rms"}


def norm_of(name: str, width: int) -> nn.Module:
    norm = NORMS[name](width, eps=1e-3)  # large enough to be seen
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 0.5)
    return norm


@pytest.mark.parametrize("name", NORMS)
def test_a_masked_norm_is_the_stock_norm_at_one_and_the_smaller_stock_norm_at_a_hard_mask(name):
    norm, x = norm_of(name, 13), 3 * torch.randn(2, 5, 13) + 1
    kind = norm_kind(norm)
    assert kind == KINDS[name]
    assert relative_error(masked_norm(x, torch.ones(13), norm, kind), norm(x)) <= 1e-6
    keep = torch.tensor([0, 2, 3, 7, 8, 12])
    mask = torch.zeros(13).index_fill(0, keep, 1.0)
    smaller = NORMS[name](6, eps=1e-3)
    smaller.load_state_dict({key: tensor[keep] for key, tensor in norm.state_dict().items()})
    y = masked_norm(x, mask, norm, kind)  # x is not zero on the other channels
    assert relative_error(y[..., keep], smaller(x[..., keep])) <= 1e-6
    assert not y[..., mask == 0].any()


@pytest.mark.parametrize("name", NORMS)
def test_a_soft_mask_weighs_channels_in_statistics_and_output(name):
    norm, x, mask = norm_of(name, 13), 3 * torch.randn(5, 13) + 1, torch.rand(13) + 0.1
    weight = mask / mask.sum()
    mean = (x * weight).sum(-1, keepdim=True) if name == "layer" else 0.0
    variance = (weight * (x - mean) ** 2).sum(-1, keepdim=True)
    gain = norm.weight + 1 if name == "gemma" else norm.weight
    expected = mask * (gain * (x - mean) / (variance + 1e-3).sqrt() + (norm.bias if name == "layer" else 0.0))
    assert relative_error(masked_norm(x, mask, norm, KINDS[name]), expected) <= 1e-6


def test_a_norm_of_another_form_is_refused_before_anything_changes():
    class HalvedLayerNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    with pytest.raises(ValueError, match="a HalvedLayerNorm is neither a LayerNorm nor an RMSNorm"):
        norm_kind(HalvedLayerNorm(13))
    model = build("bert")
    model.bert.encoder.layer[1].output.LayerNorm = HalvedLayerNorm(32)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="neither a LayerNorm"):
        get_peft_model(model, config())
    assert [type(module) for module in model.modules()] == before


# ------------------------------------------------------------------------------------------------------ what is where


@pytest.mark.parametrize("family", PRUNABLE)
def test_every_writer_has_a_hybrid_module_every_norm_a_mask_and_every_linear_lora(family):
    model = adapted(family, last_head(family))
    topology, modules = find_topology(model.get_base_model()), dict(model.get_base_model().named_modules())
    writers = {*topology.attention_out, *topology.ffn_out}
    hybrids = {name for name, m in modules.items() if isinstance(m, PatLinear) and "default" in m.petune_pat_hybrid}
    assert hybrids == writers
    assert {name for name, m in modules.items() if isinstance(m, PatNorm)} >= set(topology.norms)
    linears = {name for name, m in modules.items() if isinstance(m, PatLinear) and "default" in m.petune_pat_a}
    assert linears >= {*topology.attention_in, *topology.ffn_in, *writers}
    assert all(name.startswith(tuple(topology.blocks)) for name in linears)


@pytest.mark.parametrize("family", PRUNABLE)
def test_behind_a_hard_mask_the_stream_is_zero_on_the_pruned_channels(family):
    head = last_head(family)
    model = masked(family, head)
    gone = ~model.base_model.mask().hard
    sites = find_sites(model.get_base_model())
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
            seen[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    def look_after(name: str) -> Any:
        return lambda _, __, y: seen.__setitem__(name, y)

    blocks = set(sites.topology.blocks)
    for name, module in model.get_base_model().named_modules():
        if name in blocks:
            module.register_forward_hook(look(name), with_kwargs=True)
        elif name in sites.norms or name in sites.writers:
            module.register_forward_hook(look_after(name))
    output(model, inputs(family, head))
    assert seen.keys() >= blocks
    assert [name for name, x in seen.items() if x[..., gone].any() or not x[..., ~gone].any()] == []


def test_without_lora_only_masks_and_hybrid_modules_train():
    model = adapted("llama", "lm", r=0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not any(".petune_pat_a" in name or ".petune_pat_b" in name for name in trained)
    assert len([name for name in trained if ".petune_pat_hybrid." in name]) == 3 * 4  # two writers in two blocks


def test_lora_sits_on_the_targets_alone_and_the_mask_is_everywhere_all_the_same():
    model = adapted("llama", "lm", target_modules=["q_proj", "up_proj"])
    modules = dict(model.get_base_model().named_modules())
    with_lora = {name for name, m in modules.items() if isinstance(m, PatLinear) and "default" in m.petune_pat_a}
    assert {name.rpartition(".")[2] for name in with_lora} == {"q_proj", "up_proj"}
    with_hybrid = [m for m in modules.values() if isinstance(m, PatLinear) and "default" in m.petune_pat_hybrid]
    assert len(with_hybrid) == 4
    harden(model)
    assert len(model.merge_and_unload().model.norm.weight) == KEPT


# ----------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_the_loss_in_training_is_the_tasks_plus_the_weighted_terms(variant):
    weights = {"active_weight": 0.5, "identity_weight": 2.0, "bimodal_weight": 3.0}
    model = adapted("llama", "lm", variant=variant, **weights)
    torch.nn.init.normal_(model.base_model.mask().logits, 0.0, 0.03)
    batch = inputs("llama", "lm")
    task = model(**batch).loss  # eval: no masks' losses
    total = model.train()(**batch).loss  # the family has no dropout
    hybrids = [m for m in model.modules() if isinstance(m, Hybrid)]
    assert len(hybrids) == 5
    expected = 2.0 * sum(hybrid.identity_loss() for hybrid in hybrids)
    for name, loss in model.base_model.mask().losses().items():
        expected = expected + weights[f"{name}_weight"] * loss
    assert (total - task).item() == pytest.approx(expected.item(), rel=1e-4)
    terms = {"active", "identity", "task", *(["bimodal"] if variant == "code" else [])}
    assert model.base_model.terms.keys() == terms
    assert model.base_model.terms["task"].item() == pytest.approx(task.item(), rel=1e-4)


def test_a_model_with_a_task_type_gets_the_same_loss():
    for task_type in (None, "CAUSAL_LM"):
        model = adapted("llama", "lm", task_type=task_type).train()
        loss = model(**inputs("llama", "lm")).loss
        assert "active" in model.base_model.terms
        if task_type is None:
            expected = loss
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_every_trained_parameter_has_a_gradient_in_every_phase(variant):
    # DDP waits for each of them
    model = adapted("t5", "lm", variant=variant).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for step in (0, 3, 8, 9, 10, 25):
        model.base_model.mask().advance(step)
        grads = gradients(model, lambda: model(**inputs("t5", "lm")).loss)
        assert grads.keys() == trained
        assert all(bool(grad.isfinite().all()) for grad in grads.values())
    assert model.base_model.mask().is_final


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("step", [3, 8, 10], ids=["soft", "resting", "hard"])
def test_gradient_checkpointing_gives_the_same_gradients_in_every_phase(step, reentrant):
    model, batch = adapted("llama", "lm").train(), inputs("llama", "lm")
    torch.nn.init.normal_(model.base_model.mask().logits, 0.0, 0.03)
    model.base_model.mask().advance(step)
    plain = gradients(model, lambda: model(**batch).loss)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients(model, lambda: model(**batch).loss)
    assert plain.keys() == checkpointed.keys()
    assert max(relative_error(checkpointed[name], plain[name]) for name in plain) <= EXACT


def test_a_part_of_the_model_called_alone_sees_the_mask_as_it_is_now():
    model, batch = adapted("llama", "lm").train(), inputs("llama", "lm")
    model(**batch)  # keeps the mask's value for the blocks
    model.base_model.advance(10)
    states = model.get_base_model().model(batch["input_ids"]).last_hidden_state
    assert states.requires_grad
    assert not states[..., ~model.base_model.mask().hard].any()


@pytest.mark.slow
def test_a_compiled_training_is_compiled_once_per_phase_and_not_per_step():
    model, batch = adapted("llama", "lm").train(), inputs("llama", "lm")
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled, optimizer, counts = torch.compile(model, backend=counter), adam(model), []
    for _ in range(13):
        compiled(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.base_model.advance()
        counts.append(counter.frame_count)
    assert counts[0] == counts[7]
    assert counts[8] == counts[9]  # at rest: no gradient reaches the logits any more
    assert counts[10] == counts[12]  # hard
    assert counts[12] <= counts[0] + 3


def test_training_prunes_exactly_the_target_and_leaves_the_base_alone():
    model, batch = get_peft_model(shaken("llama", "lm"), config()), inputs("llama", "lm")
    before = base_tensors(model)
    losses = pat_train(model, batch, 30)
    assert losses[-1] < losses[9] < losses[0]
    assert int(model.base_model.mask().hard.sum()) == KEPT
    assert model.base_model.mask().now == 30
    assert_same_tensors(base_tensors(model), before)


@pytest.mark.parametrize("family", PRUNABLE)
def test_disabled_at_any_time_it_is_the_dense_base_to_the_bit(family):
    head = last_head(family)
    batch, base = inputs(family, head), shaken(family, head)
    expected, before = output(base, batch), snapshot(base)
    model = adapted(family, head)
    for step in (0, 4):
        model.base_model.mask().advance(step)
        with model.disable_adapter():
            assert torch.equal(output(model, batch), expected)
        assert relative_error(output(model, batch), expected) > 1e-2
    assert_same_tensors(base_tensors(model), before)
    unloaded = model.unload()
    assert torch.equal(output(unloaded, batch), expected)
    assert not [hook for m in unloaded.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]


def test_under_autocast_the_stream_of_a_masked_model_stays_close():
    model, batch = masked("llama", "lm"), inputs("llama", "lm")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = output(model, batch)
    assert relative_error(rounded, output(model, batch)) <= 5e-2


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_masked_model_generates_with_a_cache_what_it_generates_without(family):
    model = masked(family, "lm")
    batch = {name: value for name, value in inputs(family, "lm").items() if name != "labels"}
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    options = {**arguments, "return_dict_in_generate": True}
    cached = model.generate(**batch, **options, use_cache=True)
    plain = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    assert relative_error(torch.stack(cached.logits), torch.stack(plain.logits)) <= EXACT
    with model.disable_adapter():
        assert not torch.equal(model.generate(**batch, **arguments), cached.sequences)


# -------------------------------------------------------------------------------------------- several, copied, saved


def test_two_adapters_have_masks_of_their_own(tmp_path):
    model, batch = masked("t5", "lm"), inputs("t5", "lm")
    first = output(model, batch)
    torch.manual_seed(2)
    model.add_adapter("second", config(init_weights=False, target_dim=9))
    assert torch.equal(output(model, batch), first)
    model.set_adapter("second")
    harden(model, seed=4)
    second = output(model, batch)
    assert (int(model.base_model.mask("default").hard.sum()), int(model.base_model.mask().hard.sum())) == (KEPT, 9)
    assert not any(p.requires_grad for p in model.base_model.mask("default").parameters())
    model.set_adapter("default")
    assert torch.equal(output(model, batch), first)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(output(model, batch), second)
    assert not any("default" in name for name in model.state_dict())
    assert len(model.merge_and_unload().shared.weight.T) == 9


def test_a_copy_has_a_mask_of_its_own():
    model, batch = adapted("t5", "lm"), inputs("t5", "lm")
    before = output(model, batch)
    twin = copy.deepcopy(model)
    harden(twin)
    assert relative_error(output(twin, batch), before) > 1e-2
    assert torch.equal(output(model, batch), before)
    twin.merge_and_unload()
    assert torch.equal(output(model, batch), before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("step", [0, 4, 10], ids=["fresh", "soft", "hard"])
def test_a_saved_mask_is_loaded_as_it_is(step, low_cpu_mem_usage, tmp_path):
    model, batch = adapted("llama", "lm"), inputs("llama", "lm")
    torch.nn.init.normal_(model.base_model.mask().logits)
    model.base_model.mask().advance(step)
    expected = output(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(shaken("llama", "lm"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    mask = loaded.base_model.mask()
    assert (mask.now, mask.is_final) == (step, step == 10)
    assert torch.equal(output(loaded, batch), expected)
    loaded.base_model.finalize()
    model.base_model.finalize()
    assert torch.equal(output(loaded, batch), output(model, batch))


@pytest.mark.parametrize("stop", [3, 9, 12])
def test_training_resumed_at_any_step_is_the_training_in_one_go_to_the_bit(stop, tmp_path):
    batch = inputs("llama", "lm")
    torch.manual_seed(1)
    whole = get_peft_model(shaken("llama", "lm"), config())
    torch.manual_seed(1)
    part = get_peft_model(shaken("llama", "lm"), config())
    expected = pat_train(whole, batch, 15)
    optimizer = adam(part)
    pat_train(part, batch, stop, optimizer)
    part.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(shaken("llama", "lm"), tmp_path, is_trainable=True)
    again = adam(resumed)
    again.load_state_dict(optimizer.state_dict())
    assert pat_train(resumed, batch, 15 - stop, again) == expected[stop:]
    assert torch.equal(output(resumed, batch), output(whole, batch))


@pytest.mark.slow
def test_soft_and_hard_masks_are_the_same_in_a_fresh_process(tmp_path):
    shaken("llama", "lm").save_pretrained(tmp_path / "base")
    batch = inputs("llama", "lm")
    for step in (4, 10):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = get_peft_model(base, config(init_weights=False, task_type="CAUSAL_LM")).eval()
        torch.nn.init.normal_(model.base_model.mask().logits)
        model.base_model.mask().advance(step)
        model.save_pretrained(tmp_path / str(step))
        torch.save({"batch": batch, "logits": output(model, batch)}, tmp_path / f"{step}.pt")
    code = f"""
        import torch, petune
        import petune.adapters.pat
        from peft import AutoPeftModelForCausalLM
        torch.set_num_threads(1)
        for step in (4, 10):
            model = AutoPeftModelForCausalLM.from_pretrained(rf"{tmp_path}/{{step}}").eval()
            expected = torch.load(rf"{tmp_path}/{{step}}.pt")
            with torch.no_grad():
                assert torch.equal(model(**expected["batch"]).logits, expected["logits"]), step
        print("same")
    """
    done = fresh.run(textwrap.dedent(code))
    assert done.output.strip().endswith("same"), done.errors
