"""Bad input, and that a refusal leaves the model as it was: rows 1 to 8 of the error catalogue."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertModel

from petune import tuner
from tests import fresh
from tests.adapters.cases import BY_NAME, cases
from tests.adapters.harness import adapted, assert_same_tensors, build, inputs, output, snapshot, targets
from tests.conftest import relative_error

OURS = {"strict_load": True}  # rows whose tuner is a PetuneTuner


def refuses(model: nn.Module, config: object, match: str) -> None:
    """get_peft_model raises a ValueError with this text and neither a module nor a tensor of the model is changed."""
    before, modules = snapshot(model), [type(module) for module in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=match):
        get_peft_model(model, config)
    assert [type(module) for module in model.modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == grads
    assert_same_tensors(model.state_dict(), before)


@pytest.mark.slow
def test_an_adapter_loaded_without_importing_petune_is_a_key_error_of_pefts(tmp_path):
    adapted(BY_NAME["densedelta"], "bert").save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained(r'{tmp_path}')"
    done = fresh.run(code, cwd=tmp_path)
    assert done.code == 1
    assert "KeyError: 'PETUNE_DENSEDELTA'" in done.errors


@cases(**OURS)
def test_no_matching_module_names_the_closest_ones(case):
    message = r"no module matched target_modules=\{'qeury'\} in BertForSequenceClassification; similar names: .*query"
    refuses(build("bert"), case.config(target_modules=["qeury"]), message)


@cases(chooses_targets=True, **OURS)
def test_exclusions_and_layers_that_leave_nothing_are_named(case):
    config = case.config(target_modules=["query"], exclude_modules=["query"])
    refuses(build("bert"), config, r"no module matched .* with exclude_modules=\{'query'\}")
    config = case.config(target_modules=["query"], layers_to_transform=[7])
    refuses(build("bert"), config, r"no module matched .* with layers_to_transform=\[7\]")


@cases(default_targets=True, chooses_targets=True, **OURS)
def test_a_layer_that_the_model_does_not_have_is_refused_with_the_range(case):
    refuses(
        build("bert"), case.config(layers_to_transform=[0, 2]), r"layers_to_transform=\[0, 2\] names block 2, .*0\.\.1"
    )


@pytest.mark.parametrize(("target", "kind"), [("LayerNorm", "LayerNorm"), ("word_embeddings", "Embedding")])
@cases(blocks=False, **OURS)
def test_a_target_of_unsupported_type_is_named_with_what_is_supported(case, target, kind):
    config = case.config(target_modules=["query", target])
    refuses(build("bert"), config, rf"target 'bert\..*{target}' is a {kind}; \w+ supports Linear")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("encoder.layer", r"'bert\.encoder\.layer' is a ModuleList, which does not map hidden states"),
        ("word_embeddings", r"'bert\..*word_embeddings' is a Embedding, which does not map hidden states"),
        ("query", r"target 'bert\.encoder\.layer\.0\..*query' lies inside target 'bert\.encoder\.layer\.0'"),
    ],
)
@cases(blocks=True, **OURS)
def test_a_target_that_is_no_block_or_stands_in_one_is_refused(case, target, message):
    refuses(build("bert"), case.config(target_modules=["layer.0", target]), message)


@cases(blocks=True, **OURS)
def test_all_linear_is_refused_by_a_method_on_blocks(case):
    refuses(build("bert"), case.config(target_modules="all-linear"), "the method adapts blocks; leave it out")


@cases()
def test_an_unknown_architecture_is_asked_for_targets_and_loses_nothing(case):
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
    with pytest.raises(ValueError, match=r"target_modules|modules"):
        get_peft_model(model, case.config(**targets(case)))
    assert [type(module) for module in model] == [nn.Conv2d, nn.ReLU]


@cases(**OURS)
def test_an_adapter_of_another_base_is_refused_by_its_sizes(case, tmp_path):
    adapted(case, "bert", "none").save_pretrained(tmp_path)
    other = BertModel(BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32))
    message = (
        "adapter was made for model_type=bert, hidden_size=32, num_hidden_layers=2, "
        "this model has model_type=bert, hidden_size=16, num_hidden_layers=3"
    )
    modules = [type(module) for module in other.modules()]
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(other, tmp_path)
    assert [type(module) for module in other.modules()] == modules


@cases(strict_load=False)
def test_pefts_own_types_refuse_another_base_by_the_shapes(case, tmp_path):
    adapted(case, "bert", "none", target_modules=["query"]).save_pretrained(tmp_path)
    other = BertModel(BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(other, tmp_path)


def _lose_tensors(folder, count: int) -> list[str]:
    tensors = load_file(folder / "adapter_model.safetensors")
    lost = sorted(tensors)[:count]
    save_file({name: t for name, t in tensors.items() if name not in lost}, folder / "adapter_model.safetensors")
    return lost


@pytest.mark.parametrize("count", [1, 6])
@cases(**OURS)
def test_a_checkpoint_with_missing_tensors_is_refused_and_lists_them(case, tmp_path, count):
    names = ["query", "key", "value", "attention.output.dense"]  # enough that six tensors can be lost
    fields = {"target_modules": names, **case.anywhere} if case.chooses_targets else {}
    adapted(case, "bert", **fields, **case.resumable).save_pretrained(tmp_path)
    _lose_tensors(tmp_path, count)
    with pytest.raises(
        ValueError,
        match=rf"adapter 'default' lacks {count} tensors.*{', …' if count > 5 else r'(dense|layer).*default'}",
    ):
        PeftModel.from_pretrained(build("bert"), tmp_path)
    model = adapted(case, "bert", **fields)
    expected = output(model, inputs("bert"))
    with pytest.raises(ValueError, match=rf"adapter 'second' lacks {count} tensors"):
        model.load_adapter(tmp_path, "second")
    assert torch.equal(output(model, inputs("bert")), expected)


@cases(strict_load=False)
def test_pefts_own_types_warn_about_missing_tensors(case, tmp_path):
    adapted(case, "bert", **targets(case)).save_pretrained(tmp_path)
    _lose_tensors(tmp_path, 1)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(build("bert"), tmp_path)


@pytest.mark.parametrize(("field", "value"), [("r", 0), ("r", -3), ("lora_dropout", 1.0), ("lora_dropout", -0.1)])
def test_lora_refuses_ranks_and_rates_out_of_range(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{value}|{value}"):
        BY_NAME["lora"].config(**{field: value})


@cases(**OURS)
def test_a_model_sharded_by_tensor_parallelism_is_refused(case):
    model = build("llama", "none")
    model._tp_size = 2
    refuses(model, case.config(target_modules=["q_proj"]), "tensor parallelism")


# --------------------------------------------------------------------------------------------------- quantised bases


class Int8Linear(nn.Module):
    """A linear layer that stores round(W / step) in int8."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.step = (linear.weight.abs().max() / 127).item()
        codes = (linear.weight.data / self.step).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step, self.bias)


