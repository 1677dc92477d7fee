"""Which implementation runs, what is said when the kernels cannot, and what is never survived."""

import importlib
import logging
from types import SimpleNamespace

import pytest
import torch

from petune.kernels import dispatch
from petune.kernels.dispatch import Dispatcher

REFERENCE = SimpleNamespace(forward=lambda x: (x + 1,))


def kernel_module(forward, reason=None):
    return SimpleNamespace(forward=forward, unsupported=lambda dtype, rank: reason)


@pytest.fixture
def installed(monkeypatch):
    """Puts a module (or an error) where the kernels would be imported from, and Triton on the machine."""

    def install(module):
        def load(name):
            if isinstance(module, Exception):
                raise module
            return module

        monkeypatch.setattr(dispatch, "importlib", SimpleNamespace(import_module=load))
        monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # else no tensor of a CPU gets to a kernel

    return install


def run(dispatcher, mode, monkeypatch, x=None):
    monkeypatch.setenv("PETUNE_KERNELS", mode)
    x = torch.zeros(2) if x is None else x
    return dispatcher.run("forward", (x,), dtype=torch.float32, rank=8)[0]


def on_cuda(dispatcher):
    """One call as if the tensor were on a GPU, in mode auto."""
    return dispatcher._run("forward", (torch.zeros(2),), "auto", torch.float32, 8)[0]


def test_the_cpu_takes_the_reference_and_a_gpu_the_kernels(monkeypatch, installed):
    installed(kernel_module(lambda x: (x + 2,)))
    dispatcher = Dispatcher("toy", REFERENCE)
    assert run(dispatcher, "auto", monkeypatch)[0] == 1
    assert on_cuda(dispatcher)[0] == 2
    assert run(dispatcher, "triton", monkeypatch)[0] == 2
    assert run(dispatcher, "reference", monkeypatch)[0] == 1


def test_an_unknown_mode_is_named_with_its_values(monkeypatch):
    with pytest.raises(ValueError, match="PETUNE_KERNELS='trition' is not one of auto, reference, triton; unset it"):
        run(Dispatcher("toy", REFERENCE), "trition", monkeypatch)


def test_forced_triton_on_a_cpu_is_an_error_that_says_where_the_tensors_are(monkeypatch, installed):
    installed(kernel_module(lambda x: (x + 2,)))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"PETUNE_KERNELS=triton, but the tensors of toy are on the cpu; move them"):
        run(Dispatcher("toy", REFERENCE), "triton", monkeypatch)


def test_an_uncovered_case_is_said_once_and_is_an_error_if_triton_is_forced(monkeypatch, installed, caplog):
    installed(kernel_module(lambda x: (x + 2,), reason="rank 300 is above 256"))
    dispatcher = Dispatcher("toy", REFERENCE)
    with caplog.at_level(logging.WARNING):
        assert on_cuda(dispatcher)[0] == on_cuda(dispatcher)[0] == 1
    assert [r.getMessage() for r in caplog.records] == [
        "toy runs its slower plain torch reference: rank 300 is above 256"
    ]
    with pytest.raises(
        RuntimeError, match=r"PETUNE_KERNELS=triton, but toy cannot run .* rank 300 is above 256; unset"
    ):
        run(dispatcher, "triton", monkeypatch)


def test_a_machine_without_triton_runs_the_reference_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert on_cuda(Dispatcher("toy", REFERENCE))[0] == 1
    assert "Triton is not installed" in caplog.text
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        run(Dispatcher("toy", REFERENCE), "triton", monkeypatch)


def test_a_triton_that_does_not_import_is_named_with_its_cause(installed, caplog):
    installed(ImportError("libcuda.so.1: cannot open shared object file\nsecond line"))
    dispatcher = Dispatcher("toy", REFERENCE)
    with caplog.at_level(logging.WARNING):
        assert on_cuda(dispatcher)[0] == on_cuda(dispatcher)[0] == 1
    assert len(caplog.records) == 1
    assert "Triton cannot be imported (ImportError: libcuda.so.1: cannot open shared object file)" in caplog.text


def test_a_kernel_that_does_not_compile_is_tried_once_and_training_goes_on(monkeypatch, installed, caplog):
    calls = []

    def forward(x):
        calls.append(1)
        raise RuntimeError("Failed to find C compiler")

    installed(kernel_module(forward))
    dispatcher = Dispatcher("toy", REFERENCE)
    with caplog.at_level(logging.WARNING):
        assert on_cuda(dispatcher)[0] == on_cuda(dispatcher)[0] == 1
    assert len(calls) == len(caplog.records) == 1
    assert "its Triton kernels fail here (RuntimeError: Failed to find C compiler)" in caplog.text


def test_forced_triton_shows_the_kernels_own_error(monkeypatch, installed):
    def forward(x):
        raise RuntimeError("Failed to find C compiler")

    installed(kernel_module(forward))
    with pytest.raises(RuntimeError, match=r"^Failed to find C compiler$"):
        run(Dispatcher("toy", REFERENCE), "triton", monkeypatch)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("gone")])
def test_no_memory_and_a_lost_context_are_the_callers_to_see(installed, error):
    def forward(x):
        raise error

    installed(kernel_module(forward))
    dispatcher = Dispatcher("toy", REFERENCE)
    with pytest.raises(type(error)):
        on_cuda(dispatcher)
    assert dispatcher._broken == ""


def test_autocast_is_off_inside(monkeypatch):
    seen = SimpleNamespace(forward=lambda x: (torch.tensor(torch.is_autocast_enabled("cpu")),))
    with torch.autocast("cpu", torch.bfloat16):
        assert not run(Dispatcher("toy", seen), "auto", monkeypatch)


def test_every_operator_has_a_kernel_module_of_the_name_the_dispatcher_imports():
    for name in ("lora_linear", "lora_group", "gated_lora", "residual_low_rank"):
        assert importlib.util.find_spec(f"petune.kernels.{name}.kernel")
