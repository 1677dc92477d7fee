"""The chooser: what is timed, when nothing may be, and how its table on disk survives."""

import importlib.metadata
import json
import subprocess
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from petune.kernels import chooser
from petune.kernels.chooser import bucket, choose, known

CUDA = torch.device("cuda", 0)
KEY = ("forward", 4096, 16, "bf16")
NAME = "forward 4096 16 bf16"


class Gpu:
    """A GPU whose kernels take a given time: no event is recorded, and the trials are counted."""

    def __init__(self, monkeypatch, folder):
        self.times_us = {"addmm": 9.0, "fused": 5.0, "tma": 7.0}
        self.capturing = False
        self.trials: list[list[str]] = []
        self.launched: list[str] = []
        monkeypatch.setenv("PETUNE_CACHE_DIR", str(folder))
        monkeypatch.delenv("PETUNE_TUNE", raising=False)
        monkeypatch.setattr(chooser, "_times", self.time)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Vendor X100 80GB")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(chooser, "version", lambda name: "9.9")
        self.forget(monkeypatch)

    def forget(self, monkeypatch):
        """What a new process knows."""
        for name, empty in {"_chosen": {}, "_tables": {}, "_said": set()}.items():
            monkeypatch.setattr(chooser, name, empty)

    def time(self, candidates, device):
        self.trials.append(list(candidates))
        return {name: self.times_us[name] for name in candidates}

    def candidates(self, *names):
        return {name: lambda name=name: self.launched.append(name) for name in names or ("addmm", "fused", "tma")}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    return Gpu(monkeypatch, tmp_path)


@pytest.fixture
def table(tmp_path):
    return tmp_path / f"Vendor-X100-80GB-torch-{torch.__version__.replace('+', '-')}-triton-9.9.json"


def refuses(error):
    def run():
        raise error

    return run


# --- the trial -----------------------------------------------------------------------------------------------------


def test_the_fastest_candidate_wins(gpu):
    assert choose(KEY, gpu.candidates(), "addmm", CUDA) == "fused"
    gpu.times_us = {"addmm": 1.0, "fused": 5.0, "tma": 7.0}
    assert choose(("other", 1), gpu.candidates(), "addmm", CUDA) == "addmm"


def test_a_key_is_timed_once(gpu):
    for _ in range(3):
        choose(KEY, gpu.candidates(), "addmm", CUDA)
    assert gpu.trials == [["addmm", "fused", "tma"]]
    assert gpu.launched == ["addmm", "fused", "tma"]


