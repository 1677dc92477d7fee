"""`petune estimate`: what a fit would cost, from the shapes of the model; no weight is loaded, nothing is computed."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from petune.cli.arguments import CommandParser, take_option
from petune.cli.describe import adapter_line
from petune.cli.errors import UsageError
from petune.cli.train import ParsedFit
from petune.fsdp2 import check_shardable, units
from petune.quantized.tuner import QuantizedConfig, quantized_weights
from petune.tasks import AdapterTask
from petune.tasks.quantization import saved_bytes

Strategy = Literal["ddp", "fsdp2"]

_PROBE = 64  # side of the matrix on which an optimizer shows how much state it keeps
_GATHERED_BLOCKS = 2  # FSDP2 has the next block on its way while one runs
_OPTIONS = "--strategy", "--processes"


@dataclass(frozen=True)
class Estimate:
    """Sizes of one training process; bytes are of the tensors, without the allocator's rounding and libraries."""

    parameters: int
    """Of the whole model, as `trainable`."""
    trainable: int
    weight_bytes: int
    adapter_bytes: int
    """What is saved to disk: the tensors that train, packed where the method packs them."""
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None
    """Saved for backward at `batch_size` x `tokens`; None where the model does not run without weights."""
    batch_size: int
    """Rows of a process."""
    tokens: int
    strategy: Strategy | None = None
    """None for a single process."""
    processes: int = 1
    exchange_bytes: int = 0
    """DDP: gradients on their way to the others. FSDP2: the largest blocks and what is outside of blocks, whole."""

    @property
    def total_bytes(self) -> int:
        """Weights, gradients, optimizer state, what is exchanged and, if known, what is saved for backward."""
        held = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
        return held + self.exchange_bytes + (self.activation_bytes or 0)


def run_estimate(arguments: list[str]) -> int:
    """Parse the arguments of fit, estimate, print the table.

    Args:
        arguments: recipes and options of fit, and --strategy ddp|fsdp2 --processes N; no data file is needed.

    Raises:
        UsageError: an argument is wrong, or the two do not go together.
    """
    strategy, processes, arguments = _take_processes(arguments)
    options = ParsedFit(["fit", *arguments]).options
    task = _instantiate_task(options.model)
    data = options.data.init_args
    estimate = estimate_task(
        task,
        batch_size=data.get("batch_size") or 1,
        tokens=data.get("max_length") or 128,
        strategy=strategy,
        processes=processes,
    )
    print_estimate(estimate, adapter_line(task))
    return 0


def estimate_task(
    task: AdapterTask, *, batch_size: int, tokens: int, strategy: Strategy | None = None, processes: int = 1
) -> Estimate:
    """Sizes of training a task, from a model on the meta device.

    Args:
        task: not built; its base model's configuration must be at hand, its weights need not.
        batch_size: rows of a step, on each process.
        tokens: length of a row.
        strategy: how several processes share the work; None for one alone.
        processes: how many, 1 or more.

    Raises:
        ValueError: the strategy does not work with the task.
    """
    with torch.device("meta"):
        task.build(weights=False)
    task.train()
    model = task.model
    parameters = list(task.parameters())  # the task's: its own head, if it has one, is no part of the model
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    pieces = processes if strategy == "fsdp2" else 1
    trained_bytes = _piece_bytes(trainable, pieces)
    exchange_bytes = 0
    if strategy == "fsdp2":
        check_shardable(task)
        exchange_bytes = _gathered_bytes(task)
    elif strategy == "ddp":
        exchange_bytes = trained_bytes
    saved = 0 if task.quantization is None else saved_bytes(model, task.quantization)
    return Estimate(
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in trainable),
        weight_bytes=_piece_bytes(parameters, pieces) - saved + sum(map(_bytes, task.buffers())),
        adapter_bytes=sum(map(_bytes, trainable)) - _packing_saves(model),
        gradient_bytes=trained_bytes,
        optimizer_bytes=round(trained_bytes * _state_ratio(task)),
        activation_bytes=_saved_for_backward(model, batch_size, tokens),
        batch_size=batch_size,
        tokens=tokens,
        strategy=strategy,
        processes=processes,
        exchange_bytes=exchange_bytes,
    )


