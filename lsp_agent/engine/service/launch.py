"""Reaching the user's engine: connect to it, or start it, detached, if it does not run."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, TypeVar

from lsp_agent.cancel import CancelToken
from lsp_agent.engine.service.runtime import About, Place
from lsp_agent.errors import Cancelled, ExitCode, UserError

MODULE = "lsp_agent.engine.service.process"
START_TIMEOUT_S = 180.0
"""For an engine without a model; another that is about to leave may have to finish first."""
POLL_S = 0.05

T = TypeVar("T")


def ensure(place: Place, cancel: CancelToken, options: Sequence[str] = ()) -> About:
    """The running engine, started with `options` if there is none. Raises `UserError` and `Cancelled`."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if (about := place.running()) is not None:
            return about
        cancel.raise_if_cancelled()
        if time.monotonic() > deadline:
            raise UserError(f"The engine did not start within {START_TIMEOUT_S:.0f} s; see {place.log}.")
        start(place, cancel, options)


def start(place: Place, cancel: CancelToken, options: Sequence[str] = ()) -> bool:
    """Start an engine process and wait until it listens; False when another one was first and listens already.

    Raises `UserError` when it ends before that.
    """
    from lsp_agent.engine.remote.backend import KEY_VARIABLE  # here, since the engine's process imports this module

    place.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # -P and a folder of its own: the user's current folder holds other people's code, and its `queue.py` or
    # `numpy/` must not be imported instead of the real one.
    command = [sys.executable, "-P", "-m", MODULE, *options]
    with os.fdopen(os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
        process = subprocess.Popen(
            command,
            cwd=place.folder,
            # It lives long, and has no use for the key of a model server.
            env={name: value for name, value in os.environ.items() if name != KEY_VARIABLE} | {**place.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            close_fds=True,
            **_detached(),
        )
    assert process.stdout is not None
    threading.Thread(target=process.wait, name="reap the engine", daemon=True).start()
    try:
        for line in until_cancelled(_lines(process.stdout), cancel, START_TIMEOUT_S):
            said = json.loads(line)
            if "error" in said:
                raise UserError(said["error"], ExitCode(said.get("exit_code", ExitCode.ENVIRONMENT)))
            return bool(said["ready"])
    except TimeoutError:
        process.kill()
        raise UserError(f"The engine did not start within {START_TIMEOUT_S:.0f} s; see {place.log}.") from None
    raise UserError(f"The engine ended while it started; see {place.log}.")


def _lines(pipe: IO[bytes]) -> Iterator[bytes]:
    """Read until the engine closes it; who reads closes it too, since closing from another thread would wait."""
    with pipe:
        yield from pipe


def _detached() -> dict[str, Any]:
    """It must survive whoever starts it, and Ctrl-C in their terminal."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def until_cancelled(items: Iterable[T], cancel: CancelToken, timeout: float) -> Iterator[T]:
    """Yield blocking `items`, which a thread takes. Raises `Cancelled`, and `TimeoutError` when none comes for long."""
    taken: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def take() -> None:
        end: BaseException = StopIteration()
        try:
            for item in items:
                taken.put((item, None))
        except BaseException as error:
            end = error
        taken.put((None, end))

    threading.Thread(target=take, name="read from the engine", daemon=True).start()
    waited = time.monotonic()
    while True:
        try:
            item, end = taken.get(timeout=POLL_S)
        except queue.Empty:
            if cancel.cancelled:
                raise Cancelled from None
            if time.monotonic() - waited > timeout:
                raise TimeoutError from None
            continue
        if isinstance(end, StopIteration):
            return
        if end is not None:
            raise end
        waited = time.monotonic()
        yield item  # type: ignore[misc]  # only the end is None


def wait_until(condition: Callable[[], bool], seconds: float, cancel: CancelToken | None = None) -> bool:
    """Whether the condition came to hold in time. Raises `Cancelled`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if cancel is not None:
            cancel.raise_if_cancelled()
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def gone(about: About) -> bool:
    """Whether the engine's process has ended."""
    return about.process is None
