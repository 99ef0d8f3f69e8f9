"""Answers in the shapes of OpenAI's API.

What stands under `tool_calls.openai.OURS` is an addition of ours that other clients ignore: an answer's
`mean_logprob`, and what was wrong with calls that could not be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lsp_agent import __version__
from lsp_agent.chat_model import Completion, ToolCall
from lsp_agent.engine.api.logprobs import Shown, chat_logprobs, text_logprobs
from lsp_agent.engine.request import Timings
from lsp_agent.engine.tool_calls import Piece, call_to_openai, problem_to_openai
from lsp_agent.engine.tool_calls.openai import OURS

FINGERPRINT = f"lsp-agent-{__version__}"


def usage(timings: Sequence[Timings], completion_tokens: int) -> dict[str, Any]:
    """Write the token counts of a request, of one prompt or several."""
    prompt_tokens = sum(one.prompt_tokens for one in timings)
    accepted = sum(one.accepted_tokens for one in timings)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in timings)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(one.drafted_tokens for one in timings) - accepted,
        },
    }


class ChatChoices:
    """Writes the choices of one chat, in pieces or whole: pieces name the role first, and number an answer's calls."""

    def __init__(self, n: int, top: int) -> None:  # noqa: ARG002 - chats name the best tokens in any case
        self._calls: list[int | None] = [None] * n  # calls so far, once the answer has begun
        self._tokens: list[list[Shown]] = [[] for _ in range(n)]  # whose text was shown, not yet written

    def note(self, index: int, tokens: Sequence[Shown]) -> None:
        """Keep tokens for the next that is written of an answer."""
        self._tokens[index] += tokens

    def chunk(self, index: int, piece: Piece | Completion) -> dict[str, Any]:
        """Write more of an answer, or its end."""
        called = self._calls[index]
        delta: dict[str, Any] = {"role": "assistant"} if called is None else {}
        self._calls[index] = called = called or 0
        if isinstance(piece, Completion):
            delta |= _problems(piece)
        elif isinstance(piece, ToolCall):
            self._calls[index] = called + 1
            delta["tool_calls"] = [{"index": called, **call_to_openai(piece)}]
        else:
            delta["content"] = piece
        return {"index": index, "delta": delta, "logprobs": self._written(index), **_ending(piece)}

    def whole(self, index: int, answer: Completion) -> dict[str, Any]:
        """Write an answer."""
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None, **_problems(answer)}
        if answer.tool_calls:
            message |= {
                "content": answer.text or None,
                "tool_calls": [call_to_openai(call) for call in answer.tool_calls],
            }
        return {"index": index, "message": message, "logprobs": self._written(index), **_ending(answer)}

    def _written(self, index: int) -> dict[str, Any] | None:
        tokens, self._tokens[index] = self._tokens[index], []
        return chat_logprobs(tokens) if tokens else None


class TextChoices:
    """Writes the choices of `/v1/completions`, in pieces or whole; each may begin with its prompt (`echo`)."""

    def __init__(self, n: int, top: int) -> None:
        self._tokens: list[list[Shown]] = [[] for _ in range(n)]
        self._echoed: list[str] = [""] * n
        self._top = top

    def note(self, index: int, tokens: Sequence[Shown]) -> None:
        """Keep tokens for the next that is written of an answer."""
        self._tokens[index] += tokens

    def echo(self, index: int, prompt: str, tokens: Sequence[Shown]) -> None:
        """Let an answer begin with its prompt."""
        self._echoed[index] = prompt
        self.note(index, tokens)

    def chunk(self, index: int, piece: Piece | Completion) -> dict[str, Any]:
        """Write more of an answer, or its end."""
        return self._choice(index, piece if isinstance(piece, str) else "", piece)

    def whole(self, index: int, answer: Completion) -> dict[str, Any]:
        """Write an answer."""
        return self._choice(index, answer.text, answer)

    def _choice(self, index: int, text: str, piece: Piece | Completion) -> dict[str, Any]:
        echoed, self._echoed[index] = self._echoed[index], ""
        tokens, self._tokens[index] = self._tokens[index], []
        logprobs = text_logprobs(tokens, self._top) if tokens else None
        return {"index": index, "text": echoed + text, "logprobs": logprobs, **_ending(piece)}


def _ending(piece: Piece | Completion) -> dict[str, Any]:
    if not isinstance(piece, Completion):
        return {"finish_reason": None}
    ours = {} if piece.mean_logprob is None else {OURS: {"mean_logprob": piece.mean_logprob}}
    return {"finish_reason": piece.finish_reason, **ours}


def _problems(answer: Completion) -> dict[str, Any]:
    return {OURS: {"problems": [problem_to_openai(error) for error in answer.problems]}} if answer.problems else {}
