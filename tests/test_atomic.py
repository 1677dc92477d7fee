"""Whatever step of a save fails or is killed at, the folder holds the old adapter or the new one, whole."""

import os
import re
import resource
import signal
import sys
from pathlib import Path

import pytest
from peft import get_peft_model

import petune.atomic
from petune.atomic import replacing_folder
from petune.export import load_adapter, load_run, save_adapter
from tests.callbacks.runs import bert, lora

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes to kill are forks (POSIX)")


class Watch:
    """Acts at the n-th file operation below a folder; Python reports those to audit hooks, which stay for good."""

    def __init__(self):
        self.folder, self.left, self.act = None, 0, None
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if self.folder is None or event not in ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir"):
            return
        if isinstance(arguments[0], str | Path) and str(arguments[0]).startswith(self.folder):
            self.left -= 1
            if self.left == 0:
                self.act()


WATCH = Watch()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk():
    raise OSError(28, "No space left on device")


@pytest.fixture(params=["exchange", "two renames"])
def swap(request, monkeypatch):
    """Both ways of putting the new folder in place: the system call, and what systems without it have."""
    if request.param == "two renames":
        monkeypatch.setattr(petune.atomic, "_exchange", lambda one, other: False)


@pytest.fixture
def adapters(tmp_path):
    """A folder with an old adapter in it, and a model whose adapter is to replace it."""
    save_adapter(build(1.0), tmp_path / "adapter", run_config={"value": 1.0})
    (tmp_path / "adapter" / "mine.txt").write_text("mine")
    return tmp_path / "adapter", build(2.0)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def build(value):
    model = get_peft_model(bert(), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(value)
    return model


def value_in(folder):
    """The value all lora_B have; the tensors and petune.yaml must agree, and the rest must be there."""
    model = load_adapter(folder, bert())
    values = {v for n, p in model.named_parameters() if "lora_B" in n for v in p.unique().tolist()}
    assert values == {load_run(folder).config["value"]}
    assert (folder / "README.md").exists()
    assert (folder / "mine.txt").read_text() == "mine"
    return values.pop()


def killed_at(step, folder, model):
    """Whether a process that saves `model` was killed before its `step`-th file operation."""
    child = os.fork()
    if child == 0:
        WATCH.folder, WATCH.left, WATCH.act = str(folder.parent), step, kill
        save_adapter(model, folder, run_config={"value": 2.0})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_process_killed_at_any_step_leaves_a_whole_adapter(adapters, swap):
    folder, model = adapters
    found, step = [], 0
    while killed_at(step := step + 1, folder, model):
        found.append(value_in(folder))
    assert len(found) > 20
    assert found == sorted(found)  # the old one up to a point, the new one from there on
    assert set(found) == {1.0, 2.0}
    save_adapter(model, folder, run_config={"value": 2.0})
    assert names(folder.parent) == ["adapter"]  # nothing of the killed ones is left


def test_a_disk_that_is_full_at_any_step_leaves_a_whole_adapter(adapters, swap):
    folder, model = adapters
    messages, step, reached = [], 0, True
    while reached:
        step += 1
        WATCH.folder, WATCH.left, WATCH.act = str(folder.parent), step, full_disk
        try:
            save_adapter(model, folder, run_config={"value": 2.0})
        except OSError as error:
            messages.append(str(error))
            assert names(folder.parent) == ["adapter"]
            wanted = 1.0
        else:  # an operation that is not needed failed, or none did
            wanted = 2.0
        finally:
            reached, WATCH.folder = WATCH.left <= 0, None
        assert value_in(folder) == wanted
        if wanted == 2.0:
            save_adapter(build(1.0), folder, run_config={"value": 1.0})
    assert len(messages) > 10
    told = re.compile(r"was not saved to .*No space left on device.*untouched")
    assert [message for message in messages if not told.search(message)] == []


def test_a_file_that_may_not_grow_leaves_the_old_adapter(adapters):
    """A real failure of the system below safetensors' own writer."""
    folder, model = adapters
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try:
            save_adapter(model, folder, run_config={"value": 2.0})
        except OSError as error:
            os._exit(7 if "was not saved" in str(error) and "untouched" in str(error) else 8)
        os._exit(9)
    _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 7
    assert value_in(folder) == 1.0
    assert names(folder.parent) == ["adapter"]


def test_an_error_in_the_block_leaves_the_old_folder(tmp_path, swap):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")

    def write():
        with replacing_folder(tmp_path / "folder") as new:
            (new / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["old"]
