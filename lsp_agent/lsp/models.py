"""The models behind the jobs: opened when a job first needs one, kept for the next, closed with the server.

What is open here is a connection: the user's engine, which other windows share, or a model server has the memory.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from lsp_agent import models
from lsp_agent.borrowed import Borrowed
from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import ChatModel
from lsp_agent.errors import Cancelled, UserError

if TYPE_CHECKING:
    from lsp_agent.config import Backend

CHECK_AGAIN_S = 5.0
_POLL_S = 0.05


class Models:
    """The models that are open, shared by the folders of a window. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        """Held while a model loads, which takes seconds: closing must not wait for that."""
        self._open: dict[tuple[str | None, Backend | None], ChatModel] = {}
        self._closed = False
        self._problems: dict[str | None, tuple[float, str | None]] = {}

    def open(self, name: str | None, cancel: CancelToken | None = None, backend: Backend | None = None) -> ChatModel:
        """Lend a model, opening it if need be; closing what is lent leaves it open. Raises as `models.open_model`."""
        while not self._opening.acquire(timeout=_POLL_S):
            if cancel is not None:
                cancel.raise_if_cancelled()
        try:
            with self._lock:
                if self._closed:
                    raise Cancelled
                model = self._open.get((name, backend))
            if model is None:
                model = models.open_model(name, cancel, backend=backend)
                with self._lock:
                    if not self._closed:
                        self._open[name, backend] = model
                        return Borrowed(model)
                model.close()
                raise Cancelled
            return Borrowed(model)
        finally:
            self._opening.release()

    def problem(self, name: str | None, backend: Backend | None = None) -> str | None:
        """Why the model cannot be opened, as far as is known; asked again in the background when that is old."""
        if name is None and backend is not None:
            return None  # asking the server would take too long here; a job says what is wrong
        asked, sentence = self._problems.get(name, (float("-inf"), None))
        if time.monotonic() - asked > CHECK_AGAIN_S:
            self._problems[name] = (time.monotonic(), sentence)
            threading.Thread(target=self.check, args=(name,), name="check the model", daemon=True).start()
        return sentence

    def check(self, name: str | None, backend: Backend | None = None) -> str | None:
        """Find out whether the model can be opened; returns why not."""
        if name is None and backend is not None:
            return None
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
            opened, self._open = self._open, {}
        for model in opened.values():
            model.close()
