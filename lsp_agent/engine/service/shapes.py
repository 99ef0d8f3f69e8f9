"""Answers in the shapes of OpenAI's API.

`mean_logprob`, and what `tool_calls.openai.OURS` names, are additions of ours that other clients ignore.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lsp_agent.chat_model import Completion, TokenScore, ToolCall, ToolCallError, Usage
from lsp_agent.engine.tool_calls import (
    Piece,
    call_from_openai,
    call_to_openai,
    problem_from_openai,
    problem_to_openai,
)
from lsp_agent.engine.tool_calls.openai import OURS


def usage(total: Usage) -> dict[str, Any]:
    """Write a request's token counts."""
    return {
        "prompt_tokens": total.prompt_tokens,
        "completion_tokens": total.completion_tokens,
        "total_tokens": total.prompt_tokens + total.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": total.cached_tokens},
    }


def text_choice(index: int, answer: Completion) -> dict[str, Any]:
    """Write one answer of `/v1/completions`."""
    return {"index": index, "text": answer.text, **_ending(answer)}


def score_choice(prompt: str, scores: list[TokenScore]) -> dict[str, Any]:
    """Write the log probabilities of a text's tokens."""
    logprobs = {
        "tokens": [prompt[score.start : score.end] for score in scores],
        "text_offset": [score.start for score in scores],
        "token_logprobs": [score.logprob for score in scores],
    }
    return {"index": 0, "text": prompt, "finish_reason": "stop", "logprobs": logprobs}


def chat_choice(index: int, answer: Completion) -> dict[str, Any]:
    """Write one answer of `/v1/chat/completions`."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, **_problems(answer)}
    if answer.tool_calls:
        message |= {
            "content": answer.text or None,
            "tool_calls": [call_to_openai(call) for call in answer.tool_calls],
        }
    return {"index": index, "message": message, **_ending(answer)}


class ChatChunks:
    """Writes the choices of one streamed chat: they name the role first, and number the calls of each answer."""

    def __init__(self) -> None:
        self._calls: dict[int, int] = {}

    def choice(self, index: int, piece: Piece | Completion) -> dict[str, Any]:
        """Write more of an answer, or its end."""
        first = index not in self._calls
        called = self._calls.setdefault(index, 0)
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if isinstance(piece, Completion):
            return {"index": index, "delta": {**delta, **_problems(piece)}, **_ending(piece)}
        if isinstance(piece, ToolCall):
            self._calls[index] = called + 1
            delta["tool_calls"] = [{"index": called, **call_to_openai(piece)}]
        else:
            delta["content"] = piece
        return {"index": index, "delta": delta, "finish_reason": None}


def _ending(answer: Completion) -> dict[str, Any]:
    return {"finish_reason": answer.finish_reason, "logprobs": {"mean_logprob": answer.mean_logprob}}


def _problems(answer: Completion) -> dict[str, Any]:
    return {OURS: {"problems": [problem_to_openai(error) for error in answer.problems]}} if answer.problems else {}


def completions(answer: Mapping[str, Any]) -> list[Completion]:
    """Read the answers of a whole response; the usage of the request goes to the first, so that sums are right."""
    counted = answer["usage"]
    total = Usage(
        counted["prompt_tokens"], counted["prompt_tokens_details"]["cached_tokens"], counted["completion_tokens"]
    )
    return [_completion(choice, total if number == 0 else Usage()) for number, choice in enumerate(answer["choices"])]


def _completion(choice: Mapping[str, Any], total: Usage) -> Completion:
    message = choice.get("message") or {"content": choice.get("text")}
    problems: list[ToolCallError] = [problem_from_openai(error) for error in message.get(OURS, {}).get("problems", ())]
    return Completion(
        message["content"] or "",
        choice["finish_reason"],
        total,
        choice["logprobs"]["mean_logprob"],
        tuple(call_from_openai(call) for call in message.get("tool_calls") or ()),
        tuple(problems),
    )
