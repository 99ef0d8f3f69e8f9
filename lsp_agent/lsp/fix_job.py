"""The job that makes tests pass: the agent proves a change on a copy, then it is applied and reported with evidence."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from lsprotocol import types

from lsp_agent.agent import events
from lsp_agent.agent.fix import fix
from lsp_agent.agent.request import FixRequest, FixResult, Limits
from lsp_agent.cancel import CancelToken
from lsp_agent.errors import UserError
from lsp_agent.lsp.diagnostics import short_name
from lsp_agent.lsp.documents import Document
from lsp_agent.lsp.edits import Stale, apply_run
from lsp_agent.lsp.folder import Folder
from lsp_agent.lsp.jobs import Ending, Job
from lsp_agent.lsp.report import show_diff
from lsp_agent.testing.pytest_runner import PytestRunner
from lsp_agent.testing.results import TestRun, newly_bad
from lsp_agent.workspace.changes import FileChange, unified_diff
from lsp_agent.workspace.merge import ConflictError, merge
from lsp_agent.workspace.scratch import ScratchTree
from lsp_agent.workspace.workspace import Workspace

ATTEMPTS = 3
"""How often the change is merged and proven again when the user keeps typing."""
NAMES_SHOWN = 4


class RecordingRunner:
    """A `Runner` that keeps the first and the last run of all tests, for proofs and for the diagnostics."""

    def __init__(self, runner: PytestRunner) -> None:
        self._runner = runner
        self.first_full: TestRun | None = None
        self.last_full: TestRun | None = None

    def run(
        self,
        tree: Path,
        nodeids: Sequence[str] = (),
        *,
        timeout_s: float,
        cancel: CancelToken,
        coverage: bool = False,
        fail_fast: bool = False,
    ) -> TestRun:
        """As `Runner.run`."""
        run = self._runner.run(
            tree, nodeids, timeout_s=timeout_s, cancel=cancel, coverage=coverage, fail_fast=fail_fast
        )
        if not nodeids and not fail_fast:
            self.first_full = self.first_full or run
            self.last_full = run
        return run

    def is_protected(self, path: str) -> bool:
        """As `Runner.is_protected`."""
        return self._runner.is_protected(path)


def run_fix(folder: Folder, job: Job, nodeids: tuple[str, ...]) -> Ending:
    """Fix `nodeids`, or all failing tests. Raises `UserError` and `Cancelled`; then nothing was changed."""
    settings = folder.settings
    documents = folder.open_documents()
    workspace = folder.workspace(documents)
    runner = RecordingRunner(folder.runner())
    request = FixRequest(
        nodeids=nodeids,
        model=settings.model,
        limits=Limits(max_turns=settings.max_turns, max_seconds=settings.max_seconds),
        test_timeout_s=settings.test_timeout_seconds,
    )
    watcher = _Progress(folder, job, request.limits, runner, documents)
    digest = workspace.digest()
    open_model = partial(folder.models.open, backend=settings.backend)
    result = fix(request, workspace, runner, open_model, watcher, job.cancel)
    if result.status != "green":
        return _without_change(folder, result)
    run_id, changes = _apply(folder, job, runner, digest, result)
    if changes:
        folder.fixed_by[run_id] = result.fixed
        folder.check_undo()
    last = runner.last_full
    now = folder.open_documents()
    if last is not None:
        folder.update(lambda results: results.after(last, now))
    if not changes:
        return Ending(f"{_names(result.fixed)}: somebody made the same change meanwhile, and the tests pass with it.")
    return Ending(_evidence(result, last, job) + _unsaved(changes, now))


def _apply(
    folder: Folder, job: Job, runner: RecordingRunner, digest: str, result: FixResult
) -> tuple[str, tuple[FileChange, ...]]:
    """Apply the proven changes; when the tree is not the one of the proof any more, merge and prove again.

    Returns the run's id and what was changed: nothing, and no id, when the tree has the changes already.
    """
    changes = result.changes
    for attempt in range(ATTEMPTS):
        workspace = folder.workspace(folder.open_documents())
        if workspace.digest() != digest:
            job.progress.report("files changed meanwhile: merging and proving again", 95)
            changes = _merged(folder, workspace, result)
            digest = _prove(folder, job, runner, workspace, changes, result)
            changes = tuple(change for change in changes if change.before != change.after)
            if not changes:
                return "", ()
        job.cancel.raise_if_cancelled()
        # The process id tells a later server whether this run's process still lives.
        run_id = f"{time.strftime('%Y%m%dT%H%M%S')}-lsp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        job.touched = True
        try:
            apply_run(folder, run_id, changes, job.title, job.cancel)
        except Stale:
            job.touched = False
            digest = f"stale after attempt {attempt}"
            continue
        except UserError:
            job.touched = False
            show_diff(folder, unified_diff(changes))
            raise
        return run_id, changes
    show_diff(folder, result.diff)
    raise UserError("The files kept changing while the fix was applied, so nothing was changed; the diff shows it.")


def _merged(folder: Folder, workspace: Workspace, result: FixResult) -> tuple[FileChange, ...]:
    """The result's changes, carried over to the files as they are now. Raises `UserError` on a conflict."""
    merged = []
    for change in result.changes:
        try:
            current: bytes | None = workspace.read(change.path)
        except FileNotFoundError:
            current = None
        try:
            merged.append(FileChange(change.path, current, merge(current, change.before, change.after)))
        except ConflictError:
            show_diff(folder, result.diff)
            raise UserError(
                f"{change.path} was edited in the same place while the fix was found, so nothing was changed; "
                "the diff shows the fix."
            ) from None
    return tuple(merged)


