"""AdapterCheckpoint: small checkpoints, exact resume, and a clear no to what does not fit."""

import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from peft import VeraConfig
from torch import nn
from torch.utils.data import DataLoader

from petune.callbacks import AdapterCheckpoint
from petune.callbacks.checkpoint_io import SafeCheckpointIO
from tests import fresh
from tests.callbacks import runs

ROOT = Path(__file__).resolve().parents[2]


def assert_same(resumed, reference):
    ours, theirs = resumed.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert resumed.losses == reference.losses[-len(resumed.losses) :]


def test_a_checkpoint_holds_what_trains_and_nothing_of_the_base(uninterrupted):
    folder, module = uninterrupted
    checkpoint = torch.load(folder / "step=8.ckpt", weights_only=True)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert checkpoint["state_dict"].keys() == trained
    assert any("lora_B" in name for name in trained)
    assert any("classifier.modules_to_save" in name for name in trained)
    full = sum(parameter.numel() for parameter in module.parameters())
    assert sum(tensor.numel() for tensor in checkpoint["state_dict"].values()) < full / 10


class AsksForSteps(runs.Module):
    """Makes Lightning set the loader up early, as every schedule with a warm-up does."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 18
        return super().configure_optimizers()


@pytest.mark.parametrize("module", [runs.Module, AsksForSteps])
@pytest.mark.parametrize("step", [4, 6, 10, 12])  # 6 and 12 are ends of epochs
def test_resume_is_bit_exact_in_the_middle_of_an_epoch_and_at_its_end(uninterrupted, tmp_path, step, module):
    folder, reference = uninterrupted
    resumed = runs.fit(tmp_path, every_steps=2, resume=folder / f"step={step}.ckpt", module=module())
    assert len(resumed.losses) == 18 - step
    assert_same(resumed, reference)


@pytest.mark.parametrize("module", [runs.Module, AsksForSteps])
def test_resume_at_the_end_of_an_epoch_is_bit_exact_with_a_plain_shuffling_loader(tmp_path, module):
    reference = runs.fit(tmp_path / "one", module=module())
    resumed = runs.fit(tmp_path / "two", resume=tmp_path / "one" / "step=6.ckpt", module=module())
    assert len(resumed.losses) == 12
    assert_same(resumed, reference)


def test_resume_is_bit_exact_with_a_validation_loop_between(tmp_path):
    class Validated(runs.Module):
        def val_dataloader(self):
            return DataLoader(runs.dataset(32), runs.BATCH)  # draws from the global generator, as users' loaders do

    reference = runs.fit(tmp_path / "one", module=Validated())
    resumed = runs.fit(tmp_path / "two", resume=tmp_path / "one" / "step=12.ckpt", module=Validated())
    assert len(resumed.losses) == 6
    assert_same(resumed, reference)


def test_resume_after_kill_9_is_bit_exact(uninterrupted, tmp_path):
    command = [sys.executable, "-m", "tests.callbacks.runs", str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().strip() == "ready"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    resumed = runs.fit(tmp_path / "resumed", every_steps=2, resume=tmp_path / "killed" / "last.ckpt")
    assert len(resumed.losses) == 10
    assert_same(resumed, uninterrupted[1])


def test_numpy_and_python_generators_go_on_where_they_were(tmp_path):
    class Draws(runs.Module):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            legacy = float(np.random.rand()), float(np.random.randn())  # noqa: NPY002 - the generator under test
            self.losses[-1] = (loss.item(), random.random(), *legacy)
            return loss

    reference = runs.fit(tmp_path / "one", every_steps=3, module=Draws())
    resumed = runs.fit(tmp_path / "two", every_steps=3, resume=tmp_path / "one" / "step=9.ckpt", module=Draws())
    assert_same(resumed, reference)


def test_a_checkpoint_of_a_compiled_model_loads_into_a_plain_one_and_back(uninterrupted, tmp_path):
    folder, reference = uninterrupted
    compiled = runs.fit(
        tmp_path / "one", every_steps=2, resume=folder / "step=8.ckpt", module=runs.Module(compiled=True)
    )
    state = torch.load(tmp_path / "one" / "step=14.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in state if "_orig_mod" in name]
    assert compiled.losses == pytest.approx(reference.losses[8:], rel=1e-5)
    again = runs.fit(tmp_path / "two", every_steps=2, resume=tmp_path / "one" / "step=14.ckpt")
    assert again.losses == pytest.approx(reference.losses[14:], rel=1e-5)


def test_frozen_adapter_buffers_go_into_the_checkpoint(tmp_path):
    config = VeraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], save_projection=True)
    runs.fit(tmp_path, module=runs.Module(config))
    state = torch.load(tmp_path / "step=18.ckpt", weights_only=True)["state_dict"]
    assert any("vera_A" in name for name in state)
    assert any("vera_lambda_b" in name for name in state)


class WithBatchNorm(runs.Module):
    """A norm whose statistics move, one whose statistics stay, and a frozen copy kept as a buffer."""

    def __init__(self):
        super().__init__()
        self.moves, self.stays = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.register_buffer("average", torch.zeros(3))
        for norm in (self.moves, self.stays):
            norm.requires_grad_(False)

    def training_step(self, batch, index):
        self.stays.eval()
        logits = self.stays(self.moves(self.model(input_ids=batch[0]).logits))
        self.average.lerp_(logits.detach().mean(0), 0.1)
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.losses.append(loss.item())
        return loss


def test_running_statistics_that_moved_and_own_buffers_go_into_the_checkpoint_and_resume(tmp_path):
    reference = runs.fit(tmp_path / "one", module=WithBatchNorm())
    state = torch.load(tmp_path / "one" / "step=6.ckpt", weights_only=True)["state_dict"]
    assert {"moves.running_mean", "moves.running_var", "average"} <= state.keys()
    resumed = runs.fit(tmp_path / "two", resume=tmp_path / "one" / "step=6.ckpt", module=WithBatchNorm())
    assert_same(resumed, reference)


def test_another_base_is_refused_in_words(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    other = runs.Module(base=runs.bert(seed=5))
    with pytest.raises(ValueError, match=r"checkpoint: the adapter was made for .*bert.*\(different weights\); load"):
        runs.fit(tmp_path, every_steps=2, resume=folder / "step=8.ckpt", module=other)


def test_a_base_of_another_size_is_refused_in_words(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    other = runs.Module(base=runs.bert(hidden_size=64))
    with pytest.raises(
        ValueError, match=r"is \[.*\] in the checkpoint to load and \[.*\] in this model; build the run"
    ):
        runs.fit(tmp_path, every_steps=2, resume=folder / "step=8.ckpt", module=other)


def test_missing_tensors_are_named_up_to_five_on_loading(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    wider = runs.Module(runs.lora(target_modules=["query", "key", "value", "dense"]))
    with pytest.raises(ValueError, match=r"18 trainable tensors are not in the checkpoint to load: .* and 13 more;"):
        runs.fit(tmp_path, every_steps=2, resume=folder / "step=8.ckpt", module=wider)


def test_a_state_dict_without_what_trains_is_refused_on_saving(tmp_path):
    class Forgetful(runs.Module):
        def state_dict(self, *args, **kwargs):
            return {k: v for k, v in super().state_dict(*args, **kwargs).items() if "lora_B" not in k}

    with pytest.raises(ValueError, match=r"4 trainable tensors are not in the checkpoint to save: .*lora_B"):
        runs.fit(tmp_path, module=Forgetful())
    assert not list(tmp_path.glob("*.ckpt"))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": {}, "bomb": Bomb(tmp_path / "exploded")}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"bad\.ckpt holds pickled objects .* only weights are read"):
        runs.fit(tmp_path, resume=tmp_path / "bad.ckpt")
    (tmp_path / "worse.ckpt").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match=r"worse\.ckpt holds pickled objects"):
        runs.fit(tmp_path, resume=tmp_path / "worse.ckpt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kept_bytes", [0, 10_000])
def test_a_checkpoint_cut_short_is_refused_in_words(uninterrupted, tmp_path, kept_bytes):
    folder, _ = uninterrupted
    (tmp_path / "cut.ckpt").write_bytes((folder / "step=8.ckpt").read_bytes()[:kept_bytes])
    with pytest.raises(ValueError, match=r"cut\.ckpt is cut short or damaged .*; use an earlier checkpoint"):
        runs.fit(tmp_path, resume=tmp_path / "cut.ckpt")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint({"value": 1}, path)

    def full(checkpoint, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError, match=r"was not written \(.*No space left.*\); the one that was there before is untouched"
    ):
        SafeCheckpointIO().save_checkpoint({"value": 2}, path)
    monkeypatch.undo()
    assert SafeCheckpointIO().load_checkpoint(path) == {"value": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_process_killed_while_writing_leaves_the_old_checkpoint(tmp_path):
    script = """
