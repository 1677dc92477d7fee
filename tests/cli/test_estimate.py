"""`petune estimate` against the model it stands for."""

import json

import pytest
import torch

from petune.cli import main
from petune.cli.estimate import estimate_task
from petune.memory import saved_for_backward_bytes
from petune.tasks import TextClassification


@pytest.mark.parametrize("train", ["adapter", "head", "all"])
def test_the_estimate_is_what_the_built_model_has(tiny_bert, train):
    estimate = estimate_task(TextClassification(str(tiny_bert), train=train), batch_size=4, tokens=16)
    task = TextClassification(str(tiny_bert), train=train)
    task.build()
    trainable = [parameter for parameter in task.parameters() if parameter.requires_grad]
    assert estimate.parameters == sum(parameter.numel() for parameter in task.parameters())
    assert estimate.trainable == sum(parameter.numel() for parameter in trainable)
    assert estimate.gradient_bytes == 4 * estimate.trainable
    optimizer = task.optimizer_factory(trainable)
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = sum(t.numel() * 4 for entry in optimizer.state.values() for t in entry.values() if t.numel() > 1)
    assert estimate.optimizer_bytes == pytest.approx(state, rel=0.01)


@pytest.mark.parametrize("train", ["adapter", "all"])
def test_the_activations_are_those_of_a_real_forward(tiny_bert, train):
    estimate = estimate_task(TextClassification(str(tiny_bert), train=train), batch_size=4, tokens=16)
    task = TextClassification(str(tiny_bert), train=train)
    model = task.build().train()
    ids = torch.zeros(4, 16, dtype=torch.long)
    measured = saved_for_backward_bytes(lambda: model(input_ids=ids), exclude=model)
    assert estimate.activation_bytes == pytest.approx(measured, rel=0.1)


def test_gradient_checkpointing_lowers_the_estimate(tiny_bert):
    plain = estimate_task(TextClassification(str(tiny_bert)), batch_size=4, tokens=16)
    recomputed = estimate_task(
        TextClassification(str(tiny_bert), gradient_checkpointing=True), batch_size=4, tokens=16
    )
    assert recomputed.activation_bytes < plain.activation_bytes


def test_no_weights_and_no_data_are_needed(tiny_bert, tmp_path, capsys):
    (tmp_path / "config.json").write_text((tiny_bert / "config.json").read_text())
    arguments = ["estimate", "-c", "text_classification", "-c", "lora", f"--model.model={tmp_path}"]
    assert main([*arguments, "--data.max_length=16", "--data.batch_size=2", "--model.adapter.r=4"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("adapter: FusedLoraConfig(r=4, ")
    assert "saved for backward (2 x 16 tokens)" in shown
    assert "not counted" not in shown


def test_a_wrong_option_is_named(tiny_bert, capsys):
    arguments = ["estimate", "-c", "text_classification", f"--model.model={tiny_bert}", "--model.adapter.rank=4"]
    assert main(arguments) == 2
    assert "there is no option 'rank' here" in capsys.readouterr().err


def test_a_model_of_a_large_config_costs_no_memory(tiny_bert, tmp_path):
    config = json.loads((tiny_bert / "config.json").read_text())
    config.update(hidden_size=4096, intermediate_size=16384, num_hidden_layers=24, num_attention_heads=32)
    (tmp_path / "config.json").write_text(json.dumps(config))
    estimate = estimate_task(TextClassification(str(tmp_path)), batch_size=1, tokens=8)
    assert estimate.weight_bytes > 16 * 2**30  # more than this process could hold
    assert estimate.total_bytes > estimate.weight_bytes
