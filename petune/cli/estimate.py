"""`petune estimate`: what a fit would cost, from the shapes of the model; no weight is loaded, nothing is computed."""

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from petune.cli.arguments import CommandParser
from petune.cli.describe import adapter_line
from petune.cli.train import PetuneCLI
from petune.tasks import AdapterTask

_PROBE = 64  # side of the matrix on which an optimizer shows how much state it keeps


@dataclass(frozen=True)
class Estimate:
    """Sizes of one training process; bytes are of the tensors, without the allocator's rounding and libraries."""

    parameters: int
    trainable: int
    weight_bytes: int
    adapter_bytes: int
    """What is saved to disk: the tensors that train."""
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None
    """Saved for backward at `batch_size` x `tokens`; None where the model does not run without weights."""
    batch_size: int
    tokens: int

    @property
    def total_bytes(self) -> int:
        """Weights, gradients, optimizer state and, if known, what is saved for backward."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + (self.activation_bytes or 0)


class _Parsed(PetuneCLI):
    """The command line of fit, parsed and checked but not run."""

    def _set_seed(self) -> None: ...

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def run_estimate(arguments: list[str]) -> int:
    """Parse the arguments of fit, estimate, print the table.

    Args:
        arguments: recipes and options of fit; no data file is needed.
    """
    options = _Parsed(["fit", *arguments]).options
    task = _instantiate_task(options.model)
    data = options.data.init_args
    estimate = estimate_task(task, batch_size=data.get("batch_size") or 1, tokens=data.get("max_length") or 128)
    print_estimate(estimate, adapter_line(task))
    return 0


def estimate_task(task: AdapterTask, *, batch_size: int, tokens: int) -> Estimate:
    """Sizes of training a task, from a model on the meta device.

    Args:
        task: not built; its base model's configuration must be at hand, its weights need not.
        batch_size: rows of a step.
        tokens: length of a row.
    """
    with torch.device("meta"):
        task.build(weights=False)
    task.train()
    model = task.model
    parameters = list(task.parameters())  # the task's: its own head, if it has one, is no part of the model
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    trained_bytes = sum(map(_bytes, trainable))
    return Estimate(
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in trainable),
        weight_bytes=sum(map(_bytes, parameters)) + sum(map(_bytes, task.buffers())),
        adapter_bytes=trained_bytes,
        gradient_bytes=trained_bytes,
        optimizer_bytes=round(trained_bytes * _state_ratio(task)),
        activation_bytes=_saved_for_backward(model, batch_size, tokens),
        batch_size=batch_size,
        tokens=tokens,
    )


def print_estimate(estimate: Estimate, adapter: str) -> None:
    """The estimate as a table."""
    share = 100 * estimate.trainable / max(estimate.parameters, 1)
    print(adapter)
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_row("parameters", f"{estimate.parameters:,}")
    table.add_row("trainable", f"{estimate.trainable:,} ({share:.2f} %)")
    table.add_row("adapter on disk", mebibytes(estimate.adapter_bytes))
    table.add_section()
    table.add_row("weights", mebibytes(estimate.weight_bytes))
    table.add_row("gradients", mebibytes(estimate.gradient_bytes))
    table.add_row("optimizer", mebibytes(estimate.optimizer_bytes))
    at = f"saved for backward ({estimate.batch_size} x {estimate.tokens} tokens)"
    known = estimate.activation_bytes is not None
    table.add_row(at, mebibytes(estimate.activation_bytes or 0) if known else "not counted")
    table.add_row("memory of training" if known else "memory without activations", mebibytes(estimate.total_bytes))
    Console().print(table)


def mebibytes(count: int) -> str:
    """'1.25 MiB'."""
    return f"{count / 2**20:,.2f} MiB"


def _instantiate_task(model: Any) -> AdapterTask:
    parser = CommandParser()
    parser.add_lightning_class_args(AdapterTask, "model", subclass_mode=True)
    return parser.instantiate(parser.parse_object({"model": model})).model


def _state_ratio(task: AdapterTask) -> float:
    """Bytes of optimizer state per byte of parameter, seen on one step of a small matrix."""
    probe = nn.Parameter(torch.zeros(_PROBE, _PROBE))
    probe.grad = torch.zeros_like(probe)
    optimizer = task.optimizer_factory([probe])
    optimizer.step()
    state = [value for value in optimizer.state[probe].values() if isinstance(value, Tensor)]
    return sum(map(_bytes, state)) / _bytes(probe)


def _saved_for_backward(model: nn.Module, batch_size: int, tokens: int) -> int | None:
    """Bytes that autograd keeps of one forward pass, each storage once, parameters aside."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that its address is not given to another
        return tensor

    ids = torch.zeros(batch_size, tokens, dtype=torch.long, device="meta")
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(input_ids=ids)  # a mask's values would be looked at
    except (NotImplementedError, RuntimeError):  # the forward looks at values, which meta tensors do not have
        return None
    size = sum(storage.nbytes() for storage in kept.values())
    del output
    return size


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
