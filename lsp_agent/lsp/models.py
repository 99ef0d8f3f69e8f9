"""The model behind the jobs: opened when a job first needs it, kept for the next, closed with the server."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from lsp_agent import engine
from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import ChatModel, Completion, Message, Sampling, Tier, TokenScore
from lsp_agent.errors import UserError

CHECK_AGAIN_S = 5.0


class Borrowed:
    """A `ChatModel` whose `close` leaves the model open for the next job."""

    def __init__(self, model: ChatModel) -> None:
        self._model = model
        self.file_tokens: tuple[str, str] | None = getattr(model, "file_tokens", None)

    @property
    def name(self) -> str:
        """As the model's."""
        return self._model.name

    @property
    def tier(self) -> Tier:
        """As the model's."""
        return self._model.tier

    @property
    def context_length(self) -> int:
        """As the model's."""
        return self._model.context_length

    def chat(
        self, messages: Sequence[Message], sampling: Sampling, cancel: CancelToken, n: int = 1
    ) -> list[Completion]:
        """As the model's."""
        return self._model.chat(messages, sampling, cancel, n)

    def infill(self, prefix: str, suffix: str, sampling: Sampling, cancel: CancelToken, n: int = 1) -> list[Completion]:
        """As the model's."""
        return self._model.infill(prefix, suffix, sampling, cancel, n)

    def score(self, text: str, cancel: CancelToken) -> list[TokenScore]:
        """As the model's."""
        return self._model.score(text, cancel)

    def close(self) -> None:
        """Leave the model to its owner."""


class Models:
    """The one model that is open, shared by the folders of a window. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: tuple[str | None, ChatModel] | None = None
        self._problems: dict[str | None, tuple[float, str | None]] = {}

    def open(self, name: str | None, cancel: CancelToken | None = None) -> ChatModel:
        """Open the model, or lend the one that is open; another name closes it. Raises as `engine.open_model`."""
        with self._lock:
            if self._open is not None and self._open[0] == name:
                return Borrowed(self._open[1])
            if self._open is not None:
                self._open[1].close()
                self._open = None
            model = engine.open_model(name, cancel)
            self._open = (name, model)
            return Borrowed(model)

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
        if name is None or not name.startswith(engine.SCRIPTED):
            try:
                from lsp_agent.engine.store import resolve

                resolve(name)
            except UserError as error:
                sentence = str(error)
        self._problems[name] = (time.monotonic(), sentence)
        return sentence

    def close(self) -> None:
        """Close the model; safe to call twice."""
        with self._lock:
            if self._open is not None:
                self._open[1].close()
                self._open = None
