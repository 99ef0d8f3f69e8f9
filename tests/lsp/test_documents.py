"""Open documents: synchronisation, and the bytes that saving would write."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from lsprotocol import types

from lsp_agent.lsp.convert import uri_of
from lsp_agent.lsp.documents import Documents, TextFormat, unsaved


def open_document(documents: Documents, path: Path, text: str) -> str:
    documents.open(types.TextDocumentItem(uri_of(path), types.LanguageKind.Python, 1, text))
    return uri_of(path)


@pytest.mark.parametrize(
    ("disk", "shown"),
    [
        (b"x = 1\n", "x = 1\n"),
        (b"x = 1\r\ny = 2\r\n", "x = 1\r\ny = 2\r\n"),
        (b"x = 1\r\ny = 2\r\n", "x = 1\ny = 2\n"),  # an editor that translates line ends
        (codecs.BOM_UTF8 + "é = 1\n".encode(), "é = 1\n"),  # an editor that hides the mark
        (codecs.BOM_UTF8 + "é = 1\n".encode(), "\ufeffé = 1\n"),  # and one that does not
        ("# -*- coding: latin-1 -*-\né = 1".encode("latin-1"), "# -*- coding: latin-1 -*-\né = 1"),
        (b"a\r\nb\n", "a\r\nb\n"),
    ],
)
def test_a_saved_document_is_not_unsaved(tmp_path: Path, disk: bytes, shown: str) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(disk)
    documents = Documents()
    open_document(documents, path, shown)
    assert unsaved(documents.under(tmp_path)) == {}
    form = TextFormat.between(disk, shown, "a.py")
    assert form.to_bytes(shown) == disk
    assert form.to_text(disk) == shown


def test_an_unsaved_buffer_keeps_the_files_format(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(codecs.BOM_UTF8 + b"x = 1\r\n")
    documents = Documents()
    uri = open_document(documents, path, "x = 1\n")
    documents.change(
        types.DidChangeTextDocumentParams(
            types.VersionedTextDocumentIdentifier(2, uri),
            [
                types.TextDocumentContentChangePartial(
                    types.Range(types.Position(0, 4), types.Position(0, 5)), "'😀'\ny = 2"
                )
            ],
        )
    )
    assert unsaved(documents.under(tmp_path)) == {"a.py": codecs.BOM_UTF8 + "x = '😀'\r\ny = 2\r\n".encode()}
    document = documents.get(uri)
    assert document is not None
    assert document.version == 2
    documents.close(uri)
    assert documents.under(tmp_path) == {}


def test_changes_of_one_message_apply_one_after_the_other(tmp_path: Path) -> None:
    documents = Documents()
    uri = open_document(documents, tmp_path / "a.py", "ab\f\ncd\n")
    at = types.Position
    documents.change(
        types.DidChangeTextDocumentParams(
            types.VersionedTextDocumentIdentifier(2, uri),
            [
                types.TextDocumentContentChangePartial(types.Range(at(1, 0), at(1, 0)), "new\n"),
                types.TextDocumentContentChangePartial(types.Range(at(2, 0), at(2, 2)), "CD"),
            ],
        )
    )
    document = documents.get(uri)
    assert document is not None
    assert document.text == "ab\f\nnew\nCD\n"


def test_a_new_file_that_was_never_saved_is_seen_too(tmp_path: Path) -> None:
    documents = Documents()
    open_document(documents, tmp_path / "pkg" / "new.py", "x = 1\n")
    documents.open(types.TextDocumentItem("untitled:Untitled-1", types.LanguageKind.Python, 1, "y"))
    assert unsaved(documents.under(tmp_path)) == {"pkg/new.py": b"x = 1\n"}


def test_documents_are_found_through_a_symbolic_link(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real, target_is_directory=True)
    documents = Documents()
    open_document(documents, real / "a.py", "x")
    assert list(documents.under(link)) == ["a.py"]
