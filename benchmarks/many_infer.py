"""Mixed batches and tasks that are served, for `many.py`."""

import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from benchmarks.many_parts import CONFIGS, Plan, adapted, batch_of, compared, encoder_body, in_turns, is_smoke
from petune import BiLoraConfig
from petune.quantized.store import write_tasks
from petune.serving import AdapterServer

# --- inference -----------------------------------------------------------------------------------------------------


def causal() -> Any:
    """A causal model of random weights."""
    sizes = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    sizes |= {"intermediate_size": 1536, "vocab_size": 49152}
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config: Any = LlamaConfig(**(small if is_smoke() else sizes))  # pyright: ignore[reportArgumentType]
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def measure_infer(plan: Plan) -> dict[str, Any]:
    """The adapters of the rows are mixed as they come."""
    found: list[dict[str, Any]] = []
    for call, rows, tokens, numbers in plan.infer:
        for adapters in numbers:
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)) % adapters
            names = [str(int(number)) for number in order]
            base = causal if call == "generate" else encoder_body
            models = {side: adapted(config, adapters, base) for side, config in CONFIGS.items()}
            run = torch.inference_mode()(generated if call == "generate" else encoded)
            calls = {side: partial(run, model, rows, tokens, names) for side, model in models.items()}
            torch.testing.assert_close(*(call() for call in calls.values()), rtol=1e-3, atol=1e-3)
            times = in_turns(calls, plan.infer_repeats)
            found.append({"call": call, "rows": rows, "tokens": tokens, "adapters": adapters, **compared(times)})
            print(json.dumps(found[-1]), flush=True)
    return {"by_call": found}


def encoded(model: Any, rows: int, tokens: int, names: list[str]) -> Tensor:
    """Hidden states of random words."""
    batch = batch_of(rows, tokens, 0)
    del batch["labels"]
    return model(**batch, adapter_names=names).last_hidden_state


def generated(model: Any, rows: int, tokens: int, names: list[str]) -> Tensor:
    """The scores of `tokens` tokens, each row's own continued greedily from two random ones."""
    ids = batch_of(rows, 2, 0)["input_ids"]
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
    output = model.generate(
        input_ids=ids, adapter_names=names, output_scores=True, return_dict_in_generate=True, **options
    )
    return torch.stack(output.scores)


# --- serving -------------------------------------------------------------------------------------------------------


def vision_base() -> ViTModel:
    """A ViT-B of random weights."""
    torch.manual_seed(0)
    small: dict[str, int] = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 64, "image_size": 32}
    return ViTModel(ViTConfig(**(small if is_smoke() else {})), add_pooling_layer=False).eval()  # pyright: ignore[reportArgumentType]


def random_tasks(base: nn.Module, count: int) -> Iterator[tuple[str, PeftModel]]:
    """The same model with one random 1-bit adapter after the other."""
    model: Any = get_peft_model(base, BiLoraConfig(r=32, init_weights=False))
    factors = [one for name, one in model.named_parameters() if "petune_bilora" in name]
    for number in range(count):
        torch.manual_seed(number)
        with torch.no_grad():
            for one in factors:
                one.normal_(0.0, 0.02)
        yield f"task{number}", model


def measure_serve(plan: Plan) -> dict[str, Any]:
    """Bytes of all tasks resident, and milliseconds to activate one: from the file, and resident already."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tasks.safetensors"
        report = write_tasks(path, random_tasks(vision_base(), plan.tasks))
        base = vision_base()
        before = _resident()
        with AdapterServer(base, path) as server:
            names = [f"task{number}" for number in range(plan.tasks)]
            cold = [_timed(lambda name=name: server.activate([name])) for name in names]
            rng = torch.Generator().manual_seed(0)
            order = torch.randint(plan.tasks, (plan.switches,), generator=rng).tolist()
            warm = [_timed(lambda number=number: server.activate([names[number]])) for number in order]
            counted, grown = server.resident_bytes, _resident() - before
    return {
        "tasks": plan.tasks,
        "file_bytes": report.size,
        "resident_bytes": counted,
        "process_grew_bytes": grown,
        "from_file_ms": _spread(cold),
        "resident_ms": _spread(warm),
    }


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


def _spread(times: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times)
    found = {"median": statistics.median(ordered), "p90": ordered[int(0.9 * (len(ordered) - 1))], "most": ordered[-1]}
    return {name: round(value, 4) for name, value in found.items()}


def _resident() -> int:
    """Resident bytes of this process, those of mapped files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
