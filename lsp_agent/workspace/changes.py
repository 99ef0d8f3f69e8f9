"""A change to files, the unit that is gated, tested, applied and undone."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class FileChange:
    """One file before and after, as bytes (so that encodings and line endings survive); None: it does not exist."""

    path: str
    """Relative to the workspace root, posix."""
    before: bytes | None
    after: bytes | None


def unified_diff(changes: Iterable[FileChange]) -> str:
    """Show `changes` as one unified diff with `a/` and `b/` paths; undecodable bytes are shown escaped."""

    def lines(content: bytes | None) -> list[str]:
        return (content or b"").decode("utf-8", "backslashreplace").splitlines(keepends=True)

    parts: list[str] = []
    for change in changes:
        before = "/dev/null" if change.before is None else f"a/{change.path}"
        after = "/dev/null" if change.after is None else f"b/{change.path}"
        for line in difflib.unified_diff(lines(change.before), lines(change.after), before, after):
            parts.append(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n")
    return "".join(parts)
