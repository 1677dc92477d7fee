"""Exports of an adapter that prunes: a smaller stock model, or a compact one that PETune loads."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from petune.adapters.pat import PatConfig
from petune.export import export_lora, export_merged, load_adapter, load_run, save_adapter
from petune.probe import first_output
from petune.pruned import load_pruned
from tests import fresh
from tests.conftest import relative_error
from tests.families import FAMILIES

KEPT = 20  # a multiple of the heads, which LlamaConfig asks of its width
HEADS = {"llama": "lm", "t5": "lm", "vit": "cls", "bert": "cls"}


def build(family, folder, final=True, seed=3):
    """A model from a folder of its own with an adapter that changes it, and its mask hard or half way."""
    base = FAMILIES[family].build(head=HEADS[family])
    base.save_pretrained(folder / "base")
    config = PatConfig(target_dim=KEPT, r=3, hsm_rank=5, total_steps=9, init_weights=False)
    torch.manual_seed(seed)
    model = get_peft_model(type(base).from_pretrained(folder / "base"), config).eval()
    with torch.no_grad():
        model.base_model.mask().logits.normal_()
    model.base_model.advance(9 if final else 2)
    return model


def answer(model, family):
    inputs = FAMILIES[family].inputs(head=HEADS[family])
    with torch.no_grad():
        return first_output(model.eval()(**inputs))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "t5", "vit"])
def test_a_stock_export_answers_as_the_masked_model_and_is_smaller(tmp_path, family):
    model = build(family, tmp_path)
    report = export_merged(model, tmp_path / "merged")
    base = model.get_base_model()
    plain = type(base).from_pretrained(tmp_path / "merged")
    assert relative_error(answer(plain, family), answer(model, family)) <= 1e-5
    dense = type(base).from_pretrained(tmp_path / "base")
    assert not (tmp_path / "merged" / "petune_prune.json").exists()
    written = load_file(tmp_path / "merged" / "model.safetensors").values()
    assert report.parameters == sum(tensor.numel() for tensor in written) < report.dense_parameters
    assert report.dense_parameters == parameters(dense)
    assert report.dense_bytes == 4 * report.dense_parameters
    text = f"pruned from {parameters(dense):,} parameters, {report.dense_bytes / 1024:,.0f} KiB (stock, for from_pr"
    assert text in str(report)


def test_a_stock_export_needs_no_petune(tmp_path):
    model = build("llama", tmp_path)
    export_merged(model, tmp_path / "merged")
    inputs = FAMILIES["llama"].inputs()
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'merged')!r})\n"
        f"logits = model(**torch.load({str(tmp_path / 'inputs.pt')!r})).logits.detach()\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})\n"
        f"assert model.config.hidden_size == {KEPT} and 'petune' not in sys.modules and 'peft' not in sys.modules\n"
    )
    done = fresh.run(code, cwd=tmp_path)
    assert done.code == 0, done.errors
    assert relative_error(torch.load(tmp_path / "logits.pt"), model(**inputs).logits) <= 1e-5


def test_a_compact_export_is_marked_and_answers_as_the_masked_model(tmp_path):
    model = build("bert", tmp_path)
    report = export_merged(model, tmp_path / "merged")
    mark = json.loads((tmp_path / "merged" / "petune_prune.json").read_text())
    assert (mark["class"], mark["width"], mark["kept"]) == ("BertForSequenceClassification", 32, KEPT)
    assert relative_error(answer(load_pruned(tmp_path / "merged"), "bert"), answer(model, "bert")) <= 1e-5
    assert report.compact
    assert report.parameters < report.dense_parameters
    assert str(report).endswith(" KiB (compact, for petune.load_pruned)")


def test_an_adapter_folder_is_exported_as_the_model_is(tmp_path):
    model = build("llama", tmp_path)
    save_adapter(model, tmp_path / "adapter")
    from_folder = export_merged(tmp_path / "adapter", tmp_path / "one")
    from_model = export_merged(model, tmp_path / "two")
    assert (from_folder.parameters, from_folder.dense_parameters) == (
        from_model.parameters,
        from_model.dense_parameters,
    )
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert relative_error(answer(one, "llama"), answer(two, "llama")) <= 1e-6


def test_the_adapter_folder_says_what_it_is_and_keeps_the_mask(tmp_path):
    model = build("llama", tmp_path)
    report = save_adapter(model, tmp_path / "adapter")
    assert report.dead == ()
    assert load_run(tmp_path / "adapter").adapter["peft_type"] == "PETUNE_PAT"
    assert "PETUNE_PAT adapter" in (tmp_path / "adapter" / "README.md").read_text()
    loaded = load_adapter(tmp_path / "adapter")
    assert torch.equal(loaded.base_model.mask().hard, model.base_model.mask().hard)
    assert relative_error(answer(loaded, "llama"), answer(model, "llama")) <= 1e-6


@pytest.mark.parametrize("saved", [False, True], ids=["model", "folder"])
def test_a_soft_mask_is_refused_and_nothing_is_written(tmp_path, saved):
    model = build("llama", tmp_path, final=False)
    before = answer(model, "llama")
    if saved:
        save_adapter(model, tmp_path / "adapter")
    with pytest.raises(RuntimeError, match=r"of 32 mask values are not binary.*call finalize\(\)"):
        export_merged(tmp_path / "adapter" if saved else model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert torch.equal(answer(model, "llama"), before)


def test_the_model_is_left_as_it_is(tmp_path):
    model = build("bert", tmp_path)
    before = answer(model, "bert")
    export_merged(model, tmp_path / "merged")
    assert torch.equal(answer(model, "bert"), before)


def test_a_plain_model_in_the_place_of_a_compact_one_is_not_marked(tmp_path):
    export_merged(build("bert", tmp_path), tmp_path / "merged")
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    lora = get_peft_model(FAMILIES["bert"].build(), LoraConfig(r=3, target_modules=["query"]))
    report = export_merged(lora, tmp_path / "merged")
    assert {"notes.txt", "config.json"} <= {path.name for path in (tmp_path / "merged").iterdir()}
    assert not (tmp_path / "merged" / "petune_prune.json").exists()
    assert (report.dense_parameters, report.dense_bytes, report.compact) == (0, 0, False)
    assert "pruned" not in str(report)


def test_an_adapter_that_prunes_is_no_lora(tmp_path):
    with pytest.raises(TypeError, match="layers of PETUNE_PAT do not support LoRA conversion"):
        export_lora(build("llama", tmp_path), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
