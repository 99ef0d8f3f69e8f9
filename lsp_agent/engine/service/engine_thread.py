"""The one thread that computes: whoever asks, the models' work is done there, piece by piece."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from lsp_agent.engine.gpu.errors import GpuLost, explain
from lsp_agent.engine.service.residents import Resident
from lsp_agent.errors import EngineStopping, UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

QUIET_S = 1.0
"""After so long without work there is time to keep on disk what the next start can use."""


class EngineThread:
    """Gives each model's scheduler its turn, and sleeps when none has work. All methods are for any thread."""

    def __init__(self) -> None:
        self.broken: UserError | None = None
        """Why nothing can be computed any more; the process has to end."""
        self.residents: tuple[Resident, ...] = ()
        """Whose turn comes; replaced, never changed."""
        self._wake = threading.Event()
        self._calls: deque[tuple[concurrent.futures.Future[Any], Callable[[], Any]]] = deque()
        self._unremembered = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is work."""
        self._unremembered = True
        self._wake.set()

    def call(self, function: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Run `function` between two pieces of work."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._calls.append((future, function))
        self._wake.set()
        return future

    def told(self, error: Exception) -> Exception:
        """The error for who asked; a lost GPU breaks the thread."""
        told = explain(error) or error
        if isinstance(told, GpuLost):
            self.broken = self.broken or told
        return told

    def stop(self) -> None:
        """End after the piece of work that is under way."""
        self._ended = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._ended:
            self._wake.clear()
            self._run_calls()
            if not self._advance() and not self._wake.wait(QUIET_S if self._unremembered else None):
                self._remember()

    def _advance(self) -> bool:
        """Whether any model had work."""
        worked = False
        for resident in self.residents if self.broken is None else ():
            scheduler = resident.engine.scheduler
            try:
                worked |= scheduler.advance()
                self.broken = self.broken or scheduler.broken
            except Exception as error:  # no request's fault: those are told by their generations
                log.exception("the engine failed")
                self.broken = EngineStopping(f"The engine failed ({type(self.told(error)).__name__}); ask again.")
        return worked

    def _run_calls(self) -> None:
        while self._calls:
            future, function = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    def _remember(self) -> None:
        self._unremembered = False
        for resident in self.residents if self.broken is None else ():
            try:
                resident.engine.remember()
            except Exception as error:
                log.warning("cannot keep what the next start could use: %s", error)
                self.told(error)
