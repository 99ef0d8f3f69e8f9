"""One `TestRun` out of several pytest processes: each crash ends one, and the next runs the tests that are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from lsp_agent.testing.process import MAX_PROCESSES, Ended
from lsp_agent.testing.records import Session, result_of
from lsp_agent.testing.results import Frame, TestResult, TestRun


@dataclass
class Progress:
    """What several pytest processes of one run have said together."""

    results: dict[str, TestResult] = field(default_factory=dict)
    tests: dict[str, tuple[str, int]] = field(default_factory=dict)
    coverage: dict[str, dict[str, frozenset[int]]] = field(default_factory=dict)
    ignore: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    complete: bool = True
    error: str = ""

    def to_run(self, seconds: float, command: tuple[str, ...], output: str) -> TestRun:
        """Return the whole, and name the tests that were asked for and do not exist."""
        error = self.error
        if self.complete and self.missing and not error:
            error = _missing_sentence(self.missing, self.results)
        return TestRun(self.results, seconds, command, self.complete, error, self.coverage, output)

    def add(
        self, session: Session, ended: Ended, output: str, fail_fast: bool, faults: Callable[[], tuple[Frame, ...]]
    ) -> bool:
        """Add what one process said; return whether another is to run the tests that are left.

        `faults` reads the stack that a dying or hanging process wrote.
        """
        self.results.update(session.results)
        self.coverage.update(session.coverage)
        self.missing = session.missing
        if session.collected:
            self.tests.update(session.tests)
        left = [nodeid for nodeid in session.tests if nodeid not in self.results]
        if session.problem is not None:
            self.error = _problem_sentence(session.problem)
        elif not session.opened and ended.how == "exited":
            self.error = f"pytest did not start: {_last_line(output)}"
        elif session.status in (3, 4):
            self.error = f"pytest stopped: {_last_line(output)}"
        if self.error:
            self.complete = False
            return False
        if ended.how == "exited" and session.status is not None and session.intact:
            if not self.tests and not self.results and not session.missing:
                self.error = "pytest found no tests here: check the folder and the project's test configuration."
            crashed = [n for n in left if n != session.running]
            if session.status == 2 and crashed and not fail_fast:
                return True  # a test ended the session (pytest.exit): it counts as crashed, the others still run
            self.complete = not left
            return False
        victim = session.running or session.collecting
        if victim:
            timed_out = ended.how == "timeout"
            fields = {"frames": faults(), "message": _death(ended), "longrepr": "" if timed_out else output}
            result = result_of(session, victim, "timeout" if timed_out else "crashed", **fields)
            self.results[victim] = replace(result, exception="Timeout" if timed_out else "Crash")
            if not session.collected:
                self.ignore.append(victim)
        elif ended.how == "exited" and not left and session.collected and session.intact:
            return False  # everything was recorded; the interpreter died on its way out
        if ended.how == "timeout" or not victim or fail_fast or not session.intact:
            self.complete = False
            if not self.results and ended.how == "timeout":
                self.error = "The time was up before pytest had collected the tests."
            elif not self.results or not session.intact:
                self.error = "The test process ended without a complete record of what it did."
            return False
        return bool([n for n in left if n != victim]) or not session.collected


def _death(ended: Ended) -> str:
    if ended.how == "timeout":
        return f"still running when its time was up after {ended.seconds:.1f} s"
    if ended.how == "too many processes":
        return f"killed: it had more than {MAX_PROCESSES} processes"
    code = ended.returncode
    if code < 0 or code > 128:
        return f"the interpreter was killed by signal {-code if code < 0 else code - 128}"
    return f"the interpreter ended with exit status {code} in the middle of the test"


def _problem_sentence(problem: dict[str, object]) -> str:
    where = {
        "conftest": "A conftest file cannot be loaded",
        "usage": "pytest refused to start",
        "run": "pytest broke down",
    }
    start = where.get(str(problem["where"]), "pytest failed internally")
    frames = problem.get("frames")
    place = f" at {frames[-1][0]}:{frames[-1][1]}" if isinstance(frames, list) and frames else ""
    message = str(problem["message"]).strip().splitlines()
    return f"{start}: {problem['exception']}{place}: {message[0] if message else 'no message'}"


def _missing_sentence(missing: Sequence[str], results: dict[str, TestResult]) -> str:
    """Return the sentence about tests that were asked for and do not exist, empty when a broken file explains it."""
    unknown = [name for name in missing if name.partition("::")[0] not in results]
    if not unknown:
        return ""
    more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
    return f"This test does not exist: {unknown[0]}{more}."


def _last_line(output: str) -> str:
    """Return the line of pytest's output that a human would look at first."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for mark in ("error: ", "ERROR: ", "Error: ", "E  "):
        for line in lines:
            if mark in line and "usage: " not in line:
                return line
    return lines[-1] if lines else "it printed nothing"
