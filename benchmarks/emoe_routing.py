"""What routing does besides accuracy, for `emoe.py`: whether a batch changes a sample, and what the time is."""

import copy
import json
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from benchmarks.emoe_tasks import WordOrder
from benchmarks.lora_cpu import cpu_name
from petune import EmoeConfig
from petune.adapters.emoe import Router

HIDDEN, INNER = 768, 3072

# --- does a batch change a sample? ---------------------------------------------------------------------------------


def compare(task: WordOrder, model: nn.Module, rows: Tensor) -> dict[str, Any]:
    """One batch of all rows against each row alone.

    Returns:
        decisions: pairs of a token and a routed feed-forward.
        same_ratio: of them, those that keep the same experts, 0..1.
        logits_difference: the largest; logits_std, of the batch's logits, to compare it with.
        dropped_ratio: choices of the batch that a capacity left out, 0..1.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    lengths = task.texts["mask"][rows].sum(1).tolist()
    together, in_batch = kept_experts(task, model, routers, rows)
    same, logits, kept = list[Tensor](), list[Tensor](), 0
    for place, length in enumerate(lengths):
        logit, alone = kept_experts(task, model, routers, rows[place : place + 1])
        logits.append(logit)
        for batch, single in zip(in_batch, alone, strict=True):
            same.append((batch[place, :length] == single[0]).all(-1))
            kept += int(batch[place, :length].sum())
    return {
        "decisions": sum(map(len, same)),
        "same_ratio": torch.cat(same).double().mean().item(),
        "logits_difference": (together - torch.cat(logits)).abs().max().item(),
        "logits_std": together.std().item(),
        "dropped_ratio": 1 - kept / (sum(lengths) * sum(router.top_k for router in routers)),
    }


def kept_experts(
    task: WordOrder, model: nn.Module, routers: Sequence[Router], rows: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Logits, [rows], and for every router what each token keeps, bool [rows, tokens, num_experts]."""
    found: list[Tensor] = []

    def note(router: nn.Module, inputs: tuple[Tensor], chosen: Tensor) -> None:
        keep = getattr(router, "keep", None)  # what a capacity leaves of the chosen ones
        nothing = torch.zeros(inputs[0].shape, dtype=torch.bool)
        found.append(nothing.scatter(-1, chosen, True) if keep is None else keep)

    handles = [router.register_forward_hook(note) for router in routers]
    logits = task.logits(model, rows)
    for handle in handles:
        handle.remove()
    return logits, found


@contextmanager
def capacity(model: nn.Module, factor: float) -> Generator[None, None, None]:
    """The routers drop tokens as the authors' code does, by `within_capacity`; padding takes places as well."""

    def dropping(router: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def route(z: Tensor, scores: Tensor) -> Tensor:
            router.keep = within_capacity(scores, router.top_k, factor)
            router(scores)
            return z.masked_fill(~router.keep[..., router.labels.long()], 0.0)

        return route

    routers: list[Any] = [module for module in model.modules() if isinstance(module, Router)]
    for router in routers:
        router.route = dropping(router)
    try:
        yield
    finally:
        for router in routers:
            del router.route, router.keep


def within_capacity(scores: Tensor, top_k: int, factor: float) -> Tensor:
    """Which of its best `top_k` experts take a token, bool, of the shape of scores [..., num_experts].

    As in Tutel, which the authors' code for BERT and GPT-2 runs on, an expert takes at most
    top_k · ⌊factor · ⌈tokens / num_experts⌉⌋ tokens: the best choices of all tokens in the order of the batch, then
    their second choices, and so on.
    """
    num_experts = scores.shape[-1]
    flat = scores.reshape(-1, num_experts)
    chosen = flat.topk(top_k).indices.T.flatten()
    one_hot = F.one_hot(chosen, num_experts)
    place = (one_hot.cumsum(0) * one_hot).sum(1)  # from 1 in the queue of its expert
    taken = place <= top_k * int(factor * -(-len(flat) // num_experts))
    tokens = torch.arange(len(flat)).repeat(top_k)
    keep = torch.zeros(flat.shape, dtype=torch.bool)
    keep[tokens[taken], chosen[taken]] = True
    return keep.view(scores.shape)


# --- how long does it take? ----------------------------------------------------------------------------------------


def feed_forwards(num_experts: int, top_k: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """BERT layers of the same random weights: dense, routed by a mask, and after `sparsify`."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 12}
    base: Any = BertModel(BertConfig(num_hidden_layers=1, vocab_size=32, **shape))
    base = base.to(device, dtype).eval()

    def routed() -> Any:
        # what the experts are made of does not matter to the time
        config = EmoeConfig(num_experts=num_experts, top_k=top_k, layers=[0], cluster="random")
        return get_peft_model(copy.deepcopy(base), config).eval().base_model

    models = {"dense": base, "masked": routed().merge_and_unload(keep_routing=True), "sparse": routed().sparsify()}
    return {name: model.encoder.layer[0] for name, model in models.items()}


@torch.inference_mode()
def time_rows(
    routing: tuple[int, int], device: torch.device, dtype: torch.dtype, sizes: Sequence[int], rounds: int
) -> Iterator[dict[str, Any]]:
    """A row for each number of tokens: the ratios to dense of interleaved rounds, each of some calls of every form.

    Args:
        routing: number of experts, and how many of them a token keeps.
        device: where to measure.
        dtype: of weights and tokens.
        sizes: numbers of tokens.
        rounds: to measure, after one that warms up.

    Raises:
        AssertionError: the sparse form and the masked one do not agree.
    """
    layers = feed_forwards(*routing, device, dtype)
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for tokens in sizes:
        x = torch.randn(1, tokens, HIDDEN, device=device, dtype=dtype)
        found = {name: layer.feed_forward_chunk(x) for name, layer in layers.items()}
        torch.testing.assert_close(found["sparse"], found["masked"], rtol=tolerance, atol=tolerance)
        calls = max(1, min(32, 2048 // tokens))
        seconds: dict[str, list[float]] = {name: [] for name in layers}
        for turn in range(rounds + 1):
            for name in layers if turn % 2 else reversed(layers):
                seconds[name].append(_seconds(layers[name].feed_forward_chunk, x, calls))
        row: dict[str, Any] = {"device": place, "dtype": str(dtype).removeprefix("torch.")}
        row |= {"num_experts": routing[0], "top_k": routing[1], "tokens": tokens}
        for name, spent in seconds.items():
            ratios = [one / dense for one, dense in zip(spent[1:], seconds["dense"][1:], strict=True)]
            row[name] = {
                "ms": 1e3 * statistics.median(spent[1:]),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        print(json.dumps(row), flush=True)
        yield row


def _seconds(function: Callable[[Tensor], Tensor], x: Tensor, calls: int) -> float:
    """Of a call, the mean of `calls`."""
    start = time.perf_counter()
    for _ in range(calls):
        function(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return (time.perf_counter() - start) / calls
