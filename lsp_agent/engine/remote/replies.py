"""Answers of OpenAI-compatible servers, read with all the ways in which they differ."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from lsp_agent.chat_model import Completion, TokenScore, ToolCall, ToolCallError, ToolSchema, Usage
from lsp_agent.engine.tool_calls import (
    AnswerReader,
    call_from_openai,
    new_parser,
    problem_from_openai,
)
from lsp_agent.engine.tool_calls.openai import OURS

Finish = Literal["stop", "length", "tool_calls", "cancelled"]

_REASONING = re.compile(r"\A\s*<think>.*?(</think>\s*|\Z)", re.DOTALL)
_MEANT: dict[str, Finish] = {"length": "length", "max_tokens": "length", "limit": "length", "tool_calls": "tool_calls"}


class UnreadableAnswerError(ValueError):
    """The answer has not the API's shape."""


def completions(answer: Any, tools: Sequence[ToolSchema] = ()) -> list[Completion]:
    """Read a whole response; the request's usage goes to the first answer, so that sums are right.

    `tools`: what another server's model was offered; its calls are checked against them, and read from the text where
    the server left them there. Raises `UnreadableAnswerError`.
    """
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice.get("index") or 0)
        total = usage(answer)
        return [_completion(choice, total if number == 0 else Usage(), tools) for number, choice in enumerate(choices)]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UnreadableAnswerError(f"{type(error).__name__}: {error}") from error


def llama_infill(answer: Any) -> list[Completion]:
    """Read an answer of llama.cpp's `/infill`, which has a shape of its own. Raises `UnreadableAnswerError`."""
    try:
        found = []
        for entry in answer if isinstance(answer, list) else [answer]:
            cached = (entry.get("timings") or {}).get("cache_n") or 0
            counted = Usage(entry.get("tokens_evaluated") or 0, cached, entry.get("tokens_predicted") or 0)
            found.append(Completion(entry["content"], _MEANT.get(entry.get("stop_type") or "", "stop"), counted))
        return found
    except (LookupError, TypeError, AttributeError) as error:
        raise UnreadableAnswerError(f"{type(error).__name__}: {error}") from error


def cut(answer: Completion, ends: Iterable[str]) -> Completion:
    """End an answer before the first of `ends`, for servers that do not heed all stop texts."""
    at = min((found for end in ends if (found := answer.text.find(end)) >= 0), default=-1)
    return answer if at < 0 else replace(answer, text=answer.text[:at], finish_reason="stop")


def model_names(listed: Any) -> list[str]:
    """The models that `/v1/models` lists; none where it lists nothing readable."""
    return [str(entry["id"]) for entry in model_entries(listed)]


def model_entries(listed: Any) -> list[Mapping[str, Any]]:
    """The entries of `/v1/models`, each with an `id`."""
    entries = listed.get("data") if isinstance(listed, Mapping) else None
    return [entry for entry in entries or () if isinstance(entry, Mapping) and entry.get("id")]


def usage(answer: Mapping[str, Any]) -> Usage:
    """Read the token counts; what a server does not count is 0."""
    counted = answer.get("usage") or {}
    details = counted.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens")
    if cached is None:
        cached = counted.get("prompt_cache_hit_tokens") or (answer.get("timings") or {}).get("cache_n")
    return Usage(counted.get("prompt_tokens") or 0, cached or 0, counted.get("completion_tokens") or 0)


def _completion(choice: Mapping[str, Any], total: Usage, tools: Sequence[ToolSchema]) -> Completion:
    message = choice.get("message")
    plain = message is None
    if message is None:
        message = {"content": choice["text"]}
    ours = {**(choice.get(OURS) or {}), **(message.get(OURS) or {})}
    text = message.get("content") or ""
    if not isinstance(text, str):  # a list of parts
        text = "".join(part.get("text") or "" for part in text)
    if not plain and not ours:
        text = _REASONING.sub("", text)
    calls = tuple(_call(entry, () if ours else tools) for entry in message.get("tool_calls") or ())
    problems: list[ToolCallError] = [problem_from_openai(error) for error in ours.get("problems", ())]
    finish = _MEANT.get(choice.get("finish_reason") or "", "stop")
    if tools and not calls and not ours:
        reader = AnswerReader(new_parser("qwen3_coder" if "<function=" in text else "hermes", tools))
        reader.feed(text)
        reader.close(finish == "length")
        return reader.completion(finish == "length", total, None)
    if calls and finish == "stop":
        finish = "tool_calls"
    return Completion(text, finish, total, ours.get("mean_logprob"), calls, tuple(problems))


