"""An answer as its reader gets it: text, calls to run, and what was wrong with those that are neither."""

from __future__ import annotations

from collections.abc import Iterator

from lsp_agent.chat_model import Completion, ToolCall, ToolCallError, Usage
from lsp_agent.engine.tool_calls.parser import CallEnd, Event, TextDelta, ToolCallParser

Piece = str | ToolCall
"""More of an answer: text, or a call that is complete."""


class AnswerReader:
    """Reads one answer. A call that cannot be understood (`ToolCall.malformed`) is text, and a problem to be told."""

    def __init__(self, parser: ToolCallParser) -> None:
        self._parser = parser
        self._texts: list[str] = []
        self._calls: list[ToolCall] = []
        self._before_call = 0
        self._problems: list[ToolCallError] = []

    def feed(self, text: str) -> list[Piece]:
        """Take the next text of the answer and give what it settles."""
        return [piece for event in self._parser.feed(text) for piece in self._pieces(event)]

    def close(self, cut_off: bool) -> list[Piece]:
        """Settle the rest. `cut_off`: the answer hit its length limit."""
        return [piece for event in self._parser.close(cut_off) for piece in self._pieces(event)]

    def _pieces(self, event: Event) -> Iterator[Piece]:
        if isinstance(event, CallEnd) and not event.call.malformed:
            if not self._calls:
                self._before_call = len(self._texts)
            self._calls.append(event.call)
            yield event.call
        elif isinstance(event, CallEnd):
            self._problems += event.call.errors
            self._texts.append(event.call.raw)
            yield event.call.raw
        elif isinstance(event, TextDelta):
            self._texts.append(event.text)
            yield event.text

    def completion(
        self, cut_off: bool, usage: Usage, mean_logprob: float | None, only_first_call: bool = False
    ) -> Completion:
        """Give the whole answer, after `close`, or all up to the first call."""
        calls = self._calls[:1] if only_first_call else self._calls
        return Completion(
            text="".join(self._texts[: self._before_call] if only_first_call else self._texts),
            finish_reason="length" if cut_off else "tool_calls" if calls else "stop",
            usage=usage,
            mean_logprob=mean_logprob,
            tool_calls=tuple(calls),
            problems=tuple(self._problems),
        )