def test_every_device_and_key_has_a_choice_of_its_own(gpu, monkeypatch):
    choose(KEY, gpu.candidates(), "addmm", CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Vendor Y200")
    choose(KEY, gpu.candidates(), "addmm", torch.device("cuda", 1))
    choose((*KEY, 2), gpu.candidates(), "addmm", CUDA)
    assert len(gpu.trials) == 3


def test_a_candidate_that_fails_is_left_out_and_named(gpu, caplog):
    candidates = gpu.candidates() | {"fused": refuses(RuntimeError("out of resources: shared memory"))}
    assert choose(KEY, candidates, "addmm", CUDA) == "tma"
    assert gpu.trials == [["addmm", "tma"]]
    assert [r.message for r in caplog.records if "fused" in r.message] == [
        f"{NAME}: petune leaves out the variant fused, which fails here "
        "(RuntimeError('out of resources: shared memory'))"
    ]


def test_the_default_may_be_the_one_that_fails(gpu):
    candidates = gpu.candidates() | {"addmm": refuses(ValueError("no"))}
    assert choose(KEY, candidates, "addmm", CUDA) == "fused"


def test_a_candidate_out_of_memory_is_left_out_of_this_process_only(gpu, table, monkeypatch):
    candidates = gpu.candidates() | {"fused": refuses(torch.OutOfMemoryError("CUDA out of memory"))}
    assert choose(KEY, candidates, "addmm", CUDA) == "tma"
    assert choose(KEY, candidates, "addmm", CUDA) == "tma"
    assert len(gpu.trials) == 1
    assert not table.exists()
    gpu.forget(monkeypatch)
    assert choose(KEY, gpu.candidates(), "addmm", CUDA) == "fused"


@pytest.mark.parametrize("order", [("addmm", "fused", "tma"), ("fused", "addmm", "tma"), ("fused", "tma", "addmm")])
def test_the_error_of_the_default_is_raised_if_all_fail(gpu, order, table):
    candidates = {name: refuses(RuntimeError(f"{name} fails")) for name in order}
    with pytest.raises(RuntimeError, match="addmm fails"):
        choose(KEY, candidates, "addmm", CUDA)
    assert not table.exists()


def test_a_lost_context_is_not_survived(gpu):
    candidates = gpu.candidates() | {"fused": refuses(torch.AcceleratorError("illegal memory access"))}
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        choose(KEY, candidates, "addmm", CUDA)


def test_a_candidate_may_have_a_choice_of_its_own(gpu):
    inner: list[str] = []
    outer = {
        "addmm": lambda: inner.append(choose(("inner",), gpu.candidates(), "addmm", CUDA)),
        "fused": lambda: None,
    }
    assert choose(KEY, outer, "addmm", CUDA) == "fused"
    assert inner == ["fused"]


def test_threads_share_one_trial(gpu):
    meeting = threading.Barrier(8)
    choices: list[str] = []

    def work():
        meeting.wait()
        choices.append(choose(KEY, gpu.candidates(), "addmm", CUDA))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert choices == ["fused"] * 8
    assert len(gpu.trials) == 1


def test_the_first_trial_of_a_process_says_so_and_names_the_table(gpu, caplog, table):
    choose(KEY, gpu.candidates(), "addmm", CUDA)
    choose(("other",), gpu.candidates(), "addmm", CUDA)
    assert [r.message for r in caplog.records] == [
        f"petune times its kernels once for this GPU and keeps the choices in {table}"
    ]


def test_times_are_medians_of_interleaved_repetitions(monkeypatch):
    order: list[str] = []
    # the third repetition meets a pause of the device, which a mean would not survive
    spans = {"slow": iter([3.0, 3.0, 90.0, 3.0, 3.0]), "fast": iter([2.0, 2.0, 80.0, 2.0, 2.5])}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.last = order[-1] if order else ""

        def elapsed_time(self, end):
            return next(spans[end.last]) / 1e3

    cuda = SimpleNamespace(Event=Event, device=lambda device: nullcontext(), synchronize=lambda: order.append("sync"))
    monkeypatch.setattr(torch, "cuda", cuda)
    candidates = {name: lambda name=name: order.append(name) for name in spans}
    assert chooser._times(candidates, CUDA) == pytest.approx({"slow": 3.0, "fast": 2.0})
    assert order == ["slow", "fast"] * 5 + ["sync"]


# --- no trial ------------------------------------------------------------------------------------------------------


def test_nothing_is_timed_off_cuda(gpu):
    assert choose(KEY, gpu.candidates(), "addmm", torch.device("cpu")) == "addmm"
    assert not gpu.launched


def test_one_candidate_needs_no_trial(gpu, table):
    assert choose(KEY, gpu.candidates("addmm"), "addmm", CUDA) == "addmm"
    assert not gpu.launched
    assert not table.exists()


def test_a_capture_takes_the_default_and_stores_nothing(gpu, table):
    gpu.capturing = True
    assert choose(KEY, gpu.candidates(), "addmm", CUDA) == "addmm"
    assert not gpu.launched
    assert not table.exists()
    gpu.capturing = False
    assert choose(KEY, gpu.candidates(), "addmm", CUDA) == "fused"


def test_a_capture_takes_what_its_warm_up_chose(gpu):
    choose(KEY, gpu.candidates(), "addmm", CUDA)
    gpu.capturing = True
    assert choose(KEY, gpu.candidates(), "addmm", CUDA) == "fused"


def test_petune_tune_0_takes_the_default_and_stores_nothing(gpu, monkeypatch, table):
    monkeypatch.setenv("PETUNE_TUNE", "0")
    assert choose(KEY, gpu.candidates(), "addmm", CUDA) == "addmm"
    assert not gpu.launched
    assert not table.exists()
    monkeypatch.setenv("PETUNE_TUNE", "1")
    assert choose(KEY, gpu.candidates(), "addmm", CUDA) == "fused"


def test_petune_tune_of_another_value_is_refused(gpu, monkeypatch):
    monkeypatch.setenv("PETUNE_TUNE", "off")
    with pytest.raises(ValueError, match=r"PETUNE_TUNE='off' is neither 0 nor 1; set 0 to"):
        choose(KEY, gpu.candidates(), "addmm", CUDA)


def test_deterministic_mode_takes_the_default_even_where_a_choice_is_known(gpu):
    choose(KEY, gpu.candidates(), "addmm", CUDA)
    torch.use_deterministic_algorithms(True)
    try:
        assert choose(KEY, gpu.candidates(), "addmm", CUDA) == "addmm"
        assert choose(("other",), gpu.candidates(), "addmm", CUDA) == "addmm"
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(gpu.trials) == 1
    assert choose(KEY, gpu.candidates(), "addmm", CUDA) == "fused"


def test_a_known_key_costs_a_dictionary_lookup(gpu, monkeypatch):
    candidates = gpu.candidates()
    choose(KEY, candidates, "addmm", CUDA)
    for name in ("os", "json", "Path", "version", "_lock", "_tables", "logger"):
        monkeypatch.setattr(chooser, name, None)  # whatever a hit would touch fails
    assert choose(KEY, candidates, "addmm", CUDA) == "fused"


def test_known_gives_the_answer_without_candidates_after_the_first_call(gpu):
    assert known(KEY, "addmm", CUDA) is None
    choose(KEY, gpu.candidates(), "addmm", CUDA)
    assert known(KEY, "addmm", CUDA) == "fused"
    assert known(KEY, "addmm", torch.device("cuda", 1)) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert known(KEY, "addmm", CUDA) == known(("other",), "addmm", CUDA) == "addmm"
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_chooser_does_not_load_triton():
    code = "import sys, petune.kernels.chooser; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the table -----------------------------------------------------------------------------------------------------


def test_the_next_process_reads_the_choice(gpu, monkeypatch, caplog):
    choose(KEY, gpu.candidates(), "addmm", CUDA)
    gpu.forget(monkeypatch)
    caplog.clear()
    assert choose(KEY, gpu.candidates(), "addmm", CUDA) == "fused"
    assert len(gpu.trials) == 1
    assert not caplog.records


def test_a_table_is_readable_and_alone_in_its_folder(gpu, table):
    gpu.times_us["fused"] = 5.126
    choose(KEY, gpu.candidates(), "addmm", CUDA)
    assert json.loads(table.read_text()) == {
        "schema": 1,
        "choices": {NAME: {"choice": "fused", "times_us": {"addmm": 9.0, "fused": 5.13, "tma": 7.0}}},
    }
    assert {path.suffix for path in table.parent.iterdir()} <= {".json", ".lock"}
    assert len(table.read_text().splitlines()) > 5


def test_a_stored_choice_that_is_no_longer_a_candidate_is_timed_anew(gpu, monkeypatch, table):
    choose(KEY, gpu.candidates(), "addmm", CUDA)
    for _ in range(2):  # the table on disk, then the one in memory
        gpu.forget(monkeypatch)
        assert choose(KEY, gpu.candidates("addmm", "tma"), "addmm", CUDA) == "tma"
    assert json.loads(table.read_text())["choices"][NAME]["choice"] == "tma"
    assert choose(KEY, gpu.candidates("addmm", "fused"), "addmm", CUDA) == "fused"
    assert len(gpu.trials) == 3


def test_what_other_processes_wrote_meanwhile_is_kept(gpu, table):
    choose(KEY, gpu.candidates(), "addmm", CUDA)
    content = json.loads(table.read_text())
    content["choices"]["theirs 1"] = {"choice": "tma", "times_us": {"tma": 1.0}}
    table.write_text(json.dumps(content))
    choose(("mine", 2), gpu.candidates(), "addmm", CUDA)
    assert set(json.loads(table.read_text())["choices"]) == {NAME, "theirs 1", "mine 2"}
    assert choose(("theirs", 1), gpu.candidates(), "addmm", CUDA) == "tma"
    assert len(gpu.trials) == 2


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from petune.kernels import chooser\n"
        "for i in range(40): chooser._store(Path(sys.argv[1]), f'{sys.argv[2]} {i}', {'choice': 'x', 'times_us': {}})"
    )
    table = tmp_path / "table.json"
    command = [sys.executable, "-c", code, str(table)]
    processes = [subprocess.Popen([*command, who]) for who in "abc"]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert set(json.loads(table.read_text())["choices"]) == {f"{who} {i}" for who in "abc" for i in range(40)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"{}",
        b'{"schema": 2, "choices": {}}',
        b'{"schema": 1, "choices": 4}',
        b'{"schema": 1, "choices": {"k": "fused"}}',
        b'{"schema": 1, "choices": {"k": {"times_us": {}}}}',
    ],
    ids=repr,
)
def test_a_table_that_is_not_ours_is_replaced_after_one_warning(gpu, table, content, caplog):
    table.write_bytes(content)
    assert choose(KEY, gpu.candidates(), "addmm", CUDA) == "fused"
    choose(("other",), gpu.candidates(), "addmm", CUDA)
    warnings = [r.message for r in caplog.records if "cannot use" in r.message]
    assert len(warnings) == 1
    assert str(table) in warnings[0]
    assert len(json.loads(table.read_text())["choices"]) == 2


