"""The contract every method keeps: what PEFT's and transformers' own entry points must do with it."""

import copy
import pickle
import textwrap

import peft
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForSequenceClassification

from petune.topology import find_topology
from tests import fresh
from tests.adapters.cases import BY_NAME, cases, cases_and_families
from tests.adapters.harness import (
    adapted,
    assert_same_tensors,
    base_tensors,
    build,
    inputs,
    output,
    snapshot,
    targets,
    train,
)
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES

SOME = ("bert", "gpt2", "t5", "vit")  # post-norm, Conv1D, encoder-decoder without biases, images


@cases_and_families(*FAMILIES, identity=True)
def test_a_fresh_adapter_changes_nothing(case, family):
    base = build(family, head="none")
    batch = inputs(family, head="none")
    expected = output(base, batch)
    model = get_peft_model(base, case.config(**targets(case))).eval()
    assert relative_error(output(model, batch), expected) <= TOLERANCE[torch.float32]


@cases_and_families(*FAMILIES, default_targets=True)
def test_default_targets_sit_in_every_block(case, family):
    model = get_peft_model(build(family, head="none"), case.config())
    topology = find_topology(model.get_base_model())
    layers = [name for name, module in model.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)]
    assert [block for block in topology.blocks if not any(f"{name}.".startswith(f"{block}.") for name in layers)] == []
    trainable, total = model.get_nb_trainable_parameters()
    assert 0 < trainable < total


@cases_and_families(*FAMILIES)
def test_what_is_saved_is_what_was_trained(case, family, tmp_path):
    head = "cls" if "cls" in FAMILIES[family].heads else "lm"
    batch = inputs(family, head)
    model = get_peft_model(build(family, head), case.config(**targets(case)))
    start = output(model.eval(), batch)
    train(model, batch)
    trained = output(model, batch)
    assert relative_error(trained, start) > 1e-3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family, head), tmp_path).eval()
    assert torch.equal(output(loaded, batch), trained)


@cases_and_families(*SOME)
def test_training_goes_on_from_what_was_saved(case, family, tmp_path):
    batch = inputs(family)
    model = get_peft_model(build(family), case.config(**targets(case), **case.resumable))
    train(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path, is_trainable=True)
    assert train(loaded, batch) == pytest.approx(train(model, batch), rel=1e-6)


@cases_and_families(*SOME)
def test_only_the_adapter_trains_and_unload_gives_the_base_back_bit_by_bit(case, family):
    base = build(family)
    before = snapshot(base)
    head = FAMILIES[family].kind
    to_save = ["score"] if head == "decoder" else None if head == "seq2seq" else ["classifier"]
    model = get_peft_model(base, case.config(**targets(case), modules_to_save=to_save))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(model.base_model.prefix in name or ".modules_to_save." in name for name in trainable)
    assert any(".modules_to_save." in name for name in trainable) == (to_save is not None)
    train(model, inputs(family))
    assert_same_tensors(base_tensors(model), before)
    if to_save is None:
        assert_same_tensors(model.unload().state_dict(), before)


@cases_and_families(*SOME)
def test_disable_adapter_gives_the_output_of_the_base(case, family):
    batch = inputs(family)
    expected = output(build(family), batch)
    model = adapted(case, family)
    changed = output(model, batch)
    with model.disable_adapter():
        assert torch.equal(output(model, batch), expected)
    assert torch.equal(output(model, batch), changed)
    assert relative_error(changed, expected) > 1e-3


@cases_and_families(*SOME, merges=True, identity=True)
def test_merging_keeps_the_output_and_unmerging_brings_the_base_back(case, family):
    batch = inputs(family)
    model = adapted(case, family)
    base, expected = base_tensors(model), output(model, batch)
    model.merge_adapter(safe_merge=True)
    assert relative_error(output(model, batch), expected) <= TOLERANCE[torch.float32]
    model.unmerge_adapter()
    assert relative_error(output(model, batch), expected) <= TOLERANCE[torch.float32]
    for name, tensor in base_tensors(model).items():
        assert relative_error(tensor.float(), base[name].float()) <= TOLERANCE[torch.float32]
    merged = model.merge_and_unload()
    assert type(merged) is type(build(family))
    assert snapshot(merged).keys() == snapshot(build(family)).keys()
    assert relative_error(output(merged, batch), expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@cases_and_families("bert", "gpt2", "llama", merges=True)
def test_a_low_precision_merge_rounds_once(case, family, dtype):
    base = build(family, dtype=dtype)
    wide = build(family, dtype=dtype).float()
    model = get_peft_model(base, case.random_config(**targets(case)))
    reference = get_peft_model(wide, case.random_config(**targets(case)))
    reference.load_state_dict({**reference.state_dict(), **_adapter(model)})
    merged, exact = model.merge_and_unload().state_dict(), reference.merge_and_unload().state_dict()
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        assert relative_error(tensor, exact[name]) <= TOLERANCE[dtype]


def _adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.state_dict().items() if model.base_model.prefix in name}