def _prove(
    folder: Folder,
    job: Job,
    runner: RecordingRunner,
    workspace: Workspace,
    changes: Sequence[FileChange],
    result: FixResult,
) -> str:
    """Run all tests on `workspace` with `changes`; its digest without them. Raises `UserError` when not proven.

    As strict as the agent's own proof: what it fixed passes, and no test is worse than in its first run.
    """
    before = runner.first_full
    assert before is not None  # the agent begins with it
    digest = workspace.digest()
    with ScratchTree(workspace) as tree:
        tree.apply(changes)
        run = runner.run(tree.path, timeout_s=folder.settings.test_timeout_seconds, cancel=job.cancel)
    passing = set(run.passing)
    lost = [*(n for n in result.fixed if n not in passing), *newly_bad(before, run)]
    if run.error or not run.complete or lost:
        show_diff(folder, unified_diff(changes))
        why = run.error or (f"{short_name(lost[0])} does not pass there" if lost else "the test run was cut short")
        raise UserError(f"The fix does not hold with what was edited meanwhile ({why}), so nothing was changed.")
    return digest


class _Progress:
    """Turns the agent's events into progress reports, and the baseline into diagnostics."""

    def __init__(
        self,
        folder: Folder,
        job: Job,
        limits: Limits,
        runner: RecordingRunner,
        documents: Mapping[str, Document],
    ) -> None:
        self._folder = folder
        self._job = job
        self._limits = limits
        self._runner = runner
        self._documents = documents
        self._target = ""
        job.progress.report("running the tests")

    def __call__(self, event: events.Event) -> None:
        """Report one event."""
        report = self._job.progress.report
        if isinstance(event, events.BaselineDone):
            baseline = self._runner.last_full
            if baseline is not None:
                self._folder.update(lambda results: results.after(baseline, self._documents))
            report(f"{len(event.failing)} of {event.tests} tests fail; loading the model", 10)
        elif isinstance(event, events.ModelReady):
            report(f"{event.name} is ready", 15)
        elif isinstance(event, events.TargetStarted):
            self._target = short_name(event.nodeid)
            report(f"{self._target}: {len(event.suspects)} suspects", 15)
        elif isinstance(event, events.Trying):
            spent = max(event.turn / self._limits.max_turns, event.seconds / self._limits.max_seconds)
            report(f"{self._target}: turn {event.turn}, {event.stage} at {event.where}", 15 + int(70 * min(1.0, spent)))
        elif isinstance(event, events.CandidateJudged):
            report(f"{self._target}: turn {event.turn}, {event.stage} at {event.where}: {event.verdict}")
        elif isinstance(event, events.TargetSolved):
            report(f"{short_name(event.nodeid)} passes", 85)
        elif isinstance(event, events.Verifying):
            report("proving it: all tests on a fresh copy", 90)


def _evidence(result: FixResult, last: TestRun | None, job: Job) -> str:
    """What failed before and passes now, and what it took."""
    names = _names(result.fixed)
    verb = "failed before and passes" if len(result.fixed) == 1 else "failed before and pass"
    total = f" {len(last.passing)} of {len(last.results)} tests pass." if last is not None else ""
    others = f" Still failing, as before: {_names(result.other_failing)}." if result.other_failing else ""
    return f"{names} {verb} now.{total}{others} {_cost(result, job)}"


def _cost(result: FixResult, job: Job) -> str:
    turns = f"{result.turns} turn{'' if result.turns == 1 else 's'}"
    return f"({turns}, {job.seconds:.1f} s)"


def _unsaved(changes: Sequence[FileChange], documents: Mapping[str, Document]) -> str:
    """A reminder: what the editor changed is not on disk yet."""
    names = [change.path for change in changes if change.path in documents]
    return f" Save {', '.join(names)} to keep it." if names else ""


def _without_change(folder: Folder, result: FixResult) -> Ending:
    if result.status == "nothing_failing":
        return Ending("Nothing to fix: the tests pass.")
    if result.status == "flaky":
        text = f"{_names(result.flaky)} failed once and passed on the same code: flaky, so nothing was changed."
        return Ending(text, types.MessageType.Warning)
    if result.best:
        show_diff(folder, result.diff)
    turns = f"{result.turns} turn{'' if result.turns == 1 else 's'}"
    best = f" The best attempt makes {_names(result.fixed)} pass; its diff is shown." if result.fixed else ""
    text = f"Not green after {turns} in {result.seconds:.1f} s, so your files are untouched. {result.reason}{best}"
    return Ending(text.strip(), types.MessageType.Warning)


def _names(nodeids: Sequence[str]) -> str:
    more = f" and {len(nodeids) - NAMES_SHOWN} more" if len(nodeids) > NAMES_SHOWN else ""
    return ", ".join(short_name(n) for n in nodeids[:NAMES_SHOWN]) + more