class Int8Backend(QuantizationBackend):
    layer_type = "linear"
    supports_merge = True
    backend_name = "int8 of the tests"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def get_base_weight(self, base_layer: Int8Linear) -> torch.Tensor:
        self.calls.append("get")
        return base_layer.weight.float() * base_layer.step

    def set_base_weight(self, peft_layer: BaseTunerLayer, weight_data: torch.Tensor) -> None:
        self.calls.append("set")
        base = peft_layer.get_base_layer()
        base.step = (weight_data.abs().max() / 127).item()
        base.weight.data = (weight_data / base.step).round().to(torch.int8)


def _quantised() -> nn.Module:
    model = build("bert")
    for block in model.bert.encoder.layer:
        block.attention.self.query = Int8Linear(block.attention.self.query)
    return model


@pytest.fixture
def backend(monkeypatch):
    backend = Int8Backend()
    known = tuner.resolve_quantization_backend

    def resolve(module: nn.Module, **options: object) -> QuantizationBackend | None:
        return backend if isinstance(module, Int8Linear) else known(module, **options)

    monkeypatch.setattr(tuner, "resolve_quantization_backend", resolve)
    return backend


@cases(quantised=True, merges=True, identity=True, **OURS)
def test_a_quantised_base_is_merged_through_pefts_backend(case, backend):
    batch = inputs("bert")
    model = get_peft_model(_quantised(), case.random_config(target_modules=["query"])).eval()
    expected = output(model, batch)
    model.merge_adapter()
    assert backend.calls == ["get", "set"] * 2
    assert relative_error(output(model, batch), expected) <= 0.02  # one step of an int8 grid is 1/127 of the largest
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert type(merged.bert.encoder.layer[0].attention.self.query) is Int8Linear
    assert merged.bert.encoder.layer[0].attention.self.query.weight.dtype == torch.int8


@cases(quantised=False, **OURS)
def test_a_method_that_needs_the_float_weight_refuses_a_quantised_one(case, backend):
    message = r"target '.*query' is a quantised Int8Linear; .* load the base without quantisation"
    refuses(_quantised(), case.config(target_modules=["query"]), message)
    assert backend.calls == []


@cases(quantised=True, merges=True, **OURS)
def test_a_weight_that_cannot_be_written_is_not_merged_into(case):
    model = get_peft_model(build("bert"), case.random_config(target_modules=["query"]))
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    layer.base_layer = Int8Linear(layer.base_layer)
    before = layer.base_layer.weight.clone()
    with pytest.raises(TypeError, match=r"cannot be merged into a Int8Linear of torch\.int8.*quantisation"):
        model.merge_and_unload()
    assert torch.equal(layer.base_layer.weight, before)
