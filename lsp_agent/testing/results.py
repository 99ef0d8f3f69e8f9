"""What a test run says, independent of the runner that produced it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["passed", "failed", "error", "skipped", "xfailed", "xpassed", "crashed", "timeout"]
"""`failed`: an assertion or exception in the test; `error`: in collection, a fixture or teardown; `crashed`: the
interpreter died in it; `timeout`: it was running when its time was up."""

BAD: frozenset[Outcome] = frozenset({"failed", "error", "crashed", "timeout"})


@dataclass(frozen=True)
class Frame:
    """One traceback entry inside the tree: path relative to the tree's root (posix), 1-based line, function name."""

    path: str
    line: int
    function: str


@dataclass(frozen=True)
class TestResult:
    """One test, or one file that could not be collected (then `nodeid` is the file's path)."""

    __test__ = False  # not a test class, whatever pytest thinks of the name

    nodeid: str
    outcome: Outcome
    seconds: float = 0.0
    path: str = ""
    """File of the test, relative to the tree's root (posix)."""
    line: int = 1
    """1-based line of the test's definition."""
    exception: str = ""
    """Exception type name, such as AssertionError; empty when it passed."""
    message: str = ""
    """Exception message, with pytest's assertion introspection, a few lines at most."""
    frames: tuple[Frame, ...] = ()
    """Traceback inside the tree, outermost first."""
    longrepr: str = ""
    """The runner's own text of the failure, cut to a few thousand characters with a visible mark."""

    @property
    def bad(self) -> bool:
        """Whether this counts against green."""
        return self.outcome in BAD


@dataclass(frozen=True)
class TestRun:
    """The outcome of one run of the test command."""

    __test__ = False

    results: Mapping[str, TestResult]
    """By nodeid, in the order they ran."""
    seconds: float
    command: tuple[str, ...]
    complete: bool = True
    """False when the run was cut (timeout, crash): absence of a test then proves nothing."""
    error: str = ""
    """One sentence when the runner itself could not work (no pytest, usage error, broken conftest)."""
    coverage: Mapping[str, Mapping[str, frozenset[int]]] = field(default_factory=dict)
    """nodeid -> path -> executed lines, when asked for."""
    output: str = ""
    """Tail of stdout and stderr, cut visibly, for humans only: results never come from it."""

    @property
    def failing(self) -> tuple[str, ...]:
        """Ids of the tests that count against green."""
        return tuple(nodeid for nodeid, result in self.results.items() if result.bad)

    @property
    def passing(self) -> tuple[str, ...]:
        """Ids of the tests that passed (or failed as they were expected to)."""
        return tuple(n for n, r in self.results.items() if r.outcome in ("passed", "xfailed"))

    @property
    def green(self) -> bool:
        """Whether the runner worked, finished, ran something, and nothing failed."""
        return not self.error and self.complete and bool(self.results) and not self.failing


def newly_bad(before: TestRun, after: TestRun) -> tuple[str, ...]:
    """Ids that make `after` worse than `before`: what is bad now and was not, then what passed and is gone.

    Whatever it was before counts (skipped, xpassed, not there), except a test whose file could not be collected then:
    it only came to light. Absence counts in a complete run only; of one that was cut it proves nothing. What a cut
    `before` never reached counts as new: run it on the tree of `before` to know.
    """
    was_bad = set(before.failing)
    worse = [n for n in after.failing if n not in was_bad and n.partition("::")[0] not in was_bad]
    gone = [n for n in before.passing if n not in after.results] if after.complete else []
    return (*worse, *gone)
