"""The fingerprint is the base's: wrapping, training and casting leave it, another base changes it."""

import copy
import json

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from transformers import AutoModel, BertConfig, BertForSequenceClassification, BertForTokenClassification

from petune.fingerprint import base_fingerprint, check_fingerprint
from tests.callbacks.runs import bert
from tests.families import FAMILIES

CONFIGS = {
    "lora": LoraConfig(task_type="SEQ_CLS", target_modules=["query", "word_embeddings"]),
    "dora": LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", use_dora=True),
    "lora with trained biases": LoraConfig(task_type="SEQ_CLS", target_modules=["query"], bias="all"),
    "lora with a copy of the embeddings": LoraConfig(target_modules=["query"], modules_to_save=["word_embeddings"]),
    "lora with new tokens": LoraConfig(target_modules=["query"], trainable_token_indices={"word_embeddings": [1, 2]}),
    "ia3": IA3Config(task_type="SEQ_CLS"),
    "vera": VeraConfig(task_type="SEQ_CLS"),
    "layer norms": LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]),
    "prompt": PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
}


def train(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=torch.arange(12).view(2, 6), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_wrapping_and_training_leave_the_fingerprint(config):
    before = base_fingerprint(bert())
    assert before["sha256"] is not None
    model = get_peft_model(bert(), copy.deepcopy(config))
    assert base_fingerprint(model) == before
    train(model)
    assert base_fingerprint(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_one_and_another_seed_another(family):
    one, again, other = (FAMILIES[family].build(seed=seed) for seed in (0, 0, 1))
    found = base_fingerprint(one)
    assert found["sha256"] is not None
    assert found["num_parameters"] > 0
    assert json.loads(json.dumps(found)) == base_fingerprint(again)
    assert found["sha256"] != base_fingerprint(other)["sha256"]


def test_a_bfloat16_load_of_the_same_base_is_the_same_base():
    saved = base_fingerprint(bert())
    half = bert().to(torch.bfloat16)
    assert base_fingerprint(half)["dtype"] == "bfloat16"
    assert base_fingerprint(half)["sha256"] == saved["sha256"]
    check_fingerprint(saved, half, where="here")
    check_fingerprint(saved, bert().to(torch.float16), where="here")  # not comparable bit for bit: sizes decide


def test_a_fresh_head_does_not_matter():
    def build(seed, kind, labels):
        model = bert()
        torch.manual_seed(seed)
        headed = kind(BertConfig(**{**model.config.to_dict(), "num_labels": labels}))
        headed.bert.load_state_dict(model.bert.state_dict(), strict=False)
        return headed

    saved = base_fingerprint(build(1, BertForSequenceClassification, 3))
    check_fingerprint(saved, build(2, BertForSequenceClassification, 5), where="here")
    check_fingerprint(saved, build(3, BertForTokenClassification, 3), where="here")  # has no pooler


def test_a_merged_adapter_hides_the_weights_and_not_the_sizes():
    model = get_peft_model(bert(), LoraConfig(target_modules=["query"], init_lora_weights=False))
    saved = base_fingerprint(model)
    model.merge_adapter()
    assert base_fingerprint(model) == {**saved, "sha256": None}
    check_fingerprint(saved, model, where="here")


def test_a_compiled_model_has_the_fingerprint_of_its_own():
    model = get_peft_model(bert(), LoraConfig(target_modules=["query"]))
    assert base_fingerprint(torch.compile(model, backend="eager")) == base_fingerprint(model)


def test_a_model_on_the_meta_device_is_compared_by_sizes():
    with torch.device("meta"):
        model = AutoModel.from_config(bert().config)
    assert base_fingerprint(model)["sha256"] is None
    check_fingerprint(base_fingerprint(bert()), model, where="here")


@pytest.mark.parametrize(
    ("other", "difference"),
    [(bert(seed=5), "weights"), (bert(hidden_size=64), "hidden_size")],
    ids=["other weights", "other size"],
)
def test_another_base_is_refused_with_both_named(other, difference):
    saved = {**base_fingerprint(bert()), "name": "org/first"}
    other.config._name_or_path = "org/second"
    with pytest.raises(
        ValueError,
        match=rf"^here: .* made for org/first \(model_type bert, hidden_size 32, .*\), this "
        rf"model has org/second .* \(different {difference}\); load the base",
    ):
        check_fingerprint(saved, other, where="here")
