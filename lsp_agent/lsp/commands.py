"""The commands behind the code actions: each starts a job and returns at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lsp_agent.errors import UserError
from lsp_agent.lsp.diagnostics import short_name
from lsp_agent.lsp.folder import Folder
from lsp_agent.lsp.jobs import Ending, Job, Work

# The parts that do the work are imported in the job's thread: the event loop must not wait for them.


def fix_test(folder: Folder, arguments: Mapping[str, Any]) -> None:
    """Make the given tests pass."""
    nodeids = _nodeids(arguments)
    if not nodeids:
        raise UserError("Say which test to fix: the action is offered on its diagnostic.")
    title = f"Fix {short_name(nodeids[0])}" + (f" and {len(nodeids) - 1} more" if len(nodeids) > 1 else "")
    _start(folder, title, lambda job: _fix(folder, job, nodeids))


def make_green(folder: Folder, _arguments: Mapping[str, Any]) -> None:
    """Make all failing tests pass."""
    _start(folder, "Make all tests green", lambda job: _fix(folder, job, ()))


def _fix(folder: Folder, job: Job, nodeids: tuple[str, ...]) -> Ending:
    from lsp_agent.lsp.fix_job import run_fix

    return run_fix(folder, job, nodeids)


def run_tests(folder: Folder, arguments: Mapping[str, Any]) -> None:
    """Run all tests, or the given ones."""
    nodeids = _nodeids(arguments)

    def work(job: Job) -> Ending:
        from lsp_agent.lsp.tests_job import run_tests

        return run_tests(folder, job, nodeids)

    _start(folder, "Run the tests", work)


def undo(folder: Folder, _arguments: Mapping[str, Any]) -> None:
    """Restore the state before the last run."""

    def work(job: Job) -> Ending:
        from lsp_agent.lsp.undo_job import run_undo

        return run_undo(folder, job)

    _start(folder, "Undo the last run", work)


def stop(folder: Folder, _arguments: Mapping[str, Any]) -> None:
    """Cancel the running job. Raises `UserError` when none runs."""
    if not folder.slot.stop():
        raise UserError("Nothing is running here.")


def _start(folder: Folder, title: str, work: Work) -> None:
    if folder.slot.start(title, work) is None:
        running = folder.slot.current
        what = f"{running.title!r} is still running" if running is not None else "The folder was closed"
        raise UserError(f"{what}: stop it or wait for its end.")


def _nodeids(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    nodeids = arguments.get("nodeids") or ()
    return tuple(nodeid for nodeid in nodeids if isinstance(nodeid, str))
