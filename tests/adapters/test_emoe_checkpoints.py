"""Labels that come back exactly and are never found twice, several adapters, and what exporters make of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from petune import export_lora, export_merged, load_adapter, save_adapter
from petune.adapters.emoe import EmoeConfig, layer
from tests.adapters.emoe_models import adapted, choices, config, routed_layers, routers
from tests.adapters.harness import assert_same_tensors, build, inputs, output, snapshot, train
from tests.conftest import TOLERANCE, relative_error

WEIGHTS = "adapter_model.safetensors"
EXACT = TOLERANCE[torch.float32]


def labels_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [router.labels for router in routers(model)]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture
def found(monkeypatch) -> list[int]:
    """The seeds of the clusterings that ran: each block adds its number."""
    seeds: list[int] = []
    cluster = layer.balanced_kmeans

    def counted(keys: torch.Tensor, num_experts: int, *, seed: int) -> torch.Tensor:
        seeds.append(seed)
        return cluster(keys, num_experts, seed=seed)

    monkeypatch.setattr(layer, "balanced_kmeans", counted)
    return seeds


# --------------------------------------------------------------------------------------------------------- the labels


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("cluster", ["balanced_kmeans", "random", "contiguous"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "phi3"])
def test_labels_are_restored_and_not_found_again(
    family: str, cluster: str, low_cpu_mem_usage: bool, tmp_path: Path, found: list[int]
):
    model = adapted(family, cluster=cluster, seed=5)
    assert found == ([5, 6] if cluster == "balanced_kmeans" else [])
    model.save_pretrained(tmp_path)
    found.clear()
    base = build(family)
    for one in routed_layers(model):
        torch.nn.init.normal_(base.get_submodule(one).weight)  # another clustering would come out
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert equal(labels_of(loaded), labels_of(model))
    output(loaded, inputs(family))
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("second")
    output(loaded, inputs(family))
    assert found == []


def test_the_file_holds_labels_of_two_bytes_and_the_names_of_what_is_routed(tmp_path: Path):
    model = adapted("llama", layers=[1])
    model.save_pretrained(tmp_path)
    name = "base_model.model.model.layers.1.mlp.gate_proj.petune_emoe_router.labels"
    tensors = {key: tensor for key, tensor in load_file(tmp_path / WEIGHTS).items() if "router" in key}
    assert_same_tensors(tensors, {name: labels_of(model)[0]})
    assert tensors[name].dtype == torch.int32
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["routed_modules"] == ["model.layers.1.mlp.gate_proj"]


def test_training_leaves_the_labels_alone(found: list[int]):
    model = adapted("bert", target_modules="all-linear")
    before = [labels.clone() for labels in labels_of(model)]
    train(model, inputs("bert"))
    assert equal(labels_of(model), before)
    assert len(found) == 2


@pytest.fixture
def from_checkpoint(tmp_path: Path) -> EmoeConfig:
    """A config as it was saved, to be used for a new adapter."""
    adapted("bert", seed=5, r=4).save_pretrained(tmp_path / "old")
    saved = PeftConfig.from_pretrained(tmp_path / "old")
    saved.inference_mode = False
    assert isinstance(saved, EmoeConfig)
    return saved


def test_an_adapter_from_a_saved_config_is_clustered_when_it_is_first_used(
    from_checkpoint: EmoeConfig, found: list[int]
):
    expected = labels_of(adapted("bert", seed=5))
    found.clear()
    model = get_peft_model(build("bert"), from_checkpoint).eval()
    assert found == []
    batch = inputs("bert")
    first = output(model, batch)
    assert found == [5, 6]
    assert equal(labels_of(model), expected)
    assert torch.equal(output(model, batch), first)
    assert found == [5, 6]


def test_an_adapter_from_a_saved_config_is_clustered_before_it_is_saved(
    from_checkpoint: EmoeConfig, found: list[int], tmp_path: Path
):
    found.clear()
    model = get_peft_model(build("bert"), from_checkpoint)
    for state in (get_peft_model_state_dict(model), _saved(model, tmp_path)):
        labels = [tensor for name, tensor in state.items() if "labels" in name]
        assert all(tensor.min() == 0 and tensor.max() == 3 for tensor in labels)
        assert equal(labels, labels_of(model))
    assert found == [5, 6]


def _saved(model: PeftModel, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder / "new")
    return load_file(folder / "new" / WEIGHTS)


def test_labels_that_were_not_found_yet_are_not_taken_for_found(from_checkpoint: EmoeConfig):
    source, target = (get_peft_model(build("bert"), from_checkpoint).eval() for _ in range(2))
    target.load_state_dict(source.state_dict())  # as a trainer's checkpoint does it, before any forward
    expected = labels_of(adapted("bert", seed=5))
    output(target, inputs("bert"))
    assert equal(labels_of(target), expected)


def test_a_model_that_gets_its_weights_later_is_clustered_by_them(found: list[int]):
    weights = build("bert")
    with torch.device("meta"):
        base = type(weights)(weights.config)
    model = get_peft_model(base, config(init_weights=False), low_cpu_mem_usage=True)
    assert found == []
    reference = adapted("bert")
    model.load_state_dict(reference.state_dict(), assign=True)
    model.eval()
    assert equal(labels_of(model), labels_of(reference))
    model.get_base_model().bert.embeddings.load_state_dict(weights.bert.embeddings.state_dict(), assign=True)
    model.get_base_model().bert.embeddings.register_buffer("position_ids", torch.arange(32)[None])
    model.get_base_model().bert.embeddings.register_buffer("token_type_ids", torch.zeros(1, 32, dtype=torch.long))
    assert torch.equal(output(model, inputs("bert")), output(reference, inputs("bert")))


# --------------------------------------------------------------------------------------------------- several adapters


def pair(**second: Any) -> PeftModel:
    model = adapted("bert", layers=[1], target_modules=["query", "intermediate.dense"])
    torch.manual_seed(2)
    fields = {"layers": [0], "target_modules": ["value", "output.dense"], "r": 5, "num_experts": 8, "top_k": 3}
    model.add_adapter("second", config(init_weights=False, **{**fields, **second}))
    return model.eval()


def test_adapters_route_their_own_layers_and_leave_the_others_dense():
    batch = inputs("bert")
    model = pair()
    alone = output(adapted("bert", layers=[1], target_modules=["query", "intermediate.dense"]), batch)
    assert torch.equal(output(model, batch), alone)
    assert called(model, batch) == [0, 1]
    model.set_adapter("second")
    assert called(model, batch) == [1, 0]
    assert relative_error(output(model, batch), alone) > 1e-3
    model.base_model.set_adapter(["default", "second"])
    assert called(model, batch) == [1, 1]
    with model.disable_adapter():
        assert torch.equal(output(model, batch), output(build("bert"), batch))


def called(model: PeftModel, batch: Any) -> list[int]:
    """How often each router was asked."""
    with choices(model) as found:
        output(model, batch)
    return [len(mine) for mine in found]


def test_rows_of_a_batch_take_adapters_that_route_different_layers():
    batch = inputs("bert", batch_size=4)
    model = pair()
    base, alone = output(build("bert"), batch), {}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = output(model, batch)
    rows = ["second", "__base__", "default", "second"]
    expected = torch.stack([alone.get(name, base)[i] for i, name in enumerate(rows)])
    assert relative_error(output(model, {**batch, "adapter_names": rows}), expected) <= EXACT


@pytest.mark.parametrize("layers", [[0], [1], "all"])
def test_a_deleted_adapter_takes_its_routing_along(layers: Any):
    batch = inputs("bert")
    model = pair(layers=layers)
    before = output(model, batch)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(output(model, batch), before)
    assert not any("second" in name for name in model.state_dict())
    assert list(routed_layers(model)) == ["bert.encoder.layer.1.intermediate.dense"]


# ------------------------------------------------------------------------------------------------------- exporters


def test_the_export_folder_reads_back_exactly(tmp_path: Path):
    batch = inputs("bert")
    model = get_peft_model(build("bert"), config(target_modules="all-linear", task_type="SEQ_CLS"))
    train(model, batch)
    report = save_adapter(model, tmp_path / "adapter")
    assert report.tensors == len(load_file(tmp_path / "adapter" / WEIGHTS))
    loaded = load_adapter(tmp_path / "adapter", build("bert"))
    assert torch.equal(output(loaded.eval(), batch), output(model, batch))


def test_a_merged_export_is_dense_and_says_so(tmp_path: Path):
    model = adapted("bert")
    with pytest.warns(UserWarning, match=r"routing removed \(EMoE2Dense\)"):
        export_merged(model, tmp_path / "merged")
    state = load_file(tmp_path / "merged" / "model.safetensors")
    assert not any("router" in name for name in state)


def test_routing_is_no_lora(tmp_path: Path):
    with pytest.raises(TypeError, match="PETUNE_EMOE do not support LoRA conversion"):
        export_lora(adapted("bert"), tmp_path / "lora")


def test_unload_gives_the_base_back_bit_by_bit_and_no_warning(recwarn: pytest.WarningsRecorder):
    base = build("bert")
    before = snapshot(base)
    model = pair()
    assert_same_tensors(model.unload().state_dict(), before)
    assert not [one for one in recwarn if "routing" in str(one.message)]
