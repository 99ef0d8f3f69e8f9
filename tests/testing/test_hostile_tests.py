"""Tests that hang, die, multiply, lie, or patch the ground under the plugin."""

import os
import threading
import time
from pathlib import Path

import psutil
import pytest

from lsp_agent.cancel import CancelToken
from lsp_agent.errors import Cancelled

TIME_S = 3.0
"""Enough for pytest to reach the test on a busy machine."""


def processes_with(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if any(mark in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until_gone(mark: str, seconds: float = 2.0) -> list[psutil.Process]:
    end = time.monotonic() + seconds
    while (left := processes_with(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def unique(name: str) -> str:
    return f"{name}_{os.getpid()}_{time.monotonic_ns()}"


LOOP, SLEEP = "while True: pass", "import time; time.sleep(1000)"
LOCK = "import threading; threading.Event().wait()"


@pytest.mark.parametrize(
    ("level", "hang"),
    [("full", LOOP), ("full", SLEEP), ("full", LOCK), ("none", LOOP)],
    indirect=["level"],
    ids=["loop", "sleep", "lock", "loop-without-sandbox"],
)
def test_a_hanging_test_times_out_with_its_place(project, run, level, hang):
    root = project(
        {
            "lib.py": f"def stuck():\n    {hang}\n",
            "test_a.py": "import lib\ndef test_a(): pass\ndef test_b(): lib.stuck()\n",
        }
    )
    began = time.monotonic()
    result = run(root, level=level, timeout_s=TIME_S)
    assert time.monotonic() - began < TIME_S + 1.5
    assert [r.outcome for r in result.results.values()] == ["passed", "timeout"]
    stuck = result.results["test_a.py::test_b"]
    assert [(f.path, f.function) for f in stuck.frames] == [("test_a.py", "test_b"), ("lib.py", "stuck")]
    assert stuck.line == 3 and "time was up" in stuck.message
    assert not result.complete and not result.green


def test_a_loop_in_c_that_holds_the_interpreter_lock_times_out(project, run, level):
    root = project({"test_a.py": "import itertools\ndef test_a(): sum(itertools.repeat(0))"})
    result = run(root, level=level, timeout_s=TIME_S)
    assert result.results["test_a.py::test_a"].outcome == "timeout"
    assert result.results["test_a.py::test_a"].frames[-1].function == "test_a"


def test_a_sleep_that_the_kill_interrupts_does_not_pass(project, run, level):
    """The signal that asks for the stack makes a sleep in C return early."""
    root = project({"test_a.py": "import ctypes\ndef test_a(): ctypes.PyDLL(None).sleep(1000)"})
    result = run(root, level=level, timeout_s=TIME_S)
    assert result.failing == ("test_a.py::test_a",)
    assert result.results["test_a.py::test_a"].outcome == "timeout"


def test_grandchildren_die_with_the_run(project, run, level):
    mark = unique("grandchild")
    root = project(
        {
            "test_a.py": f"""
                import os, subprocess, sys, time

                def test_a():
                    child = '''
                import subprocess, sys, time
                sleep = "import time; open('alive.txt', 'w').close(); time.sleep(600) # {mark}"
                subprocess.Popen([sys.executable, "-c", sleep], start_new_session=True)
                time.sleep(600)
                '''
                    subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
                    while not os.path.exists("alive.txt"):
                        time.sleep(0.02)

                def test_b():
                    time.sleep(600)
            """
        }
    )
    began = time.monotonic()
    assert run(root, level=level, timeout_s=TIME_S).failing == ("test_a.py::test_b",)
    assert time.monotonic() - began < TIME_S + 1.5
    assert wait_until_gone(mark) == []
    assert run(root, "test_a.py::test_a", level=level).green
    assert wait_until_gone(mark) == []


def test_cancel_kills_within_a_second(project, run, level):
    mark = unique("cancelled")
    root = project({f"test_{mark}.py": "import time\ndef test_a(): time.sleep(600)"})
    cancel = CancelToken()
    threading.Timer(1.0, cancel.cancel).start()
    began = time.monotonic()
    with pytest.raises(Cancelled):
        run(root, f"test_{mark}.py", level=level, timeout_s=60, cancel=cancel)
    assert time.monotonic() - began < 2
    assert wait_until_gone(mark) == []
    with pytest.raises(Cancelled):
        run(root, level=level, cancel=cancel)


@pytest.mark.parametrize(
    ("death", "reason"),
    [
        ("os._exit(0)", "exit status 0"),
        ("ctypes.string_at(0)", "signal 11"),
        ("os.abort()", "signal 6"),
        ("os.kill(os.getpid(), 9)", "signal 9"),
    ],
)
def test_a_crash_does_not_hide_the_other_tests(project, run, level, death, reason):
    root = project(
        {
            "lib.py": f"import ctypes, os\ndef die():\n    {death}\n",
            "test_a.py": """
                import lib
                def test_a(): pass
                def test_b(): lib.die()
                def test_c(): assert 0
            """,
        }
    )
    result = run(root, level=level)
    assert [r.outcome for r in result.results.values()] == ["passed", "crashed", "failed"]
    assert reason in result.results["test_a.py::test_b"].message
    assert result.complete and not result.green
    if "string_at" in death:  # faulthandler says where
        assert ("lib.py", "die") in [(f.path, f.function) for f in result.results["test_a.py::test_b"].frames]


def test_many_crashes_are_bounded(project, run):
    body = "import os, pytest\n@pytest.mark.parametrize('n', range(30))\ndef test_a(n): os._exit(1)"
    result = run(project({"test_a.py": body}))
    assert 5 <= len(result.results) < 30
    assert not result.complete


def test_a_crash_in_collection_does_not_hide_other_files(project, run):
    root = project({"test_a.py": "import os\nos._exit(0)", "test_b.py": "def test_b(): pass"})
    result = run(root)
    assert {n: r.outcome for n, r in result.results.items()} == {"test_a.py": "crashed", "test_b.py::test_b": "passed"}


def test_a_crash_at_exit_keeps_the_results(project, run):
    root = project({"test_a.py": "import atexit, os\natexit.register(os._exit, 7)\ndef test_a(): pass"})
    result = run(root)
    assert result.green


def test_an_exit_in_session_finish_is_no_proof(project, run):
    """Results without the end of the session: whatever came later is unknown."""
    root = project(
        {
            "conftest.py": "import os\ndef pytest_sessionstart(): os._exit(0)",
            "test_a.py": "def test_a(): pass",
        }
    )
    result = run(root)
    assert not result.green and result.error and not result.complete


def test_fork_bombs_are_bounded(project, run, sandboxed):
    root = project(
        {
            "test_a.py": """
                import os, time

                def test_a():
                    for _ in range(20):
                        try:
                            os.fork()
                        except OSError:
                            pass
                    time.sleep(60)
            """
        }
    )
    result = run(root, timeout_s=8)
    assert not result.green
    assert result.results["test_a.py::test_a"].outcome in ("crashed", "timeout", "failed")
    assert wait_until_gone(str(root)) == []


def test_memory_is_bounded(project, run):
    root = project({"test_a.py": "def test_a():\n    x = bytearray(1 << 45)\ndef test_b(): pass"})
    result = run(root)
    assert result.results["test_a.py::test_a"].exception == "MemoryError"
    assert result.results["test_a.py::test_b"].outcome == "passed"


def test_a_fork_that_runs_on_records_nothing(project, run, level):
    root = project(
        {
            "test_a.py": """
                import os
                def test_a():
                    if os.fork() == 0:
                        assert 0, "in the child"
                    os.wait()
                def test_b(): pass
            """
        }
    )
    result = run(root, level=level)
    assert result.green and len(result.results) == 2


PATCHES = {
    "print": "print('{}' * 1000); import sys; sys.stderr.write('passed')",
    "close": "import os; os.closerange(3, 1000)",
    "reuse": "import os; os.closerange(3, 1000); [open('mine%d.txt' % i, 'w') for i in range(40)]",
    "chdir": "import os; os.chdir('/')",
    "gone": "import os, shutil; os.mkdir('x'); os.chdir('x'); os.rmdir('../x')",
    "time": "import time; time.time = time.perf_counter = time.monotonic = lambda: 1 / 0",
    "json": "import json; json.dumps = json.loads = json.JSONEncoder.encode = json.JSONEncoder.iterencode = None",
    "open": "import builtins, os, io; builtins.open = os.open = os.write = os.fstat = os.getpid = io.open = None",
    "hash": "import hashlib; hashlib.blake2b = None",
    "environ": "import os; os.environ.clear()",
    "modules": "import sys; [sys.modules.pop(n) for n in list(sys.modules) if 'lsp_agent' in n]",
    "umask": "import os; os.umask(0o777)",
    "signals": "import signal; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 13, 15)]",
    "recursion": "import sys; sys.setrecursionlimit(120)",
    "threads": "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
}


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_the_plugin_outlives_what_tests_do(project, run, patch):
    root = project(
        {"test_a.py": f"def test_a():\n    {PATCHES[patch]}\ndef test_b(): pass\ndef test_c(): assert 1 == 2\n"}
    )
    breaks_pytest = patch in ("close", "reuse", "open", "json")  # its capturing, or what it does at its end
    result = run(root, pytest_args=("-s",) if breaks_pytest else ())
    outcomes = [r.outcome for r in result.results.values()]
    assert outcomes == ["passed", "passed", "failed"], (result.error, result.output)
    assert result.complete or breaks_pytest
    for path in root.glob("mine*.txt"):
        assert path.read_text() == ""


def test_a_breakdown_of_pytest_itself_is_said(project, run):
    """Its capturing writes to a closed descriptor: results so far stay, and the run proves nothing."""
    body = "def test_a(): import os; os.closerange(3, 1000)\ndef test_b(): pass"
    result = run(project({"test_a.py": body}))
    assert not result.green
    assert "Bad file descriptor" in result.error


def test_records_cannot_be_forged_by_writing_lines(project, run, level):
    """The events file is in reach of the tests; a line without the key's digest voids the run."""
    root = project(
        {
            "test_a.py": """
                import glob, os, sys

                def test_a():
                    places = [os.path.realpath("/proc/self/fd/" + n) for n in os.listdir("/proc/self/fd")]
                    events = [p for p in places if p.endswith("/events")]
                    assert events
                    lines = open(events[0]).read().splitlines()
                    with open(events[0], "a") as stream:
                        stream.write(lines[-1].replace("start", "finish") + "\\n")
                        stream.write('0 [99, "finish", {"nodeid": "test_a.py::test_b", "outcome": "passed"}]\\n')

                def test_b():
                    assert 0
            """
        }
    )
    result = run(root, level=level)
    assert not result.green
    assert "test_a.py::test_b" not in result.passing


def test_replayed_or_removed_records_void_the_run(project, run):
    root = project(
        {
            "test_a.py": """
                import os

                def test_a():
                    pass

                def test_b():
                    for n in os.listdir("/proc/self/fd"):
                        path = os.path.realpath("/proc/self/fd/" + n)
                        if path.endswith("/events"):
                            lines = open(path).readlines()
                            open(path, "w").writelines(lines[:-3])
                            break
                    else:
                        assert 0
            """
        }
    )
    assert not run(root).green


def test_the_key_is_not_in_reach_of_simple_means(project, run, level):
    root = project(
        {
            "test_a.py": """
                import os, re, sys

                def test_a():
                    assert os.read(0, 10) == b""
                    text = repr(dict(os.environ)) + repr(sys.argv) + open("/proc/self/environ").read()
                    text += open("/proc/self/cmdline").read()
                    assert not re.search("[0-9a-f]{40}", text)
                    plugin = sys.modules["lsp_agent_pytest"]
                    assert not [v for v in vars(plugin).values() if isinstance(v, bytes)]
                    assert not [p for p in sys.path if "lsp" in p and "plugin" in p]
                    assert "lsp" not in os.environ.get("PYTHONPATH", "")
            """
        }
    )
    result = run(root, level=level)
    assert result.green, result.results


def test_warnings_as_errors_and_unraisable_exceptions(project, run):
    root = project(
        {
            "pytest.ini": "[pytest]\nfilterwarnings = error\n",
            "test_a.py": """
                class Bad:
                    def __del__(self): raise ValueError("in del")
                def test_a():
                    Bad()
                def test_b(): pass
            """,
        }
    )
    result = run(root)
    assert result.results["test_a.py::test_b"].outcome == "passed"
    assert result.results["test_a.py::test_a"].outcome in ("failed", "error", "passed")
    assert result.complete


def test_nothing_is_left_in_the_systems_temporary_folder(project, run, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    run(project({"test_a.py": "def test_a(): pass"}))
    assert list(Path(tmp_path / "tmp").iterdir()) == []
