"""The contract in training: every trainer, precision, memory saver and wrapper leaves an adapter an adapter."""

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader

from tests.adapters.cases import BY_NAME, Case, cases, cases_and_families
from tests.adapters.harness import (
    assert_same_tensors,
    base_tensors,
    build,
    gradients,
    inputs,
    output,
    targets,
    train,
)
from tests.conftest import TOLERANCE, relative_error
from tests.families import FAMILIES

ROOT = Path(__file__).parents[2]


def fresh(case: Case, family: str = "bert", head: str = "cls", **fields: object) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(build(family, head), case.config(**targets(case), **fields))


def rows(family: str = "bert", head: str = "cls", count: int = 8) -> list[dict[str, torch.Tensor]]:
    batch = FAMILIES[family].inputs(count, head=head)
    return [{name: value[i] for name, value in batch.items()} for i in range(count)]


def adapter_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@cases_and_families("bert", "gpt2", "llama", "vit")
def test_a_low_precision_base_keeps_its_dtype_and_trains_a_float32_adapter(case, family, dtype):
    batch = inputs(family, dtype=dtype)
    base = build(family, dtype=dtype)
    expected = output(base, batch)
    model = get_peft_model(base, case.config(**targets(case))).eval()
    start = output(model, batch)
    assert start.dtype == dtype
    assert torch.equal(start, expected) == case.identity  # adding an exact zero must not move a bit
    before = base_tensors(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = train(model, batch, steps=2)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert not torch.equal(output(model, batch), expected)
    assert_same_tensors(base_tensors(model), before)


@cases_and_families("bert", "gpt2", "llama")
def test_gradients_under_autocast_are_those_of_float32_to_bf16_rounding(case, family):
    batch = inputs(family)
    model = get_peft_model(build(family), case.random_config(**targets(case))).eval()

    def autocast_loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    exact = gradients(model, lambda: model(**batch).loss)
    rounded = gradients(model, autocast_loss)
    assert exact.keys() == rounded.keys()
    left, right = (torch.cat([g[name].flatten().double() for name in exact]) for g in (exact, rounded))
    assert torch.nn.functional.cosine_similarity(left, right, dim=0) > 0.99


# ---------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@cases_and_families("bert", "llama", "vit")
def test_gradient_checkpointing_gives_the_same_gradients(case, family, reentrant):
    batch = inputs(family)
    model = get_peft_model(build(family), case.random_config(**targets(case))).train()
    _switch_dropout_off(model)
    plain = gradients(model, lambda: model(**batch).loss)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    if family != "vit":
        model.enable_input_require_grads()
    elif reentrant:
        model.get_base_model().vit.embeddings.register_forward_hook(lambda _, __, out: out.requires_grad_(True))
    checkpointed = gradients(model, lambda: model(**batch).loss)
    assert plain.keys() == checkpointed.keys()
    assert max(relative_error(checkpointed[name], plain[name]) for name in plain) <= TOLERANCE[torch.float32]


def _switch_dropout_off(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


@cases_and_families("bert", "gpt2")
def test_gradient_accumulation_equals_the_big_batch(case, family):
    # in float64, where 1-bit methods still count in float32: else what the base rounds may be all that is left of
    # terms that cancel
    model = get_peft_model(build(family), case.random_config(**targets(case))).double().eval()
    batch = inputs(family, batch_size=4, dtype=torch.float64)

    def parts() -> torch.Tensor:
        losses = [model(**{name: v[i : i + 2] for name, v in batch.items()}).loss / 2 for i in (0, 2)]
        return losses[0] + losses[1]

    whole, summed = gradients(model, lambda: model(**batch).loss), gradients(model, parts)
    assert max(relative_error(summed[name], whole[name]) for name in whole) <= TOLERANCE[torch.float32]


# -------------------------------------------------------------------------------------------------------- wrappers


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert"])
@cases()
def test_a_compiled_model_computes_trains_and_saves_the_same(case, family, tmp_path):
    batch = inputs(family)
    model = get_peft_model(build(family), case.random_config(**targets(case))).eval()
    expected = output(model, batch)
    plain = gradients(model, lambda: model(**batch).loss)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert relative_error(output(compiled, batch), expected) <= TOLERANCE[torch.float32]
    grads = gradients(model, lambda: compiled(**batch).loss)
    assert max(relative_error(grads[name], plain[name]) for name in plain) <= TOLERANCE[torch.float32]
    compiled.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path).eval()
    assert not any("_orig_mod" in name for name in loaded.state_dict())
    assert torch.equal(output(loaded, batch), expected)


DDP = """
import os, sys, torch, torch.distributed as dist
import tests.adapters.cases
from datetime import timedelta
from tests.adapters.cases import BY_NAME
from tests.adapters.harness import build, inputs, targets
from peft import get_peft_model
rank, store, out, name = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2, timeout=timedelta(seconds=90))
case = BY_NAME[name]
torch.manual_seed(1)
model = get_peft_model(build("bert"), case.random_config(**targets(case))).eval()
ddp = torch.nn.parallel.DistributedDataParallel(model)
batch = {key: value[2 * rank : 2 * rank + 2] for key, value in inputs("bert", batch_size=4).items()}
ddp(**batch).loss.backward()
if rank == 0:
    torch.save({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, out)
dist.barrier()
dist.destroy_process_group()
sys.stderr.flush()
os._exit(0)  # the interpreter's own exit now and then aborts in gloo's threads (torch 2.13)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "densedelta", "pat"])
def test_ddp_on_two_processes_averages_the_gradients_of_the_adapter(name, tmp_path):
    case = BY_NAME[name]
    torch.manual_seed(1)
    model = get_peft_model(build("bert"), case.random_config(**targets(case))).eval()
    expected = gradients(model, lambda: model(**inputs("bert", batch_size=4)).loss)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    arguments = [str(tmp_path / "store"), str(tmp_path / "grads.pt"), name]
    processes = [
        subprocess.Popen([sys.executable, "-c", DDP, str(rank), *arguments], env=environment, cwd=ROOT)
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    grads = torch.load(tmp_path / "grads.pt")
    assert grads.keys() == expected.keys()
    assert max(relative_error(grads[name], expected[name]) for name in grads) <= TOLERANCE[torch.float32]


# -------------------------------------------------------------------------------------------------------- trainers


@cases()
def test_accelerate_prepares_clips_and_hands_the_adapter_back(case):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = fresh(case)
    before = base_tensors(model)
    start = adapter_of(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(), batch_size=2))
    for batch in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert accelerator.unwrap_model(prepared) is model
    assert any(not torch.equal(p, start[name]) for name, p in adapter_of(model).items())
    assert_same_tensors(base_tensors(model), before)


class _Module(L.LightningModule):
    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-3)


@cases()
def test_lightning_trains_the_adapter_and_its_checkpoint_restores_it(case, tmp_path):
    module = _Module(fresh(case))
    before = base_tensors(module.model)
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(module, DataLoader(rows(), batch_size=2))
    assert_same_tensors(base_tensors(module.model), before)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = _Module(fresh(case))
    again.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    batch = inputs("bert")
    assert torch.equal(output(again.model.eval(), batch), output(module.model.eval(), batch))