def _call(entry: Mapping[str, Any], tools: Sequence[ToolSchema]) -> ToolCall:
    if not entry.get("id"):
        entry = {**entry, "id": f"call_{uuid.uuid4().hex[:24]}"}
    return call_from_openai(entry, tools or None)


def scores(answer: Any, text: str) -> list[TokenScore] | None:
    """Read the log probabilities of a text's tokens; None where the server sent none for the text.

    Tokens are placed by their own text. Those that hold part of a character share the place up to the next that fits.
    """
    try:
        scored = answer["choices"][0]["logprobs"]
        tokens: list[str] = scored["tokens"]
        values: list[float | None] = scored["token_logprobs"]
        if len(tokens) != len(values) or not all(isinstance(token, str) for token in tokens):
            return None
        if not all(isinstance(value, int | float | None) for value in values):
            return None
    except (LookupError, TypeError):
        return None
    if not text.startswith(tokens[0] if tokens else "\0") and not (values and values[0] is None):
        return None  # the tokens of an answer, not of the text
    return list(_placed(zip(tokens, values, strict=True), text))


def _placed(tokens: Iterable[tuple[str, float | None]], text: str) -> Iterable[TokenScore]:
    at, lost = 0, 0.0
    pending = False
    for token, value in tokens:
        found = text.find(token, at, at + len(token) + 8) if token and "\ufffd" not in token else -1
        if found < 0:
            pending, lost = True, lost + (value or 0.0)
            continue
        if pending and found > at:
            yield TokenScore(at, found, lost)
        pending, lost = False, 0.0
        at = found + len(token)
        if value is not None:
            yield TokenScore(found, at, value)


class Collected:
    """A stream's chunks put together into what the server would have answered without streaming."""

    def __init__(self) -> None:
        self._choices: dict[int, dict[str, Any]] = {}
        self._rest: dict[str, Any] = {}
        self._error: Any = None
        self.status = 200

    def add(self, chunk: Any) -> None:
        """Take in one chunk; one that is an error ends the answer with that."""
        if not isinstance(chunk, Mapping):
            return
        if chunk.get("error"):
            self._error = chunk
            code = chunk["error"].get("code") if isinstance(chunk["error"], Mapping) else None
            self.status = code if isinstance(code, int) and code >= 400 else 500
            return
        for key in ("usage", "timings", "model"):
            if chunk.get(key):
                self._rest[key] = chunk[key]
        for choice in chunk.get("choices") or ():
            self._add_choice(choice)

    def _add_choice(self, choice: Mapping[str, Any]) -> None:
        index = choice.get("index") or 0
        whole = self._choices.setdefault(index, {"index": index, "finish_reason": None})
        for key in ("finish_reason", OURS):
            if choice.get(key):
                whole[key] = choice[key]
        if "delta" not in choice:
            whole["text"] = whole.get("text", "") + (choice.get("text") or "")
            return
        delta = choice["delta"] or {}
        message = whole.setdefault("message", {"role": "assistant", "content": "", "tool_calls": []})
        message["content"] += delta.get("content") or ""
        if delta.get(OURS):
            message[OURS] = delta[OURS]
        for part in delta.get("tool_calls") or ():
            _add_call(message["tool_calls"], part)

    @property
    def complete(self) -> bool:
        """Whether every answer came to its end."""
        ended = bool(self._choices) and all(choice["finish_reason"] for choice in self._choices.values())
        return ended or self._error is not None

    @property
    def body(self) -> Any:
        """The whole answer, or the error."""
        if self._error is not None:
            return self._error
        return {**self._rest, "choices": list(self._choices.values())}


def _add_call(calls: list[dict[str, Any]], part: Mapping[str, Any]) -> None:
    """Add a piece of a call: it is the one with the piece's index; without indices a piece with a name begins one."""
    function = part.get("function") or {}
    index = part.get("index")
    call = next((c for c in calls if c["index"] == index), None) if index is not None else None
    if call is None and index is None and calls and not function.get("name"):
        call = calls[-1]
    if call is None:
        number = len(calls) if index is None else index
        call = {"index": number, "type": "function", "function": {"name": "", "arguments": ""}}
        calls.append(call)
    for key in ("id", OURS):
        if part.get(key):
            call[key] = part[key]
    call["function"]["name"] = call["function"]["name"] or function.get("name") or ""
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        call["function"]["arguments"] = arguments
    elif arguments:
        call["function"]["arguments"] += arguments
