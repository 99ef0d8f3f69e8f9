"""The small protocol between the agent and whatever runs the model.

The agent knows nothing of ONNX, HTTP or tokenizers: it sees a `ChatModel`. The engine's client implements it, and so
does the scripted model of the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypedDict

from lsp_agent.cancel import CancelToken

Tier = Literal["small", "medium", "large"]
"""What a model can be asked to do: small (up to 3B, fixed pipeline), medium (7 to 14B), large (tools, long horizon)."""


class Message(TypedDict):
    """One chat message; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. `temperature` 0 is greedy; the other filters apply in the order top-k, top-p, min-p."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of one request. `cached_tokens` of the `prompt_tokens` were not read again."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True)
class Completion:
    """One answer. `mean_logprob`: mean natural-log probability of its tokens under the model, before any filter."""

    text: str
    finish_reason: Literal["stop", "length", "cancelled"]
    usage: Usage = field(default_factory=Usage)
    mean_logprob: float | None = None


@dataclass(frozen=True)
class TokenScore:
    """One token of a scored text: characters [start, end) and its natural-log probability given all before it."""

    start: int
    end: int
    logprob: float


class ChatModel(Protocol):
    """A loaded model. Every call blocks its thread, and returns within one decode step of `cancel`.

    Raises `lsp_agent.errors.Cancelled` when cancelled and `UserError` when the model cannot answer (too long a
    prompt, an engine that died).
    """

    @property
    def name(self) -> str:
        """The model's short name, as in its manifest."""

    @property
    def tier(self) -> Tier:
        """The model's capability tier."""

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""

    @property
    def file_tokens(self) -> tuple[str, str] | None:
        """Special tokens in front of a repository's name and of each file's path; None: the model has none."""

    def chat(
        self, messages: Sequence[Message], sampling: Sampling, cancel: CancelToken, n: int = 1
    ) -> list[Completion]:
        """Answer a conversation `n` times."""

    def infill(self, prefix: str, suffix: str, sampling: Sampling, cancel: CancelToken, n: int = 1) -> list[Completion]:
        """Fill in the middle between `prefix` and `suffix`, `n` times.

        `prefix` may hold whole context files in front, written with the model's own file separators by
        `lsp_agent.agent.prompts`.
        """

    def score(self, text: str, cancel: CancelToken) -> list[TokenScore]:
        """Give each token of `text` its log probability; the first token, having no context, is left out."""

    def close(self) -> None:
        """Free the model; safe to call twice."""
