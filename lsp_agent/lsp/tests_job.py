"""The job that runs the tests: unsaved buffers included, in a scratch copy, with diagnostics at the end."""

from __future__ import annotations

from collections.abc import Sequence

from lsprotocol import types

from lsp_agent.cancel import CancelToken
from lsp_agent.errors import UserError
from lsp_agent.lsp.diagnostics import short_name
from lsp_agent.lsp.folder import Folder
from lsp_agent.lsp.jobs import Ending, Job
from lsp_agent.testing.results import TestRun
from lsp_agent.workspace.scratch import ScratchTree

NAMES_SHOWN = 3


def run_tests(folder: Folder, job: Job, nodeids: Sequence[str] = ()) -> Ending:
    """Run all tests or `nodeids`, show the failing ones, and say how many. Raises `UserError` and `Cancelled`."""
    job.progress.report("running the tests")
    run = refresh(folder, job.cancel, nodeids)
    if run.error:
        raise UserError(run.error)
    return Ending(summary(run), types.MessageType.Warning if run.failing else types.MessageType.Info)


def run_again(folder: Folder, job: Job, nodeids: Sequence[str] = ()) -> Ending:
    """Run tests again because files changed; those that cannot be run any more are forgotten."""
    try:
        run = refresh(folder, job.cancel, nodeids)
        problem = run.error
    except UserError as error:
        problem = str(error)
    if problem:
        gone = set(nodeids or folder.results.failing)
        folder.update(lambda results: results.without(gone))
        return Ending(f"forgotten, because they cannot be run: {problem}")
    return Ending(summary(run))


def refresh(folder: Folder, cancel: CancelToken, nodeids: Sequence[str] = ()) -> TestRun:
    """Run all tests, or `nodeids`, on the files as they are in the editor now, and show what failed."""
    runner = folder.runner()
    documents = folder.open_documents()
    with ScratchTree(folder.workspace(documents)) as tree:
        run = runner.run(tree.path, nodeids, timeout_s=folder.settings.test_timeout_seconds, cancel=cancel)
    folder.update(lambda results: results.after(run, documents, nodeids))
    return run


def summary(run: TestRun) -> str:
    """One sentence on a run."""
    total = len(run.results)
    tests = f"{total} test{'' if total == 1 else 's'}"
    cut = "" if run.complete else " The run was cut short, so some tests did not run."
    if not run.failing:
        return f"{len(run.passing)} of {tests} passed, none failed ({run.seconds:.1f} s).{cut}"
    names = ", ".join(short_name(n) for n in run.failing[:NAMES_SHOWN])
    more = f" and {len(run.failing) - NAMES_SHOWN} more" if len(run.failing) > NAMES_SHOWN else ""
    return f"{len(run.failing)} of {tests} failed: {names}{more} ({run.seconds:.1f} s).{cut}"