@cases(merges=True, identity=True)
def test_a_merged_layer_is_the_base_in_training_too_and_a_second_merge_warns(case):
    model = adapted(case, "llama")
    batch = inputs("llama")
    expected = output(model, batch)
    model.merge_adapter()
    model.train()
    assert relative_error(output(model, batch), expected) <= TOLERANCE[torch.float32]
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@cases(merges=True)
def test_safe_merge_refuses_nan_and_leaves_the_base_alone(case):
    model = adapted(case, "bert")
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    before = base_tensors(model)
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        model.merge_and_unload(safe_merge=True)
    assert_same_tensors(base_tensors(model), before)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@cases(merges=False)
def test_merging_what_is_no_weight_is_refused_with_a_sentence(case, merge):
    sentence = r"unload\(\)|finalize\(\)"  # a mask has to be hard before it can be folded
    with pytest.raises((RuntimeError, ValueError), match=sentence):  # NotImplementedError is a RuntimeError
        getattr(adapted(case, "bert"), merge)()


@cases_and_families(*SOME)
def test_adapters_are_added_switched_and_deleted(case, family, tmp_path):
    batch = inputs(family)
    model = adapted(case, family)
    first = output(model, batch)
    torch.manual_seed(2)
    model.add_adapter("second", case.random_config(**targets(case)))
    assert torch.equal(output(model, batch), first)
    model.set_adapter("second")
    second = output(model, batch)
    assert relative_error(second, first) > 1e-3
    assert [name for name, p in model.named_parameters() if p.requires_grad and "second" not in name.split(".")] == []
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    model.delete_adapter("second")
    assert not any("second" in name for name in model.state_dict())
    model.set_adapter("default")
    assert torch.equal(output(model, batch), first)
    model.load_adapter(tmp_path / "second", "third")
    model.set_adapter("third")
    assert torch.equal(output(model, batch), second)


@cases(several_active=True)
def test_two_active_adapters_add_up(case):
    batch = inputs("llama")
    model = adapted(case, "llama")
    torch.manual_seed(2)
    model.add_adapter("second", case.random_config(**targets(case)))
    model.base_model.set_adapter(["default", "second"])
    both = output(model, batch)
    model.base_model.set_adapter(["second", "default"])
    assert relative_error(output(model, batch), both) <= TOLERANCE[torch.float32]
    if case.merges:
        model.merge_adapter(["default", "second"])
        assert relative_error(output(model, batch), both) <= TOLERANCE[torch.float32]


@cases_and_families("bert", "gpt2", "vit", mixed_batch=True)
def test_each_row_of_a_mixed_batch_takes_its_own_adapter(case, family):
    batch = inputs(family, batch_size=4)
    base = output(build(family), batch)
    model = adapted(case, family)
    first = output(model, batch)
    torch.manual_seed(2)
    model.add_adapter("second", case.random_config(**targets(case)))
    model.set_adapter("second")
    second = output(model, batch)
    model.set_adapter("default")
    rows = ["second", "__base__", "default", "second"]
    expected = torch.stack([{"second": second, "default": first}.get(name, base)[i] for i, name in enumerate(rows)])
    mixed = output(model, {**batch, "adapter_names": rows})
    assert relative_error(mixed, expected) <= TOLERANCE[torch.float32]
    assert torch.equal(output(model, batch), first)  # no hook stays behind


@cases(mixed_batch=True)
def test_generate_with_beams_takes_mixed_batches(case):
    batch = {name: v for name, v in inputs("bart", "lm", batch_size=2).items() if name != "labels"}
    model = adapted(case, "bart", "lm")
    arguments = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    alone = model.generate(**batch, **arguments)
    with model.disable_adapter():
        base = model.generate(**batch, **arguments)
    mixed = model.generate(**batch, **arguments, adapter_names=["default", "__base__"])
    assert torch.equal(mixed, torch.stack([alone[0], base[1]]))


@cases(mixed_batch=True)
def test_a_mixed_batch_that_cannot_work_is_refused(case):
    model = adapted(case, "bert")
    batch = inputs("bert", batch_size=2)
    with pytest.raises(ValueError, match="nobody"):
        output(model, {**batch, "adapter_names": ["default", "nobody"]})
    with pytest.raises(ValueError, match=r"adapter_names|Length"):
        output(model, {**batch, "adapter_names": ["default"]})
    if not any(hasattr(module, "operands") for module in model.modules()):  # those train: test_mixed_batches.py
        with pytest.raises(ValueError, match="training mode"):
            output(model.train(), {**batch, "adapter_names": ["default", "default"]})
    if case.merges:
        model.eval().merge_adapter()
        with pytest.raises(ValueError, match="merged"):
            output(model, {**batch, "adapter_names": ["default", "default"]})


