"""FSDP2 for a model with an adapter: how it is cut over the processes, and a strategy that saves what trains.

A model that was cut takes whole tensors in `load_state_dict`, and a checkpoint holds whole tensors under the names and
in the order that one process writes: any number of processes reads what any other number wrote.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from typing_extensions import override

from petune.frozen_block import FrozenBlock
from petune.state import adapter_keys
from petune.topology import find_topology
from petune.tuner import PetuneTuner

NAME = "fsdp2"


class FSDP2Strategy(ModelParallelStrategy):
    """Every parameter cut over all processes (FSDP2), and checkpoints of one file with what trains.

    It is Lightning's `ModelParallelStrategy` without tensor parallelism; its name is `fsdp2`. The module cuts itself
    up in `configure_model`, as `AdapterTask` does. What is frozen and no part of an adapter is never gathered.

    Args:
        kwargs: process_group_backend and timeout, as in `ModelParallelStrategy`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # Weights and optimizer are read and written as without sharding: `shard` and the three methods below translate.
    restore_checkpoint_after_setup = Strategy.restore_checkpoint_after_setup
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer
    load_checkpoint = Strategy.load_checkpoint
    save_checkpoint = Strategy.save_checkpoint
    load_model_state_dict = Strategy.load_model_state_dict

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What trains and what is not cut up, whole, on the first process; empty on the others."""
        assert self.lightning_module is not None
        reshard(self.lightning_module)
        wanted = gathered_names(self.lightning_module)
        state: dict[str, Any] = {}
        for name, value in self.lightning_module.state_dict().items():
            if isinstance(value, DTensor) and name not in wanted:
                continue
            full = _whole(value)  # on every process: it is a collective
            if self.is_global_zero:
                state[name] = full
        return state

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimizer, whole, on the first process; empty on the others."""
        state = tree_map(_whole, super(ModelParallelStrategy, self).optimizer_state(optimizer))
        return state if self.is_global_zero else {}

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict({**saved, "state": dict(_cut_states(optimizer, saved))})


