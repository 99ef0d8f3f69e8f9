"""Calls inside of a code fence of their own, as small models write them.

```json
{"name": NAME, "arguments": {KEY: VALUE, …}}
```
"""

from __future__ import annotations

import re
from collections.abc import Callable

from lsp_agent.chat_model import Repair
from lsp_agent.engine.tool_calls.reader import Draft, NeedMore, Reader, View

FENCE = "```"
_OPENER = re.compile(FENCE + r"([\w+.-]*)[ \t]*\r?\n\s*")
_UNFINISHED = re.compile(FENCE + r"[\w+.-]*[ \t]*\r?|`{1,2}")
_LAST_LINE = re.compile(r"\n[ \t]*" + FENCE + r"\s*\Z")
_LINE_END = re.compile(r"[ \t]*(?:\r?\n|\r?\Z)")

FindCall = Callable[[View, int, bool], tuple[int, Reader | None]]


def find_fence(view: View, at: int, end: int, blank_line: bool) -> int | None:
    """Give the first place in [at, end) where a line begins with a fence, or may yet."""
    while (at := view.text.find("`", at, end)) >= 0:
        whole = view.text.startswith(FENCE, at, view.end)
        unfinished = not view.final and FENCE.startswith(view.text[at : view.end])
        if (whole or unfinished) and view.line_is_blank(at, blank_line):
            return at
        at += 1
    return None


class FencedReader(Reader):
    """Reads a fence that holds one call and nothing else; the fence is then a part of the call."""

    def __init__(self, find_call: FindCall) -> None:
        self._find_call = find_call
        self._body = 0
        self._language = ""
        self._inner: Reader | None = None

    def read(self, view: View, cut_off: bool) -> Draft | None:
        """See `Reader.read`. The name is told at the end: till then the fence may turn out to hold more."""
        if self._inner is None and not self._open(view):
            return None
        assert self._inner is not None
        draft = self._inner.read(self._inside(view, cut_off), cut_off)
        if draft is None:
            return None
        place = view.skip_space(self._body + draft.end)
        if place == view.end and not view.final:
            raise NeedMore
        if view.starts(FENCE, place):
            place += len(FENCE)
            line_end = _LINE_END.match(view.text, place, view.end)
            if line_end is None:
                return None  # it opens a fence of its own
            if line_end.end() == view.end and not view.final and not line_end[0].endswith("\n"):
                raise NeedMore
        elif place < view.end or not self._language:
            return None  # more stands in the fence, or the fence closed one that stood before
        else:
            place = self._body + draft.end
        draft.end = place
        draft.mend(Repair.CODE_FENCE)
        return draft

    def _open(self, view: View) -> bool:
        """Look for a call at the fence's beginning; False when something else stands there."""
        opener = _OPENER.match(view.text, 0, view.end)
        if opener is None:
            if not view.final and _UNFINISHED.fullmatch(view.text, 0, view.end):
                raise NeedMore
            return False
        if opener.end() == view.end and not view.final:
            raise NeedMore
        self._body, self._language = opener.end(), opener[1]
        place, self._inner = self._find_call(self._inside(view), 0, True)
        if self._inner is None and place == 0 and not view.final:
            raise NeedMore
        return self._inner is not None and place == 0

    def _inside(self, view: View, cut_off: bool = False) -> View:
        """What the fence holds so far. A fence that ends the answer also ends a call that lacks its own end."""
        closer = _LAST_LINE.search(view.text, self._body, view.end) if view.final and not cut_off else None
        end = closer.start() if closer else view.end
        return View(view.text[self._body : end], end - self._body, view.final)
