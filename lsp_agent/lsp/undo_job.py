"""The job that takes back the last run."""

from __future__ import annotations

from lsp_agent.lsp.edits import undo_run
from lsp_agent.lsp.folder import Folder
from lsp_agent.lsp.jobs import Ending, Job
from lsp_agent.lsp.tests_job import run_again


def run_undo(folder: Folder, job: Job) -> Ending:
    """Undo, say which files, and then run the tests again whose outcome the undo changed."""
    job.progress.report("restoring the files")
    job.cancel.raise_if_cancelled()
    run_id, changes, merged = undo_run(folder, job.title, job.cancel)
    job.touched = True
    folder.check_undo()
    paths = ", ".join(change.path for change in changes)
    restored = f"{paths} restored" if paths else "no file had to be changed"
    kept = f" Later edits in {', '.join(merged)} were kept." if merged else ""
    again = tuple(dict.fromkeys([*folder.results.failing, *folder.fixed_by.get(run_id, ())]))
    then = ("Run the tests it concerns", lambda follower: run_again(folder, follower, again)) if again else None
    return Ending(f"Undone: {restored}.{kept}", then=then if folder.results.ran else None)
