"""FusedLoraConfig: PEFT's LoRA in meaning, checkpoint and merge; what the fused layer covers and what stays PEFT's."""

import copy
import json
import pickle
import warnings
from dataclasses import asdict, fields, replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import Linear as LoraLinear
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers.pytorch_utils import Conv1D

from petune import FusedLoraConfig, fuse
from petune.adapters.lora import FusedLoraLinear
from petune.adapters.lora import layer as layer_module
from petune.kernels.lora_linear import lora_linear
from tests.adapters.lora_models import BERT, GPT2, LLAMA, adapted, layers, output, pair, with_two
from tests.conftest import relative_error
from tests.families import FAMILIES


def losses_of_training(model, steps=50):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    batch, losses = BERT.inputs(batch_size=8, head="cls"), []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# --- the same method as PEFT's -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [BERT, GPT2, LLAMA], ids=lambda family: family.name)
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_alpha": 3, "rank_pattern": {"query|c_attn|q_proj": 2}}], ids=str
)
def test_forward_and_gradients_equal_pefts(family, options):
    ours, theirs = pair(family=family, dtype=torch.float64, **options)  # depth would amplify fp32 rounding
    assert all(type(layer) is FusedLoraLinear for layer in layers(ours))
    out, reference = output(ours, family), output(theirs, family)
    assert relative_error(out, reference) <= 1e-12
    direction = torch.randn_like(out)
    names = [name for name, p in theirs.named_parameters() if p.requires_grad and "pooler" not in name]
    assert {p.shape[0] for name, p in ours.named_parameters() if "lora_A" in name} == (
        {2, 4} if len(options) > 1 else {4}
    )
    for y, model in ((out, ours), (reference, theirs)):
        (y * direction).sum().backward()
        model.gradient = torch.cat([model.get_parameter(name).grad.flatten() for name in names])
    assert relative_error(ours.gradient, theirs.gradient) <= 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_one_layer_equals_pefts_in_fp32(bias):
    torch.manual_seed(0)
    base, x, dy = nn.Sequential(nn.Linear(37, 53, bias=bias)), torch.randn(2, 19, 37), torch.randn(2, 19, 53)
    results = []
    for config_cls in (FusedLoraConfig, LoraConfig):
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(base), config_cls(target_modules=["0"], init_lora_weights=False))
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *(p for p in model.parameters() if p.requires_grad)], dy)])
    for out, reference in zip(*results, strict=True):
        assert relative_error(out, reference) <= 1e-6


def test_fifty_steps_of_adamw_follow_pefts_loss_and_merge_into_equal_weights():
    options = {"head": "cls", "task_type": "SEQ_CLS", "init_lora_weights": True}
    ours, theirs = pair(**options)
    left, right = losses_of_training(ours), losses_of_training(theirs)
    assert left[-1] < 0.9 * left[0]
    assert max(abs(a - b) for a, b in zip(left, right, strict=True)) <= 1e-5
    theirs.load_state_dict(ours.state_dict())
    merged, reference = ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], reference[name]) for name in reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_bases_keep_pefts_dtypes(dtype, autocast):
    ours, theirs = pair(dtype=torch.float32 if autocast else dtype)
    with torch.autocast(torch.get_default_device().type, dtype, enabled=autocast):
        out, reference = output(ours), output(theirs)
    assert out.dtype == reference.dtype
    assert relative_error(out, reference) <= 0.02
    out.float().square().mean().backward()
    assert layers(ours)[0].lora_A["default"].weight.grad.dtype == torch.float32


def test_dropout_is_on_in_training_only():
    model = adapted(FusedLoraConfig, lora_dropout=0.5)
    quiet = adapted(FusedLoraConfig)
    assert relative_error(output(model.eval()), output(quiet.eval())) == 0.0
    model.base_model.model.eval()
    for layer in layers(model):
        layer.train()
    assert not torch.equal(output(model), output(model))
    torch.manual_seed(3)
    first = output(model)
    torch.manual_seed(3)
    assert torch.equal(first, output(model))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    grads = []
    for checkpointing in (False, True):
        model = adapted(FusedLoraConfig, family=LLAMA, lora_dropout=0.3).train()
        if checkpointing:
            model.base_model.model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(4)
        output(model, LLAMA, use_cache=False).square().mean().backward()
        grads.append(layers(model)[0].lora_A["default"].weight.grad)
    assert torch.equal(*grads)


