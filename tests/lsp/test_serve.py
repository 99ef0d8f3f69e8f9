"""The server as a process: startup, weight, shutdown, death of the editor."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from editor_client import EditorClient, check_time, patience

HEAVY = ("numpy", "transformers", "onnxruntime", "onnx", "torch", "gguf", "tokenizers", "huggingface_hub")
SLEEPY_TEST = """import subprocess, sys, time


def test_sleeps():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    time.sleep(300)
"""


def test_the_server_is_up_quickly_and_stays_light(project: Path) -> None:
    busy = []

    def start() -> float:
        with EditorClient(project) as editor:
            spent = psutil.Process(editor.process.pid).cpu_times()
            busy.append(spent.user + spent.system)
            return editor.startup_s

    check_time(start, 1.0)
    assert min(busy) < patience(1.0), "processor time, which other work slows less"
    with EditorClient(project) as editor:
        editor.open("calc.py")
        editor.run("lspAgent.runTests")
        editor.message("1 of 2 tests failed")
        resident = psutil.Process(editor.process.pid).memory_info().rss
    assert resident < 150 << 20, f"{resident >> 20} MiB"


def test_nothing_heavy_is_imported_by_anything_the_server_runs() -> None:
    code = (
        "import sys, lsp_agent.lsp.server, lsp_agent.lsp.opening, lsp_agent.lsp.fix_job, lsp_agent.lsp.undo_job,"
        "lsp_agent.config, lsp_agent.models.store, lsp_agent.engine.service.client, lsp_agent.workspace.watcher;"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _children_with(process: psutil.Process, part: str) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        try:
            if part in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            pass
    return found


def _wait(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + patience(seconds)
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def sleepy(project: Path) -> Path:
    (project / "test_sleepy.py").write_text(SLEEPY_TEST)
    return project


def sleeping_editor(root: Path) -> tuple[EditorClient, list[psutil.Process]]:
    """An editor whose server is in the middle of a test run that has a child of its own."""
    editor = EditorClient(root)
    editor.run("lspAgent.runTests")
    server = psutil.Process(editor.process.pid)
    assert _wait(lambda: _children_with(server, "time.sleep(300)"), 30), "the test never started"
    return editor, server.children(recursive=True)


def all_gone(processes: list[psutil.Process]) -> bool:
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


def test_the_end_of_standard_input_ends_the_server_and_its_tests(sleepy: Path) -> None:
    editor, children = sleeping_editor(sleepy)
    assert editor.process.stdin is not None
    editor.process.stdin.close()
    assert editor.process.wait(patience(5)) == 1
    assert _wait(lambda: all_gone(children), 3)
    assert list((sleepy).glob(".lsp-agent*")) == []


def test_shutdown_cancels_a_running_job(sleepy: Path) -> None:
    editor, children = sleeping_editor(sleepy)
    began = time.monotonic()
    editor.request("shutdown", None)
    editor.notify("exit", None)
    assert editor.process.wait(patience(5)) == 0
    assert time.monotonic() - began < patience(4)
    assert _wait(lambda: all_gone(children), 2)


def test_exit_without_shutdown_is_an_error_code(project: Path) -> None:
    editor = EditorClient(project)
    editor.notify("exit", None)
    assert editor.process.wait(patience(5)) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_server_and_its_tests(sleepy: Path, number: signal.Signals) -> None:
    editor, children = sleeping_editor(sleepy)
    editor.process.send_signal(number)
    assert editor.process.wait(patience(5)) == 128 + number
    assert _wait(lambda: all_gone(children), 3)


def test_a_signal_that_comes_while_the_server_holds_a_lock_ends_it_too(project: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, time\n"
        "from lsp_agent.lsp.jobs import JobSlot\n"
        "def start(slot, *_arguments, **_options):\n"
        "    with slot._lock:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.2)\n"
        "JobSlot.start = start\n"
    )
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    editor = EditorClient(project, environment=environment)
    try:
        command = {"command": "lspAgent.runTests", "arguments": [{"folder": project.as_uri()}]}
        editor._send({"id": 1000, "method": "workspace/executeCommand", "params": command})
        assert editor.process.wait(patience(10)) == 128 + signal.SIGTERM
    finally:
        editor.kill()


def test_kill_9_leaves_no_test_running(sleepy: Path) -> None:
    editor, children = sleeping_editor(sleepy)
    editor.kill()
    assert _wait(lambda: all_gone(children), 5)


def test_the_crash_of_the_editor_ends_the_server_even_when_the_pipe_stays_open(project: Path, tmp_path: Path) -> None:
    """The editor's other child inherits the pipe, so that standard input never ends."""
    script = tmp_path / "crashing_editor.py"
    script.write_text(
        f"""import json, os, subprocess, sys, time
r, w = os.pipe()
os.set_inheritable(w, True)
server = subprocess.Popen([sys.executable, "-m", "lsp_agent", "serve"], stdin=r, stdout=subprocess.PIPE)
keeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False,
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
def send(message):
    body = json.dumps({{"jsonrpc": "2.0", **message}}).encode()
    os.write(w, b"Content-Length: %d\\r\\n\\r\\n" % len(body) + body)
params = {{"processId": os.getpid(), "rootUri": {project.as_uri()!r}, "capabilities": {{}}}}
send({{"id": 1, "method": "initialize", "params": params}})
server.stdout.readline()
send({{"method": "initialized", "params": {{}}}})
time.sleep(1.5)
print(server.pid, keeper.pid, flush=True)
os._exit(1)
"""
    )
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, timeout=30, check=False)
    server, keeper = (psutil.Process(int(pid)) for pid in done.stdout.split())
    try:
        assert _wait(lambda: all_gone([server]), 8)
    finally:
        keeper.kill()
        if server.is_running():
            server.kill()


def test_loopback_tcp_serves_one_client(project: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "lsp_agent", "serve", "--tcp", str(port)], stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        assert b"127.0.0.1" in process.stderr.readline()
        listening = [c for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN]
        assert [c.laddr.ip for c in listening] == ["127.0.0.1"]
        connection = socket.create_connection(("127.0.0.1", port), timeout=5)
        params = b'{"processId":null,"rootUri":null,"capabilities":{}}'
        body = b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":' + params + b"}"
        connection.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert connection.recv(100).startswith(b"Content-Length:")
        connection.close()
        assert process.wait(10) in (0, 1)
    finally:
        process.kill()
        process.wait()


def test_logs_hold_no_file_contents(project: Path) -> None:
    secret = "s3cr3t_in_a_buffer"
    with EditorClient(project, "--log-level", "debug") as editor:
        editor.open("calc.py", f"{secret} = 1\n")
        # A message that pygls complains about, contents and all.
        editor.notify("textDocument/didChange", {"textDocument": {"uri": secret}, "contentChanges": secret})
        editor.run("lspAgent.runTests")
        editor.message("failed")
    assert secret.encode() not in editor.stderr
    assert editor.stderr, "the log should say something at level debug"


def test_prints_of_libraries_cannot_break_the_protocol(project: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    (tmp_path / "sitecustomize.py").write_text(
        "import threading, time, os, pathlib, sys\n"
        "def noise():\n"
        f"    while not pathlib.Path({str(start)!r}).exists(): time.sleep(0.01)\n"
        "    for _ in range(100): os.write(1, b'noise'); time.sleep(0.01)\n"
        "threading.Thread(target=noise, daemon=True).start()\n"
    )
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    with EditorClient(project, environment=environment) as editor:
        start.touch()
        for _ in range(20):
            editor.open("calc.py")
            assert editor.actions("calc.py")
            time.sleep(0.05)
    assert b"noise" in editor.stderr
