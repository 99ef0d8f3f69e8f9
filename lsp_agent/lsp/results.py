"""What the last test runs of a folder said, and on which buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lsp_agent.lsp.documents import Document
from lsp_agent.testing.results import TestResult, TestRun


@dataclass(frozen=True)
class Results:
    """The known outcome of every test; immutable, replaced as a whole."""

    tests: Mapping[str, TestResult] = field(default_factory=dict)
    documents: Mapping[str, Document] = field(default_factory=dict)
    """The open documents the runs saw, by relative path: line numbers refer to these texts."""
    seconds: float = 0.0
    """How long the last full run took."""
    ran: bool = False
    """Whether any run told us anything yet."""

    @property
    def failing(self) -> tuple[str, ...]:
        """Ids of the tests that failed when they last ran."""
        return tuple(nodeid for nodeid, result in self.tests.items() if result.bad)

    def after(self, run: TestRun, documents: Mapping[str, Document], nodeids: Iterable[str] = ()) -> Results:
        """With the outcome of `run` of all tests, or of only `nodeids`.

        A run that did not work changes nothing; a complete one of all tests replaces everything.
        """
        if run.error and not run.results:
            return self
        asked = tuple(nodeids)
        if asked:
            kept = {nodeid: result for nodeid, result in self.tests.items() if nodeid not in asked}
            return replace(self, tests={**kept, **run.results}, documents={**self.documents, **documents}, ran=True)
        kept = {} if run.complete else dict(self.tests)
        return Results({**kept, **run.results}, dict(documents), run.seconds, ran=True)

    def without(self, nodeids: Iterable[str]) -> Results:
        """With the given tests forgotten: what is known of them no longer holds."""
        gone = set(nodeids)
        return replace(self, tests={n: r for n, r in self.tests.items() if n not in gone})

    def of_test(self, path: str, names: tuple[str, ...]) -> list[TestResult]:
        """The results of the test `names` (classes, then the function) in `path`, one for each set of parameters."""
        stem = "::".join((path, *names))
        return [r for nodeid, r in self.tests.items() if nodeid.split("[", 1)[0] == stem]
