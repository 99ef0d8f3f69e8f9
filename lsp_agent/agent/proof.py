"""The first runs, that say what is wrong, and the last one, that proves it mended on exactly the user's tree."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from lsp_agent.agent.judge import passes, worse
from lsp_agent.agent.request import FixRequest
from lsp_agent.cancel import CancelToken
from lsp_agent.errors import ExitCode, UserError
from lsp_agent.testing.results import TestResult, TestRun
from lsp_agent.testing.runner import Runner
from lsp_agent.workspace.changes import FileChange
from lsp_agent.workspace.merge import ConflictError, merge
from lsp_agent.workspace.scratch import ScratchTree
from lsp_agent.workspace.workspace import Workspace

VERIFY_ATTEMPTS = 3
MOST_TESTS_WITH_COVERAGE = 300
HUNG_S = 20.0
LEAST_PROOF_S = 10.0
PROOF_SLOWDOWN = 3.0
"""How many times what the baseline took the proof gets, however little is left: a solved bug is worth the wait."""


def baseline(runner: Runner, scratch: ScratchTree, request: FixRequest, cancel: CancelToken) -> TestRun:
    """Run all tests of the unchanged tree; raise `UserError` when there is nothing to work with."""
    limit = min(request.test_timeout_s, request.limits.max_seconds)
    run = runner.run(scratch.path, timeout_s=limit, cancel=cancel)
    if request.nodeids and not run.error:
        missing = [n for n in request.nodeids if not _matching(run, n)]
        if missing:
            # A name the full run did not have: pytest knows whether it exists at all.
            scratch.reset()
            asked = runner.run(scratch.path, missing, timeout_s=limit, cancel=cancel)
            if asked.error or not asked.results:
                raise UserError(asked.error or f"This test does not exist: {missing[0]}.", ExitCode.USAGE)
            run = TestRun(
                {**run.results, **asked.results}, run.seconds, run.command, run.complete, run.error, {}, run.output
            )
    if not run.results and not run.complete and not run.error:
        raise UserError(f"No test ended within {limit:.0f} seconds: allow more time for the tests and for the run.")
    if not run.results:
        raise UserError(run.error or f"No tests were found in {scratch.workspace.root}.")
    if run.error and not run.failing:
        raise UserError(run.error)
    return run


def targets(run: TestRun, request: FixRequest) -> tuple[str, ...]:
    """The failing tests to mend: those asked for, or all; a file or class asked for stands for its tests."""
    if not request.nodeids:
        return run.failing
    wanted = {n for asked in request.nodeids for n in _matching(run, asked)}
    return tuple(n for n in run.failing if n in wanted)


def second_look(
    runner: Runner, scratch: ScratchTree, run: TestRun, failing: Sequence[str], timeout_s: float, cancel: CancelToken
) -> TestRun:
    """Run the failing tests again, with coverage, and the other tests of their files for comparison.

    Tests that hung run apart and briefly: they would hang again and take the others' time.
    """
    hung = [n for n in failing if run.results[n].outcome == "timeout"]
    rest = [n for n in failing if n not in hung]
    files = dict.fromkeys(n.partition("::")[0] for n in failing)
    beside = [n for n in run.passing if n.partition("::")[0] in files]
    results: dict[str, TestResult] = {}
    coverage: dict[str, Mapping[str, frozenset[int]]] = {}
    seconds = 0.0
    for nodeids, limit in (([*rest, *beside[:MOST_TESTS_WITH_COVERAGE]], timeout_s), (hung, min(timeout_s, HUNG_S))):
        if nodeids:
            scratch.reset()
            again = runner.run(scratch.path, nodeids, timeout_s=limit, cancel=cancel, coverage=True)
            results |= again.results
            coverage |= again.coverage
            seconds += again.seconds
    return TestRun(results, seconds, run.command, coverage=coverage)


@dataclass(frozen=True)
class Proof:
    """The last run; `problem` is one sentence when it proves nothing."""

    changes: tuple[FileChange, ...]
    run: TestRun | None = None
    problem: str = ""
    broken: tuple[str, ...] = ()
    """What the changes make worse."""


def prove(
    runner: Runner,
    workspace: Workspace,
    changes: Sequence[FileChange],
    before: TestRun,
    fixed: Sequence[str],
    timeout_s: Callable[[], float],
    cancel: CancelToken,
    known_failing: Collection[str] = (),
) -> Proof:
    """Run all tests on a fresh copy of the user's tree as it is now, with `changes` in it.

    What the user edited meanwhile is kept: the changes are merged into it, and the run is done again when the tree
    changed while it ran. `timeout_s` says how long the next run may take; `known_failing` are tests that `before` does
    not hold and that fail without the changes too.
    """
    current = tuple(changes)
    for _ in range(VERIFY_ATTEMPTS):
        digest = workspace.digest()
        try:
            current = _rebased(workspace, changes)
        except ConflictError:
            return Proof(current, None, "The same lines were edited while the fix was found; run again.")
        if not current:
            return Proof(current, None, "The files were edited while the fix was found and hold it already; run again.")
        if refused := protected(runner, current):
            return Proof(current, None, refused)
        with ScratchTree(workspace) as fresh:
            fresh.apply(current)
            run = runner.run(fresh.path, timeout_s=timeout_s(), cancel=cancel)
        if workspace.digest() == digest:
            broken = tuple(n for n in worse(before, run) if n not in known_failing)
            return Proof(current, run, protected(runner, current) or _lacking(run, fixed, broken), broken)
    return Proof(current, None, "The files kept changing while the fix was proven; run again when they are still.")


def _rebased(workspace: Workspace, changes: Sequence[FileChange]) -> tuple[FileChange, ...]:
    rebased = []
    for change in changes:
        try:
            now: bytes | None = workspace.read(change.path)
        except OSError:
            now = None
        after = merge(now, change.before, change.after)
        if after != now:
            rebased.append(FileChange(change.path, now, after))
    return tuple(rebased)


def proof_timeout(test_timeout_s: float, left_s: float, before: TestRun) -> float:
    """Seconds of the last run: what is left, but never less than a slow run of the same tests takes."""
    return min(test_timeout_s, max(left_s, LEAST_PROOF_S, PROOF_SLOWDOWN * before.seconds))


def protected(runner: Runner, changes: Sequence[FileChange]) -> str:
    """One sentence when a change concerns a test, or leads to one through a symbolic link."""
    found = next((c.path for c in changes if runner.is_protected(c.path)), None)
    return f"{found} belongs to the tests, which no run may change." if found else ""


def _lacking(run: TestRun, fixed: Sequence[str], broken: Sequence[str]) -> str:
    if run.error:
        return f"The last test run failed: {run.error}"
    if not run.complete:
        return "The last test run was cut short."
    lost = [n for n in fixed if not passes(run, n)]
    if lost:
        return f"{lost[0]} did not pass in the last run, on the tree as it is now."
    if broken:
        return f"{broken[0]} did not fail before and got worse in the last run, on the tree as it is now."
    return ""


def _matching(run: TestRun, asked: str) -> list[str]:
    """Tests that an id, a class, a file or a parametrised test's name stands for."""
    exact = [n for n in run.results if n == asked]
    return exact or [
        n for n in run.results if n.startswith((f"{asked}::", f"{asked}[")) or n == asked.partition("::")[0]
    ]
