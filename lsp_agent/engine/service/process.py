"""The engine's own process, one for each user and machine; `launch` starts it, `docs/service.md` tells its life.

Of several that start at once the one that gets the lock is the engine, and the others leave. One JSON line on standard
output says `{"ready": true}`, `{"ready": false}` (another engine listens already) or `{"error": sentence}`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from lsp_agent import __version__
from lsp_agent.engine.service.launch import START_TIMEOUT_S, wait_until
from lsp_agent.engine.service.logs import log_to
from lsp_agent.engine.service.runtime import HAS_UNIX_SOCKETS, OVERRIDE, About, Place, place, write_private
from lsp_agent.errors import ExitCode, UserError

if TYPE_CHECKING:
    import uvicorn

    from lsp_agent.engine.api.server import EngineServer
    from lsp_agent.engine.service.host import EngineHost

IDLE = "LSP_AGENT_ENGINE_IDLE_SECONDS"
IDLE_SECONDS = 600.0
"""An engine that nobody asked anything for so long gives its memory back; the next request starts it again."""
DRAIN_S = 600.0
"""The longest answer that is waited for when the engine is asked to leave."""
CLOSE_S = 20.0
"""How long writing to disk what the next start can use may take."""
BROKEN_S = 2.0
"""How long clients may take to read that the GPU was lost."""

log = logging.getLogger("lsp_agent.engine")
Say = Callable[[dict[str, object]], None]


def main(arguments: list[str] | None = None, *, foreground: bool = False) -> None:
    """Be the engine until it is idle or stopped."""
    options = _options(arguments)
    say = _nothing if foreground else _messages()
    try:
        idle_seconds = seconds_of(IDLE, IDLE_SECONDS)
        here = place()
        lock = _lock(here)
        if lock is None:
            if foreground:
                raise UserError("An engine runs already; end it with `lsp-agent engine stop`.")
            say({"ready": False})
            return
        with lock:
            here.clear()  # what a killed engine left
            log_to(here.log, console=foreground)
            _replace_older(here)
            try:
                code = _be_engine(here, options, idle_seconds, say)
            finally:
                here.clear()
            log.info("the engine ends")
            logging.shutdown()
            lock.release()
            # What computes, or is left of CUDA after an error, may hang while it is torn down.
            os._exit(code)
    except UserError as error:
        if foreground:
            raise
        say({"error": str(error), "exit_code": int(error.exit_code)})
        sys.exit(error.exit_code)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lsp-agent engine process")
    parser.add_argument("--tcp", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--default", metavar="MODEL")
    parser.add_argument("--load", action="store_true", help="load the default at once")
    parser.add_argument("--package", action="append", default=[], metavar="NAME=PATH")
    return parser.parse_args(arguments)


def seconds_of(variable: str, default: float) -> float:
    """The seconds that an environment variable says. Raises `UserError`."""
    text = os.environ.get(variable, "")
    try:
        seconds = float(text) if text else default
    except ValueError as error:
        raise UserError(f"{variable} is not a number of seconds: {text!r}.", ExitCode.USAGE) from error
    if not seconds > 0:  # nor what is not a number
        raise UserError(f"{variable} must be more than 0 seconds, not {text!r}.", ExitCode.USAGE)
    return seconds


def _lock(here: Place) -> FileLock | None:
    """The lock; None when another engine has it and listens. One that is about to leave is waited for."""
    lock = FileLock(here.lock, mode=0o600, thread_local=False)

    def decided() -> bool:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return here.running() is not None
        return True

    if not wait_until(decided, START_TIMEOUT_S):
        raise UserError(f"Another engine neither answers nor ends; see {here.log}, and end it.")
    return lock if lock.is_locked else None


def _replace_older(here: Place) -> None:
    """Have engines of older versions finish what they do and leave. (Newer ones stay: both would restart for ever.)"""
    for other in here.others():
        process = other.process
        if _numbers(other.version) < _numbers(__version__) and process is not None:
            log.info("asking the engine of version %s to leave", other.version)
            process.terminate()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split("."))


def _be_engine(here: Place, options: argparse.Namespace, idle_seconds: float, say: Say) -> int:
    from lsp_agent.engine.api.server import EngineServer
    from lsp_agent.engine.service import control
    from lsp_agent.engine.service.catalog import Catalog
    from lsp_agent.engine.service.host import EngineHost

    catalog = Catalog(options.context, options.default)
    for named in options.package:
        name, _, path = named.partition("=")
        catalog.add(name, Path(path).absolute())

    async def run() -> int:
        host = EngineHost(catalog, threads=options.threads)
        _take_signals(host)  # before anybody can find us, and end us
        with contextlib.ExitStack() as open_ones:
            listeners = {}
            port = options.tcp if HAS_UNIX_SOCKETS else options.tcp or 0
            if port is not None:
                listeners["port"] = open_ones.enter_context(contextlib.closing(_listen_on(port)))
                port = listeners["port"].getsockname()[1]
            if HAS_UNIX_SOCKETS:
                listeners["socket"] = open_ones.enter_context(contextlib.closing(_listen_at(here.socket)))
            about = About.mine(here.scope, port or 0)
            server = EngineServer(host, routes=control.routes(host, here, about))
            serving = _Serving(host, server, idle_seconds)
            if "socket" in listeners:
                serving.add(server.app, listeners["socket"])
            if "port" in listeners:
                token = secrets.token_urlsafe(32)
                write_private(here.token, token)
                serving.add(server.guarded(token), listeners["port"])
            here.write_about(about)
            say({"ready": True})
            log.info("engine %s of version %s listens", about.pid, __version__)
            loading = asyncio.create_task(_load_default(host)) if options.load else None
            code = await serving.run()
            del loading  # until here, so that it lives as long as it is needed
            return code

    # Not `asyncio.run`, which would end what is unfinished with answers of its own: connections that break are clear.
    return asyncio.new_event_loop().run_until_complete(run())


async def _load_default(host: EngineHost) -> None:
    try:
        await host.engine()
    except UserError as error:
        log.error("%s", error)
    except Exception:
        log.exception("the default model cannot be loaded")


class _Serving:
    """Serves until the host is to leave, is broken, or was idle for long."""

    def __init__(self, host: EngineHost, server: EngineServer, idle_seconds: float) -> None:
        self._host, self._server, self._idle_seconds = host, server, idle_seconds
        self._listening: list[tuple[uvicorn.Server, socket.socket]] = []

    def add(self, app: Any, listener: socket.socket) -> None:
        """Serve `app` there, too."""
        import uvicorn

        from lsp_agent.engine.api.server import uvicorn_config

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # ours are enough

        self._listening.append((Server(uvicorn_config(app)), listener))

    async def run(self) -> int:
        """Serve; returns the process's exit code."""
        tasks = [asyncio.create_task(http.serve(sockets=[listener])) for http, listener in self._listening]
        pause = min(0.2, self._idle_seconds / 4)
        while not (reason := self._reason()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._host.left.wait(), pause)
        log.info("%s", reason)
        self._host.leave()
        await self._finish()
        if not self._host.leaving_now:
            for http, _ in self._listening:
                http.should_exit = True
            await asyncio.wait(tasks, timeout=BROKEN_S)
            if self._host.broken is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._host.close(), CLOSE_S)
        return ExitCode.ENVIRONMENT if self._host.broken else ExitCode.OK

    def _reason(self) -> str:
        if self._host.broken is not None:
            return f"leaving: {self._host.broken}"
        if self._host.stopping:
            return "leaving, as asked"
        used = max(self._host.last_used, self._server.last_used)
        return "" if self._busy or time.monotonic() - used < self._idle_seconds else "leaving, being idle"

    @property
    def _busy(self) -> bool:
        return self._host.busy or bool(self._server.busy)

    async def _finish(self) -> None:
        """Until what was asked is answered."""
        deadline = time.monotonic() + (BROKEN_S if self._host.broken else DRAIN_S)
        while self._busy and not self._host.leaving_now and time.monotonic() < deadline:
            await asyncio.sleep(0.02)