StrategyRegistry.register(NAME, FSDP2Strategy, description=FSDP2Strategy.__doc__ or "")


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Cut the parameters of every child of `module` over the processes of a mesh; a second call does nothing.

    Each transformer block is gathered and freed by itself; what is outside of the blocks, and a network beside them,
    with the child. Tensors that train and buffers are the first process's. The children must be called, not `module`.

    Args:
        module: a task that is built.
        mesh: of Lightning's `ModelParallelStrategy`.

    Raises:
        ValueError: tensor parallelism is asked for; `module` is compiled, or holds parameters itself; the method
            refuses; or what trains in one unit is of several dtypes.
    """
    if is_sharded(module):
        return
    ranks = mesh["tensor_parallel"].size()
    if ranks > 1:
        raise ValueError(
            f"tensor_parallel_size={ranks} would split the layers that adapters stand on; use strategy: {NAME}, which "
            "cuts every tensor over all processes."
        )
    check_shardable(module)
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    for child, parts in [(child, list(units(child))) for child in children]:
        _broadcast(child, mesh)
        for unit, _ in parts:
            fully_shard(unit, mesh=mesh["data_parallel"])
        child.register_load_state_dict_pre_hook(_cut_whole_tensors)


def check_shardable(module: nn.Module) -> None:
    """Refuse what `shard` cannot cut up.

    Raises:
        ValueError: `module` is compiled, runs parts of its model, is quantised, or holds parameters itself; or the
            method refuses.
    """
    if any(one._compiled_call_impl is not None for one in module.modules()):
        raise ValueError(
            f"compile: true and {NAME} do not go together, since a compiled forward gathers no parameters; leave "
            "compile out."
        )
    if not getattr(module, "calls_model", True):
        raise ValueError(
            f"{type(module).__name__} runs parts of its model one by one, and {NAME} gathers weights when the whole "
            "is called; use strategy: ddp."
        )
    quantised = [child for child in module.children() if getattr(child, "hf_quantizer", None) is not None]
    if quantised or getattr(module, "quantization", None) is not None:
        raise ValueError(
            f"the base is quantised, and {NAME} cuts up float weights; use strategy: ddp, or load the base without "
            "quantisation."
        )
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise ValueError(
            f"{type(module).__name__}.{own[0]} belongs to the task itself, which {NAME} cannot cut up; put it into a "
            "module of its own, or use strategy: ddp."
        )
    for tuner in module.modules():
        if isinstance(tuner, PetuneTuner) and (conflict := tuner.sharding_conflict()):
            raise ValueError(f"{type(tuner).__name__} {conflict}, so that {NAME} cannot train it; use strategy: ddp.")


def units(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """The blocks, and last the model, each with the parameters of its own; a model without blocks is one unit.

    Where adapters and head train in different dtypes, `modules_to_save` are units too. Of a block with a network
    beside it, the unit is the block alone: gradients of that network do not come through the block's output, which is
    what has the unit's weights gathered again.

    Raises:
        ValueError: a unit trains tensors of several dtypes, which one reduction cannot hold.
    """
    try:
        names = find_topology(model).blocks
    except ValueError:  # a head or a projection
        names = ()
    parts = [_behind_network(model.get_submodule(name)) for name in names]
    if len(_trained_dtypes(model.parameters())) > 1:  # adapters in float32 on a base in half precision
        parts += [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    seen: set[nn.Parameter] = set()
    for part in (*parts, model):
        own = [parameter for parameter in part.parameters() if parameter not in seen]
        seen.update(own)
        if len(dtypes := _trained_dtypes(own)) > 1:
            raise ValueError(
                f"{type(part).__name__} trains parameters of {' and '.join(dtypes)}, and {NAME} reduces one dtype at "
                "a time; use autocast_adapter_dtype: false, dtype: float32, or strategy: ddp."
            )
        yield part, own


def _behind_network(block: nn.Module) -> nn.Module:
    return block.base_layer if isinstance(block, FrozenBlock) else block


def _trained_dtypes(parameters: Iterable[Tensor]) -> list[str]:
    return sorted({str(one.dtype).removeprefix("torch.") for one in parameters if one.requires_grad})


def is_sharded(module: nn.Module) -> bool:
    """Whether a part of `module` was cut up."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def reshard(module: nn.Module) -> None:
    """Have every parameter of a model that was cut be this process's piece, whatever ran last."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def gathered_names(module: nn.Module) -> set[str]:
    """Names in `module.state_dict()` that a checkpoint of the module needs whole: adapters, and all that trains."""
    trained = {name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    return trained | adapter_keys(module)


@contextmanager
def whole_adapter(module: nn.Module) -> Generator[None]:
    """Put whole tensors on the CPU in the place of this process's pieces, but for the frozen base.

    Every process must enter; inside, the module can be read and saved but not run.
    """
    reshard(module)
    wanted = gathered_names(module)
    pieces: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    try:
        for prefix, owner in module.named_modules():
            for name, piece in owner._parameters.items():
                if isinstance(piece, DTensor) and f"{prefix}.{name}".lstrip(".") in wanted:
                    pieces.append((owner, name, owner._parameters[name]))
                    owner._parameters[name] = nn.Parameter(_whole(piece.detach()), piece.requires_grad)
        yield
    finally:
        for owner, name, held in pieces:
            owner._parameters[name] = held


def _broadcast(module: nn.Module, mesh: DeviceMesh) -> None:
    """Give every process the first one's trained parameters and buffers, as DDP does."""
    trained = (parameter for parameter in module.parameters() if parameter.requires_grad)
    for tensor in (*trained, *module.buffers()):
        if tensor.numel():
            sent = tensor.detach().to(mesh.device_type, copy=True).contiguous()
            # as bytes: gloo knows no narrow integers
            torch.distributed.broadcast(sent.reshape(-1).view(torch.uint8), src=0)
            tensor.detach().copy_(sent)


def _cut_whole_tensors(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    reshard(module)
    for name, parameter in module.named_parameters():
        value = state.get(prefix + name)
        if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
            state[prefix + name] = _cut(value, parameter)


def _cut_states(optimizer: Optimizer, saved: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
    """The state of each parameter, cut like the parameter."""
    groups = zip(saved["param_groups"], optimizer.param_groups, strict=True)
    parameters = {index: one for old, new in groups for index, one in zip(old["params"], new["params"], strict=True)}
    for index, state in saved["state"].items():
        parameter = parameters[index]
        yield (
            index,
            {name: _cut(value, parameter) if _is_like(value, parameter) else value for name, value in state.items()},
        )


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape


def _cut(value: Tensor, like: Any) -> Tensor:
    if isinstance(value, DTensor):
        return value
    # every process has the whole tensor: nothing is sent
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _whole(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value
