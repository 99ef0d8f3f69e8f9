"""What happens when a folder is opened and takes too long for the event loop: recovery, settings, watching."""

from __future__ import annotations

import logging
import re

import psutil
from lsprotocol import types

from lsp_agent.errors import UserError
from lsp_agent.lsp.documents import unsaved
from lsp_agent.lsp.folder import Folder
from lsp_agent.lsp.watch import Watch

log = logging.getLogger(__name__)

DOCUMENTS_WAIT_S = 2.0
"""How long the editor may take to send its open documents, before what it had not applied is taken back."""
_OUR_RUN = re.compile(r"\d{8}T\d{6}-lsp-(\d+)-[0-9a-f]{8}")


def open_folder(folder: Folder, watch: Watch) -> None:
    """Recover from crashes, read the settings, look for the model and begin to watch; runs in a thread of its own."""
    try:
        for sentence in folder.checkpoints.recover():
            folder.editor.show(sentence, types.MessageType.Warning)
        folder.models.check(folder.settings.model)
        folder.check_undo()
        watch.start()
        if watch.wait_closed(DOCUMENTS_WAIT_S):
            return
        for sentence in finish_interrupted(folder):
            folder.editor.show(sentence, types.MessageType.Warning)
    except UserError as error:
        folder.editor.show(str(error), types.MessageType.Error)
    except OSError as error:
        log.exception("The folder could not be opened")
        folder.editor.show(f"Files of {folder.root.name} are not watched: {error.strerror}.", types.MessageType.Error)


def finish_interrupted(folder: Folder) -> list[str]:
    """Settle runs whose server died while the editor applied its part; one sentence for each.

    Where the editor has the whole change, the run counts as applied; where it has none, the rest is taken back.
    """
    sentences = []
    for run in folder.checkpoints.runs():
        match = _OUR_RUN.fullmatch(run.id)
        if run.status != "awaiting_editor" or match is None or psutil.pid_exists(int(match[1])):
            continue
        overlay = unsaved(folder.open_documents())
        planned = {change.path for change in folder.checkpoints.plan_undo(run.id, overlay=overlay)}
        if planned == set(run.files):
            folder.checkpoints.mark_applied_by_editor(run.id)
            sentences.append("A crash interrupted a run after its edit was applied; it can be undone.")
        else:
            open_here = [path for path in planned if path in folder.open_documents()]
            if open_here:
                sentences.append(
                    "A crash interrupted a run while its edit was applied in part: choose “Undo the last run” to take "
                    "it back."
                )
                continue
            folder.checkpoints.undo(run.id, overlay=overlay)
            sentences.append("A crash interrupted a run before your editor applied it: it was taken back.")
    folder.check_undo()
    return sentences