@cases(mixed_batch=False)
def test_mixed_batches_are_refused_and_not_silently_ignored(case):
    with pytest.raises(ValueError, match="adapter_names"):
        output(adapted(case, "bert"), {**inputs("bert", batch_size=1), "adapter_names": ["default"]})


@cases(weighted=True)
def test_a_weighted_adapter_is_the_weighted_sum(case):
    options = {"combination_type": "cat"} if "lora" in case.name else {}
    model = adapted(case, "gpt2", target_modules=["c_attn", "c_fc"])
    model.add_adapter("second", case.random_config(target_modules=["c_fc"]))
    model.base_model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum", **options)
    for layer in model.base_model.model.transformer.h:
        attention, ffn = layer.attn.c_attn, layer.mlp.c_fc
        total = 0.7 * ffn.get_delta_weight("default") - 0.4 * ffn.get_delta_weight("second")
        assert relative_error(ffn.get_delta_weight("sum"), total) <= TOLERANCE[torch.float32]
        total = 0.7 * attention.get_delta_weight("default")
        assert relative_error(attention.get_delta_weight("sum"), total) <= TOLERANCE[torch.float32]
    model.set_adapter("sum")
    assert torch.isfinite(output(model, inputs("gpt2"))).all()


@cases(weighted=False)
def test_a_weighted_adapter_without_meaning_is_refused(case):
    with pytest.raises(NotImplementedError, match="weighted sum"):
        adapted(case, "bert").base_model.add_weighted_adapter(["default"], [1.0], "sum")


@cases(converts_to_lora=True)
def test_pefts_conversion_to_lora_approximates_the_update(case):
    model = adapted(case, "bert", target_modules=["query", "value"])
    config, state = peft.convert_to_lora(model, rank=32)
    back = get_peft_model(build("bert"), config)
    peft.set_peft_model_state_dict(back, state)
    batch = inputs("bert")
    assert relative_error(output(back.eval(), batch), output(model, batch)) <= 1e-4  # of an SVD of full rank


@cases_and_families(*SOME, native=True)
def test_transformers_own_adapter_methods_work(case, family, tmp_path):
    batch = inputs(family)
    model = build(family)
    expected = output(model, batch)
    model.add_adapter(case.random_config(**targets(case)), adapter_name="mine")
    changed = output(model.eval(), batch)
    assert relative_error(changed, expected) > 1e-3
    model.disable_adapters()
    assert torch.equal(output(model, batch), expected)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    fresh = build(family)
    fresh.load_adapter(tmp_path, adapter_name="again")
    assert relative_error(output(fresh.eval(), batch), changed) <= TOLERANCE[torch.float32]
    fresh.delete_adapter("again")
    assert torch.equal(output(fresh, batch), expected)


@cases()
def test_auto_classes_find_the_base_from_the_adapter_folder(case, tmp_path):
    build("bert").save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    model = get_peft_model(base, case.random_config(task_type="SEQ_CLS", **targets(case))).eval()
    batch = inputs("bert")
    expected = output(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    auto = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(output(auto, batch), expected)
    if case.native and not case.packed:
        native = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(output(native, batch), expected)


@cases_and_families("bert", "gpt2")
def test_low_cpu_mem_usage_loads_the_same_adapter(case, family, tmp_path):
    model = adapted(case, family)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path, low_cpu_mem_usage=True).eval()
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert torch.equal(output(loaded, inputs(family)), output(model, inputs(family)))


@cases()
def test_deepcopy_and_pickle_keep_the_model_and_share_nothing(case):
    model = adapted(case, "bert")
    batch = inputs("bert")
    expected = output(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, batch), expected)
        train(twin, batch)
        assert torch.equal(output(model, batch), expected)
    config = case.config(target_modules=["query"])
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("case", [BY_NAME["densedelta"], BY_NAME["emoe_routed"]], ids=lambda case: case.name)
def test_a_fresh_process_computes_the_same_logits(case, tmp_path):
    build("bert").save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, case.config(task_type="SEQ_CLS", **targets(case)))
    batch = inputs("bert")
    train(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    torch.save({"batch": batch, "logits": output(model, batch)}, tmp_path / "expected.pt")
    code = f"""
        import sys, torch, petune
        import {case.config_cls.__module__}
        from peft import AutoPeftModelForSequenceClassification
        torch.set_num_threads(1)
        model = AutoPeftModelForSequenceClassification.from_pretrained(r"{tmp_path / "adapter"}").eval()
        expected = torch.load(r"{tmp_path / "expected.pt"}")
        with torch.no_grad():
            assert torch.equal(model(**expected["batch"]).logits, expected["logits"])
        print("same")
    """
    done = fresh.run(textwrap.dedent(code))
    assert done.output.strip().endswith("same"), done.errors
