"""Failing tests as diagnostics: at the line that failed and at the test's definition.

Tests that fail at the same line share one diagnostic. `data` carries what a code action needs: the test ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lsprotocol import types

from lsp_agent.lsp.capabilities import ClientFeatures
from lsp_agent.lsp.convert import Encoding, line_range, map_line, uri_of
from lsp_agent.lsp.documents import Document, read_bytes
from lsp_agent.lsp.editor import Editor
from lsp_agent.lsp.results import Results
from lsp_agent.testing.results import TestResult

SOURCE = "lsp-agent"
MESSAGE_LINES = 8
NAMES_SHOWN = 5


@dataclass
class Spot:
    """One line that gets a diagnostic, and the tests it is about."""

    path: str
    line: int
    is_definition: bool
    results: list[TestResult] = field(default_factory=list)


def short_name(nodeid: str) -> str:
    """The test's own name: `test_add[1-2]` of `tests/test_calc.py::TestAdd::test_add[1-2]`."""
    head, bracket, parameters = nodeid.partition("[")
    return head.rsplit("::", 1)[-1] + bracket + parameters


def failing_line(result: TestResult, is_protected: Callable[[str], bool]) -> tuple[str, int] | None:
    """Path and 1-based line where to look: the deepest frame in the project's own source, else the assert line."""
    own = [frame for frame in result.frames if not is_protected(frame.path)]
    frames = own or list(result.frames)
    return (frames[-1].path, frames[-1].line) if frames else None


def spots(results: Results, is_protected: Callable[[str], bool]) -> list[Spot]:
    """The lines to mark for all failing tests."""
    found: dict[tuple[str, int], Spot] = {}
    for result in results.tests.values():
        if not result.bad:
            continue
        definition = (result.path or result.nodeid.split("::", 1)[0], max(1, result.line))
        places = {definition: True}
        failed_at = failing_line(result, is_protected)
        if failed_at is not None:
            places[failed_at] = failed_at == definition
        for place, is_definition in places.items():
            spot = found.setdefault(place, Spot(*place, is_definition))
            spot.results.append(result)
    return list(found.values())


def message(spot: Spot) -> str:
    """What the diagnostic says: which tests, and the first one's expected and actual values."""
    first = spot.results[0]
    names = [short_name(result.nodeid) for result in spot.results]
    what = {"error": "has an error", "crashed": "crashed Python", "timeout": "ran out of time"}.get(
        first.outcome, "fails"
    )
    if len(names) == 1:
        head = f"{names[0]} {what}"
    else:
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        head = f"{len(names)} tests fail here: {', '.join(names[:NAMES_SHOWN])}{more}"
    detail = first.message.strip() or first.longrepr.strip()
    if first.exception and not detail.startswith(first.exception):
        detail = f"{first.exception}: {detail}" if detail else first.exception
    lines = detail.splitlines()
    shown = lines[:MESSAGE_LINES] + (["…"] if len(lines) > MESSAGE_LINES else [])
    return f"{head}: " + "\n".join(shown) if shown else head


def build(
    results: Results,
    root: Path,
    open_documents: Mapping[str, Document],
    is_protected: Callable[[str], bool],
    features: ClientFeatures,
    encoding: Encoding,
) -> dict[str, list[types.Diagnostic]]:
    """Diagnostics of all failing tests by document URI. Lines edited since the run get none; the others follow."""
    texts: dict[str, str] = {}

    def text_of(path: str) -> str:
        if path not in texts:
            document = open_documents.get(path)
            texts[path] = (
                document.text if document is not None else (read_bytes(root / path) or b"").decode("utf-8", "replace")
            )
        return texts[path]

    def uri(path: str) -> str:
        document = open_documents.get(path)
        return document.uri if document is not None else uri_of(root / path)

    def current_line(path: str, line: int) -> int | None:
        ran_on = results.documents.get(path)
        return line if ran_on is None else map_line(ran_on.text, text_of(path), line)

    found: dict[str, list[types.Diagnostic]] = {}
    marked: dict[tuple[str, int], types.Location] = {}
    pairs = []
    for spot in spots(results, is_protected):
        line = current_line(spot.path, spot.line)
        if line is None:
            continue
        where = line_range(text_of(spot.path), line, encoding)
        marked[(spot.path, spot.line)] = types.Location(uri(spot.path), where)
        pairs.append((spot, where))
    for spot, where in pairs:
        diagnostic = types.Diagnostic(
            where,
            message(spot),
            severity=types.DiagnosticSeverity.Error,
            code=spot.results[0].outcome,
            source=SOURCE,
            data={"nodeids": [result.nodeid for result in spot.results]} if features.diagnostic_data else None,
        )
        if features.related_information:
            diagnostic.related_information = _related(spot, marked, is_protected) or None
        found.setdefault(uri(spot.path), []).append(diagnostic)
    return found


def _related(
    spot: Spot, marked: Mapping[tuple[str, int], types.Location], is_protected: Callable[[str], bool]
) -> list[types.DiagnosticRelatedInformation]:
    """The other end of each test of `spot`: from the failing line to its definition and back."""
    related = []
    for result in spot.results[:NAMES_SHOWN]:
        name = short_name(result.nodeid)
        ends = [(failing_line(result, is_protected), f"{name} fails here"), ((result.path, result.line), f"{name}")]
        for place, text in ends:
            if place is not None and place != (spot.path, spot.line) and place in marked:
                related.append(types.DiagnosticRelatedInformation(marked[place], text))
    return related


class Publisher:
    """Publishes one folder's diagnostics, and clears those of documents that have none any more."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self.published: dict[str, list[types.Diagnostic]] = {}
        """What the editor shows now, by URI."""

    def publish(self, diagnostics: Mapping[str, list[types.Diagnostic]], versions: Mapping[str, int]) -> None:
        """Replace everything shown by `diagnostics`."""
        former = self.published
        self.published = dict(diagnostics)
        for uri in former.keys() - diagnostics.keys():
            self._editor.publish(uri, [], versions.get(uri))
        for uri, found in diagnostics.items():
            if former.get(uri) != found:
                self._editor.publish(uri, found, versions.get(uri))
