"""Makes a passing change smaller: takes back its hunks one at a time while the tests still pass."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

MOST_TRIES = 6


def hunks(before: str, after: str) -> int:
    """How many separate places differ."""
    return sum(tag != "equal" for tag, *_ in _opcodes(before, after))


def without_hunk(before: str, after: str, index: int) -> str:
    """`after` with its hunk number `index` taken back."""
    old, new = before.split("\n"), after.split("\n")
    lines: list[str] = []
    number = -1
    for tag, i1, i2, j1, j2 in _opcodes(before, after):
        number += tag != "equal"
        lines += old[i1:i2] if tag != "equal" and number == index else new[j1:j2]
    return "\n".join(lines)


def minimise(before: str, after: str, passes: Callable[[str], bool]) -> str:
    """The smallest version found in `MOST_TRIES` test runs; `passes` gates and tests one text."""
    tries, index = 0, hunks(before, after) - 1
    while index >= 0 and tries < MOST_TRIES and hunks(before, after) > 1:
        smaller = without_hunk(before, after, index)
        tries += 1
        if passes(smaller):
            after = smaller
        index = min(index - 1, hunks(before, after) - 1)
    return after


def _opcodes(before: str, after: str) -> Sequence[tuple[str, int, int, int, int]]:
    return difflib.SequenceMatcher(None, before.split("\n"), after.split("\n"), autojunk=False).get_opcodes()
