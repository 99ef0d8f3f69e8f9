"""Positions and text edits, for every encoding and line ending."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lsprotocol import types

from lsp_agent.lsp.convert import (
    apply_change,
    line_range,
    map_line,
    minimal_edits,
    offset_at,
    position_at,
    split_lines,
)

ENCODINGS = [types.PositionEncodingKind.Utf8, types.PositionEncodingKind.Utf16, types.PositionEncodingKind.Utf32]
PIECES = st.sampled_from(["a", "b", " ", "\n", "\r\n", "\r", "\f", "\u2028", "é", "😀", "中"])
TEXTS = st.lists(PIECES, max_size=30).map("".join)


def offset_in(text: str, position: types.Position, encoding: str) -> int:
    """Offset of a position, counted in bytes: independently of the server's code."""
    lines = re.split("(?<=\r\n)|(?<=\n)|(?<=\r)(?!\n)", text)
    codec, unit = {"utf-8": ("utf-8", 1), "utf-16": ("utf-16-le", 2), "utf-32": ("utf-32-le", 4)}[encoding]
    column = len(lines[position.line].encode(codec)[: position.character * unit].decode(codec))
    return sum(map(len, lines[: position.line])) + column


def apply_edits(text: str, edits: list[types.TextEdit], encoding: str) -> str:
    """What an editor makes of edits, whose ranges all refer to `text` as it was."""
    for edit in sorted(edits, key=lambda e: (e.range.start.line, e.range.start.character), reverse=True):
        start, end = (offset_in(text, place, encoding) for place in (edit.range.start, edit.range.end))
        text = text[:start] + edit.new_text + text[end:]
    return text


@pytest.mark.parametrize(("encoding", "character"), [("utf-8", 6), ("utf-16", 4), ("utf-32", 3)])
def test_an_emoji_counts_by_the_negotiated_encoding(encoding: str, character: int) -> None:
    text = 'x\n"😀"\n'
    offset = text.index("😀") + 2  # behind the closing quotation mark
    assert position_at(text, offset, encoding) == types.Position(1, character)
    assert offset_at(text, types.Position(1, character), encoding) == offset


def test_form_feeds_and_line_separators_do_not_end_a_line() -> None:
    assert split_lines("a\fb\n\u2028c\x1cd\r\ne\rf") == ["a\fb\n", "\u2028c\x1cd\r\n", "e\r", "f"]


@given(text=TEXTS, encoding=st.sampled_from(ENCODINGS), data=st.data())
def test_positions_go_both_ways(text: str, encoding: types.PositionEncodingKind, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, len(text)))
    if text[offset - 1 : offset + 1] == "\r\n":
        offset -= 1
    assert offset_at(text, position_at(text, offset, encoding), encoding) == offset


@given(before=TEXTS, after=TEXTS, encoding=st.sampled_from(ENCODINGS))
def test_minimal_edits_give_exactly_the_text_after(
    before: str, after: str, encoding: types.PositionEncodingKind
) -> None:
    edits = minimal_edits(before, after, encoding)
    assert apply_edits(before, edits, encoding) == after
    places = [(e.range.start.line, e.range.start.character, e.range.end.line, e.range.end.character) for e in edits]
    assert all(first[2:] <= second[:2] for first, second in pairwise(places))


@given(before=TEXTS, insert=TEXTS, encoding=st.sampled_from(ENCODINGS), data=st.data())
def test_incremental_changes_follow_the_clients_positions(
    before: str, insert: str, encoding: types.PositionEncodingKind, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(before)))
    end = data.draw(st.integers(start, len(before)))
    if "\r\n" in (before[start - 1 : start + 1], before[end - 1 : end + 1]):
        return  # no client can name a place between the two
    change = types.TextDocumentContentChangePartial(
        types.Range(position_at(before, start, encoding), position_at(before, end, encoding)), insert
    )
    assert apply_change(before, change, encoding) == before[:start] + insert + before[end:]


def test_an_edit_is_as_small_as_the_change() -> None:
    before = "def f(a, b):\r\n    return a - b  # 😀 äöü\r\n\r\nx = 1\r\n"
    edits = minimal_edits(before, before.replace("-", "+").replace("x = 1", "x = 2"), "utf-16")
    assert edits == [
        types.TextEdit(types.Range(types.Position(1, 13), types.Position(1, 14)), "+"),
        types.TextEdit(types.Range(types.Position(3, 4), types.Position(3, 5)), "2"),
    ]


def test_a_missing_final_newline_stays_missing() -> None:
    assert apply_edits("a\nb", minimal_edits("a\nb", "a\nc", "utf-16"), "utf-16") == "a\nc"
    assert apply_edits("a\nb", minimal_edits("a\nb", "a\nb\nc", "utf-16"), "utf-16") == "a\nb\nc"


def test_a_diagnostic_covers_the_visible_part_of_its_line() -> None:
    assert line_range("a\n\t  é = '😀'  \n", 2, "utf-16") == types.Range(types.Position(1, 3), types.Position(1, 11))
    assert line_range("a\n", 9, "utf-16") == types.Range(types.Position(8, 0), types.Position(8, 0))


def test_a_line_is_followed_through_edits_elsewhere() -> None:
    before = "a\nb\nc\n"
    assert map_line(before, "new\na\nb\nc\n", 2) == 3
    assert map_line(before, "a\nB\nc\n", 2) is None
    assert map_line(before, before, 3) == 3
