"""JSON tool calls inside `<tool_call>` tags, the Hermes format that Qwen2.5 was trained on.

<tool_call>
{"name": NAME, "arguments": {KEY: VALUE, …}}
</tool_call>
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lsp_agent.chat_model import Problem, Repair, ToolCallError, ToolSchema
from lsp_agent.engine.tool_calls.parser import ToolCallParser
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
from lsp_agent.engine.tool_calls.values import decode_json, decode_lenient

_ARGUMENT_KEYS = ("arguments", "parameters")
_FIRST_KEYS = tuple(f'"{key}"' for key in ("name", *_ARGUMENT_KEYS))
_NAME = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")')
_START = re.compile("[<{]")
_NEXT_CALL = re.compile(r"^[ \t]*" + CALL_OPEN + r"\s*\{", re.MULTILINE)
_MARK = re.compile(r'["\\{}\[\]<]')
_UNREADABLE = ToolCallError(
    Problem.MALFORMED,
    'The tool call was not valid JSON and was not run; write {"name": …, "arguments": {…}}, with strings escaped.',
)


class _CallReader(Reader):
    def __init__(self, tools: Mapping[str, ToolSchema], bare: bool, line_start: bool) -> None:
        self._tools = tools
        self._bare = bare
        self._line_start = line_start
        self._body: int | None = None
        self._scan = 0
        self._open: list[str] = []
        self._in_string = False
        self._doubled_opener = False
        self._name_in_text: str | None = None
        self._end: int | None = None
        self._found: tuple[dict[str, Any], list[Repair]] | None = None

    def read(self, view: View, cut_off: bool) -> Draft | None:
        if self._body is None:
            body = self._find_body(view)
            if body is None:
                return None
            if body == view.end:
                draft = Draft(view.end)
                draft.cut_off()
                return draft
            self._body = self._scan = body
        if self._name_in_text is None and (match := _NAME.match(view.text, self._body, view.end)):
            self._name_in_text = _decoded_name(match[1])
            # A bare object is a call only if it turns out to be one, so it has no name before.
            self.name = None if self._bare else self._name_in_text
        if self._end is None:
            self._end = self._object_end(view)
            if self._end is None:
                if not view.final:
                    raise NeedMore
                return self._settle(view, self._body, cut_off)
            self._found = _decode(view.text[self._body : self._end], self._open)
        if self._found is None:
            # Broken beyond mending: the call goes on to its closing tag, wherever the braces seemed to end.
            return None if self._bare else self._unreadable(view, self._end)
        call = self._found[0]
        if self._bare and not (call.get("name") in self._tools and any(key in call for key in _ARGUMENT_KEYS)):
            return None
        return self._with_closers(view, self._draft(self._end, *self._found))

    def _find_body(self, view: View) -> int | None:
        """Give the place of the object, None when this is no call, or the view's end when the answer stops short."""
        if self._bare:
            at = view.skip_space(1)
            key = next((key for key in _FIRST_KEYS if view.starts(key, at)), None)
            if key is None:
                return None
            return 0 if view.starts(":", view.skip_space(at + len(key))) else None
        at = view.skip_space(len(CALL_OPEN))
        while view.starts(CALL_OPEN, at):
            self._doubled_opener = True
            at = view.skip_space(at + len(CALL_OPEN))
        if view.starts("{", at):
            return at
        return view.end if self._line_start and view.starts_cut_off(CALL_OPEN, at) else None

    def _object_end(self, view: View) -> int | None:
        """Look for the object's end: its last brace, or a closing tag outside of strings."""
        while match := _MARK.search(view.text, self._scan, view.end):
            mark, self._scan = match[0], match.end()
            if mark == "\\":
                # What is escaped is skipped, also when it has not come yet.
                self._scan += 1 if self._in_string else 0
            elif mark == '"':
                self._in_string = not self._in_string
            elif self._in_string:
                continue
            elif mark == "<":
                self._scan = match.start()
                if view.starts(CALL_CLOSE, self._scan):
                    return self._scan
                self._scan = match.end()
            elif mark in "{[":
                self._open.append("}" if mark == "{" else "]")
            elif self._open:
                self._open.pop()
                if not self._open:
                    return self._scan
        self._scan = max(self._scan, view.end)
        return None

    def _settle(self, view: View, body: int, cut_off: bool) -> Draft | None:
        """Decide about an object that never ended, for instance because a quote in it was not escaped."""
        name = self._name_in_text or ""
        if self._bare and name not in self._tools:
            return None
        limit = view.end
        if not cut_off:
            following = _NEXT_CALL.search(view.text, body)
            inner = View(view.text, following.start() if following else view.end, True)
            limit, closer = inner.end, inner.find(CALL_CLOSE, body)
            if closer >= 0:
                found = _decode(view.text[body:closer], [])
                return (
                    self._with_closers(inner, self._draft(closer, *found)) if found else self._unreadable(inner, body)
                )
            if not self._in_string and (found := _decode(view.text[body:limit], self._open)):
                return self._with_closers(inner, self._draft(len(view.text[:limit].rstrip()), *found))
        draft = self._draft(limit, {"name": name}, [])
        draft.cut_off()
        return draft

    def _unreadable(self, view: View, at: int) -> Draft:
        closer = view.find(CALL_CLOSE, at)
        opener = view.find(CALL_OPEN, at)
        if closer < 0 and opener < 0 and not view.final:
            raise NeedMore
        known = [place for place in (closer, opener) if place >= 0]
        end = min(known, default=view.end)
        draft = Draft(end, problem=_UNREADABLE, name=self._name_in_text or "")
        return self._with_closers(view, draft) if end == closer else draft

    def _with_closers(self, view: View, draft: Draft) -> Draft:
        at = draft.end
        while at < view.end and (view.text[at].isspace() or view.text[at] == "}"):
            at += 1
        if at == view.end and not view.final:
            raise NeedMore
        if view.starts(CALL_CLOSE, at):
            if "}" in view.text[draft.end : at]:
                draft.mend(Repair.LENIENT_JSON)
            draft.end = absorb_closers(view, at, (CALL_CLOSE,), draft)
        elif not self._bare:
            draft.mend(Repair.MISSING_CLOSER)
        return draft

    def _draft(self, end: int, call: dict[str, Any], repairs: list[Repair]) -> Draft:
        name = call.get("name")
        draft = Draft(end, name if isinstance(name, str) else "", repairs=list(repairs))
        if self._bare:
            draft.mend(Repair.MISSING_OPENER)
        if self._doubled_opener:
            draft.mend(Repair.DOUBLED_OPENER)
        arguments: Any = next((call[key] for key in _ARGUMENT_KEYS if key in call), {})
        if isinstance(arguments, str):
            draft.mend(Repair.LENIENT_JSON)
            arguments = _decoded_object(arguments)
        if not draft.name or not isinstance(arguments, dict):
            draft.problem = _UNREADABLE
        else:
            draft.arguments = [Argument(key, value, is_json=True) for key, value in arguments.items()]
        return draft


