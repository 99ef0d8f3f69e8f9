"""Text on its way out of a command."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` as any terminal and JSON reader can take it: bytes that are not UTF-8 are shown escaped."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
