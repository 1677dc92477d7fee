"""Rows of one batch with different adapters: the grouped operator computes what each adapter computes alone."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

import petune
from petune import mixed_batch
from petune.adapters.onebit import layer as onebit
from petune.adapters.onebit.layer import BiLoraLayer
from petune.kernels.grouped_lora import JoinedFactors, RowGroups
from petune.mixed_batch import row_groups
from petune.quantized.linear import PackedLinear, QuantizedLinear
from petune.quantized.packing import pack
from tests.adapters.harness import build, gradients, inputs, output
from tests.conftest import TOLERANCE, relative_error

NAMES = ("default", "second", "third")
ROWS = ["third", "__base__", "default", "third", "second"]


def lora(number: int, **fields: object) -> petune.FusedLoraConfig:
    r = (4, 3, 9)[number]
    return petune.FusedLoraConfig(r=r, lora_alpha=8 + number, init_lora_weights=False, **fields)


def bilora(number: int, **fields: object) -> petune.BiLoraConfig:
    return petune.BiLoraConfig(
        r=(4, 3, 9)[number], scale=0.5 + number, init_weights=False, **{"dropout": 0.0, **fields}
    )


METHODS = {"lora": lora, "bilora": bilora}


def three(method: str, family: str, head: str = "cls", **fields: object) -> PeftModel:
    """A model with three adapters of other ranks and scales; the second is on values alone."""
    torch.manual_seed(3)
    model = get_peft_model(build(family, head), METHODS[method](0, **fields))
    for number, name in enumerate(NAMES[1:], start=1):
        some = {"target_modules": r".*\.(value|v_proj|c_attn|v_lin)"} if number == 1 else {}
        model.add_adapter(name, METHODS[method](number, **{**fields, **some}))
    model.set_requires_grad(NAMES)
    return model.eval()


def alone(model: PeftModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    outputs = {}
    for name in NAMES:
        model.set_adapter(name)
        outputs[name] = output(model, batch)
    with model.disable_adapter():
        outputs["__base__"] = output(model, batch)
    model.set_adapter("default")
    model.set_requires_grad(NAMES)
    return outputs


def calls_of(monkeypatch, target, *functions: str) -> list[int]:
    """Numbers of adapters in each call of the grouped operators."""
    calls: list[int] = []

    def counting(original):
        def counted(*args):
            calls.append(next(one for one in args if isinstance(one, RowGroups)).adapters)
            return original(*args)

        return counted

    for function in functions:
        monkeypatch.setattr(target, function, counting(getattr(target, function)))
    return calls


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit", "distilbert"])
@pytest.mark.parametrize("method", METHODS)
def test_each_row_gets_what_its_adapter_gives_alone_by_the_grouped_operator(method, family, monkeypatch):
    batch = inputs(family, batch_size=len(ROWS))
    model = three(method, family)
    expected = alone(model, batch)
    calls = calls_of(monkeypatch, mixed_batch, "grouped_lora", "grouped_joined_lora")
    mixed = output(model, {**batch, "adapter_names": ROWS})
    wanted = torch.stack([expected[name][i] for i, name in enumerate(ROWS)])
    assert relative_error(mixed, wanted) <= TOLERANCE[torch.float32]
    assert len(calls) == sum(isinstance(m, LoraLayer | BiLoraLayer) for m in model.modules())
    assert max(calls) == 3


@pytest.mark.parametrize("method", METHODS)
def test_a_mixed_batch_in_training_gives_the_gradients_of_each_adapters_rows_alone(method):
    model = three(method, "bert").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = inputs("bert", batch_size=len(ROWS))
    labels = batch.pop("labels")

    def loss(rows: list[int], **mixed: object) -> torch.Tensor:
        logits = model(**{name: value[rows] for name, value in batch.items()}, **mixed).logits
        return torch.nn.functional.cross_entropy(logits, labels[rows], reduction="sum")

    together = gradients(model, lambda: loss(list(range(len(ROWS))), adapter_names=ROWS))
    for name in NAMES:
        model.set_adapter(name)
        rows = [i for i, row in enumerate(ROWS) if row == name]
        own = gradients(model, lambda rows=rows: loss(rows))
        assert own
        for key, expected in own.items():
            assert relative_error(together[key], expected) <= 10 * TOLERANCE[torch.float32]
    assert model.training
    assert model.base_model.training


def _sizes(monkeypatch, operator: str, weights: int = 1) -> list[int]:
    """Projections in each call of an operator, whose argument `weights` is theirs."""
    sizes: list[int] = []
    original = getattr(mixed_batch, operator)
    monkeypatch.setattr(mixed_batch, operator, lambda *args: sizes.append(len(args[weights])) or original(*args))
    return sizes


def _step(model: PeftModel, names: list[str], family: str) -> dict[str, torch.Tensor]:
    head = "lm" if family == "llama" else "cls"
    batch = inputs(family, head, batch_size=len(names))
    torch.manual_seed(7)
    return gradients(model, lambda: model(**batch, adapter_names=names).loss)


@pytest.mark.parametrize(("family", "sizes"), [("bert", [3, 3]), ("llama", [3, 2, 3, 2])])
def test_in_training_projections_of_one_input_are_one_operator(family, sizes, monkeypatch):
    head = "lm" if family == "llama" else "cls"
    models = [three("lora", family, head, target_modules="all-linear") for _ in range(2)]
    petune.fuse(models[0])
    names = ["third", "__base__", "default", "third", "default"]
    called = _sizes(monkeypatch, "grouped_lora_projections")
    found, expected = (_step(model, names, family) for model in models)
    assert called == sizes
    for key, gradient in expected.items():
        assert relative_error(found[key], gradient) <= 10 * TOLERANCE[torch.float32]
    assert all(layer.group.off == "" for layer in models[0].modules() if getattr(layer, "group", None))


def test_rows_that_all_take_one_adapter_are_a_batch_of_it(monkeypatch):
    model = three("lora", "bert", target_modules="all-linear").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    petune.fuse(model)
    model.set_adapter("third")
    batch = inputs("bert", batch_size=3)
    expected = gradients(model, lambda: model(**batch).loss)
    model.set_requires_grad(NAMES)
    grouped = _sizes(monkeypatch, "grouped_lora"), _sizes(monkeypatch, "grouped_lora_projections")
    alone = _sizes(monkeypatch, "lora_group")
    found = _step(model, ["third"] * 3, "bert")
    assert (grouped, alone) == (([], []), [3, 3])
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert torch.equal(found[key], gradient)


def test_a_hook_on_one_projection_is_called_and_all_compute_their_own(monkeypatch):
    model = three("lora", "bert", target_modules="all-linear")
    petune.fuse(model)
    names = ["third", "__base__", "default", "third", "default"]
    expected = _step(model, names, "bert")
    called, seen = _sizes(monkeypatch, "grouped_lora_projections"), []
    key = next(layer for name, layer in model.named_modules() if name.endswith("0.attention.self.key"))
    key.register_forward_hook(lambda *_: seen.append(1))
    found = _step(model, names, "bert")
    assert (called, seen) == ([3], [1])  # the other block's
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("method", METHODS)
def test_an_optimizer_moves_only_the_adapters_that_had_rows(method):
    dropout = {"lora_dropout": 0.1} if method == "lora" else {"dropout": 0.1}
    model = three(method, "bert", **dropout).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = inputs("bert", batch_size=4)
    model(**batch, adapter_names=["third", "default", "default", "__base__"]).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in moved if "second" in name} == set()
    for adapter in ("default", "third"):
        assert {name for name in before if f".{adapter}" in name} <= moved


@pytest.mark.parametrize("family", ["bart", "llama"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_generation_with_a_cache_and_beams_is_each_rows_own(method, family, beams):
    model = (
        three(method, family, "lm", target_modules="all-linear") if method == "lora" else three(method, family, "lm")
    )
    batch = {name: value for name, value in inputs(family, "lm", batch_size=3).items() if name != "labels"}
    arguments = {"num_beams": beams, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    rows = ["third", "__base__", "default"]
    mixed = model.generate(**batch, **arguments, adapter_names=rows)
    for i, name in enumerate(rows):
        model.set_adapter("default" if name == "__base__" else name)
        if name == "__base__":
            with model.disable_adapter():
                own = model.generate(**batch, **arguments)
        else:
            own = model.generate(**batch, **arguments)
        assert torch.equal(mixed[i], own[i])


@pytest.mark.parametrize("method", METHODS)
def test_a_generation_joins_the_factors_of_a_layer_twice_and_keeps_nothing_of_them(method, monkeypatch):
    model = three(method, "llama", "lm")
    batch = {name: value for name, value in inputs("llama", "lm", batch_size=3).items() if name != "labels"}
    joined: list[JoinedFactors] = []
    of = JoinedFactors.of
    monkeypatch.setattr(JoinedFactors, "of", lambda *factors: joined.append(of(*factors)) or joined[-1])

    def generate() -> torch.Tensor:
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        rows = ["third", "__base__", "default"]
        scores = model.generate(
            **batch, **options, adapter_names=rows, output_scores=True, return_dict_in_generate=True
        )
        return torch.stack(scores.scores)

    before = generate()
    layers = sum(isinstance(m, LoraLayer | BiLoraLayer) for m in model.modules())
    assert len(joined) == 2 * layers  # in the first pass, and to be kept in the second of six
    kept = [weakref.ref(factors.a) for factors in joined]
    joined.clear()
    gc.collect()
    assert [one for one in kept if one() is not None] == []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default" in name:
                parameter.mul_(-1.5)
    assert not torch.equal(before, generate())


def test_packed_adapters_are_unpacked_by_the_grouped_operator(monkeypatch, tmp_path):
    model = three("bilora", "bert")
    batch = inputs("bert", batch_size=len(ROWS))
    expected = output(model, {**batch, "adapter_names": ROWS})
    for module in model.modules():
        if isinstance(module, BiLoraLayer):
            for factors in (module.petune_bilora_a, module.petune_bilora_b):
                for name, latent in factors.items():
                    factors[name] = _packed(latent)
    calls = calls_of(monkeypatch, onebit, "grouped_packed_lora")
    found = output(model, {**batch, "adapter_names": ROWS})
    assert relative_error(found, expected) <= TOLERANCE[torch.float32]
    assert set(calls) == {2, 3}


def _packed(latent: QuantizedLinear) -> PackedLinear:
    module = PackedLinear(latent.in_features, latent.out_features, latent.quantization)
    stats = latent.statistics()
    codes = latent.quantization.codes(latent.weight, stats)
    module.load_state_dict({"bits": pack(codes, latent.quantization.bits), "stats": stats})
    return module


def test_adapters_that_the_operator_does_not_cover_take_pefts_loop_or_its_refusal(monkeypatch):
    model = three("lora", "bert")
    batch = inputs("bert", batch_size=len(ROWS))
    expected = output(model, {**batch, "adapter_names": ROWS})
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_A["third"].register_forward_hook(lambda _, __, out: out)  # hooked: PEFT's forward runs it
    calls = calls_of(monkeypatch, mixed_batch, "grouped_lora", "grouped_joined_lora")
    assert relative_error(output(model, {**batch, "adapter_names": ROWS}), expected) <= TOLERANCE[torch.float32]
    assert calls == []
    model.add_adapter("dora", petune.FusedLoraConfig(r=2, use_dora=True))
    with pytest.raises(ValueError, match="DoRA"):
        output(model, {**inputs("bert", batch_size=2), "adapter_names": ["dora", "default"]})


def test_plain_peft_lora_still_refuses_training_with_names():
    model = get_peft_model(build("bert"), LoraConfig(r=2, target_modules=["query"])).train()
    with pytest.raises(ValueError, match="training mode"):
        model(**inputs("bert", batch_size=2), adapter_names=["default", "default"])
    petune.fuse(model)
    assert model(**inputs("bert", batch_size=2), adapter_names=["default", "default"]).loss.requires_grad


def test_a_failure_in_training_leaves_the_mode_as_it_was():
    model = three("lora", "bert").train()
    with pytest.raises(ValueError, match="nobody"):
        model(**inputs("bert", batch_size=2), adapter_names=["default", "nobody"])
    assert model.base_model.training


def test_rows_are_sorted_once_for_all_layers_of_a_forward():
    row_groups.cache_clear()
    model = three("bilora", "bert")
    output(model, {**inputs("bert", batch_size=len(ROWS)), "adapter_names": ROWS})
    assert row_groups.cache_info().misses == 2  # the layers of all three adapters, and those of two
    assert row_groups.cache_info().hits == 2
