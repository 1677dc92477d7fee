"""Bad input to emergent experts: rows 29 to 34 of the error catalogue and every other refusal, the model untouched."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, MixtralConfig, Qwen3MoeConfig

from petune import tuner
from petune.adapters.emoe import EmoeConfig
from tests.adapters.emoe_models import adapted, config, routers
from tests.adapters.harness import assert_same_tensors, build, inputs, output, snapshot
from tests.adapters.test_contract_errors import Int8Backend, Int8Linear, refuses

WEIGHTS = "adapter_model.safetensors"
ROUTED = "bert.encoder.layer.1.intermediate.dense"

# -------------------------------------------------------------------------------------------------- rows 29 to 34


@pytest.mark.parametrize(
    ("family", "experts", "near"), [("bert", 5, "4 and 6"), ("gpt2", 100, "64 and 128"), ("llama", 96, "48")]
)
def test_a_number_of_experts_that_does_not_divide_the_inner_size_names_the_nearest(
    family: str, experts: int, near: str
):
    size = {"bert": 48, "gpt2": 128, "llama": 48}[family]
    message = rf"EmoeConfig.num_experts={experts} does not divide {size}, the inner size at '.*'; use {near}\."
    refuses(build(family), config(num_experts=experts), message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 5}, r"EmoeConfig.top_k=5 must be 1 to num_experts=4\."),
        ({"top_k": 0}, r"EmoeConfig.top_k=0 must be a positive integer\."),
        ({"top_k": -1}, r"EmoeConfig.top_k=-1 must be a positive integer\."),
        ({"top_k": 1.5}, r"EmoeConfig.top_k=1.5 must be a positive integer\."),
        ({"num_experts": 0}, r"EmoeConfig.num_experts=0 must be a positive integer\."),
        ({"layers": "last_even:0"}, r"EmoeConfig.layers='last_even:0' must be 'all', 'last_even:n' with n >= 1, or"),
        ({"layers": "last:2"}, r"EmoeConfig.layers='last:2' must be 'all', 'last_even:n'"),
        ({"layers": []}, r"EmoeConfig.layers=\[\] names at least one block; 'last_even:2' is the default\."),
        ({"router": "key"}, r"EmoeConfig.router='key' must be one of .*; the closest is 'keys'\."),
        ({"score": "gates"}, r"EmoeConfig.score='gates' must be one of .*; the closest is 'gate'\."),
        (
            {"cluster": "balanced_means"},
            r"EmoeConfig.cluster='balanced_means' must be one of .*; the closest is 'balanced_kmeans'\.",
        ),
        ({"lora_dropout": 1.0}, r"EmoeConfig.lora_dropout=1.0 must be a number in \[0.0, 1.0\)\."),
        ({"pre_act_dropout": -0.1}, r"EmoeConfig.pre_act_dropout=-0.1 must be a number in"),
        ({"router_noise": -1.0}, r"EmoeConfig.router_noise=-1.0 must be a number in"),
        ({"balance_loss": "a bit"}, r"EmoeConfig.balance_loss='a bit' must be a number in"),
        ({"r": -1}, r"EmoeConfig.r=-1 must be a positive integer\."),
        ({"router": "random", "score": "up"}, r"EmoeConfig.router='random' has scores of its own; leave out score"),
        ({"router": "learned", "score_bias": True}, r"EmoeConfig.router='learned' has scores of its own"),
    ],
)
def test_a_field_out_of_range_is_refused_with_what_is_valid(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config(**fields)


@pytest.mark.parametrize(("name", "value"), [("sigmoid", "0.5"), ("laplace", "0.00")])
def test_an_activation_that_does_not_map_zero_to_zero_is_refused(name: str, value: str):
    model = build("bert")
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = (
        type(model)
        ._from_config(model.config.__class__(**{**model.config.to_dict(), "hidden_act": name}))
        .bert.encoder.layer[0]
        .intermediate.intermediate_act_fn
    )
    message = rf"the activation behind '{ROUTED}' has f\(0\) = {value}.*, so that masking before it would not remove"
    refuses(model, config(), message)
    assert get_peft_model(model, config(layers=[0])) is not None


def test_an_adapter_with_nothing_to_train_is_refused():
    message = r"no parameters of its own to train; set r > 0, train_ffn=True, router='learned' or modules_to_save\."
    refuses(build("bert"), config(r=0), message)
    for fields in ({"train_ffn": True}, {"router": "learned"}, {"modules_to_save": ["classifier"]}):
        assert any(p.requires_grad for p in adapted("bert", r=0, **fields).parameters())


def test_for_inference_an_adapter_may_have_nothing_to_train():
    model = get_peft_model(build("bert"), config(r=0, inference_mode=True))
    assert not any(p.requires_grad for p in model.parameters())


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4} | {
    "vocab_size": 99,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "base",
    [
        MixtralConfig(**SMALL, num_local_experts=2),
        Qwen3MoeConfig(**SMALL, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16),
    ],
    ids=["mixtral", "qwen3_moe"],
)
def test_a_mixture_of_experts_is_refused(base: Any):
    model = AutoModel.from_config(base)
    message = rf"{type(model).__name__} is a mixture of experts already \(num_experts=2\); .* use FusedLoraConfig"
    refuses(model, config(), message)


# ------------------------------------------------------------------------------------------------------ other refusals


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, 2], r"EmoeConfig.layers=\[0, 2\] names block 2, but the model has feed-forwards in blocks 0\.\.1\."),
        (-1, r"EmoeConfig.layers=\[-1\] names block -1, but .* 0\.\.1\."),
    ],
)
def test_a_block_that_the_model_does_not_have_is_refused(layers: Any, message: str):
    refuses(build("bert"), config(layers=layers), message)


def test_layers_that_leave_nothing_to_route_are_refused():
    model = build("gpt2")
    del model.transformer.h[1:]
    model.transformer.h[0].mlp.c_fc_too = type(model.transformer.h[0].mlp.c_fc)(128, 32)
    refuses(model, config(), r"EmoeConfig.layers='all' leaves no feed-forward to route; .* in blocks of no kind")


def test_a_score_that_the_feed_forward_does_not_have_is_refused():
    message = rf"EmoeConfig.score='up' needs a gated feed-forward, and '{ROUTED}' has no up projection; use 'gate'"
    refuses(build("bert"), config(score="up", layers=[1]), message)


def hide_activation(model: nn.Module) -> nn.Module:
    del model.bert.encoder.layer[1].intermediate.intermediate_act_fn
    model.config.hidden_act = "one of my own"
    return model


def test_an_activation_that_cannot_be_found_is_told_and_refused_where_it_is_needed():
    with pytest.warns(UserWarning, match=rf"cannot find the activation behind '{ROUTED}'; routing needs one"):
        get_peft_model(hide_activation(build("bert")), config(layers=[1]))
    message = rf"EmoeConfig.score='inter' needs the activation behind '{ROUTED}', which cannot be found; use 'gate'"
    with pytest.warns(UserWarning, match="cannot find"):
        refuses(hide_activation(build("bert")), config(layers=[1], score="inter"), message)


def test_targets_of_lora_that_match_nothing_are_refused_though_routing_has_its_own():
    refuses(build("bert"), config(target_modules=["qeury"]), r"no module matched target_modules=\{'qeury'\}.*query")


def test_a_checkpoints_names_of_another_model_are_refused():
    message = (
        r"EmoeConfig.routed_modules=\['bert.*'\] names 'bert.*', which is the first linear of no .*; they are model\."
    )
    refuses(build("llama"), config(routed_modules=[ROUTED]), message)


def test_two_adapters_that_route_one_feed_forward_are_not_active_together():
    model = adapted("bert")
    model.add_adapter("second", config(layers=[1]))
    before = output(model, inputs("bert"))
    with pytest.raises(ValueError, match=rf"adapters 'default' and 'second' both route '{ROUTED}', .* one of them at"):
        model.base_model.set_adapter(["default", "second"])
    assert model.active_adapters == ["default"]
    assert torch.equal(output(model, inputs("bert")), before)


# ------------------------------------------------------------------------------------------------------ checkpoints


def _damage(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {name: change(t).contiguous() if "labels" in name else t for name, t in tensors.items()}, folder / WEIGHTS
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t[:-8],
            r"has 40 labels for '.*petune_emoe_router\.\w+', whose feed-forward has 48 neurons; load it on the",
        ),
        (
            lambda t: t.clamp(max=2),
            r"do not make 4 experts of 12 neurons each; the checkpoint is damaged, or its num_e",
        ),
        (lambda t: t + 1, r"do not make 4 experts of 12 neurons each"),
        (lambda t: t - 1, r"do not make 4 experts of 12 neurons each"),
    ],
    ids=["too few", "uneven", "too high", "unset"],
)
def test_labels_that_make_no_experts_are_refused(change: Any, message: str, tmp_path: Path):
    adapted("bert").save_pretrained(tmp_path)
    _damage(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(build("bert"), tmp_path)
    model = adapted("bert")
    before = output(model, inputs("bert"))
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "second")
    assert torch.equal(output(model, inputs("bert")), before)


def test_a_changed_number_of_experts_is_refused(tmp_path: Path):
    adapted("bert").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts": 8}))
    with pytest.raises(ValueError, match=r"do not make 8 experts of 6 neurons each; .* its num_experts was changed"):
        PeftModel.from_pretrained(build("bert"), tmp_path)


def test_a_checkpoint_without_labels_is_refused(tmp_path: Path):
    adapted("bert").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if "labels" not in name}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"adapter 'default' lacks 2 tensors .*labels"):
        PeftModel.from_pretrained(build("bert"), tmp_path)


# ---------------------------------------------------------------------------------------------------- quantised bases


class UnreadableBackend(Int8Backend):
    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        raise TypeError("forward only")


def quantised() -> nn.Module:
    model = build("bert")
    for block in model.bert.encoder.layer:
        block.intermediate.dense = Int8Linear(block.intermediate.dense)
    return model


def use(backend: Int8Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    known = tuner.resolve_quantization_backend

    def resolve(module: nn.Module, **options: object) -> Any:
        return backend if isinstance(module, Int8Linear) else known(module, **options)

    monkeypatch.setattr(tuner, "resolve_quantization_backend", resolve)


def test_a_quantised_feed_forward_is_clustered_and_routed_by_what_its_weight_stands_for(monkeypatch):
    use(Int8Backend(), monkeypatch)
    batch = inputs("bert")
    torch.manual_seed(1)
    model = get_peft_model(quantised(), config(init_weights=False)).eval()
    base = quantised()
    for block in base.bert.encoder.layer:
        wide = nn.Linear(32, 48)
        codes = block.intermediate.dense
        wide.load_state_dict({"weight": codes.weight.float() * codes.step, "bias": codes.bias})
        block.intermediate.dense = wide
    torch.manual_seed(1)
    reference = get_peft_model(base, config(init_weights=False)).eval()
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(routers(model), routers(reference), strict=True))
    assert torch.allclose(output(model, batch), output(reference, batch), atol=1e-5)


def test_a_quantised_feed_forward_cannot_keep_its_routing(monkeypatch):
    use(Int8Backend(), monkeypatch)
    model = get_peft_model(quantised(), config(init_weights=False)).eval()
    before, state = output(model, inputs("bert")), snapshot(model)
    with pytest.raises(TypeError, match=r"keep_routing=True needs a Linear or Conv1D .* '.*dense' is a Int8Linear"):
        model.base_model.merge_and_unload(keep_routing=True)
    assert_same_tensors(model.state_dict(), state)
    assert torch.equal(output(model, inputs("bert")), before)


def test_a_quantised_weight_that_cannot_be_read_is_refused(monkeypatch):
    use(UnreadableBackend(), monkeypatch)
    message = r"would route '.*dense', a Int8Linear whose weight PEFT cannot read; leave its block out of layers, or"
    refuses(quantised(), config(), message)


def test_the_config_that_is_made_by_default_is_the_papers():
    made = EmoeConfig()
    assert (made.num_experts, made.top_k, made.layers, made.r, made.lora_alpha) == (64, 16, "last_even:2", 8, 16.0)
    assert (made.lora_dropout, made.score_bias, made.router_noise, made.balance_loss) == (0.1, False, 0.0, 0.0)
