"""What the operators' checks of their operands share."""

from collections.abc import Mapping

from torch import Tensor


def projection_fault(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, cast: bool) -> str:
    """What is wrong with these operands of one LoRA linear layer and what to do, or ""; cast: autocast is on."""
    if not (
        x.dim() > 0
        and weight.dim() == a.dim() == b.dim() == 2
        and x.shape[-1] == weight.shape[1] == a.shape[1]
        and b.shape[0] == weight.shape[0]
        and b.shape[1] == a.shape[0]
        and (bias is None or bias.shape == weight.shape[:1])
    ):
        return (
            "do not fit; pass [..., in_features], [out_features, in_features], [out_features], [rank, in_features] "
            "and [out_features, rank]."
        )
    return placement_fault(x, weight, bias, a, b, cast)


def base_fault(x: Tensor, weight: Tensor, bias: Tensor | None, cast: bool) -> str:
    """What is wrong with x and the base layer alone and what to do, or ""; cast: autocast is on."""
    if not (
        x.dim() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
    ):
        return "do not fit; pass [..., in_features], [out_features, in_features] and [out_features]."
    return placement_fault(x, weight, bias, weight, weight, cast)


def placement_fault(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, cast: bool) -> str:
    """What is wrong with the devices of these operands, or the dtypes of the base, or ""; cast: autocast is on."""
    if not (x.device == weight.device == a.device == b.device) or (bias is not None and bias.device != x.device):
        return "are not on one device; move the model and its input to the same one."
    if not cast and (weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype)):
        return "differ in the dtype of the base; cast the input to the weight's dtype or use autocast."
    return ""


def described(tensors: Mapping[str, Tensor | None]) -> str:
    """Name, shape, dtype and device of each."""
    return ", ".join(
        f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device}"
        for name, tensor in tensors.items()
        if tensor is not None
    )


def check_dropout(operator: str, dropout_p: float) -> None:
    """Raises ValueError where dropout_p is no probability of dropping some elements but not all."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{operator}: dropout_p={dropout_p} is not in [0, 1); use 0.0 for no dropout.")
