"""What cannot train together says so, and what fails takes nobody with it."""

import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from peft import PromptEncoderConfig

import petune
from petune.many import fit_many
from petune.tasks.guard import GuardedModule
from tests.conftest import TOLERANCE, relative_error
from tests.many.learners import Learner, alone, lora, rows, run


class Guarded(GuardedModule, Learner):
    """Stops at a loss that is no number."""


class Poisoned(Guarded):
    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return loss * float("nan") if index == 2 else loss


class Raising(Learner):
    def training_step(self, batch, index):
        if index == 1:
            raise RuntimeError("the file of batch 1 is gone")
        return super().training_step(batch, index)


def _nan_weights(learner):
    """NaN in the adapter itself: every later row of this run is NaN, and nothing else may be."""

    class Poison(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            for name, parameter in pl_module.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.constant_(parameter, float("nan"))

    return learner, (Poison(),)


def _beyond_the_vocabulary():
    data = rows(seed=5)
    data[4]["input_ids"][3] = 10_000
    return data


@pytest.mark.parametrize("kind", ["nan loss", "nan weights", "raises", "bad ids", "bad shape"])
def test_a_run_that_fails_is_reported_and_changes_nothing_for_the_others(kind, tmp_path):
    def good(place):
        return run(tmp_path / place, Learner(lora(r=3)), rows(length=9, seed=1), seed=1)

    learner, callbacks, data = Learner(lora()), (), rows(seed=5)
    match kind:
        case "nan loss":
            learner = Poisoned(lora())
        case "nan weights":
            learner, callbacks = _nan_weights(Guarded(lora()))
        case "raises":
            learner = Raising(lora())
        case "bad ids":
            data = _beyond_the_vocabulary()
        case _:
            data = [{**row, "token_type_ids": torch.zeros(4, dtype=torch.long)} for row in data]
    bad = run(tmp_path / "bad", learner, data, callbacks=callbacks, seed=5)
    healthy = good("good")
    results = fit_many({"bad": bad, "good": healthy})
    assert results["good"].error is None
    error = results["bad"].error
    assert isinstance(error, {"nan loss": FloatingPointError, "nan weights": FloatingPointError}.get(kind, Exception))
    if kind == "raises":
        assert str(error) == "the file of batch 1 is gone"
    expected = alone(good("alone"))
    for name, tensor in expected.learned.items():
        assert relative_error(healthy.task.learned[name], tensor) <= 10 * TOLERANCE[torch.float32]


def test_two_runs_that_write_into_one_folder_are_refused(tmp_path):
    one, other = (run(tmp_path / "same", Learner(lora()), rows()) for _ in range(2))
    with pytest.raises(ValueError, match=r"the runs 'a' and 'b' both write into .*same.*; give each a folder"):
        fit_many({"a": one, "b": other})


def test_no_runs_and_limits_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="was given no runs; pass at least one"):
        fit_many({})
    one = run(tmp_path, Learner(lora()), rows())
    with pytest.raises(ValueError, match="tokens_per_step=0 lets nothing train; use 1 or more"):
        fit_many({"a": one}, tokens_per_step=0)
    with pytest.raises(ValueError, match="together=0 lets nothing train"):
        fit_many({"a": one}, together=0)


class OtherBase(Learner):
    def configure_model(self):
        if "model" not in self._modules:
            super().configure_model()
            with torch.no_grad():
                self.model.get_base_model().bert.encoder.layer[1].output.dense.weight.add_(1e-3)


class WholeBase(Learner):
    def configure_model(self):
        if "model" not in self._modules:
            super().configure_model()
            self.model.get_base_model().bert.encoder.layer[0].output.dense.weight.requires_grad_(True)


class Plain(Learner):
    def configure_model(self):
        if "model" not in self._modules:
            super().configure_model()
            self.model = self.model.unload()


class Compiled(Learner):
    def configure_model(self):
        if "model" not in self._modules:
            super().configure_model()
            self.model.compile(backend="eager")


REFUSED = {
    "another base": (lambda: OtherBase(lora()), r"is not the same in this run's base and in that of the first run"),
    "a base that trains": (lambda: WholeBase(lora()), r"of the base trains, and runs that train together share"),
    "no adapter": (lambda: Plain(lora()), r"has no adapter, and only adapters train together; set train: adapter"),
    "compiled": (lambda: Compiled(lora()), r"a compiled model cannot hand its rows to a joint batch"),
    "pat": (lambda: _learner(petune.PatConfig, total_steps=4), r"PatConfig .*train it by petune fit"),
    "ladder": (lambda: _learner(petune.LadderSideConfig), r"LadderSideConfig .*train it by petune fit"),
    "emoe": (lambda: _learner(petune.EmoeConfig, num_experts=4, top_k=2), r"EmoeConfig .*train it by petune fit"),
    "prompts": (lambda: _learner(PromptEncoderConfig, num_virtual_tokens=2), r"PromptEncoderConfig .*by petune fit"),
}


def _learner(config, **fields):
    return Learner(config(task_type="SEQ_CLS", **fields))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_share_a_batch_is_refused_and_the_others_train(kind, tmp_path):
    make, said = REFUSED[kind]
    runs = {
        "good": run(tmp_path / "good", Learner(lora()), rows(count=4)),
        "bad": run(tmp_path / "bad", make(), rows(count=4)),
    }
    results = fit_many(runs)
    assert results["good"].error is None
    with pytest.raises(Exception, match=said):
        raise results["bad"].error


def test_an_interrupt_stops_every_run_and_their_checkpoints_stay(tmp_path):
    class Interrupt(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                signal.raise_signal(signal.SIGINT)

    seen = []

    class Watch(Callback):
        def on_exception(self, trainer, pl_module, exception):
            seen.append((trainer.global_step, type(exception).__name__))

    first = run(tmp_path / "0", Learner(lora()), rows(count=12), batch=1, callbacks=(Interrupt(), Watch()))
    second = run(tmp_path / "1", Learner(lora()), rows(count=12), batch=1, callbacks=(Watch(),))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs, and Lightning, ignore
    try:
        with pytest.raises(KeyboardInterrupt):
            fit_many({"0": first, "1": second})
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert [name for _, name in seen] == ["KeyboardInterrupt", "RunStoppedError"]
    assert {step for step, _ in seen} <= {2, 3, 4}


def test_a_strategy_of_several_devices_is_refused_before_it_starts_any_process(tmp_path):
    one = run(tmp_path / "0", Learner(lora()), rows())
    one.trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, default_root_dir=tmp_path)
    with pytest.raises(
        ValueError, match="a: runs that train together share one device, and DDPStrategy is for several"
    ):
        fit_many({"a": one})
