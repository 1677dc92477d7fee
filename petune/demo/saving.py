"""Write the trained adapter and look whether what was written is what was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petune.card import CardInfo
from petune.demo.report import Check
from petune.export import save_adapter
from petune.load import load_adapter
from petune.run import ADAPTER_WEIGHTS

RELOAD_TOLERANCE = 1e-6
MERGE_TOLERANCE = 1e-4  # one rounding of W + ΔW in float32 in each layer, on outputs of order one


def save_and_check(
    model: PeftModel,
    folder: Path,
    *,
    base: PreTrainedModel | PeftModel,
    outputs: Callable[[nn.Module], Tensor],
    run_config: dict[str, Any],
    card: CardInfo,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[int, list[Check]]:
    """Export the adapter, load it onto a fresh base, merge it there, and compare outputs.

    Args:
        model: trained.
        folder: to write; an adapter that is there is replaced.
        base: the model as it was before the adapter was put in.
        outputs: what to compare, of any model of the same shape, in eval mode and float32.
        run_config: written beside the adapter.
        card: what the model card tells.
        tokenizer: saved beside the adapter.

    Returns:
        Bytes of the adapter's weights on disk, and the checks.
    """
    assert isinstance(base, PreTrainedModel)
    trained = outputs(model)
    report = save_adapter(model, folder, run_config=run_config, tokenizer=tokenizer, card=card)
    loaded = load_adapter(folder, base)
    checks = [Check(f"{folder.name}: saved and loaded again", _largest(trained, outputs(loaded)), RELOAD_TOLERANCE)]
    merged = _merged(loaded)
    if merged is not None:
        found = outputs(merged)
        if found.shape != trained.shape:  # a pruned model has no channels for what is zero in the masked one
            trained = trained[..., trained.flatten(0, -2).any(0)]
        checks.append(Check(f"{folder.name}: merged into the base", _largest(trained, found), MERGE_TOLERANCE))
    return report.files[ADAPTER_WEIGHTS], checks


def adapter_folder(output: Path, method: str, adapters: int) -> Path:
    """`<output>/adapter`, or with several adapters `<output>/adapter-<method>`."""
    return output / ("adapter" if adapters == 1 else f"adapter-{method}")


def _merged(model: PeftModel) -> nn.Module | None:
    """The model with the adapter folded in; None for a method whose update cannot be."""
    tuner: Any = model.base_model
    try:
        return tuner.merge_and_unload(**getattr(tuner, "exact_merge", {}))
    except NotImplementedError:
        return None


def _largest(left: Tensor, right: Tensor) -> float:
    return (left - right).abs().max().item()
