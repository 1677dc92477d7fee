"""Every method on every quantised base: it works, or refuses with a reason; and docs/quantised.md says which."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from peft.utils.integrations import dequantize_module_weight
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn

import petune
from petune import tuner
from petune.adapters.emoe.cluster import balanced_kmeans
from petune.export import export_merged, load_adapter, save_adapter
from petune.four_bits import keep_form
from petune.topology import find_topology
from tests.conftest import relative_error
from tests.quantised.bases import AUTO, BASES, METHODS, Base, Method, batch_for, cell, float_model, logits, table

ROOT = Path(__file__).parents[2]
PAIRS = [
    pytest.param(
        method, base, id=f"{method.name}-{base.name}", marks=[pytest.mark.gpu] if base.device == "cuda" else []
    )
    for base in BASES
    for method in METHODS
]
RUNS = [pair for pair in PAIRS if not cell(*pair.values).refused]
REFUSED = [pair for pair in PAIRS if cell(*pair.values).refused]


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {kind: tmp_path_factory.mktemp(kind) for kind in AUTO}
    for kind, folder in made.items():
        float_model(kind).save_pretrained(folder)
    return made


def on(base: Base, method: Method, folders: dict[str, Path], **fields) -> nn.Module:
    if base.device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{base.title} needs a CUDA device")
    torch.manual_seed(3)
    return get_peft_model(base.load(folders[method.model]), method.config(**fields)).eval()


def train(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    """Two steps, each with a finite gradient for all that trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    for _ in range(2):
        model(**batch).loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize(("method", "base"), RUNS)
def test_a_method_trains_saves_and_loads_on_a_base(method, base, folders, tmp_path):
    model, batch = on(base, method, folders), batch_for(method.model, base.device)
    with model.disable_adapter():
        of_base = logits(model, batch)
    assert relative_error(of_base, logits(float_model(method.model), batch_for(method.model))) > 1e-3, "not quantised"
    assert torch.equal(logits(model, batch), of_base), "a fresh adapter changes nothing"
    train(model, batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), of_base), "the base is what it was"
    trained = logits(model, batch)
    assert relative_error(trained, of_base) > 0.01
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter", base.load(folders[method.model])).eval()
    assert relative_error(logits(loaded, batch), trained) < 1e-5


@pytest.mark.parametrize(("method", "base"), RUNS)
def test_an_adapter_is_merged_into_a_base_or_says_why_not(method, base, folders, tmp_path):
    model, batch = on(base, method, folders, **method.random), batch_for(method.model, base.device)
    reason = cell(method, base).not_merged
    if reason:
        with pytest.raises((NotImplementedError, TypeError, ValueError), match=reason):
            model.merge_and_unload()
        return
    name = find_topology(model.base_model.model).linears[0]
    layer = model.base_model.model.get_submodule(name)
    written = dequantize_module_weight(layer.get_base_layer()).float()
    wanted = written + layer.get_delta_weight("default").float()
    assert relative_error(wanted, written) > 0.1
    merged = copy.deepcopy(model).merge_and_unload()
    found = dequantize_module_weight(merged.get_submodule(name)).float()
    step = relative_error(written, float_model(method.model).get_submodule(name).weight)
    assert relative_error(found, wanted) < 1.5 * step, "the sum, rounded to the base's grid"
    if base.name != "hqq":  # transformers does not write one
        export_merged(model, tmp_path / "merged")
        again = AUTO[method.model].from_pretrained(tmp_path / "merged").eval()
        keep_form(again)
        assert relative_error(logits(again, batch), logits(merged, batch)) < 1e-5


