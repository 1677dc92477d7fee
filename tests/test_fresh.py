"""The new processes of the tests: what is not imported in them, and that they end as a new interpreter does."""

import os
import signal

from tests import fresh


def test_a_process_starts_without_peft_and_what_stands_on_it(tmp_path):
    code = "import os, sys; print(sorted({name.split('.')[0] for name in sys.modules}), os.getcwd(), sys.argv[1:])"
    done = fresh.run(code, tmp_path, 3, cwd=tmp_path)
    assert done.code == 0, done.errors
    modules, _, rest = done.output.partition("] ")
    assert "'torch', " in modules
    assert not {"'peft'", "'petune'", "'lightning'", "'pytest'", "'tests'"} & set(modules.strip("[").split(", "))
    assert rest.strip() == f"{tmp_path} {[str(tmp_path), '3']}"


def test_two_run_at_the_same_time_and_see_the_environment_of_their_start(tmp_path, monkeypatch):
    monkeypatch.setenv("PETUNE_SEEN", "yes")
    meet = "import os, sys, time\nopen(sys.argv[1], 'w')\nwhile not os.path.exists(sys.argv[2]): time.sleep(0.01)\n"
    code = meet + "print(os.environ['PETUNE_SEEN'], os.environ['RANK'])"
    left, right = tmp_path / "left", tmp_path / "right"
    first, second = fresh.Fresh(code, left, right, RANK="0"), fresh.Fresh(code, right, left, RANK="1")
    assert [one.wait(60).output for one in (first, second)] == ["yes 0\n", "yes 1\n"]
    assert "RANK" not in os.environ


def test_failures_are_told_as_an_interpreter_tells_them():
    failed = fresh.run("import sys; sys.stdout.write('before'); raise ValueError('of the code')")
    assert (failed.code, failed.output) == (1, "before")
    assert failed.errors.endswith("ValueError: of the code\n")
    assert fresh.run("raise SystemExit(3)").code == 3
    killed = fresh.run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.code == -signal.SIGKILL
    assert fresh.Fresh("import time; time.sleep(60)").wait(1).code == -signal.SIGKILL
