"""What the tasks and the command line make of `FusedLoraConfig`."""

import warnings

import pytest
from jsonargparse import ArgumentParser
from peft import LoraConfig, PeftConfig

from petune.adapters.lora import FusedLoraConfig, FusedLoraLinear
from petune.tasks import TextClassification
from tests.tasks import tiny


@pytest.mark.parametrize(("adapter", "grouped"), [(FusedLoraConfig(r=2), True), (LoraConfig(r=2), False)], ids=str)
def test_tasks_group_the_layers_of_our_config(adapter, grouped):
    task = TextClassification(tiny.classifier(), labels=["low", "high"], adapter=adapter)
    task.build()
    assert any(layer.group for layer in task.model.modules() if isinstance(layer, FusedLoraLinear)) == grouped


def test_a_command_line_reads_the_fields_that_pefts_types_keep_from_it():
    parser = ArgumentParser()
    parser.add_subclass_arguments(PeftConfig, "adapter")
    arguments = ["r=4", "rank_pattern.query=2", "alpha_pattern.key=1.5", "init_lora_weights=pissa_niter_4"]
    parsed = parser.parse_args(["--adapter=petune.FusedLoraConfig", *(f"--adapter.{item}" for item in arguments)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's "loftq_config will be ignored" among them
        config = parser.instantiate(parsed).adapter
    assert isinstance(config, FusedLoraConfig)
    assert (config.r, config.rank_pattern, config.alpha_pattern) == (4, {"query": 2}, {"key": 1.5})
    assert config.init_lora_weights == "pissa_niter_4"
