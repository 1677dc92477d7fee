"""Models smaller than their config: cut, marked, saved and loaded; inputs made up; hooks taken off."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForSequenceClassification, BertModel
from transformers.pytorch_utils import Conv1D

from petune.export import save_model
from petune.hooks import remove_hooks
from petune.probe import first_output, probe_inputs
from petune.pruned import MARK, load_pruned, mark_pruned, resize, write_mark
from tests.adapters.harness import build, inputs, output
from tests.conftest import relative_error
from tests.families import FAMILIES

ALL = [pytest.param(name, head, id=f"{name}-{head}") for name, family in FAMILIES.items() for head in family.heads]


def narrowed(family: str = "bert", inner: int = 31) -> nn.Module:
    """A model with fewer neurons in its feed-forwards than its config says."""
    model = build(family)
    tensors = {
        name: tensor[:inner] if "intermediate.dense" in name else tensor[:, :inner]
        for name, tensor in model.state_dict().items()
        if "intermediate.dense" in name or name.endswith(("0.output.dense.weight", "1.output.dense.weight"))
    }
    return mark_pruned(resize(model, tensors), width=32, kept=32)


# ------------------------------------------------------------------------------------------------------------- pruned


def test_a_resized_module_states_the_size_of_its_weight():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(5, 7),
            "turned": Conv1D(7, 5),
            "table": nn.Embedding(11, 5),
            "norm": nn.LayerNorm(5),
            "patches": nn.Conv2d(3, 5, 2),
            "sounds": nn.Conv1d(4, 6, 3, groups=2),
        }
    )
    shapes = {"linear": (6, 3), "turned": (3, 6), "table": (11, 3), "norm": (3,), "patches": (4, 3, 2, 2)}
    tensors = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    tensors["sounds.weight"] = torch.randn(4, 2, 3)
    biases = {"linear": 6, "turned": 6, "norm": 3, "patches": 4, "sounds": 4}
    small = resize(model, {**tensors, **{f"{name}.bias": torch.randn(size) for name, size in biases.items()}})
    assert small is model
    assert (model["linear"].in_features, model["linear"].out_features) == (3, 6)
    assert (model["turned"].nx, model["turned"].nf) == (3, 6)
    assert (model["table"].num_embeddings, model["table"].embedding_dim) == (11, 3)
    assert model["norm"].normalized_shape == (3,)
    assert (model["patches"].in_channels, model["patches"].out_channels) == (3, 4)
    assert (model["sounds"].in_channels, model["sounds"].out_channels) == (4, 4)
    x = torch.randn(2, 3)
    assert model["norm"](model["linear"](x)[:, :3]).shape == (2, 3)
    assert model["turned"](x).shape == (2, 6)
    assert model["patches"](torch.randn(1, 3, 4, 4)).shape == (1, 4, 3, 3)


def test_resizing_keeps_what_trains_what_is_a_buffer_and_takes_ties_apart():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    model["a"].weight.requires_grad_(False)
    model.register_buffer("mean", torch.zeros(3))
    tensors = {"a.weight": torch.randn(3, 2), "b.weight": torch.randn(3, 2), "mean": torch.ones(2)}
    resize(model, tensors)
    assert model["a"].weight is not model["b"].weight
    assert not model["a"].weight.requires_grad
    assert isinstance(model["b"].weight, nn.Parameter)
    assert torch.equal(model.mean, torch.ones(2))
    assert "mean" not in dict(model.named_parameters())


def test_a_tensor_without_a_place_is_named():
    with pytest.raises(KeyError, match=r"no parameter or buffer 'weights'; load it with the class it was saved from"):
        resize(nn.Linear(3, 3), {"weights": torch.zeros(3, 3)})


def test_a_marked_model_is_saved_and_loaded_with_its_own_sizes(tmp_path):
    model, batch = narrowed(), inputs("bert")
    expected = output(model, batch)
    save_model(model, tmp_path / "small")
    assert json.loads((tmp_path / "small" / MARK).read_text())["class"] == "BertForSequenceClassification"
    loaded = load_pruned(tmp_path / "small")
    assert type(loaded) is BertForSequenceClassification
    assert loaded.bert.encoder.layer[1].intermediate.dense.out_features == 31
    assert torch.equal(output(loaded, batch), expected)
    save_model(loaded, tmp_path / "again")  # it still knows
    assert torch.equal(output(load_pruned(tmp_path / "again"), batch), expected)
    twin = copy.deepcopy(loaded)
    save_model(twin, tmp_path / "twin")
    assert (tmp_path / "twin" / MARK).is_file()


def test_the_dtype_is_that_of_the_weights(tmp_path):
    model = narrowed().to(torch.bfloat16)
    save_model(model, tmp_path / "small")
    assert {p.dtype for p in load_pruned(tmp_path / "small").parameters()} == {torch.bfloat16}


def test_weights_in_several_files_are_all_loaded(tmp_path):
    model, batch = narrowed(), inputs("bert")
    save_model(model, tmp_path / "small")
    model.save_pretrained(tmp_path / "small", max_shard_size="20KB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 2
    (tmp_path / "small" / "model.safetensors").unlink(missing_ok=True)
    assert torch.equal(output(load_pruned(tmp_path / "small"), batch), output(model, batch))


def test_an_unmarked_model_leaves_no_mark(tmp_path):
    write_mark(build("bert"), tmp_path)
    assert not list(tmp_path.iterdir())
    save_model(build("bert"), tmp_path / "dense")
    message = rf"{MARK}, so it is no pruned model; load it with from_pretrained"
    with pytest.raises(FileNotFoundError, match=message):
        load_pruned(tmp_path / "dense")


def _saved(folder: Path) -> Path:
    save_model(narrowed(), folder / "small")
    return folder / "small"


def test_a_class_that_transformers_does_not_have_is_named(tmp_path):
    folder = _saved(tmp_path)
    about = json.loads((folder / MARK).read_text())
    (folder / MARK).write_text(json.dumps({**about, "class": "BretModel"}))
    with pytest.raises(ValueError, match="holds a BretModel, which this version of transformers does not have"):
        load_pruned(folder)


def test_a_folder_that_lacks_weights_is_refused_and_says_which(tmp_path):
    folder = _saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    lost = [name for name in tensors if "layer.1.output.dense" in name]
    save_file({name: t for name, t in tensors.items() if name not in lost}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 2 weights, bert\.encoder\.layer\.1\.output\.dense\.weight first"):
        load_pruned(folder)


# -------------------------------------------------------------------------------------------------------------- probe


@pytest.mark.parametrize(("family", "head"), ALL)
def test_every_family_takes_the_inputs_made_up_for_it(family, head):
    model = build(family, head)
    probe = probe_inputs(model, batch_size=3)
    assert probe is not None
    found = first_output(model(**probe))
    assert found.shape[0] == 3
    assert torch.isfinite(found).all()
    assert found.std() > 0
    assert all(torch.equal(one, probe[name]) for name, one in probe_inputs(model, batch_size=3).items())
    other = first_output(model(**probe_inputs(model, batch_size=3, seed=1)))
    assert relative_error(other, found) > 1e-3


def test_the_token_that_ends_a_text_stands_at_its_end_alone():
    ids = probe_inputs(build("bart"), batch_size=50)["input_ids"]
    assert (ids[:, -1] == 2).all()
    assert not (ids[:, :-1] == 2).any()
    assert ids.max() < 99


def test_inputs_have_the_dtype_and_the_device_of_the_model():
    assert probe_inputs(build("vit").to(torch.bfloat16))["pixel_values"].dtype == torch.bfloat16
    assert probe_inputs(build("bert").to("meta"))["input_ids"].is_meta


def test_a_rectangular_image_is_made_as_the_config_has_it():
    model = build("vit")
    model.config.image_size = (16, 24)
    assert probe_inputs(model)["pixel_values"].shape == (2, 3, 16, 24)


def test_a_model_that_does_not_tell_its_inputs_gets_none():
    assert probe_inputs(nn.Linear(3, 3)) is None
    model = build("bert")
    model.main_input_name = "video"
    assert probe_inputs(model) is None


def test_the_first_output_is_the_logits_or_else_the_first():
    assert first_output((torch.ones(1), torch.zeros(1))) == 1
    model, batch = build("bert"), inputs("bert")
    assert torch.equal(first_output(model(**batch)), model(**batch).logits)
    bare = BertModel(model.config).eval()
    batch = {name: value for name, value in batch.items() if name != "labels"}
    assert torch.equal(first_output(bare(**batch)), bare(**batch).last_hidden_state)


# -------------------------------------------------------------------------------------------------------------- hooks


def _count(calls: list[str], name: str, *_: Any, **__: Any) -> None:
    calls.append(name)


def _is(name: str, hook: Any) -> bool:
    return getattr(hook, "args", (None, None))[1] == name


def test_only_our_hooks_come_off_and_off_a_copy_as_well():
    calls: list[str] = []
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model.register_forward_pre_hook(partial(_count, calls, "ours"), with_kwargs=True)
    model[0].register_forward_hook(partial(_count, calls, "ours"), with_kwargs=True, always_call=True)
    model[1].register_forward_hook(partial(_count, calls, "theirs"), with_kwargs=True)
    twin = copy.deepcopy(model)
    remove_hooks(twin, partial(_is, "ours"))
    model(torch.randn(2, 3))
    assert calls == ["ours", "ours", "theirs"]
    calls.clear()
    for module in twin.modules():
        for hook in module._forward_hooks.values():
            assert hook.args[1] == "theirs"
    assert not twin._forward_pre_hooks
    assert not twin._forward_pre_hooks_with_kwargs
    assert not twin[0]._forward_hooks_with_kwargs
    assert not twin[0]._forward_hooks_always_called
    assert len(twin[1]._forward_hooks_with_kwargs) == 1
    twin(torch.randn(2, 3))
    assert twin[1]._forward_hooks.popitem()[1].args[0] == ["theirs"]  # the copy counts in a list of its own
    assert calls == []