def _take_signals(host: EngineHost) -> None:
    """The first asks to finish and leave, the second to leave."""
    loop = asyncio.get_running_loop()
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            with contextlib.suppress(NotImplementedError):  # Windows
                loop.add_signal_handler(getattr(signal, name), lambda: host.leave(now=host.stopping))


def _listen_at(path: Path) -> socket.socket:
    os.umask(0o177)  # the socket is the user's only, whatever folder it is in
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise UserError(
            f"There can be no socket {path} ({error.strerror}); set {OVERRIDE} to another folder."
        ) from error
    finally:
        os.umask(0o077)
    listener.listen(128)
    return listener


def _listen_on(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if sys.platform != "win32":  # there it would let somebody else take the port over
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"The port {port} cannot be used ({error.strerror}); choose another.", ExitCode.USAGE
        ) from error
    listener.listen(128)
    return listener


def _messages() -> Say:
    """What tells who started us, once; all else that is printed goes to the log."""
    pipe = os.dup(1)
    os.dup2(2, 1)

    def say(message: dict[str, object]) -> None:
        with contextlib.suppress(BrokenPipeError):  # they are gone
            os.write(pipe, (json.dumps(message) + "\n").encode())
        os.close(pipe)

    return say


def _nothing(message: dict[str, object]) -> None:
    """In the foreground nobody waits for messages."""


if __name__ == "__main__":
    main()
