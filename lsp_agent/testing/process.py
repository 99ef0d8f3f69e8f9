"""Runs one child process with all its descendants, until it ends, its time is up, or it is cancelled."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from lsp_agent.cancel import CancelToken

POLL_S = 0.05
CENSUS_S = 0.5
MAX_PROCESSES = 512
MARK = "LSP_AGENT_TEST_RUN"

End = Literal["exited", "timeout", "cancelled", "too many processes"]


@dataclass(frozen=True)
class Ended:
    """How the process ended."""

    how: End
    returncode: int
    """Negative: the signal that killed it."""
    seconds: float


def run_group(
    argv: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    stdin: bytes,
    output: Path,
    deadline: float,
    cancel: CancelToken,
    mark: str = "",
) -> Ended:
    """Run `argv` in a session of its own and kill all that is left of it at the end.

    `stdin` is written to a pipe; `output` takes stdout and stderr; `deadline` is on
    `time.monotonic`. `mark` is the value of the environment variable `MARK` by which descendants that left the
    process group are found; empty inside a process namespace, which ends with its first process.
    """
    began = time.monotonic()
    environment = {**environment, MARK: mark} if mark else dict(environment)
    with output.open("wb") as sink:
        process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    how: End = "exited"
    next_census = began + CENSUS_S
    try:
        # A pipe that the child has drained cannot be read again, and a thread cannot be blocked by a child that hangs.
        threading.Thread(target=_feed, args=(process, stdin), daemon=True).start()
        with _waiter(process) as wait:
            while not wait(min(POLL_S, max(deadline - time.monotonic(), 0.001))):
                now = time.monotonic()
                if cancel.cancelled:
                    how = "cancelled"
                elif now >= deadline:
                    how = "timeout"
                elif now >= next_census:
                    next_census = now + CENSUS_S
                    if _census(process.pid) > MAX_PROCESSES:
                        how = "too many processes"
                if how != "exited":
                    break
    finally:
        kill_tree(process, mark)
    return Ended(how, process.returncode, time.monotonic() - began)


def _feed(process: subprocess.Popen[bytes], content: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError), process.stdin:
        process.stdin.write(content)


@contextlib.contextmanager
def _waiter(process: subprocess.Popen[bytes]) -> Iterator[Callable[[float], bool]]:
    """Give a function that waits some seconds and says whether the process has ended, at once when it does."""
    try:
        fd = os.pidfd_open(process.pid)
    except (AttributeError, OSError):

        def wait(seconds: float) -> bool:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                return False
            return True

        yield wait
        return
    try:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        yield lambda seconds: bool(poller.poll(max(1, int(seconds * 1000))))
    finally:
        os.close(fd)


def _census(pid: int) -> int:
    try:
        return len(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return 0


def kill_tree(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kill the group, every descendant, and every process that carries `mark`; then reap."""
    try:
        victims = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    except psutil.Error:
        victims = []
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.poll() is None:
        process.kill()
    if mark:
        victims += [other for other in psutil.process_iter() if _carries(other, mark)]
    for victim in victims:
        with contextlib.suppress(psutil.Error):
            victim.kill()
    process.wait()


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        return process.pid != os.getpid() and process.environ().get(MARK) == mark
    except (psutil.Error, OSError):
        return False
