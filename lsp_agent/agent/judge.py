"""Runs the tests on candidates, in a scratch copy: the failing test first, its file next, the rest last."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lsp_agent.cancel import CancelToken
from lsp_agent.testing.results import TestRun, newly_bad
from lsp_agent.testing.runner import Runner
from lsp_agent.workspace.changes import FileChange
from lsp_agent.workspace.scratch import ScratchTree

SMALL_SUITE_S = 2.0
"""A suite whose tests take no longer is run whole each time: starting pytest is most of the cost."""
UNKNOWN_START_S = 1.0
LEAST_TIMEOUT_S = 2.5
LAST_TIMEOUT_S = 1.0
"""What a test run gets at least, however little is left of the run's time."""
SLOWDOWN = 4.0
"""How many times slower than the baseline a candidate's run may be before it counts as hanging."""

Kind = Literal["passes", "fails", "further", "breaks others"]


@dataclass(frozen=True)
class Verdict:
    """What the tests say of a candidate."""

    kind: Kind
    seconds: float
    tests_run: int
    run: TestRun | None = None
    """The full run, when it came to that."""
    broken: tuple[str, ...] = ()
    depth: int = 0
    """Line of the test where it failed (0: not known); later is further."""


class Judge:
    """Compares candidates with the baseline. `scratch` belongs to it while it works."""

    def __init__(
        self,
        runner: Runner,
        scratch: ScratchTree,
        baseline: TestRun,
        timeout_s: float,
        seconds_left: Callable[[], float],
        cancel: CancelToken,
    ) -> None:
        self.baseline = baseline
        self.known_failing: set[str] = set()
        """Failing tests that a cut baseline never reached, and that fail on the unchanged tree too."""
        self._runner = runner
        self._scratch = scratch
        self._timeout_s = timeout_s
        self._seconds_left = seconds_left
        self._cancel = cancel
        in_tests = sum(r.seconds for r in baseline.results.values())
        # Of a cut run it is not known how long starting took.
        self._start_s = max(0.0, baseline.seconds - in_tests) if baseline.complete else UNKNOWN_START_S

    def judge(self, changes: Sequence[FileChange], target: str, reference: TestRun) -> Verdict:
        """Run what is needed to know whether `changes` make `target` pass and break nothing.

        `reference` is the full run of the state the candidate starts from: what passes there must still pass.
        """
        began = time.monotonic()
        self._scratch.reset()
        self._scratch.apply(changes)
        tests = 0
        small = self.baseline.complete and self.baseline.seconds <= self._start_s + SMALL_SUITE_S
        steps: list[tuple[str, ...]] = [()] if small else [(target,), (target.partition("::")[0],), ()]
        run = reference
        for step in dict.fromkeys(steps):
            run = self._runner.run(
                self._scratch.path,
                step,
                timeout_s=self._timeout(step),
                cancel=self._cancel,
                fail_fast=step == (target,),
            )
            tests += len(run.results)
            elapsed = time.monotonic() - began
            full = run if not step else None
            if not passes(run, target):
                depth = failing_line(run, target)
                further = depth > failing_line(reference, target) > 0
                return Verdict("further" if further else "fails", elapsed, tests, full, depth=depth)
            broken = self.broken(reference, run, within=step)
            if broken:
                return Verdict("breaks others", elapsed, tests, full, broken)
        return Verdict("passes", time.monotonic() - began, tests, run)

    def full(self, changes: Sequence[FileChange], seconds: float) -> TestRun:
        """Run all tests on `changes`, for at most `seconds`."""
        self._scratch.reset()
        self._scratch.apply(changes)
        limit = min(self._timeout_s, max(LAST_TIMEOUT_S, seconds))
        return self._runner.run(self._scratch.path, timeout_s=limit, cancel=self._cancel)

    def broken(self, reference: TestRun, run: TestRun, within: tuple[str, ...] = ()) -> tuple[str, ...]:
        """What `run` makes worse than `reference`; `within` limits it to the files that were asked for."""
        if within and "::" in within[0]:
            return ()
        found = [n for n in worse(reference, run) if not within or n.partition("::")[0] in within]
        unknown = [n for n in found if n not in reference.results and n not in self.known_failing]
        if unknown and not reference.complete:
            unknown = self._newly_failing(unknown)
        return tuple(n for n in found if n in reference.results or n in unknown)

    def _newly_failing(self, nodeids: Sequence[str]) -> list[str]:
        """Of tests that a cut baseline never reached, those that pass on the unchanged tree."""
        self._scratch.reset()
        limit = min(self._timeout_s, max(LAST_TIMEOUT_S, self._seconds_left()))
        run = self._runner.run(self._scratch.path, nodeids, timeout_s=limit, cancel=self._cancel)
        good = set(run.passing)
        self.known_failing |= {n for n in nodeids if n not in good}
        return [n for n in nodeids if n in good]

    def _timeout(self, step: tuple[str, ...]) -> float:
        """Seconds a run of `step` gets: never more than are left, but for the time to start at all."""
        return min(self._hanging(step), max(LAST_TIMEOUT_S, self._seconds_left()))

    def _hanging(self, step: tuple[str, ...]) -> float:
        """Seconds after which a run of `step` counts as hanging: several times what the baseline took for it."""
        if not self.baseline.complete and not (step and "::" in step[0]):
            return self._timeout_s  # how long it takes is not known
        seconds = self._start_s
        for nodeid, result in self.baseline.results.items():
            if result.outcome != "timeout" and (not step or nodeid in step or nodeid.partition("::")[0] in step):
                seconds += result.seconds
        return min(self._timeout_s, max(LEAST_TIMEOUT_S, SLOWDOWN * seconds))


def worse(before: TestRun, after: TestRun) -> tuple[str, ...]:
    """Ids of the tests that `after` makes worse: bad now and not before, or passed before and skipped or gone now.

    A run that was cut proves nothing, so all that passed before and that it lacks counts.
    """
    good = {n for n, r in after.results.items() if r.outcome in ("passed", "xfailed", "xpassed")}
    return tuple(dict.fromkeys([*newly_bad(before, after), *(n for n in before.passing if n not in good)]))


def passes(run: TestRun, target: str) -> bool:
    """Whether `target` passed in `run`; a file that could not be collected passes once its tests run at all."""
    if target in run.results or "::" in target:
        return target in run.passing
    return not run.error and any(n.startswith(f"{target}::") for n in run.results)


def failing_line(run: TestRun, target: str) -> int:
    """Line of the target's own file at which it failed; 0 when that is not known."""
    result = run.results.get(target)
    if result is None:
        return 0
    return next((f.line for f in reversed(result.frames) if f.path == result.path), 0)
