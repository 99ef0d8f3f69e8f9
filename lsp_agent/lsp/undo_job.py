"""The job that takes back the last run."""

from __future__ import annotations

from lsp_agent.errors import UserError
from lsp_agent.lsp.edits import undo_run
from lsp_agent.lsp.folder import Folder
from lsp_agent.lsp.jobs import Job
from lsp_agent.lsp.tests_job import refresh


def run_undo(folder: Folder, job: Job) -> str:
    """Undo, say which files, and run the tests again whose outcome the undo changed."""
    job.progress.report("restoring the files")
    job.cancel.raise_if_cancelled()
    run_id, changes, merged = undo_run(folder, None, "Undo the last run")
    job.touched = True
    paths = ", ".join(change.path for change in changes) or "no file"
    kept = f" Later edits in {', '.join(merged)} were kept." if merged else ""
    folder.editor.show(f"Undone: {paths} restored.{kept}")
    folder.check_undo()
    fixed = folder.fixed_by.get(run_id, ())
    again = tuple(dict.fromkeys([*folder.results.failing, *fixed]))
    if again and folder.results.ran:
        job.progress.report("running the tests it concerns")
        try:
            refresh(folder, job.cancel, again)
        except UserError as error:
            folder.editor.log(str(error))
    return f"{paths} restored"
