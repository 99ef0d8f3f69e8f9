"""The models behind the jobs: opened when a job first needs one, kept for the next, closed with the server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from lsp_agent import models
from lsp_agent.borrowed import Borrowed
from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import ChatModel
from lsp_agent.errors import Cancelled, UserError

CHECK_AGAIN_S = 5.0
_POLL_S = 0.05


@dataclass(eq=False)
class _Open:
    """A model and how many jobs have it."""

    name: str | None
    model: ChatModel
    borrowers: int = 0


class _Lent(Borrowed):
    """Gives the model back when it is closed."""

    def __init__(self, model: ChatModel, give_back: Callable[[], None]) -> None:
        super().__init__(model)
        self._give_back: Callable[[], None] | None = give_back

    def close(self) -> None:
        """Give the model back; safe to call twice."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


class Models:
    """The models that are open, shared by the folders of a window. Thread-safe.

    Each takes much memory, so only the one that was asked for last stays open without a job; another is closed as soon
    as no job has it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        """Held while a model loads, which takes seconds: the others' giving back must not wait for that."""
        self._open: list[_Open] = []
        """The one that was asked for last is the last."""
        self._closed = False
        self._problems: dict[str | None, tuple[float, str | None]] = {}

    def open(self, name: str | None, cancel: CancelToken | None = None) -> ChatModel:
        """Lend the model until it is closed, opening it if need be. Raises as `models.open_model`."""
        while not self._opening.acquire(timeout=_POLL_S):
            if cancel is not None:
                cancel.raise_if_cancelled()
        try:
            with self._lock:
                if self._closed:
                    raise Cancelled
                entry = next((entry for entry in self._open if entry.name == name), None)
                if entry is not None:
                    self._open.remove(entry)
                    self._open.append(entry)
                    entry.borrowers += 1  # before the idle ones are closed
                idle = self._take_idle(keep=None)
            _close(idle)  # first, so that two models need not fit into memory where one does
            if entry is None:
                entry = _Open(name, models.open_model(name, cancel), borrowers=1)
                with self._lock:
                    if self._closed:
                        entry.model.close()
                        raise Cancelled
                    self._open.append(entry)
            return _Lent(entry.model, lambda: self._give_back(entry))
        finally:
            self._opening.release()

    def _give_back(self, entry: _Open) -> None:
        with self._lock:
            entry.borrowers -= 1
            idle = self._take_idle(keep=self._open[-1] if self._open else None)
        _close(idle)

    def _take_idle(self, keep: _Open | None) -> list[_Open]:
        """Take out all but `keep` that no job has; the caller holds the lock and closes them."""
        idle = [entry for entry in self._open if entry.borrowers == 0 and entry is not keep]
        self._open = [entry for entry in self._open if entry not in idle]
        return idle

    def problem(self, name: str | None) -> str | None:
        """Why the model cannot be opened, as far as is known; asked again in the background when that is old."""
        asked, sentence = self._problems.get(name, (float("-inf"), None))
        if time.monotonic() - asked > CHECK_AGAIN_S:
            self._problems[name] = (time.monotonic(), sentence)
            threading.Thread(target=self.check, args=(name,), name="check the model", daemon=True).start()
        return sentence

    def check(self, name: str | None) -> str | None:
        """Find out whether the model can be opened; returns why not."""
        sentence = None
        if name is None or not name.startswith(models.SCRIPTED):
            try:
                from lsp_agent.models.store import resolve

                resolve(name)
            except UserError as error:
                sentence = str(error)
        self._problems[name] = (time.monotonic(), sentence)
        return sentence

    def close(self) -> None:
        """Close all models, also those that jobs have; safe to call twice."""
        with self._lock:
            self._closed = True
            entries, self._open = self._open, []
        _close(entries)


def _close(entries: list[_Open]) -> None:
    for entry in entries:
        entry.model.close()
