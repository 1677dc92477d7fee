"""What save_adapter writes is what was trained, and every broken folder gets a clear answer."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import IA3Config, LoHaConfig, PeftModel, PromptTuningConfig, VeraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertTokenizerFast, RobertaConfig
from transformers import RobertaForSequenceClassification as Roberta

from petune.export import (
    CardInfo,
    export_lora,
    export_merged,
    load_adapter,
    load_run,
    save_adapter,
    save_model,
)
from tests import fresh
from tests.callbacks.runs import bert, lora
from tests.conftest import TOLERANCE, relative_error

ROOT = Path(__file__).resolve().parents[1]
INPUTS = {"input_ids": torch.arange(5, 35).view(3, 10)}


def trained(config=None, base=None):
    """A model whose adapter and head have moved."""
    torch.manual_seed(1)
    model = get_peft_model(base or bert(), config or lora())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(**INPUTS, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(**INPUTS).logits


@pytest.fixture
def tokenizer(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return BertTokenizerFast(str(tmp_path / "vocab.txt"))


@pytest.fixture
def named_base(tmp_path):
    """A base that was loaded from a folder, as users' are."""
    bert().save_pretrained(tmp_path / "base")
    return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")


CONFIGS = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "head only in part": lora(modules_to_save=["pooler", "classifier"]),
    "ia3": IA3Config(task_type="SEQ_CLS"),
    "vera": VeraConfig(task_type="SEQ_CLS", r=4),
    "prompt": PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_loaded_is_what_was_trained_bit_for_bit(tmp_path, config):
    model = trained(config)
    report = save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(tmp_path / "adapter", bert()).eval()), logits(model))
    assert report.dead == ()
    assert report.files["adapter_model.safetensors"] > 4 * report.parameters
    plain = PeftModel.from_pretrained(bert(), tmp_path / "adapter").eval()
    assert torch.equal(logits(plain), logits(model))


def test_the_folder_alone_is_enough_when_the_base_has_a_name(tmp_path, named_base, tokenizer):
    named_base.config.id2label = {0: "no", 1: "yes", 2: "maybe"}
    named_base.config.label2id = {"no": 0, "yes": 1, "maybe": 2}
    model = trained(base=named_base)
    save_adapter(model, tmp_path / "run" / "adapter", tokenizer=tokenizer)
    loaded = load_adapter(tmp_path / "run")  # the run's folder will do
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert loaded.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert BertTokenizerFast.from_pretrained(tmp_path / "run" / "adapter")("hello")["input_ids"] == [2, 5, 3]


@pytest.fixture
def published(tmp_path):
    """The folder of a base that was published with a head for five labels."""
    base = bert()
    base.config.num_labels = 5
    base.classifier = torch.nn.Linear(32, 5)
    base.save_pretrained(tmp_path / "published")
    return tmp_path / "published"


def test_a_base_with_a_head_of_another_size_takes_the_adapters(tmp_path, published):
    base = AutoModelForSequenceClassification.from_pretrained(published, num_labels=3, ignore_mismatched_sizes=True)
    model = trained(base=base)
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(tmp_path / "adapter")), logits(model))


def test_what_the_adapter_does_not_replace_must_have_the_bases_shape(tmp_path, published):
    save_adapter(trained(base=bert()), tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"intermediate\.dense\.bias has another shape in the base's file than in its"
    ):
        load_adapter(tmp_path / "adapter", published, intermediate_size=48)