def test_the_adapted_model_compiles_into_one_graph():
    model = adapted(FusedLoraConfig).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(output(compiled), output(model)) <= 1e-6


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_plain_peft_reads_our_checkpoint_without_a_warning(tmp_path):
    ours = adapted(FusedLoraConfig, rank_pattern={"query": 2}).eval()
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA"
    assert set(saved) == {field.name for field in fields(LoraConfig)} - {"runtime_config"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's warnings are; transformers has a FutureWarning of its own
        loaded = PeftModel.from_pretrained(BERT.build(), tmp_path)
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert all(type(layer) is LoraLinear for layer in layers(loaded))
    assert relative_error(output(loaded), output(ours)) <= 1e-6


def test_our_layers_read_pefts_checkpoint(tmp_path):
    theirs = adapted(LoraConfig).eval()
    theirs.save_pretrained(tmp_path)
    fused = PeftModel.from_pretrained(BERT.build(), tmp_path)
    assert str(fuse(fused)) == "fused: 13/13 layers, 2 groups"
    adapter = PeftModel.from_pretrained(BERT.build(), tmp_path, config=FusedLoraConfig(r=4))
    for model in (fused, adapter):
        assert all(type(layer) is FusedLoraLinear for layer in layers(model))
        assert relative_error(output(model.eval()), output(theirs)) <= 1e-6


def test_config_and_model_survive_copy_pickle_and_asdict():
    config = FusedLoraConfig(r=4, target_modules=["query"])
    assert "_custom_modules" not in asdict(config)
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config, r=4)):
        assert asdict(twin) == asdict(config)
        model = get_peft_model(BERT.build(), twin)
        assert all(type(layer) is FusedLoraLinear for layer in layers(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin.eval()), output(model.eval()))


def test_transformers_add_adapter_gets_fused_layers():
    model = BERT.build()
    model.add_adapter(FusedLoraConfig(r=4))
    assert {type(layer) for layer in layers(model)} == {FusedLoraLinear}


# --- several adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_several_active_adapters_add_up(dropout):
    options = {"lora_dropout": dropout, "target_modules": ["query"]}
    ours, theirs = (with_two(config_cls, **options) for config_cls in (FusedLoraConfig, LoraConfig))
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
    assert relative_error(output(ours.eval()), output(theirs.eval())) <= 1e-6
    if dropout:  # PEFT draws one mask per adapter: its own forward runs
        outs = []
        for model in (ours.train(), theirs.train()):
            torch.manual_seed(5)
            outs.append(output(model))
        assert torch.equal(*outs)


def test_mixed_batches_disabling_and_deleting_work_as_in_peft():
    ours, theirs = (with_two(config_cls).eval() for config_cls in (FusedLoraConfig, LoraConfig))
    for names in (["default", "other"], ["__base__", "other"]):
        mixed = output(ours, adapter_names=names)
        assert relative_error(mixed, output(theirs, adapter_names=names)) <= 1e-6
    base = output(BERT.build())
    with ours.disable_adapter():
        assert torch.equal(output(ours), base)
    ours.merge_adapter()
    theirs.merge_adapter()
    assert torch.equal(output(ours), output(theirs))
    ours.unmerge_adapter()
    ours.delete_adapter("other")
    ours.delete_adapter("default")
    assert relative_error(output(ours.base_model.model), base) <= 1e-6  # PeftModel itself wants an adapter


# --- coverage and the report ---------------------------------------------------------------------------------------

UNCOVERED = {
    "dora": ({"use_dora": True}, "DoraLinearVariant"),
    "lora_bias": ({"lora_bias": True}, "lora_bias=True"),
    "embedding": ({"target_modules": ["word_embeddings"]}, "peft's Embedding"),
}


@pytest.mark.parametrize("case", UNCOVERED)
def test_what_the_operator_does_not_cover_stays_pefts_own_layer(case):
    options, reason = UNCOVERED[case]
    ours, theirs = pair(**options)
    assert not layers(ours, FusedLoraLinear)
    assert relative_error(output(ours.eval()), output(theirs.eval())) == 0.0
    report = fuse(theirs)
    assert (report.fused, report.total) == (0, len(report.left))
    assert reason in str(report)


def test_subclasses_of_linear_are_left_to_pefts_dispatchers():
    class QuantisedLinear(nn.Linear):
        pass

    model = nn.Sequential(QuantisedLinear(5, 7), nn.Linear(7, 3))
    model = get_peft_model(model, FusedLoraConfig(target_modules=["0", "1"]))
    assert [type(layer) for layer in layers(model)] == [LoraLinear, FusedLoraLinear]
    report = fuse(model)
    assert (report.fused, report.total) == (1, 2)
    assert "QuantisedLinear" in report.left["base_model.model.0"]


@pytest.mark.parametrize("where", ["base_layer", "lora_A", "forward"])
def test_hooks_on_the_wrapped_modules_still_run(where):
    model = adapted(FusedLoraConfig, target_modules=["query"])
    layer, calls = layers(model)[0], []
    module = layer.lora_A["default"] if where == "lora_A" else layer.base_layer
    if where == "forward":  # as accelerate's offloading does
        module.forward = lambda x: calls.append(1) or nn.functional.linear(x, module.weight, module.bias)
    else:
        module.register_forward_hook(lambda *_: calls.append(1))
    output(model)
    assert calls == [1]


def test_global_hooks_run_in_pefts_own_forward():
    model, calls = adapted(FusedLoraConfig, target_modules=["query"]), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        output(model)
    finally:
        handle.remove()
    assert layers(model)[0].lora_A["default"] in calls


def test_a_compiled_base_layer_runs():
    ours, theirs = pair(target_modules=["query"])
    base, calls = layers(ours)[0].base_layer, []
    base._compiled_call_impl = lambda *args: calls.append(1) or base._call_impl(*args)  # what base.compile() sets
    assert relative_error(output(ours), output(theirs)) <= 1e-6
    assert calls == [1]


