"""Which parameters learn how fast, and the two defaults: AdamW and warm-up followed by decay."""

import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

# The up-projection B of LoRA and its kin, in PEFT's naming (lora_B, lora_embedding_B) and ours (petune_<method>_B).
_UP_PROJECTION = re.compile(r"(^|[._])(lora|petune_[a-z0-9]+)_(embedding_)?B(\.|$)")


def adamw(
    params: Iterable[Any],
    lr: float = 5e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    fused: bool | None = None,
) -> Optimizer:
    """`torch.optim.AdamW`, in its fused form where every parameter lies on a CPU or a CUDA device.

    Args:
        params: parameter groups; a group's own lr and weight_decay win.
        lr: learning rate.
        betas: decay of the running mean and of the running square, each in [0, 1).
        eps: added to the root of the running square.
        weight_decay: decoupled weight decay.
        fused: True or False forces the form.
    """
    groups: list[Any] = list(params)
    if fused is None:
        parameters = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def parameter_groups(
    module: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    head: Iterable[str] = (),
    head_learning_rate: float | None = None,
    lora_plus_ratio: float | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters of a module, one group per pair of learning rate and weight decay.

    Vectors (biases, norms, IA3's scales, DoRA's magnitudes) do not decay. LoRA+ (Hayou et al. 2024, arXiv 2402.12354)
    lets B learn `lora_plus_ratio` times as fast as A.

    Args:
        module: where the parameters are.
        learning_rate: of everything the other two do not name.
        weight_decay: of matrices.
        head: names of the modules that count as the task's head, as they were before an adapter was put in.
        head_learning_rate: of the head; None for learning_rate.
        lora_plus_ratio: learning rate of B over that of A; None for the same.

    Raises:
        ValueError: nothing is trainable, or lora_plus_ratio is given and no B is trainable.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    rates = {
        "head": learning_rate if head_learning_rate is None else head_learning_rate,
        "up": learning_rate * (lora_plus_ratio or 1.0),
        "rest": learning_rate,
    }
    heads = tuple(head)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = _kind(name, heads)
        decays = not _is_vector(parameter)
        group = groups.setdefault(
            (kind, decays),
            {
                "params": [],
                "lr": rates[kind],
                "weight_decay": weight_decay if decays else 0.0,
                "name": kind + ("" if decays else "/no_decay"),
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError(
            f"{type(module).__name__} has no trainable parameter; choose an adapter that matches a module, or train "
            "the head (train: head) or the whole model (train: all)."
        )
    if lora_plus_ratio is not None and not any(kind == "up" for kind, _ in groups):
        raise ValueError(
            f"lora_plus_ratio={lora_plus_ratio} needs an adapter with an up-projection B and there is none to train; "
            "leave lora_plus_ratio out or choose a LoRA."
        )
    return list(groups.values())


def check_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Refuse a learning rate given to the optimizer itself: the groups' own would silently win.

    Raises:
        ValueError: the optimizer's lr is neither its class's default nor `learning_rate`.
    """
    given = optimizer.defaults.get("lr")
    default = inspect.signature(type(optimizer)).parameters.get("lr")
    expected = {learning_rate, default.default if default else None, inspect.signature(adamw).parameters["lr"].default}
    if given is not None and not isinstance(given, Tensor) and given not in expected:
        raise ValueError(
            f"optimizer {type(optimizer).__name__} was given lr={given}, which the task's groups override; "
            "set learning_rate (and head_learning_rate, lora_plus_ratio) of the task instead."
        )


def warmup_schedule(optimizer: Optimizer, name: str, total_steps: float, warmup_ratio: float) -> LRScheduler:
    """Linear warm-up over `warmup_ratio` of the steps, then linear or cosine decay to zero, or constant.

    Args:
        optimizer: whose learning rates are scaled.
        name: linear, cosine or constant.
        total_steps: optimizer steps of the whole run; infinite or negative where the trainer does not know.
        warmup_ratio: share of total_steps, 0..1.

    Raises:
        ValueError: the number of steps is needed and not known.
    """
    known = 0 < total_steps < float("inf")
    if not known and (name != "constant" or warmup_ratio > 0):
        raise ValueError(
            f"scheduler={name!r} with warmup_ratio={warmup_ratio} needs the length of the run, and data that is "
            "streamed has none; set trainer.max_steps, or scheduler: constant and warmup_ratio: 0."
        )
    steps = int(total_steps) if known else 0
    kind = "constant_with_warmup" if name == "constant" else name
    return get_scheduler(kind, optimizer, num_warmup_steps=round(warmup_ratio * steps), num_training_steps=steps)


def _kind(name: str, heads: tuple[str, ...]) -> str:
    if _UP_PROJECTION.search(name):
        return "up"
    dotted = f".{name}"
    return "head" if any(f".{head}." in dotted for head in heads) else "rest"


def _is_vector(parameter: Tensor) -> bool:
    return parameter.numel() == max(parameter.shape, default=1)
