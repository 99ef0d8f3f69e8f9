"""The streaming parser that both tool-call formats share: text in, text and calls out, nothing lost.

Every decision is a pure function of the answer's text up to some point, and is put off (`NeedMore`) while text yet to
come could change it. So the events do not depend on how the stream was cut, and the text of the events together with
the raw spans of the calls is the answer, character for character.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lsp_agent.chat_model import ToolCall, ToolSchema
from lsp_agent.engine.tool_calls.fences import FencedReader, find_fence
from lsp_agent.engine.tool_calls.reader import Draft, NeedMore, Reader, View
from lsp_agent.engine.tool_calls.schema import check_arguments


@dataclass(frozen=True)
class TextDelta:
    """More of the answer's plain text."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """Call number `index` of the answer begins. `CallEnd` has the name that counts."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallEnd:
    """Call number `index` is complete, or is known never to be (see `ToolCall.errors`)."""

    index: int
    call: ToolCall


Event = TextDelta | CallStart | CallEnd


class ToolCallParser(ABC):
    """Splits one answer of a model, as it streams in, into text and tool calls. Use one parser for one answer.

    No input makes it raise. `new_id` names the calls.
    """

    def __init__(self, tools: Iterable[ToolSchema], new_id: Callable[[], str] | None = None) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._new_id = new_id or _random_id
        self._buffer = ""
        # Everything before is settled as text; a reader, while there is one, began exactly at the buffer's start.
        self._searched = 0
        self._reader: Reader | None = None
        self._started: CallStart | None = None
        self._blank_line = True
        self._calls = 0

    def feed(self, text: str) -> list[Event]:
        """Take the next piece of the answer and give what it settles."""
        # With one reference to it CPython lengthens a string in place; else each piece would copy a long value.
        buffer, self._buffer = self._buffer, ""
        buffer += text
        self._buffer = buffer
        del buffer
        return self._advance(final=False, cut_off=False)

    def close(self, cut_off: bool = False) -> list[Event]:
        """Settle everything: the answer is over. `cut_off`: it hit its length limit, so an open call is in error."""
        return self._advance(final=True, cut_off=cut_off)

    @abstractmethod
    def _find(self, view: View, at: int, blank_line: bool) -> tuple[int, Reader | None]:
        """Find the next call from `at` on.

        Gives its place and reader, or the place up to which there is surely none. `blank_line`: only whitespace stands
        on the line before the view's start.
        """

    def _advance(self, final: bool, cut_off: bool) -> list[Event]:
        events: list[Event] = []
        while self._step(View(self._buffer, len(self._buffer), final), cut_off, events):
            pass
        return events

    def _step(self, view: View, cut_off: bool, events: list[Event]) -> bool:
        if self._reader is None:
            at, self._reader = self._find(view, self._searched, self._blank_line)
            fence = find_fence(view, self._searched, at, self._blank_line) if self._tools else None
            if fence is not None:
                at, self._reader = fence, FencedReader(self._find)
            self._emit_text(at, events)
            return self._reader is not None
        try:
            draft = self._reader.read(view, cut_off)
        except NeedMore:
            self._start(self._reader.name, events)
            return False
        name, self._reader = self._reader.name, None
        if draft is None:
            self._searched = 1
            return True
        self._start(draft.name if name is None else name, events)
        self._emit_call(draft, events)
        return True

    def _start(self, name: str | None, events: list[Event]) -> None:
        if name is not None and self._started is None:
            self._started = CallStart(self._calls, self._new_id(), name)
            events.append(self._started)

    def _emit_text(self, upto: int, events: list[Event]) -> None:
        text, self._buffer = self._buffer[:upto], self._buffer[upto:]
        self._searched = 0
        if text:
            line = text.rpartition("\n")
            self._blank_line = not line[2].strip() and (bool(line[1]) or self._blank_line)
            events.append(TextDelta(text))

    def _emit_call(self, draft: Draft, events: list[Event]) -> None:
        assert self._started is not None and draft.end > 0
        arguments: dict[str, Any] = {}
        errors = [draft.problem] if draft.problem else []
        # A call that could not be read has no other errors worth telling; a known wrong name is one even then.
        if draft.name or not errors:
            arguments, found = check_arguments(draft.name, draft.arguments, self._tools, complete=not errors)
            errors += found
        raw, self._buffer = self._buffer[: draft.end], self._buffer[draft.end :]
        call = ToolCall(self._started.id, draft.name, arguments, raw, tuple(errors), tuple(draft.repairs))
        events.append(CallEnd(self._calls, call))
        self._calls += 1
        self._started, self._blank_line, self._searched = None, True, 0


def _random_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
