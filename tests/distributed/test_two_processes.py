"""Two processes on gloo train what one does, write what one does, and take over from one another."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import runs

pytestmark = pytest.mark.timeout(900)  # two processes wait for one another: a busy machine makes them slow

ROOT = Path(__file__).resolve().parents[2]
COMPARED = [(strategy, name) for strategy, name in runs.PLACES if name not in runs.METHODS_OF_IMAGES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, worker_id):
    """What one process wrote, in one/, and two, in ddp/ and fsdp2/; results in rank0.json and rank1.json."""
    here = tmp_path_factory.getbasetemp()
    here = here if worker_id == "master" else here.parent  # the workers of xdist share what takes a minute
    folder = here / "distributed"
    with filelock.FileLock(here / "distributed.lock"):
        if not (folder / "rank1.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _train(folder)
    return folder


def _train(folder: Path) -> None:
    losses = {name: runs.fit(setting, folder / "one" / name).losses for name, setting in runs.SETTINGS.items()}
    (folder / "one.json").write_text(json.dumps(losses))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.distributed.runs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    logs = [(folder / f"rank{rank}.log").open("w") for rank in range(2)]
    processes = [
        subprocess.Popen([*command, str(rank), port, str(folder)], env=environment, cwd=ROOT, stdout=log, stderr=log)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            log.close()
    assert codes == [0, 0], (folder / "rank0.log").read_text()[-3000:]


@pytest.fixture(scope="module")
def one(folder):
    return json.loads((folder / "one.json").read_text())


@pytest.fixture(scope="module")
def pair(folder):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def mean(pair, kind, key):
    return [(left + right) / 2 for left, right in zip(pair[0][kind][key], pair[1][kind][key], strict=True)]


def rest(one, name):
    """The losses behind the checkpoint, of the batches that a step has."""
    return one[name][runs.SAVED_AT * runs.SETTINGS[name].trainer.get("accumulate_grad_batches", 1) :]


def tolerance(name):
    return 2e-2 if name == "bfloat16" else 1e-4


@pytest.mark.parametrize(("strategy", "name"), COMPARED)
def test_two_processes_have_the_losses_of_one_at_the_same_global_batch(one, pair, strategy, name):
    losses = mean(pair, "losses", f"{strategy}/{name}")
    assert len(losses) == runs.STEPS
    assert losses == pytest.approx(one[name], rel=tolerance(name))


@pytest.mark.parametrize(("strategy", "name"), COMPARED)
def test_two_processes_go_on_where_one_stopped(one, pair, strategy, name):
    losses = mean(pair, "resumed", f"{strategy}/{name}")
    assert losses == pytest.approx(rest(one, name), rel=tolerance(name))


@pytest.mark.parametrize(("strategy", "name"), COMPARED)
def test_one_process_goes_on_where_two_stopped(one, folder, tmp_path, strategy, name):
    start = folder / strategy / name / f"step={runs.SAVED_AT}.ckpt"
    resumed = runs.fit(runs.SETTINGS[name], tmp_path, resume=start)
    assert resumed.losses == pytest.approx(rest(one, name), rel=tolerance(name))


@pytest.mark.parametrize("name", [name for name in runs.METHODS_OF_IMAGES if name not in runs.REFUSED_BY_FSDP2])
def test_both_strategies_train_alike_where_batch_norms_see_half_a_batch(pair, name):
    ddp, fsdp2 = (mean(pair, "losses", f"{strategy}/{name}") for strategy in runs.STRATEGIES)
    assert fsdp2 == pytest.approx(ddp, rel=tolerance(name))


@pytest.mark.parametrize("strategy", runs.STRATEGIES)
def test_two_processes_resume_bit_for_bit_with_dropout(pair, strategy):
    for rank in range(2):
        whole, again = pair[rank]["bit_exact"][strategy]
        assert again == whole
    assert pair[0]["bit_exact"][strategy] != pair[1]["bit_exact"][strategy]


@pytest.mark.parametrize(("strategy", "name"), runs.PLACES)
def test_a_checkpoint_has_the_tensors_of_one_process_and_none_of_the_frozen_base(folder, strategy, name):
    file = f"step={runs.SAVED_AT}.ckpt"
    ours, theirs = (torch.load(folder / place / name / file)["state_dict"] for place in (strategy, "one"))
    assert {key: (value.shape, value.dtype) for key, value in ours.items()} == {
        key: (value.shape, value.dtype) for key, value in theirs.items()
    }
    task = runs.make_task(runs.SETTINGS[name])
    task.build()
    frozen = {key for key, parameter in task.named_parameters() if not parameter.requires_grad}
    assert not frozen & ours.keys()
    sizes = [(folder / place / name / file).stat().st_size for place in (strategy, "one")]
    assert sizes[0] - sizes[1] < 20_000  # the second process's random state


def test_a_checkpoint_of_lora_is_a_fraction_of_the_base(folder):
    task = runs.make_task(runs.Setting())
    base = sum(parameter.nbytes for parameter in task.build().parameters() if not parameter.requires_grad)
    for strategy in runs.STRATEGIES:
        state = torch.load(folder / strategy / "lora" / f"step={runs.SAVED_AT}.ckpt")["state_dict"]
        assert sum(tensor.nbytes for tensor in state.values()) < base / 3


@pytest.mark.parametrize(("strategy", "name"), [place for place in COMPARED if place[1] not in ("head", "all")])
def test_the_adapter_folder_is_that_of_one_process(folder, strategy, name):
    ours, theirs = (
        load_file(folder / place / name / "adapter" / "adapter_model.safetensors") for place in (strategy, "one")
    )
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].shape == tensor.shape
        if tensor.is_floating_point() and name != "bfloat16":
            assert torch.allclose(ours[key], tensor, rtol=1e-3, atol=1e-3), key


def test_only_the_first_process_writes(pair):
    assert any(f"step={runs.SAVED_AT}.ckpt" in line for line in pair[0]["written"])
    assert any(".adapter.incoming" in line for line in pair[0]["written"])
    assert pair[1]["written"] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pat", "PatModel computes a loss of its layers' weights after the forward, when they have been freed, so"),
        ("hside", "HierarchicalModel with detach=False puts norms of its own into blocks, which gathering a block"),
        ("compiled", "compile: true and fsdp2 do not go together"),
        ("own parameter", "WithOwnParameter.scale belongs to the task itself, which fsdp2 cannot cut up"),
        ("two dtypes", "trains parameters of bfloat16 and float32, and fsdp2 reduces one dtype at a time"),
        ("tensor parallel", "tensor_parallel_size=2 would split the layers that adapters stand on"),
        ("pieces", "ModelParallelStrategy would write checkpoints in pieces"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(pair, name, message):
    for rank in range(2):
        assert message in pair[rank]["refused"][name]
