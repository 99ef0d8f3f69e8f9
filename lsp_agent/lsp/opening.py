"""What happens when a folder is opened and takes too long for the event loop: recovery, settings, watching."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import psutil
from lsprotocol import types

from lsp_agent.errors import UserError
from lsp_agent.lsp.documents import unsaved
from lsp_agent.lsp.folder import Folder
from lsp_agent.lsp.watch import Watch
from lsp_agent.workspace.checkpoints import RunInfo

log = logging.getLogger(__name__)

DOCUMENTS_WAIT_S = 2.0
"""How long the editor may take to send its open documents, before what it had not applied is taken back."""
CLOCK_SLACK_S = 2.0
_OUR_RUN = re.compile(r"\d{8}T\d{6}-lsp-(\d+)-[0-9a-f]{8}")


def open_folder(folder: Folder, watch: Watch) -> None:
    """Recover from crashes, begin to watch, read the settings, look for the model; runs in a thread of its own."""
    for step in (_recover, lambda _: watch.start(), _look_for_model):
        _attempt(folder, step)
    if not watch.wait_closed(DOCUMENTS_WAIT_S):
        _attempt(folder, finish_interrupted)


def _attempt(folder: Folder, step: Callable[[Folder], None]) -> None:
    """One step; what goes wrong with it is shown and does not keep the others from being taken."""
    try:
        step(folder)
    except UserError as error:
        folder.editor.show(str(error), types.MessageType.Error)
    except OSError as error:
        log.exception("A step of opening the folder failed")
        folder.editor.show(f"{folder.root.name} is not fully served: {error.strerror}.", types.MessageType.Error)


def _recover(folder: Folder) -> None:
    for sentence in folder.checkpoints.recover():
        folder.editor.show(sentence, types.MessageType.Warning)
    folder.check_undo()


def _look_for_model(folder: Folder) -> None:
    folder.models.check(folder.settings.model, folder.settings.backend)
    # Imported now, so that the first job need not wait for it.
    import lsp_agent.lsp.fix_job  # noqa: F401


def finish_interrupted(folder: Folder) -> None:
    """Settle runs whose server died while the editor applied its part.

    Where the editor has the whole change, the run counts as applied; where it has none, the rest is taken back.
    """
    for run in folder.checkpoints.runs():
        match = _OUR_RUN.fullmatch(run.id)
        if run.status == "awaiting_editor" and match is not None and not _lives(int(match[1]), run.time):
            folder.editor.show(_finish(folder, run), types.MessageType.Warning)
    folder.check_undo()


def _lives(pid: int, since: float) -> bool:
    """Whether the process that had this id at the time `since` (s since the epoch) lives: ids are given out again."""
    try:
        process = psutil.Process(pid)
        # The kernel reckons the start from the boot time, which clock corrections move by fractions of a second.
        return process.create_time() < since + CLOCK_SLACK_S and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _finish(folder: Folder, run: RunInfo) -> str:
    documents = folder.open_documents()
    overlay = unsaved(documents)
    there = {change.path for change in folder.checkpoints.plan_undo(run.id, overlay=overlay)}
    if there == set(run.files):
        folder.checkpoints.mark_applied_by_editor(run.id)
        return "A crash interrupted a run after its edit was applied; it can be undone."
    if there & documents.keys():
        return "A crash interrupted a run that was applied in part: choose “Undo the last run” to take it back."
    folder.checkpoints.undo(run.id, overlay=overlay)
    return "A crash interrupted a run before your editor applied its part: it was taken back."
