"""A source file as text the model can read, with what is needed to write it back byte for byte.

Line endings and encoding survive: the model sees `\\n`, the file keeps its own.
"""

from __future__ import annotations

import codecs
import io
import tokenize
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Python source: `text` with `\\n` line ends; `encode` gives the bytes of a changed text."""

    path: str
    text: str
    encoding: str = "utf-8"
    newline: str = "\n"
    bom: bool = False

    @classmethod
    def decode(cls, path: str, content: bytes) -> Source | None:
        """Read `content`; None when it is not text in the encoding it declares."""
        bom = content.startswith(codecs.BOM_UTF8)
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
            text = content.decode("utf-8-sig" if bom else encoding)
        except (SyntaxError, UnicodeDecodeError, LookupError):
            return None
        # Only a file that ends every line the same way is converted: a mixed one would not survive the way back.
        crlf = "\r\n" in text and text.count("\r\n") == text.count("\n") == text.count("\r")
        return cls(path, text.replace("\r\n", "\n") if crlf else text, encoding, "\r\n" if crlf else "\n", bom)

    def encode(self, text: str) -> bytes | None:
        """Write `text` as this file was written; None when its encoding cannot hold it."""
        if self.newline != "\n":
            text = text.replace("\n", self.newline)
        try:
            content = text.encode("utf-8" if self.bom else self.encoding)
        except UnicodeEncodeError:
            return None
        return codecs.BOM_UTF8 + content if self.bom else content
