"""Between the protocol's positions and our text: lines, offsets, code units, URIs and minimal text edits.

The protocol counts characters in code units of the negotiated encoding (UTF-16 unless the client offers better), and
knows three line endings: `\\n`, `\\r\\n` and `\\r`. `str.splitlines` knows more (form feeds are common in Python
sources), so it must not be used here.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

from lsprotocol import types
from pygls.uris import from_fs_path, to_fs_path

Encoding = types.PositionEncodingKind | str

_LINE_END = re.compile(r"\r\n|\n|\r")


def path_of(uri: str) -> Path | None:
    """The file a URI names; None for anything but `file:`."""
    name = to_fs_path(uri)
    return Path(name) if name else None


def uri_of(path: Path) -> str:
    """The `file:` URI of an absolute path."""
    uri = from_fs_path(str(path))
    assert uri is not None
    return uri


def split_lines(text: str) -> list[str]:
    """The lines of `text` with their endings, as the protocol counts them; joined they give `text` again."""
    starts = line_starts(text)
    ends = [*starts[1:], len(text)]
    return [text[start:end] for start, end in zip(starts, ends, strict=True) if start < end]


def line_starts(text: str) -> list[int]:
    """Offset of each line; a text that ends with a line ending has one more, empty, line."""
    return [0, *(match.end() for match in _LINE_END.finditer(text))]


def units(text: str, encoding: Encoding) -> int:
    """Length of `text` in code units of `encoding`."""
    if encoding == types.PositionEncodingKind.Utf32 or text.isascii():
        return len(text)
    if encoding == types.PositionEncodingKind.Utf8:
        return len(text.encode("utf-8", "surrogatepass"))
    return len(text) + sum(1 for character in text if ord(character) > 0xFFFF)


def _column(line: str, character: int, encoding: Encoding) -> int:
    """Code points of `line` before the code unit `character`; inside of a code point, the one it belongs to."""
    if encoding == types.PositionEncodingKind.Utf32 or line.isascii():
        return min(character, len(line))
    seen = 0
    for column, point in enumerate(line):
        seen += units(point, encoding)
        if seen > character:
            return column
    return len(line)


def offset_at(text: str, position: types.Position, encoding: Encoding, starts: Sequence[int] | None = None) -> int:
    """Offset of `position` in code points; past the end of a line or of the text, that end."""
    starts = starts if starts is not None else line_starts(text)
    if position.line >= len(starts):
        return len(text)
    start = starts[position.line]
    end = starts[position.line + 1] if position.line + 1 < len(starts) else len(text)
    line = text[start:end]
    return start + _column(line.rstrip("\r\n"), position.character, encoding)


def position_at(text: str, offset: int, encoding: Encoding, starts: Sequence[int] | None = None) -> types.Position:
    """The position of a code point offset."""
    starts = starts if starts is not None else line_starts(text)
    line = bisect_right(starts, offset) - 1
    return types.Position(line, units(text[starts[line] : offset], encoding))


def line_range(text: str, line: int, encoding: Encoding) -> types.Range:
    """The visible part of the 1-based `line`: without indentation, trailing blanks and line ending."""
    lines = split_lines(text)
    content = lines[line - 1].rstrip() if 0 < line <= len(lines) else ""
    indent = len(content) - len(content.lstrip())
    row = max(0, line - 1)
    return types.Range(
        types.Position(row, units(content[:indent], encoding)), types.Position(row, units(content, encoding))
    )


def apply_change(text: str, change: types.TextDocumentContentChangeEvent, encoding: Encoding) -> str:
    """`text` after one incremental or full change of the client's."""
    if isinstance(change, types.TextDocumentContentChangeWholeDocument):
        return change.text
    starts = line_starts(text)
    start = offset_at(text, change.range.start, encoding, starts)
    end = offset_at(text, change.range.end, encoding, starts)
    return text[:start] + change.text + text[max(start, end) :]


def minimal_edits(before: str, after: str, encoding: Encoding) -> list[types.TextEdit]:
    """The smallest edits, one a changed hunk, that turn `before` into `after`: cursors elsewhere stay where they are.

    Ascending, not overlapping, never between the two characters of a `\\r\\n`.
    """
    old, new = split_lines(before), split_lines(after)
    starts = line_starts(before)
    edits = []
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        start = starts[i1] if i1 < len(starts) else len(before)
        removed, added = "".join(old[i1:i2]), "".join(new[j1:j2])
        head, tail = _common_ends(removed, added)
        first, last = start + head, start + len(removed) - tail
        edits.append(
            types.TextEdit(
                types.Range(position_at(before, first, encoding, starts), position_at(before, last, encoding, starts)),
                added[head : len(added) - tail],
            )
        )
    return edits


def _common_ends(removed: str, added: str) -> tuple[int, int]:
    """Lengths of the common prefix and suffix, not overlapping and not splitting a `\\r\\n` of either text."""
    limit = min(len(removed), len(added))
    head = 0
    while head < limit and removed[head] == added[head]:
        head += 1
    tail = 0
    while tail < limit - head and removed[-1 - tail] == added[-1 - tail]:
        tail += 1
    if head and removed[head - 1] == "\r":
        head -= 1
    if tail and (removed[-tail] == "\n" or added[-tail] == "\n"):
        tail -= 1  # the "\r" before it may belong to the changed part
    return head, tail


def map_line(before: str, after: str, line: int) -> int | None:
    """Where the 1-based `line` of `before` is in `after`; None when the line itself was changed or removed."""
    if before == after:
        return line
    matcher = SequenceMatcher(None, split_lines(before), split_lines(after), autojunk=False)
    for block in matcher.get_matching_blocks():
        if block.a < line <= block.a + block.size:
            return line - block.a + block.b
    return None
