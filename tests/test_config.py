"""PetuneConfig: messages that name field, value and a valid alternative."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from petune.config import PetuneConfig
from tests.adapters.dense_delta import DenseDeltaConfig


@dataclass
class CheckedConfig(PetuneConfig):
    method: ClassVar[str] = "densedelta"

    rank: Any = 4
    rate: Any = 0.1
    bits: Any = 1
    start: Any = "zeros"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("rank")
        self.check_interval(0.0, 1.0, "rate")
        self.check_choice("bits", (1, 2, 4, 8))
        self.check_choice("start", ("zeros", "kaiming"))


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "4", None])
def test_what_is_no_positive_integer_is_refused(rank):
    with pytest.raises(ValueError, match=rf"CheckedConfig\.rank={rank!r} must be a positive integer\."):
        CheckedConfig(rank=rank)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan"), "0.1", False, None])
def test_what_is_outside_of_the_interval_is_refused(rate):
    with pytest.raises(ValueError, match=rf"CheckedConfig\.rate={rate!r} must be a number in \[0\.0, 1\.0\)"):
        CheckedConfig(rate=rate)


def test_what_is_no_choice_is_refused_with_the_choices_and_the_closest():
    with pytest.raises(ValueError, match=r"CheckedConfig\.bits=3 must be one of 1, 2, 4, 8\."):
        CheckedConfig(bits=3)
    with pytest.raises(
        ValueError, match=r"start='kaming' must be one of 'zeros', 'kaiming'; the closest is 'kaiming'"
    ):
        CheckedConfig(start="kaming")


@pytest.mark.parametrize("rank", [1, 7])
@pytest.mark.parametrize("rate", [0, 0.0, 0.999])
def test_what_is_in_range_is_taken(rank, rate):
    config = CheckedConfig(rank=rank, rate=rate)
    assert (config.rank, config.rate, config.peft_type) == (rank, rate, "PETUNE_DENSEDELTA")


def test_no_targets_and_layers_of_an_expression_are_refused():
    with pytest.raises(ValueError, match=r"target_modules=set\(\) names at least one module"):
        DenseDeltaConfig(target_modules=[])
    with pytest.raises(ValueError, match=r"layers_to_transform=\[1\] needs a list in target_modules"):
        DenseDeltaConfig(target_modules=r".*\.query", layers_to_transform=[1])


def test_lists_of_names_become_sets_as_in_peft_and_survive_the_file(tmp_path):
    config = DenseDeltaConfig(target_modules=["b", "a"], exclude_modules=["c"], base_shape={"hidden_size": 4})
    assert (config.target_modules, config.exclude_modules) == ({"a", "b"}, {"c"})
    config.save_pretrained(tmp_path)
    again = DenseDeltaConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
