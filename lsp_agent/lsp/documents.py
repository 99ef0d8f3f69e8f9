"""The open documents: what the editor shows, saved or not, is what the tests and the agent see.

pygls keeps documents too, but splits lines at form feeds and others that the protocol does not count, which would
corrupt a buffer; so the protocol class hands the three synchronisation messages to this store instead.
"""

from __future__ import annotations

import codecs
import io
import threading
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lsprotocol import types

from lsp_agent.errors import UserError
from lsp_agent.lsp.convert import Encoding, apply_change, path_of
from lsp_agent.workspace.files import resolve_inside


@dataclass(frozen=True)
class Document:
    """One open document at one version; immutable, so that any thread may keep it."""

    uri: str
    path: Path | None
    version: int
    text: str


@dataclass(frozen=True)
class TextFormat:
    """How a file's bytes became the editor's text: encoding, byte order mark, and whether line ends were translated.

    Editors drop a byte order mark and put it back on saving; some show `\\r\\n` files with `\\n`.
    """

    encoding: str = "utf-8"
    bom: bool = False
    crlf: bool = False

    @staticmethod
    def between(disk: bytes | None, text: str, name: str) -> TextFormat:
        """The format by which `text`, shown for the file `name`, came from `disk` (None: a file not yet saved)."""
        if disk is None:
            return TextFormat()
        bom = disk.startswith(codecs.BOM_UTF8)
        encoding = "utf-8" if bom else _source_encoding(disk, name)
        translated = b"\r\n" in disk and "\r" not in text and disk.count(b"\n") == disk.count(b"\r\n")
        return TextFormat(encoding, bom and not text.startswith("\ufeff"), translated)

    def to_bytes(self, text: str) -> bytes:
        """The bytes the editor would save for `text`."""
        if self.crlf:
            text = text.replace("\n", "\r\n")
        try:
            content = text.encode(self.encoding)
        except UnicodeEncodeError:  # typed a character that the declared encoding lacks: what it saves, nobody knows
            content = text.encode("utf-8", "surrogatepass")
        return codecs.BOM_UTF8 + content if self.bom else content

    def to_text(self, content: bytes) -> str:
        """What the editor shows for `content`. Raises `UnicodeDecodeError`."""
        if self.bom:
            content = content.removeprefix(codecs.BOM_UTF8)
        text = content.decode(self.encoding)
        return text.replace("\r\n", "\n") if self.crlf else text


def _source_encoding(content: bytes, name: str) -> str:
    """The encoding a Python file declares, else UTF-8."""
    if name.endswith((".py", ".pyi")):
        try:
            return tokenize.detect_encoding(io.BytesIO(content).readline)[0]
        except SyntaxError:
            pass
    return "utf-8"


class Documents:
    """The open documents of all folders; written by the event loop only, read by any thread."""

    def __init__(self) -> None:
        self.encoding: Encoding = types.PositionEncodingKind.Utf16
        self._documents: dict[str, Document] = {}
        self._lock = threading.Lock()

    def open(self, item: types.TextDocumentItem) -> None:
        """Take over a document that the editor opened."""
        with self._lock:
            self._documents[item.uri] = Document(item.uri, path_of(item.uri), item.version, item.text)

    def change(self, params: types.DidChangeTextDocumentParams) -> None:
        """Apply the editor's changes; a document that was never opened is ignored."""
        document = self.get(params.text_document.uri)
        if document is None:
            return
        text = document.text
        for change in params.content_changes:
            text = apply_change(text, change, self.encoding)
        with self._lock:
            self._documents[document.uri] = replace(document, version=params.text_document.version, text=text)

    def close(self, uri: str) -> None:
        """Forget a document; from now on the file on disk counts."""
        with self._lock:
            self._documents.pop(uri, None)

    def get(self, uri: str) -> Document | None:
        """The document as it is now, by the editor's own URI."""
        with self._lock:
            return self._documents.get(uri)

    def under(self, root: Path) -> dict[str, Document]:
        """Open documents that belong below `root`, by the posix path `Workspace` knows them by."""
        with self._lock:
            documents = list(self._documents.values())
        found = {}
        for document in documents:
            relative = relative_path(document.path, root)
            if relative is not None:
                found[relative] = document
        return found


def relative_path(path: Path | None, root: Path) -> str | None:
    """Posix path of `path` relative to `root`, links inside followed; None outside of it and in git's own files."""
    if path is None:
        return None
    root = root.resolve()
    try:
        return resolve_inside(root, path.resolve().relative_to(root).as_posix()).relative_to(root).as_posix()
    except (ValueError, UserError):
        return None


def content_of(document: Document) -> bytes:
    """The bytes that saving `document` would write."""
    assert document.path is not None
    disk = read_bytes(document.path)
    return TextFormat.between(disk, document.text, document.path.name).to_bytes(document.text)


def unsaved(documents: Mapping[str, Document]) -> dict[str, bytes]:
    """The contents, by relative path, of those documents that differ from their files."""
    overlay = {}
    for relative, document in documents.items():
        content = content_of(document)
        if document.path is None or content != read_bytes(document.path):
            overlay[relative] = content
    return overlay


def read_bytes(path: Path) -> bytes | None:
    """The file's bytes; None when there is no such regular file."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def versions(documents: Iterable[Document]) -> dict[str, int]:
    """Version of each document by URI."""
    return {document.uri: document.version for document in documents}
