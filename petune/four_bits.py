"""Weights of four bits on a CPU: keep them in the one form that can be trained through and merged into."""

from typing import Any

from torch import nn

_PACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit


def keep_form(model: nn.Module) -> None:
    """Have the 4-bit layers of bitsandbytes in `model` leave their weights as they are.

    On a CPU with AVX512-BF16 their first forward in eval mode writes the weights in another order, which neither their
    backward nor PEFT's dequantisation knows (bitsandbytes 0.50): training after a validation stops with an error in
    autograd, and a merge after one gives noise. Weights that have been written so are put back, their scales rounded
    to bfloat16. Devices and layers of any other kind are not touched.
    """
    for module in model.modules():
        if hasattr(module, _PACKS):
            setattr(module, _PACKS, False)
            _put_back(module)


def _put_back(module: nn.Module) -> None:
    state: Any = getattr(module.weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    module.state_dict()  # bitsandbytes' own way back, which leaves single-quantised scales as a bfloat16 table
    if state.absmax.dim() == 2:  # [input blocks, output features]
        state.absmax = state.absmax.T.reshape(-1).float()