import os, signal, sys, torch
from petune.callbacks.checkpoint_io import SafeCheckpointIO
io = SafeCheckpointIO()
io.save_checkpoint({"value": 1}, sys.argv[1])
def half(checkpoint, target):
    open(target, "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
io.save_checkpoint({"value": 2}, sys.argv[1])
"""
    path = tmp_path / "last.ckpt"
    assert fresh.run(script, path).code == -signal.SIGKILL
    assert SafeCheckpointIO().load_checkpoint(path) == {"value": 1}
    SafeCheckpointIO().save_checkpoint({"value": 3}, path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]  # what the killed process left is gone


def test_settings_that_would_write_the_base_are_named(tmp_path):
    run = runs.trainer(AdapterCheckpoint(), ModelCheckpoint(tmp_path, save_weights_only=True), epochs=1)
    with pytest.warns(UserWarning, match="save_weights_only=True"):
        run.fit(runs.Module(), DataLoader(runs.dataset(), runs.BATCH))


def test_a_checkpoint_of_more_processes_goes_on_with_a_warning(uninterrupted, tmp_path):
    checkpoint = torch.load(uninterrupted[0] / "step=8.ckpt", weights_only=True)
    checkpoint["petune"]["random_states"] *= 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match="written by 2 processes and this run has 1"):
        runs.fit(tmp_path / "run", every_steps=2, resume=tmp_path / "two.ckpt")


def test_the_callback_leaves_a_users_own_checkpoint_io_alone(tmp_path):
    class Own(SafeCheckpointIO):
        pass

    own, seen = Own(), []

    class Look(Callback):
        def on_fit_start(self, trainer, pl_module):
            seen.append(trainer.strategy.checkpoint_io)

    runs.fit(tmp_path, callbacks=[Look()], plugins=[own])
    assert seen == [own]
