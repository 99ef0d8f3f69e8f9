"""One loaded model for many runs, each of which closes what it is given."""

from __future__ import annotations

from collections.abc import Sequence

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import ChatModel, Completion, Message, Sampling, Tier, TokenScore


class SharedModel:
    """Implements `ChatModel` over a model that stays open when this one is closed."""

    def __init__(self, model: ChatModel) -> None:
        self._model = model
        self.name: str = model.name
        self.tier: Tier = model.tier
        self.context_length: int = model.context_length
        self.file_tokens: tuple[str, str] | None = model.file_tokens

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