@pytest.fixture
def operator_calls(monkeypatch):
    calls = []

    def spy(*args):
        calls.append(args)
        return lora_linear(*args)

    monkeypatch.setattr(layer_module, "lora_linear", spy)
    return calls


@pytest.mark.parametrize("where", ["scale", "base", "lora_A", "lora_B", "x"])
def test_tensors_that_the_operator_cannot_read_go_to_pefts_forward(where, operator_calls):
    model = get_peft_model(nn.Sequential(nn.Linear(5, 7)), FusedLoraConfig(r=2, target_modules=["0"]))
    layer, x = layers(model)[0], torch.randn(3, 5)
    expected = model(x)
    assert len(operator_calls) == 1

    def twice(t):  # stands for distributed and quantised tensors
        return TwoTensor(t.detach(), t.detach().clone())

    if where == "scale":  # what peft.utils.hotswap makes of it
        layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    elif where == "x":
        x = twice(x)
    else:
        module = layer.base_layer if where == "base" else getattr(layer, where)["default"]
        module.weight = nn.Parameter(twice(module.weight))
    out = model(x)
    assert relative_error(getattr(out, "a", out), expected) <= 1e-6
    assert len(operator_calls) == 1
    if where != "x":
        assert fuse(model).fused == 0


def test_a_tensor_in_the_place_of_the_parameter_is_read(operator_calls):
    ours, theirs = (
        get_peft_model(nn.Sequential(nn.Linear(5, 7)), cls(r=2, target_modules=["0"], init_lora_weights=False))
        for cls in (FusedLoraConfig, LoraConfig)
    )
    ours.load_state_dict(theirs.state_dict())
    layer = layers(ours)[0]
    for module in (layer.base_layer, layer.lora_A["default"]):  # as FSDP1 and DataParallel do
        weight = module.weight.detach()
        del module._parameters["weight"]
        module.weight = weight
    x = torch.randn(3, 5)
    assert relative_error(ours(x), theirs(x)) <= 1e-6
    assert len(operator_calls) == 1


def test_input_of_another_dtype_behaves_as_in_peft():
    for config_cls in (FusedLoraConfig, LoraConfig):
        model = get_peft_model(nn.Sequential(nn.Linear(5, 7)), config_cls(target_modules=["0"]))
        with pytest.raises(RuntimeError, match="same dtype"):
            model(torch.randn(2, 5, dtype=torch.bfloat16))
        model = get_peft_model(nn.Sequential(nn.Linear(5, 7)).bfloat16(), config_cls(target_modules=["0"]))
        with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="same dtype"):
            model(torch.randn(2, 5, dtype=torch.bfloat16))


def test_a_trainable_bias_of_the_base_gets_pefts_gradient():
    ours, theirs = pair(bias="lora_only")
    for model in (ours, theirs):
        output(model).square().mean().backward()
    left, right = (layers(model)[0].base_layer.bias.grad for model in (ours, theirs))
    assert relative_error(left, right) <= 1e-5


def test_fuse_refuses_a_model_without_lora():
    with pytest.raises(ValueError, match="no LoRA layer in BertModel; add or load a LoRA adapter first"):
        fuse(BERT.build())


# --- targets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_default_targets_are_every_linear_layer_of_every_family(family):
    model = get_peft_model(family.build(), FusedLoraConfig(r=2))
    linear = [m for m in family.build().modules() if isinstance(m, nn.Linear | Conv1D)]
    report = fuse(model)
    assert report.fused == report.total == len(linear) > 0
    output(model, family).square().mean().backward()


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_classification_head_is_trained_in_full_and_not_wrapped(task_type):
    model = get_peft_model(
        BERT.build(head="cls"), FusedLoraConfig(task_type=task_type, exclude_modules=["pooler.dense"])
    )
    head = model.base_model.model.classifier
    assert isinstance(head, ModulesToSaveWrapper)
    assert all(p.requires_grad for p in head.modules_to_save["default"].parameters())
    wrapped = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    assert not [name for name in wrapped if "classifier" in name or "pooler" in name]


def test_layers_to_transform_keeps_pefts_default_names():
    model = get_peft_model(BERT.build(), FusedLoraConfig(layers_to_transform=[1]))
    names = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    assert names == {f"encoder.layer.1.attention.self.{role}" for role in ("query", "value")}


# --- bad fields ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"FusedLoraConfig\.r=0 must be a positive integer"),
        ({"r": -3}, r"FusedLoraConfig\.r=-3 must be a positive integer"),
        ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\]=0 must be a positive integer"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1\.0 is not in \[0, 1\)"),
        ({"lora_dropout": -0.1}, r"lora_dropout=-0\.1 is not in \[0, 1\)"),
        ({"target_modules": []}, "target_modules is empty; name modules"),
    ],
    ids=str,
)
def test_fields_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FusedLoraConfig(**options)


def test_alpha_of_zero_warns_that_the_adapter_is_off():
    with pytest.warns(UserWarning, match="lora_alpha=0 switches the adapter off"):
        FusedLoraConfig(lora_alpha=0)