def test_a_choice_of_a_strange_type_is_timed_anew(gpu, table):
    table.write_text(json.dumps({"schema": 1, "choices": {NAME: {"choice": ["fused"]}}}))
    assert choose(KEY, gpu.candidates(), "addmm", CUDA) == "fused"
    assert len(gpu.trials) == 1


def test_a_folder_that_cannot_be_made_is_survived_with_one_warning(gpu, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PETUNE_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert choose(KEY, gpu.candidates(), "addmm", CUDA) == "fused"
    assert choose(("other",), gpu.candidates(), "addmm", CUDA) == "fused"
    assert choose(KEY, gpu.candidates(), "addmm", CUDA) == "fused"
    assert len(gpu.trials) == 2
    warnings = [r.message for r in caplog.records if "cannot keep" in r.message]
    assert len(warnings) == 1


def test_a_full_disk_leaves_the_old_table_and_no_rest(gpu, monkeypatch, table):
    choose(KEY, gpu.candidates(), "addmm", CUDA)
    before = table.read_text()

    def full(handle, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chooser.os, "fdopen", full)
    assert choose(("other",), gpu.candidates(), "addmm", CUDA) == "fused"
    assert table.read_text() == before
    assert {path.suffix for path in table.parent.iterdir()} <= {".json", ".lock"}


def test_the_folder_of_the_table(gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert chooser._folder() == tmp_path
    monkeypatch.delenv("PETUNE_CACHE_DIR")
    assert chooser._folder() == tmp_path / "xdg" / "petune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert chooser._folder() == tmp_path / "home" / ".cache" / "petune"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(chooser.Path, "home", homeless)
    monkeypatch.setattr(chooser.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    assert chooser._folder() == tmp_path / "tmp" / "petune"


def test_a_torch_with_triton_built_in_has_a_table_too(gpu, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(chooser, "version", missing)
    assert chooser._table_path(CUDA).name.endswith("-triton-unknown.json")


@pytest.mark.parametrize(("tokens", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (4097, 8192), (8192, 8192)])
def test_a_bucket_is_the_next_power_of_two(tokens, power):
    assert bucket(tokens) == power