def test_training_goes_on_from_a_loaded_adapter(tmp_path):
    save_adapter(trained(), tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter", bert(), is_trainable=True)
    loaded(**INPUTS, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)
    assert sum(p.requires_grad for p in loaded.parameters()) == sum(p.requires_grad for p in trained().parameters())


def test_an_adapter_with_another_name_and_a_compiled_model_are_saved_alike(tmp_path):
    model = trained()
    save_adapter(model, tmp_path / "plain")
    save_adapter(torch.compile(model, backend="eager"), tmp_path / "outer")
    model.base_model.model = torch.compile(model.base_model.model, backend="eager")
    save_adapter(model, tmp_path / "inner")
    named = PeftModel.from_pretrained(bert(), tmp_path / "plain", adapter_name="mine")
    save_adapter(named, tmp_path / "named")
    wanted = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    for folder in ("outer", "inner", "named"):
        found = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_petune_yaml_tells_the_run(tmp_path, named_base):
    config = {"model": {"adapter": lora(), "path": tmp_path, "names": {"b", "a"}}, "seed": 3}
    card = CardInfo(metrics={"accuracy": 0.5}, seed=3)
    report = save_adapter(trained(base=named_base), tmp_path / "adapter", run_config=config, card=card)
    run = load_run(tmp_path / "adapter")
    assert run.config["model"]["adapter"]["r"] == 4
    assert run.config["model"]["names"] == ["a", "b"]
    assert run.metrics == {"accuracy": 0.5}
    assert run.seed == 3
    assert run.base["class"] == "BertForSequenceClassification"
    assert run.base["name"] == str(tmp_path / "base")
    assert run.adapter == {
        "name": "default",
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "parameters": report.parameters,
    }
    assert {"petune", "peft", "torch"} <= run.versions.keys()


def code_of(card):
    return re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)


def test_the_model_card_is_filled_and_its_code_runs(tmp_path, named_base):
    model = trained(base=named_base)
    info = CardInfo(task="text classification", data="12 rows of nothing", metrics={"macro_f1": 0.75}, seed=7)
    save_adapter(model, tmp_path / "adapter", card=info, run_config={"trainer": {"max_epochs": 3}})
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "base"
    assert card.data.pipeline_tag == "text-classification"
    assert {"lora", "peft", "petune"} <= set(card.data.tags)
    for text in ("| macro_f1 | 0.75 |", "12 rows of nothing", "seed: 7", "max_epochs: 3", "peft 0."):
        assert text in card.text
    assert "More Information Needed" not in card.text
    script = (
        code_of(card) + "import torch\ntorch.save(model.eval()(input_ids=torch.arange(5, 35).view(3, 10)).logits, 'x')"
    )
    done = fresh.run(script, cwd=tmp_path / "adapter")
    assert done.code == 0, done.errors
    assert torch.equal(torch.load(tmp_path / "adapter" / "x"), logits(model))


def test_the_card_of_a_base_without_a_name_is_valid(tmp_path):
    save_adapter(trained(), tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model == "bert-from-config"
    assert 'petune.load_adapter(".", base=base)' in code_of(card)
    save_adapter(trained(), tmp_path / "adapter", card=CardInfo(base_model="org/model"))
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.base_model == "org/model"


def test_an_untrained_adapter_is_reported_dead(tmp_path):
    with pytest.warns(UserWarning, match="lora_B is zero in every layer"):
        report = save_adapter(get_peft_model(bert(), lora()), tmp_path / "adapter")
    assert report.dead == ("lora_B",)


def test_an_adapter_that_is_not_finite_is_refused_and_the_old_one_stays(tmp_path):
    model = trained()
    save_adapter(model, tmp_path / "adapter")
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    next(p for n, p in model.named_parameters() if "lora_A" in n).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"lora_A\.weight is not finite .* so the adapter was not saved"):
        save_adapter(model, tmp_path / "adapter")
    after = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_files_of_others_survive_and_stale_ones_of_ours_do_not(tmp_path, tokenizer):
    save_adapter(trained(), tmp_path / "adapter", tokenizer=tokenizer)
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    (tmp_path / "adapter" / "plots").mkdir()
    (tmp_path / "adapter" / "plots" / "loss.png").write_text("mine too")
    save_adapter(trained(), tmp_path / "adapter")
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "adapter" / "plots" / "loss.png").read_text() == "mine too"
    assert not (tmp_path / "adapter" / "tokenizer.json").exists()


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "README.md").write_text("my project")
    with pytest.raises(FileExistsError, match=r"exists and holds no adapter_config\.json; name a new folder"):
        save_adapter(trained(), tmp_path)
    assert (tmp_path / "README.md").read_text() == "my project"


