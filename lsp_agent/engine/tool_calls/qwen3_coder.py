"""Qwen3-Coder's XML tool calls.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

Values are not escaped, so a value may hold what looks like tags. A closing tag ends a value only where the format
goes on after it; a whole call written inside a value is skipped as one piece. What stays undecided is settled at the
end of the answer, more and more leniently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lsp_agent.chat_model import Repair, ToolSchema
from lsp_agent.engine.tool_calls.parser import ToolCallParser
from lsp_agent.engine.tool_calls.qwen3_tags import (
    FUNCTION_CLOSE,
    FUNCTION_OPEN,
    PARAMETER_CLOSE,
    PARAMETER_OPEN,
    tag_at,
)
from lsp_agent.engine.tool_calls.reader import (
    CALL_CLOSE,
    CALL_OPEN,
    Draft,
    NeedMore,
    Reader,
    View,
    absorb_closers,
)
from lsp_agent.engine.tool_calls.schema import Argument

_IN_VALUE = re.compile("|".join(map(re.escape, (PARAMETER_CLOSE, FUNCTION_CLOSE, PARAMETER_OPEN, FUNCTION_OPEN))))
_OPENER = re.compile(f"{CALL_OPEN}|{FUNCTION_OPEN}")
_CLOSERS = re.compile(rf"^[ \t]*({FUNCTION_CLOSE}\s*{CALL_CLOSE})", re.MULTILINE)
_CLOSER = re.compile(rf"^[ \t]*({FUNCTION_CLOSE}|{CALL_CLOSE})", re.MULTILINE)
_LONGEST_TAG = max(len(tag) for tag in (PARAMETER_CLOSE, FUNCTION_CLOSE, PARAMETER_OPEN, FUNCTION_OPEN))


@dataclass
class _Value:
    """A parameter's value that is being read: its text begins at `start`, tags are looked for from `scan` on."""

    name: str
    start: int
    scan: int
    nested: int = 0


