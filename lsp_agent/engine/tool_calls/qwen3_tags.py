"""The tags of Qwen3-Coder's tool calls."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from lsp_agent.engine.tool_calls.reader import CALL_CLOSE, CALL_OPEN, NeedMore, View

FUNCTION_OPEN = "<function="
FUNCTION_CLOSE = "</function>"
PARAMETER_OPEN = "<parameter="
PARAMETER_CLOSE = "</parameter>"
MAX_NAME_CHARS = 128

TagKind = Literal["parameter", "end_parameter", "function", "end_function", "call", "end_call", "end"]
_FIXED: tuple[tuple[str, TagKind], ...] = (
    (PARAMETER_CLOSE, "end_parameter"),
    (FUNCTION_CLOSE, "end_function"),
    (CALL_CLOSE, "end_call"),
    (CALL_OPEN, "call"),
)
_NAMED: tuple[tuple[str, TagKind], ...] = ((PARAMETER_OPEN, "parameter"), (FUNCTION_OPEN, "function"))
# The name ends at `>`, or at the line's end where that was forgotten.
_NAME = re.compile(r"[ \t]*([^<>\n]*[^<>\s])[ \t\r]*(?:>|(?=\n))")


class Tag(NamedTuple):
    """A tag of the format that ends at `end`; kind `end` is the end of the answer, perhaps within a tag."""

    kind: TagKind
    end: int
    name: str = ""


def tag_at(view: View, at: int) -> Tag | None:
    """Read the tag at `at`, or give None when there is none; raises NeedMore."""
    for literal, kind in _FIXED:
        if view.starts(literal, at):
            return Tag(kind, at + len(literal))
    for literal, kind in _NAMED:
        if view.starts(literal, at):
            return _named(view, kind, at + len(literal))
    if any(view.starts_cut_off(literal, at) for literal, _ in _FIXED + _NAMED):
        return Tag("end", view.end)
    return None


def _named(view: View, kind: TagKind, at: int) -> Tag | None:
    limit = min(view.end, at + MAX_NAME_CHARS + 1)
    # The look-ahead to the line's end must see one character more than the name may have.
    if match := _NAME.match(view.text, at, limit):
        return Tag(kind, match.end(), match[1].strip("\"'"))
    if limit < view.end or any(mark in view.text[at:limit] for mark in "<>\n"):
        return None
    if not view.final:
        raise NeedMore
    return Tag("end", view.end)