def _decode(text: str, still_open: list[str]) -> tuple[dict[str, Any], list[Repair]] | None:
    """Decode a call, mending what small models do to JSON; None when that fails."""
    for body, decode in (
        (text, decode_json),
        (text, decode_lenient),
        (text + "".join(reversed(still_open)), decode_lenient),
    ):
        try:
            call = decode(body)
        except ValueError:
            continue
        if isinstance(call, dict):
            return call, [] if decode is decode_json else [Repair.LENIENT_JSON]
    return None


def _decoded_object(text: str) -> Any:
    try:
        return decode_lenient(text) if text.strip() else {}
    except ValueError:
        return None


def _decoded_name(literal: str) -> str:
    try:
        return str(decode_json(literal))
    except ValueError:
        return ""


class HermesParser(ToolCallParser):
    """Parses answers with JSON tool calls."""

    def _find(self, view: View, at: int, blank_line: bool) -> tuple[int, Reader | None]:
        while match := _START.search(view.text, at, view.end):
            at = match.start()
            line_start = view.line_is_blank(at, blank_line)
            if match[0] == "{" and line_start:
                return at, _CallReader(self._tools, bare=True, line_start=True)
            try:
                if view.starts(CALL_OPEN, at):
                    return at, _CallReader(self._tools, bare=False, line_start=line_start)
            except NeedMore:
                return at, None
            at += 1
        return view.end, None