class _CallReader(Reader):
    def __init__(self, tools: Mapping[str, ToolSchema], bare: bool) -> None:
        self._tools = tools
        self._bare = bare
        self._draft: Draft | None = None
        self._at = 0
        self._value: _Value | None = None

    def read(self, view: View, cut_off: bool) -> Draft | None:
        if self._draft is None:
            self._draft = self._open(view)
            if self._draft is None:
                return None
            self.name = self._draft.name
            if self._draft.problem:
                return self._draft
        draft = self._draft
        while True:
            if self._value is not None:
                view = self._read_value(view, draft, self._value, cut_off)
                if draft.problem:
                    return draft
            if self._read_between(view, draft, cut_off):
                return draft

    def _open(self, view: View) -> Draft | None:
        """Read up to the function's name; None when prose follows the opener, as in an explanation."""
        draft = Draft(end=0)
        at = 0
        if self._bare:
            draft.mend(Repair.MISSING_OPENER)
        while (tag := tag_at(view, at)) and tag.kind == "call":
            if draft.end:
                draft.mend(Repair.DOUBLED_OPENER)
            draft.end = tag.end
            at = view.skip_space(tag.end)
        if tag is None:
            return None
        if tag.kind == "end":
            if self._bare:
                return None
            draft.end = view.end
            draft.cut_off()
            return draft
        if tag.kind != "function":
            return None
        after = tag_at(view, view.skip_space(tag.end))
        if after is None or after.kind in ("function", "call", "end_parameter"):
            return None
        if after.kind == "end" and self._bare and tag.name not in self._tools:
            return None
        draft.name, draft.end, self._at = tag.name, tag.end, tag.end
        if after.kind == "end":
            draft.end = view.end
            draft.cut_off()
        return draft

    def _read_between(self, view: View, draft: Draft, cut_off: bool) -> bool:
        """Read what stands between values; True when the call is complete, False when a value begins."""
        while True:
            place = view.skip_space(self._at)
            tag = tag_at(view, place)
            if tag is None or tag.kind in ("function", "call"):
                draft.mend(Repair.MISSING_CLOSER)
                return True
            if tag.kind == "parameter":
                self._value = _Value(tag.name, tag.end, tag.end)
                draft.end = self._at = tag.end
                return False
            if tag.kind == "end":
                draft.mend(Repair.MISSING_CLOSER)
                if cut_off or view.starts(PARAMETER_OPEN[:2], place):
                    draft.cut_off()
                if place < view.end:
                    draft.end = view.end
                return True
            if tag.kind == "end_parameter":
                draft.mend(Repair.DOUBLED_CLOSER)
                draft.end = self._at = tag.end
                continue
            draft.end = absorb_closers(view, place, (FUNCTION_CLOSE, CALL_CLOSE), draft)
            closers = view.text[place : draft.end]
            if FUNCTION_CLOSE not in closers or (CALL_CLOSE not in closers and not self._bare):
                draft.mend(Repair.MISSING_CLOSER)
            return True

    def _read_value(self, view: View, draft: Draft, value: _Value, cut_off: bool) -> View:
        """Read to the value's end, and give the view that the rest of the call is to be read in."""
        while True:
            found = _IN_VALUE.search(view.text, value.scan, view.end)
            if found is None:
                if not view.final:
                    value.scan = max(value.scan, view.end - _LONGEST_TAG + 1)
                    raise NeedMore
                return self._settle(view, draft, value, cut_off)
            value.scan = found.start()
            if self._ends_value(view, draft, value, found[0], found.end()):
                return view
            value.scan = found.end()

    def _ends_value(self, view: View, draft: Draft, value: _Value, literal: str, end: int) -> bool:
        at = value.scan
        line_start = view.line_is_blank_before(at, value.start)
        if literal == FUNCTION_OPEN:
            tag = tag_at(view, at)
            value.nested += line_start and tag is not None and tag.kind == "function"
        elif literal == FUNCTION_CLOSE:
            value.nested = max(0, value.nested - 1)
        elif value.nested:
            return False
        elif literal == PARAMETER_OPEN:
            tag = tag_at(view, at)
            if line_start and tag and tag.kind == "parameter" and self._is_new_parameter(tag.name, draft, value):
                draft.mend(Repair.MISSING_CLOSER)
                self._end_value(view, draft, value, at, at)
                return True
        elif self._closes(view, value, at, line_start):
            self._end_value(view, draft, value, at, end)
            return True
        return False

    def _is_new_parameter(self, name: str, draft: Draft, value: _Value) -> bool:
        tool = self._tools.get(draft.name)
        seen = {argument.name for argument in draft.arguments} | {value.name}
        return tool is not None and name in tool.properties and name not in seen

    def _closes(self, view: View, value: _Value, at: int, line_start: bool) -> bool:
        """Whether the `</parameter>` at `at` ends the value: the format must go on after it.

        In a value that began on a line of its own the tag must also begin or end a line.
        """
        place = at
        while view.starts(PARAMETER_CLOSE, place):
            after = place + len(PARAMETER_CLOSE)
            place = view.skip_space(after)
        tag = tag_at(view, place)
        if tag is None:
            return False
        if tag.kind == "end_function" and not self._function_ends(view, tag.end):
            return False
        own_line = line_start or tag.kind == "end" or "\n" in view.text[after:place]
        return own_line or not view.text.startswith(("\n", "\r\n"), value.start)

    def _function_ends(self, view: View, at: int) -> bool:
        place = view.skip_space(at)
        tag = tag_at(view, place)
        if tag is None:
            return self._bare and "\n" in view.text[at:place]
        return tag.kind in ("end_call", "call", "function", "end_function", "end")

    def _end_value(self, view: View, draft: Draft, value: _Value, end: int, after: int) -> None:
        text = view.text[value.start : end]
        # The format's own line breaks: one after the opening tag, one before the closing tag.
        line_break = "\r\n" if text.startswith("\r\n") else "\n"
        text = text.removeprefix(line_break)
        last = text.rfind("\n") + 1
        if last and not text[last:].strip(" \t"):
            text = text[:last].removesuffix(line_break)
        draft.arguments.append(Argument(value.name, text))
        draft.end = self._at = after
        self._value = None

    def _settle(self, view: View, draft: Draft, value: _Value, cut_off: bool) -> View:
        """Decide where a value ends that nothing in the whole answer ends properly.

        A later call is never swallowed, unless the answer was cut off: then nothing tells a call that follows from one
        that the value quotes.
        """
        closer = None
        if not cut_off:
            view = View(view.text, self._next_call(view, value.start), True)
            if self._settle_leniently(view, draft, value):
                return view
            text = view.text[value.start : view.end]
            closer = _CLOSERS.search(text) or _CLOSER.search(text)
        if closer is None:
            draft.end = view.end
            draft.cut_off()
            self._value = None
            return view
        end = closer.start(1)
        stray = text.rfind(PARAMETER_CLOSE, 0, end)
        draft.mend(Repair.MISSING_CLOSER if stray < 0 else Repair.STRAY_TEXT)
        self._end_value(view, draft, value, value.start + (end if stray < 0 else stray), value.start + end)
        return view

    def _settle_leniently(self, view: View, draft: Draft, value: _Value) -> bool:
        """End the value at its first `</parameter>` that any tag follows, wherever in a line and in whatever call."""
        at = value.start
        while (at := view.find(PARAMETER_CLOSE, at)) >= 0:
            place = after = at + len(PARAMETER_CLOSE)
            while view.starts(PARAMETER_CLOSE, place := view.skip_space(place)):
                place += len(PARAMETER_CLOSE)
            if tag_at(view, place):
                self._end_value(view, draft, value, at, after)
                return True
            at = after
        return False

    def _next_call(self, view: View, start: int) -> int:
        for found in _OPENER.finditer(view.text, start, view.end):
            if not view.line_is_blank_before(found.start(), start):
                continue
            tag = tag_at(view, found.start())
            while tag and tag.kind == "call":
                tag = tag_at(view, view.skip_space(tag.end))
            if tag and tag.kind == "function" and tag.name in self._tools:
                return found.start()
        return view.end


class Qwen3CoderParser(ToolCallParser):
    """Parses answers with tool calls in Qwen3-Coder's XML."""

    def _find(self, view: View, at: int, blank_line: bool) -> tuple[int, Reader | None]:
        while True:
            at = view.text.find("<", at, view.end)
            if at < 0:
                return view.end, None
            try:
                if view.starts(CALL_OPEN, at):
                    return at, _CallReader(self._tools, bare=False)
                if view.line_is_blank(at, blank_line) and view.starts(FUNCTION_OPEN, at):
                    return at, _CallReader(self._tools, bare=True)
            except NeedMore:
                return at, None
            at += 1
