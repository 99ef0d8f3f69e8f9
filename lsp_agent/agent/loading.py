"""Opens the model in a thread of its own, so that loading and the first test run overlap."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from lsp_agent.agent.deadline import Deadline
from lsp_agent.agent.request import OpenModel
from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import ChatModel
from lsp_agent.errors import Cancelled


class Loading:
    """A model that is being opened. As a context manager it closes the model, or stops loading it, at the end."""

    def __init__(self, open_model: OpenModel, name: str | None, cancel: CancelToken) -> None:
        self.seconds = 0.0
        self._stop = Deadline(cancel)
        self._model: ChatModel | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._load, args=(open_model, name), name="load model", daemon=True)

    def __enter__(self) -> Loading:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.cancel()
        self._thread.join()
        if self._model is not None:
            self._model.close()

    def raise_error(self) -> None:
        """Raise what opening the model raised, if it did already; never waits."""
        if self._error is not None:
            raise self._error

    def result(self) -> ChatModel:
        """Wait for the model. Raises what opening it raised, and `Cancelled`."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._model is None:
            raise Cancelled
        return self._model

    def _load(self, open_model: OpenModel, name: str | None) -> None:
        began = time.monotonic()
        try:
            self._model = open_model(name, self._stop)
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - began