def test_a_model_without_adapter_is_refused(tmp_path):
    with pytest.raises(TypeError, match="BertForSequenceClassification, which has no adapter"):
        save_adapter(bert(), tmp_path / "adapter")


def test_two_active_adapters_are_refused(tmp_path):
    model = get_peft_model(bert(), lora(task_type=None))
    model.add_adapter("second", lora(task_type=None))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"2 adapters are active \(default, second\); choose one"):
        save_adapter(model, tmp_path / "adapter")


# --- merged and plain LoRA -------------------------------------------------------------------------------------------


def roberta():
    torch.manual_seed(3)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Roberta(RobertaConfig(**sizes, intermediate_size=64, num_labels=3))


BASES = {"bert": bert, "roberta": roberta}  # RoBERTa's head has two layers


@pytest.mark.parametrize(("config", "base"), [(lora(), "bert"), (IA3Config(task_type="SEQ_CLS"), "roberta")])
def test_a_merged_model_needs_neither_peft_nor_petune(tmp_path, config, base):
    model = trained(copy.deepcopy(config), BASES[base]())
    wanted = logits(model)
    export_merged(model, tmp_path / "merged")
    assert torch.equal(logits(model), wanted)  # the model itself was left alone
    script = (
        "import sys, torch\nfrom transformers import AutoModelForSequenceClassification as A\n"
        "model = A.from_pretrained(sys.argv[1]).eval()\n"
        "torch.save(model(input_ids=torch.arange(5, 35).view(3, 10)).logits, sys.argv[2])\n"
        "assert not {'peft', 'petune'} & sys.modules.keys()"
    )
    done = fresh.run(script, tmp_path / "merged", tmp_path / "x")
    assert done.code == 0, done.errors
    assert relative_error(torch.load(tmp_path / "x"), wanted) < TOLERANCE[torch.float32]


def test_an_adapter_folder_is_merged_as_well(tmp_path, named_base):
    model = trained(base=named_base)
    save_adapter(model, tmp_path / "adapter")
    export_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert relative_error(logits(merged), logits(model)) < TOLERANCE[torch.float32]


def test_prompts_cannot_be_merged(tmp_path):
    with pytest.raises(TypeError, match="adds tokens, not weights, so it cannot be merged"):
        export_merged(trained(CONFIGS["prompt"]), tmp_path / "merged")


def test_a_broken_model_is_not_saved(tmp_path):
    model = bert()
    model.classifier.bias.data[0] = float("inf")
    with pytest.raises(ValueError, match=r"classifier\.bias is not finite"):
        save_model(model, tmp_path / "model")
    with pytest.raises(TypeError, match="Linear is no Hugging Face model"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_lora_is_exported_as_it_is(tmp_path):
    model = trained()
    assert export_lora(model, tmp_path / "lora").relative_error == 0
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path / "lora").eval()), logits(model))


@pytest.mark.parametrize("base", BASES)
def test_another_additive_method_becomes_a_plain_lora(tmp_path, base):
    model = trained(LoHaConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "value"]), BASES[base]())
    report = export_lora(model, tmp_path / "lora", rank=9)  # the Hadamard product of two rank 3 has rank 9 at most
    assert report.relative_error < 1e-5
    plain = PeftModel.from_pretrained(BASES[base](), tmp_path / "lora").eval()
    assert any(isinstance(module, PeftLinear) for module in plain.modules())
    assert relative_error(logits(plain), logits(model)) < TOLERANCE[torch.float32]
    assert export_lora(model, tmp_path / "rank1", rank=1).relative_error > 0.01
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_method_that_is_no_sum_is_not_exported_as_lora(tmp_path):
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        export_lora(trained(IA3Config(task_type="SEQ_CLS")), tmp_path / "lora")
    with pytest.raises(TypeError, match="Linear has no adapter to export"):
        export_lora(torch.nn.Linear(2, 2), tmp_path / "lora")


