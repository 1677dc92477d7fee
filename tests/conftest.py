"""Shared by all tests: no network, one thread, one tolerance table."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face import: a test that would reach for the hub fails at once
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

if device := os.environ.get("PETUNE_TEST_DEVICE"):  # `make gpu` says cuda
    torch.set_default_device(device)
torch.set_num_threads(1)  # two cores run two test processes; more threads would only fight over them

TOLERANCE = {
    # relative error ‖out − ref‖ / ‖ref‖ that rounding of the storage dtype explains
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 6e-4,
    torch.bfloat16: 4e-3,
}


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in float64; the absolute norm where the reference is zero."""
    out, reference = out.detach().double(), reference.detach().double()
    scale = reference.norm()
    return ((out - reference).norm() / (scale if scale > 0 else 1.0)).item()


@pytest.fixture
def tolerance():
    return TOLERANCE


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)  # a benchmark's smoke run takes all cores, and would leave them to all tests after it