@pytest.mark.parametrize(("method", "base"), REFUSED)
def test_a_method_that_cannot_work_is_refused_before_anything_is_replaced(method, base, folders):
    if base.device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{base.title} needs a CUDA device")
    model = base.load(folders[method.model])
    before = [type(module) for module in model.modules()]
    with pytest.raises((ValueError, TypeError), match=cell(method, base).refused):
        get_peft_model(model, method.config())
    assert method.name == "lora" or [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("base", [base for base in BASES if base.device == "cpu"], ids=lambda base: base.name)
def test_experts_are_found_in_the_dequantised_weights_and_routed_to(base, folders):
    method, batch = METHODS[3], batch_for("bert")
    model = on(base, method, folders, top_k=2)
    dense = on(base, method, folders)
    assert relative_error(logits(model, batch), logits(dense, batch)) > 0.01
    layer = model.base_model.model.bert.encoder.layer[0].intermediate.dense
    experts = balanced_kmeans(layer.get_base_weight(), 4, seed=layer.router("default").seed)
    assert torch.equal(layer.router("default").labels, experts.int())
    train(model, batch)


@pytest.mark.parametrize("base", [base for base in BASES if base.device == "cpu"], ids=lambda base: base.name)
def test_the_adapter_goes_on_the_float_base_as_well(base, folders, tmp_path):
    method = METHODS[1]
    model, batch = on(base, method, folders, **method.random), batch_for("bert")
    save_adapter(model, tmp_path / "adapter")
    fingerprint = yaml.safe_load((tmp_path / "adapter" / "petune.yaml").read_text())["base"]["fingerprint"]
    assert fingerprint["num_parameters"] is None
    assert fingerprint["sha256"] is None
    assert fingerprint["hidden_size"] == 128
    loaded = load_adapter(tmp_path / "adapter", AUTO["bert"].from_pretrained(folders["bert"])).eval()
    plain = float_model("bert")
    assert relative_error(logits(loaded, batch), logits(plain, batch)) > 0.05
    export_merged(loaded, tmp_path / "merged")
    merged = AUTO["bert"].from_pretrained(tmp_path / "merged").eval()
    assert relative_error(logits(merged, batch), logits(loaded, batch)) < 1e-5


@pytest.mark.parametrize("base", [base for base in BASES if base.device == "cpu"], ids=lambda base: base.name)
def test_fuse_leaves_quantised_layers_to_peft_and_says_so(base, folders):
    model = on(base, METHODS[0], folders)
    report = petune.fuse(model)
    assert (report.fused, len(report.left)) == (0, 12)
    assert all(reason.startswith("it is peft's ") for reason in report.left.values())


@pytest.mark.parametrize("method", [METHODS[0], METHODS[1]], ids=lambda method: method.name)
def test_four_bit_weights_stand_an_evaluation_before_training_and_merging(method, folders):
    base, batch = BASES[0], batch_for("bert")
    raw = base.load(folders["bert"])
    seen = logits(raw, batch)  # on some CPUs bitsandbytes writes the weights anew here
    model = get_peft_model(raw, method.config()).eval()
    assert relative_error(logits(model, batch), seen) < 0.02  # scales in bfloat16
    train(model, batch)
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    written = dequantize_module_weight(layer.get_base_layer()).float()
    plain = float_model("bert").bert.encoder.layer[0].attention.self.query.weight
    assert relative_error(written, plain) < 0.15


class OnlyForward(nn.Module):
    """A linear whose weight PEFT cannot read, as those of GPTQ: no nn.Linear, and of integers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = (linear.weight.abs().max() / 127).item()
        self.register_buffer("qweight", (linear.weight.data / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("method", METHODS[1:6], ids=lambda method: method.name)
def test_what_the_page_says_of_gptq_holds_where_peft_can_only_run_a_layer(method, monkeypatch):
    known = tuner.resolve_quantization_backend
    backend = ForwardOnlyQuantizationBackend("gptq")
    monkeypatch.setattr(
        tuner, "resolve_quantization_backend", lambda m, **o: backend if isinstance(m, OnlyForward) else known(m, **o)
    )
    base, model, batch = BASES[-1], copy.deepcopy(float_model("bert")).requires_grad_(False), batch_for("bert")
    for name in find_topology(model).linears:
        model.set_submodule(name, OnlyForward(model.get_submodule(name)))
    if refused := cell(method, base).refused:
        with pytest.raises(ValueError, match=refused):
            get_peft_model(model, method.config())
        return
    adapted = get_peft_model(model, method.config()).eval()
    train(adapted, batch)
    with pytest.raises((NotImplementedError, TypeError), match=cell(method, base).not_merged):
        adapted.merge_and_unload()


def test_the_page_shows_what_the_tests_run():
    assert table() in (ROOT / "docs" / "quantised.md").read_text()
