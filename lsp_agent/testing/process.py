"""Runs one child process with all its descendants, until it ends, its time is up, or it is cancelled."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from lsp_agent.cancel import CancelToken

POLL_S = 0.05
CENSUS_S = 0.25
MAX_PROCESSES = 512
DUMP_S = 0.15
"""How long a process has to write its stack before it is killed."""
DUMP_SIGNAL = signal.SIGRTMAX - 5 if hasattr(signal, "SIGRTMAX") else signal.SIGUSR2
"""Asks the plugin's faulthandler for the stack; a number that no test suite is likely to use."""
MARK = "LSP_AGENT_TEST_RUN"

End = Literal["exited", "timeout", "cancelled", "too many processes"]


@dataclass(frozen=True)
class Ended:
    """How the process ended."""

    how: End
    returncode: int
    """Negative: the signal that killed it."""
    seconds: float
    known: int | None = None
    """Bytes in the watched file when the time was up; what came later, the signal for the stack may have caused."""


def run_group(
    argv: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    stdin: bytes,
    output: Path,
    deadline: float,
    cancel: CancelToken,
    namespaced: bool,
    watched: Path,
) -> Ended:
    """Run `argv` in a session of its own; when this returns, none of its descendants is alive.

    `stdin` is written to a pipe; `output` takes stdout and stderr; `deadline` is on `time.monotonic`. `namespaced`:
    the command is bubblewrap with a process namespace, which dies as a whole. Otherwise descendants that left the
    process group are found by a variable in their environment.
    """
    began = time.monotonic()
    mark = f"{os.getpid()}.{time.monotonic_ns()}"
    info_read, info_write = os.pipe()
    if namespaced:
        argv = [argv[0], "--info-fd", str(info_write), *argv[1:]]
    try:
        with output.open("wb") as sink:
            process = subprocess.Popen(
                argv,
                cwd=cwd,
                env=environment if namespaced else {**environment, MARK: mark},
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(info_write,) if namespaced else (),
            )
    except BaseException:
        os.close(info_read)
        raise
    finally:
        os.close(info_write)
    group = _Namespace(process, info_read) if namespaced else _Group(process, info_read, mark)
    how: End = "exited"
    known: int | None = None
    next_census = began + CENSUS_S
    try:
        # A pipe that the child has drained cannot be read again; the thread is not held up by a child that hangs.
        threading.Thread(target=_feed, args=(process, stdin), daemon=True).start()
        with _pidfd(process.pid) as fd:
            while how == "exited" and not _ended(process, fd, min(POLL_S, max(deadline - time.monotonic(), 0.001))):
                now = time.monotonic()
                if cancel.cancelled:
                    how = "cancelled"
                elif now >= deadline:
                    how = "timeout"
                    known = watched.stat().st_size
                    group.dump()
                elif now >= next_census:
                    next_census = now + CENSUS_S
                    if group.census() > MAX_PROCESSES:
                        how = "too many processes"
    finally:
        group.kill()
    return Ended(how, process.returncode, time.monotonic() - began, known)


def _feed(process: subprocess.Popen[bytes], content: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError), process.stdin:
        process.stdin.write(content)


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int | None]:
    """Give a descriptor that becomes readable when the process ends, None where the system has none."""
    try:
        fd = os.pidfd_open(pid)
    except (AttributeError, OSError):
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _ended(process: subprocess.Popen[bytes], fd: int | None, seconds: float) -> bool:
    """Wait up to `seconds`; return whether the process has ended, at once when it does."""
    if fd is not None:
        return _readable(fd, seconds)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _readable(fd: int, seconds: float) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(max(1, int(seconds * 1000))))


class _Group:
    """A process group without a namespace: descendants are looked for."""

    def __init__(self, process: subprocess.Popen[bytes], info: int, mark: str = "") -> None:
        self.process, self.mark = process, mark
        self.info = info

    def census(self) -> int:
        """Return the number of descendants."""
        return len(self._descendants())

    def _descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        except psutil.Error:
            return []

    def dump(self) -> None:
        """Ask the interpreter for its stack."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(DUMP_SIGNAL)
        time.sleep(DUMP_S)

    def kill(self) -> None:
        """Kill the group, every descendant, and every process that carries the mark; then reap."""
        os.close(self.info)
        victims = self._descendants()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
        victims += [other for other in psutil.process_iter() if _carries(other, self.mark)]
        for victim in victims:
            with contextlib.suppress(psutil.Error):
                victim.kill()
        self.process.wait()


class _Namespace(_Group):
    """Bubblewrap: its first process inside takes all others along when it dies."""

    _init: int | None = None

    @property
    def init(self) -> int:
        """Pid of the namespace's first process, 0 when bubblewrap did not get that far."""
        if self._init is None:
            text = b""
            while _readable(self.info, 0) and (part := os.read(self.info, 4096)):
                text += part
            try:
                self._init = int(json.loads(text)["child-pid"])
            except (ValueError, KeyError):
                return 0
        return self._init

    def dump(self) -> None:
        """Ask the interpreter, the only child of the first process, for its stack."""
        with contextlib.suppress(psutil.Error, IndexError):
            psutil.Process(self.init).children()[0].send_signal(DUMP_SIGNAL)
        time.sleep(DUMP_S)

    def kill(self) -> None:
        """Kill the namespace and wait until its last process is gone: none may write to the tree any more."""
        init = self.init
        os.close(self.info)
        if init:
            with _pidfd(init) as fd, contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(init, signal.SIGKILL)
                if fd is not None:
                    _readable(fd, 5)
        else:
            self.process.kill()
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        return process.pid != os.getpid() and process.environ().get(MARK) == mark
    except (psutil.Error, OSError):
        return False