# --- broken folders --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


def refusal(folder, error=ValueError, base=None):
    with pytest.raises(error) as caught:
        load_adapter(folder, base or bert())
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_another_base_is_refused(folder):
    assert "(different weights); load the base that it was made for" in refusal(folder, base=bert(seed=8))
    assert "(different hidden_size)" in refusal(folder, base=bert(hidden_size=64))


def test_a_missing_folder_and_missing_files_are_named(folder, tmp_path):
    assert "no adapter folder" in refusal(tmp_path / "nowhere", FileNotFoundError)
    (folder / "adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors; copy it again" in refusal(folder, FileNotFoundError)
    (folder / "adapter_config.json").unlink()
    assert "holds no adapter_config.json, so it is no adapter folder" in refusal(folder, FileNotFoundError)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_weights_cut_short_are_refused(folder, size):
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert "is cut short or damaged" in refusal(folder)


def test_a_flipped_bit_is_noticed(folder):
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert "is damaged: it is not the file that was exported" in refusal(folder)


def test_missing_tensors_are_named(folder):
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key: value for key, value in tensors.items() if "lora_B" not in key}, weights)
    (folder / "petune.yaml").unlink()
    assert re.search(r"lacks 4 tensors of the adapter: .*lora_B", refusal(folder))


def test_tensors_of_another_shape_are_refused(folder):
    (folder / "petune.yaml").unlink()
    assert "its tensors do not fit this model: size mismatch" in refusal(folder, base=bert(hidden_size=64))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_read(folder, tmp_path):
    (folder / "adapter_model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "exploded"), folder / "adapter_model.bin")
    assert "adapter_model.bin, a pickle, which can run code when read" in refusal(folder)
    assert not (tmp_path / "exploded").exists()


def test_yaml_with_code_in_it_is_refused_and_not_run(folder, tmp_path):
    path = tmp_path / "exploded"
    (folder / "petune.yaml").write_text(f"!!python/object/apply:pathlib.Path.touch [{path}]")
    assert "petune.yaml cannot be read" in refusal(folder)
    assert not path.exists()


def test_damaged_text_files_are_refused(folder):
    (folder / "petune.yaml").write_text("- a list")
    assert "petune.yaml holds no mapping" in refusal(folder)
    (folder / "petune.yaml").write_text("config: {}")
    with pytest.raises(ValueError, match=r"petune\.yaml lacks adapter, base, created"):
        load_run(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "adapter_config.json is damaged" in refusal(folder)


def test_a_folder_that_petune_did_not_write_has_no_run(folder):
    (folder / "petune.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"PETune did not write it; load it with petune\.load_adapter"):
        load_run(folder)
    assert isinstance(load_adapter(folder, bert()), PeftModel)  # which works


def test_a_folder_without_an_adapter_is_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no adapter; pass the folder that holds adapter_config\.json"):
        load_run(tmp_path)


def test_a_method_that_nobody_registered_is_named(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "PETUNE_NOPE"}))
    assert "type 'PETUNE_NOPE', which neither this PEFT nor this PETune knows" in refusal(folder)


def test_a_base_without_a_name_has_to_be_given(folder):
    with pytest.raises(ValueError, match="does not say what its base is"):
        load_adapter(folder)


def test_a_base_that_is_not_on_this_machine_is_named_at_once(folder):
    with pytest.raises(OSError, match=r"'org/gone' is neither a folder nor in the hub's cache.*pass base="):
        load_adapter(folder, "org/gone")
    with pytest.raises(OSError, match=r"is no folder, and no name that the hub could know"):
        load_adapter(folder, "/moved/to/nowhere")


def test_only_classes_of_transformers_are_built(folder, named_base):
    run = yaml.safe_load((folder / "petune.yaml").read_text())
    run["base"]["class"] = "logging"
    (folder / "petune.yaml").write_text(yaml.safe_dump(run))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": None}))
    with pytest.raises(ValueError, match="does not say what class its base has"):
        load_adapter(folder, named_base.name_or_path)
