"""A model lent to jobs that close what they are given, while its owner keeps it open for the next one."""

from __future__ import annotations

from collections.abc import Sequence

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import (
    DEFAULT_OPTIONS,
    ChatModel,
    ChatOptions,
    Completion,
    Message,
    Sampling,
    Tier,
    TokenScore,
    ToolSchema,
)


class Borrowed:
    """A `ChatModel` whose `close` leaves the model open for the next job."""

    def __init__(self, model: ChatModel) -> None:
        self._model = model

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

    @property
    def file_tokens(self) -> tuple[str, str] | None:
        """As the model's."""
        return self._model.file_tokens

    def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        cancel: CancelToken,
        n: int = 1,
        tools: Sequence[ToolSchema] = (),
        options: ChatOptions = DEFAULT_OPTIONS,
    ) -> list[Completion]:
        """As the model's."""
        return self._model.chat(messages, sampling, cancel, n, tools, options)

    def infill(
        self,
        prefix: str,
        suffix: str,
        sampling: Sampling,
        cancel: CancelToken,
        n: int = 1,
        options: ChatOptions = DEFAULT_OPTIONS,
    ) -> list[Completion]:
        """As the model's."""
        return self._model.infill(prefix, suffix, sampling, cancel, n, options)

    def score(self, text: str, cancel: CancelToken) -> list[TokenScore]:
        """As the model's."""
        return self._model.score(text, cancel)

    def close(self) -> None:
        """Leave the model to its owner."""
