"""`petune estimate` against the model it stands for."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from petune import BiLoraConfig, FusedLoraConfig, save_adapter
from petune.adapters.pat import PatConfig
from petune.cli import main
from petune.cli.estimate import estimate_task, mebibytes
from petune.fsdp2 import check_shardable
from petune.memory import saved_for_backward_bytes
from petune.tasks import SemanticSegmentation, TextClassification


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


@pytest.mark.parametrize("adapter", [FusedLoraConfig(r=4), BiLoraConfig(r=4), BiLoraConfig(r=4, storage="latent")])
def test_the_bytes_on_disk_are_those_of_the_file(tiny_bert, tmp_path, adapter):
    task = TextClassification(str(tiny_bert), adapter=copy.deepcopy(adapter))
    estimate = estimate_task(TextClassification(str(tiny_bert), adapter=adapter), batch_size=4, tokens=16)
    task.build()
    save_adapter(task.model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    anchors = {name for name in tensors if name.endswith(".anchor")}  # of latents: beside what trains
    assert estimate.adapter_bytes == sum(t.nbytes for name, t in tensors.items() if name not in anchors)


@pytest.mark.parametrize(("size", "shown"), [(4198, "4.1 KiB"), (200_000, "0.19 MiB"), (2**34, "16.00 GiB")])
def test_sizes_are_shown_in_a_unit_that_fits(size, shown):
    assert mebibytes(size) == shown


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


def test_a_method_that_prunes_is_estimated_without_weights(tiny_bert, tmp_path, capsys):
    (tmp_path / "config.json").write_text((tiny_bert / "config.json").read_text())
    assert main(["estimate", "-c", "text_classification", "-c", "pat", f"--model.model={tmp_path}"]) == 0
    assert capsys.readouterr().out.startswith("adapter: PatConfig(")
    adapter = PatConfig(r=20, round_to=8)
    estimate = estimate_task(TextClassification(str(tmp_path), adapter=adapter), batch_size=4, tokens=16)
    task = TextClassification(str(tiny_bert), adapter=PatConfig(r=20, round_to=8))
    task.build()
    assert estimate.parameters == sum(parameter.numel() for parameter in task.parameters())
    assert estimate.trainable == sum(p.numel() for p in task.parameters() if p.requires_grad)


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


@pytest.fixture
def seventy_billion(tmp_path):
    """Folder of the configuration of a Llama of 70 billion parameters, in bfloat16."""
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        num_labels=2,
        pad_token_id=0,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def test_sixteen_processes_hold_a_sixteenth_of_seventy_billion_each_or_all_of_it(seventy_billion, capsys):
    shape = {"batch_size": 1, "tokens": 8, "processes": 16}
    cut, whole = (
        estimate_task(TextClassification(str(seventy_billion)), strategy=strategy, **shape)
        for strategy in ("fsdp2", "ddp")
    )
    assert 69e9 < cut.parameters == whole.parameters < 71e9
    assert 138e9 < whole.weight_bytes < 142e9
    assert cut.weight_bytes == pytest.approx(whole.weight_bytes / 16, rel=2e-3)
    # the first process has one of the 8 rows of each A, and a sixteenth of each B
    assert whole.gradient_bytes / 16 < cut.gradient_bytes < whole.gradient_bytes / 8
    assert cut.optimizer_bytes / cut.gradient_bytes == pytest.approx(whole.optimizer_bytes / whole.gradient_bytes)
    assert whole.exchange_bytes == whole.gradient_bytes == whole.adapter_bytes == cut.adapter_bytes
    block = (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672) * 2  # bytes of q, o; k, v; gate, up, down
    outside = 128256 * 8192 * 2
    assert cut.exchange_bytes == pytest.approx(2 * block + outside, rel=0.02)  # adapters and norms are the rest
    arguments = ["estimate", "-c", "text_classification", f"--model.model={seventy_billion}", "--data.max_length=8"]
    assert main([*arguments, "--strategy", "fsdp2", "--processes=16"]) == 0
    shown = capsys.readouterr().out
    assert "on each of 16 processes, strategy fsdp2:" in shown
    assert "blocks gathered to run" in shown


def test_what_fsdp2_refuses_the_estimate_refuses(tiny_bert):
    task = TextClassification(str(tiny_bert), compile=True)
    with pytest.raises(ValueError, match=r"compile: true and fsdp2 do not go together.* leave compile out"):
        estimate_task(task, batch_size=1, tokens=8, strategy="fsdp2", processes=2)


def test_a_task_that_runs_parts_of_its_model_is_refused_under_fsdp2():
    with pytest.raises(ValueError, match="SemanticSegmentation runs parts of its model one by one"):
        check_shardable(SemanticSegmentation("somewhere", labels=["a", "b"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategy=ddp"], "--strategy alone says half of it; add --processes."),
        (["--processes=2"], "--processes alone says half of it; add --strategy."),
        (["--strategy=horovod", "--processes=2"], "--strategy=horovod is not known; use one of ddp, fsdp2."),
        (["--strategy=ddp", "--processes=some"], "--processes=some is no number of processes; use 1 or more."),
    ],
)
def test_a_strategy_needs_its_processes(tiny_bert, capsys, options, message):
    assert main(["estimate", "-c", "text_classification", f"--model.model={tiny_bert}", *options]) == 2
    assert message in capsys.readouterr().err