def print_estimate(estimate: Estimate, adapter: str) -> None:
    """The estimate as a table."""
    share = 100 * estimate.trainable / max(estimate.parameters, 1)
    print(adapter)
    if estimate.strategy is not None:
        print(f"on each of {estimate.processes} processes, strategy {estimate.strategy}:")
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
    if estimate.strategy is not None:
        exchanged = "gradients on their way" if estimate.strategy == "ddp" else "blocks gathered to run"
        table.add_row(exchanged, mebibytes(estimate.exchange_bytes))
    at = f"saved for backward ({estimate.batch_size} x {estimate.tokens} tokens)"
    known = estimate.activation_bytes is not None
    table.add_row(at, mebibytes(estimate.activation_bytes or 0) if known else "not counted")
    table.add_row("memory of training" if known else "memory without activations", mebibytes(estimate.total_bytes))
    Console().print(table)


def mebibytes(count: int) -> str:
    """'36.5 KiB' below a tenth of a MiB; '1.25 MiB'; '12.50 GiB' from 10 on."""
    if 0 < count < 2**20 / 10:
        return f"{count / 2**10:,.1f} KiB"
    return f"{count / 2**20:,.2f} MiB" if count < 10 * 2**30 else f"{count / 2**30:,.2f} GiB"


def _take_processes(arguments: list[str]) -> tuple[Strategy | None, int, list[str]]:
    strategy, arguments = take_option(arguments, _OPTIONS[0])
    processes, arguments = take_option(arguments, _OPTIONS[1])
    if (strategy is None) != (processes is None):
        there, missing = _OPTIONS if processes is None else _OPTIONS[::-1]
        raise UsageError(f"{there} alone says half of it; add {missing}.")
    if strategy is None or processes is None:
        return None, 1, arguments
    if strategy not in get_args(Strategy):
        raise UsageError(f"--strategy={strategy} is not known; use one of {', '.join(get_args(Strategy))}.")
    if not processes.isdecimal() or int(processes) < 1:
        raise UsageError(f"--processes={processes} is no number of processes; use 1 or more.")
    return cast("Strategy", strategy), int(processes), arguments


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
    config: Any = getattr(model, "config", None)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {})}
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(**inputs)  # a mask's values would be looked at
    except (NotImplementedError, RuntimeError):  # the forward looks at values, which meta tensors do not have
        return None
    size = sum(storage.nbytes() for storage in kept.values())
    del output
    return size


def _packing_saves(model: nn.Module) -> int:
    """Bytes of the latents, less those of the codes that a checkpoint has in their place."""
    saved = 0
    for adapter, config in getattr(model, "peft_config", {}).items():
        if isinstance(config, QuantizedConfig) and config.storage == "packed":
            for entry, path in quantized_weights(model, adapter):
                saved += _bytes(cast("Any", model.get_submodule(path)).weight) - entry.stored_bytes
    return saved


def _gathered_bytes(task: AdapterTask) -> int:
    """What of the weights is whole at the same time: the largest blocks, and what is outside of blocks."""
    total = 0
    for child in task.children():
        *blocks, rest = (own for _, own in units(child))
        sizes = sorted(sum(map(_bytes, own)) for own in blocks)
        total += sum(map(_bytes, rest)) + sum(sizes[-_GATHERED_BLOCKS:])
    return total


def _piece_bytes(parameters: Iterable[Tensor], pieces: int) -> int:
    """Bytes of the first process's pieces, the largest: FSDP2 cuts along the first axis."""
    total = 0
    for one in parameters:
        rows = one.shape[0] if one.dim() else 1
        total += _bytes(one) // max(rows, 1) * math.ceil(rows / pieces)
    return total


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
