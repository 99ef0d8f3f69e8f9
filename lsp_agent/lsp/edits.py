"""Changes to the user's files: open documents through the editor, versioned; the others through the checkpoints.

Either all of a run's changes are made or none. The journal is written first; then the closed files; then the editor is
asked. What the editor refuses is taken back from the closed files, and what it did only in part is taken back from its
documents. A document that was typed in since is never overwritten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from lsprotocol import types

from lsp_agent.cancel import CancelToken
from lsp_agent.errors import UserError
from lsp_agent.lsp.convert import minimal_edits
from lsp_agent.lsp.documents import Document, TextFormat, content_of, read_bytes
from lsp_agent.lsp.folder import Folder
from lsp_agent.workspace.changes import FileChange
from lsp_agent.workspace.merge import ConflictError, merge
from lsp_agent.workspace.transaction import FileChangedError

SETTLE_S = 3.0
"""How long an editor may take, after it says it applied an edit, to send the document's new text."""


class Stale(Exception):  # noqa: N818 - control flow: look again and retry
    """A document changed between looking and editing; nothing was changed."""


@dataclass(frozen=True)
class Plan:
    """The edit of one open document."""

    change: FileChange
    document: Document
    """As it was when the edit was made for it."""
    after: str | None
    """Its text afterwards; None: the file is deleted."""


def plan_edits(folder: Folder, changes: Sequence[FileChange], documents: Mapping[str, Document]) -> list[Plan]:
    """Those of `changes` that the editor has to make, because the file is open there.

    Raises `Stale` when a document is not what its change expects, and `UserError` for a client that cannot edit a
    document with unsaved changes.
    """
    features = folder.editor.features
    plans = []
    for change in changes:
        document = documents.get(change.path)
        if document is None:
            continue
        content = content_of(document)
        if content != change.before:
            raise Stale
        assert document.path is not None
        disk = read_bytes(document.path)
        can_edit = features.apply_edit and (
            change.after is not None or (features.delete_files and features.document_changes)
        )
        if can_edit:
            form = TextFormat.between(disk, document.text, document.path.name)
            plans.append(Plan(change, document, None if change.after is None else form.to_text(change.after)))
        elif disk != content:
            raise UserError(
                f"Your editor cannot apply this edit to {change.path}, which has unsaved changes: "
                "save it and start again."
            )
    return plans


def workspace_edit(folder: Folder, plans: Sequence[Plan]) -> types.WorkspaceEdit:
    """The edit for the client: versioned document changes, or plain changes where it knows no others."""
    encoding = folder.documents.encoding
    if not folder.editor.features.document_changes:
        return types.WorkspaceEdit(
            changes={p.document.uri: minimal_edits(p.document.text, p.after or "", encoding) for p in plans}
        )
    operations: list[types.TextDocumentEdit | types.CreateFile | types.RenameFile | types.DeleteFile] = []
    for plan in plans:
        if plan.after is None:
            operations.append(types.DeleteFile(plan.document.uri))
            continue
        identifier = types.OptionalVersionedTextDocumentIdentifier(plan.document.uri, plan.document.version)
        operations.append(types.TextDocumentEdit(identifier, minimal_edits(plan.document.text, plan.after, encoding)))
    return types.WorkspaceEdit(document_changes=operations)


def edit_documents(folder: Folder, plans: Sequence[Plan], label: str, cancel: CancelToken) -> str | None:
    """Have the editor make the edits, all or none; returns why it did not, None when it did.

    Some editors answer "applied" although a stale version made them skip it, so the documents decide.
    """
    if any(folder.documents.get(plan.document.uri) != plan.document for plan in plans):
        return "a document changed in the meantime"
    answer = folder.editor.apply_edit(label, workspace_edit(folder, plans), cancel)
    if answer.applied or not answer.known:
        if _wait(lambda: all(_holds(folder, plan) for plan in plans), cancel):
            return None
        reason = answer.reason or "the editor left a document as it was"
    else:
        reason = answer.reason
        if not any(_holds(folder, plan) for plan in plans):
            return reason
    _take_back(folder, [plan for plan in plans if _holds(folder, plan)], label)
    return reason


def _holds(folder: Folder, plan: Plan) -> bool:
    """Whether the document has the change by now, possibly with the user's later typing around it."""
    current = folder.documents.get(plan.document.uri)
    if current is None:
        path = plan.document.path
        assert path is not None
        return read_bytes(path) == plan.change.after
    if plan.after is None:
        return False
    if current.text == plan.after:
        return True
    if current.version == plan.document.version or current.text == plan.document.text:
        return False
    before, after, now = (t.encode("utf-8", "surrogatepass") for t in (plan.document.text, plan.after, current.text))
    try:
        return merge(now, before, after) == now
    except ConflictError:
        return False


def _take_back(folder: Folder, plans: Sequence[Plan], label: str) -> None:
    """Return documents that were edited although others were not to what they were, later typing kept."""
    back = []
    for plan in plans:
        current = folder.documents.get(plan.document.uri)
        if current is not None and plan.after is not None and current.text == plan.after:
            change = FileChange(plan.change.path, plan.change.after, plan.change.before)
            back.append(Plan(change, current, plan.document.text))
    if back:
        folder.editor.apply_edit(f"Take back: {label}", workspace_edit(folder, back))


def _wait(condition: Callable[[], bool], cancel: CancelToken) -> bool:
    end = time.monotonic() + SETTLE_S
    while not condition():
        if time.monotonic() > end or cancel.cancelled:
            return False
        time.sleep(0.01)
    return True


def apply_run(folder: Folder, run_id: str, changes: Sequence[FileChange], label: str, cancel: CancelToken) -> None:
    """Make a run's changes, journaled as `run_id`.

    Raises `Stale` when something changed meanwhile, and `UserError` when they cannot be made; then nothing was.
    """
    documents = folder.open_documents()
    plans = plan_edits(folder, changes, documents)
    by_editor = [plan.change.path for plan in plans]
    checkpoints = folder.checkpoints
    checkpoints.begin(run_id, folder.workspace(documents))
    try:
        checkpoints.apply(run_id, changes, skip=by_editor)
    except FileChangedError:
        checkpoints.complete(run_id)
        raise Stale from None
    if not plans:
        return
    reason = edit_documents(folder, plans, label, cancel)
    if reason is None:
        checkpoints.mark_applied_by_editor(run_id)
        return
    checkpoints.undo(run_id, skip=by_editor, overlay=_current(folder, by_editor))
    if any(folder.documents.get(plan.document.uri) != plan.document for plan in plans):
        raise Stale
    raise UserError(f"Your editor did not apply the edit ({reason}), so nothing was changed.")


def undo_run(folder: Folder, label: str, cancel: CancelToken) -> tuple[str, list[FileChange], tuple[str, ...]]:
    """Take back the last run: its id, the changes made, and the files whose later edits were merged.

    Raises `UserError` when it cannot; then nothing was changed.
    """
    checkpoints = folder.checkpoints
    documents = folder.open_documents()
    overlay = _current(folder, documents)
    planned = checkpoints.plan_undo(overlay=overlay)
    try:
        plans = plan_edits(folder, planned, documents)
    except Stale:
        raise UserError("A file changed just now, so nothing was undone: try again.") from None
    by_editor = [plan.change.path for plan in plans]
    result = checkpoints.undo(skip=by_editor, overlay=overlay)
    if plans:
        reason = edit_documents(folder, plans, label, cancel)
        if reason is not None:
            checkpoints.undo(result.undo_id, skip=by_editor, overlay=_current(folder, by_editor))
            raise UserError(f"Your editor did not apply the edit ({reason}), so nothing was undone.")
        checkpoints.mark_applied_by_editor(result.undo_id)
    return result.run_id, list(result.changes), result.merged


def _current(folder: Folder, paths: Collection[str]) -> dict[str, bytes]:
    """What the editor holds of `paths` now."""
    documents = folder.open_documents()
    return {path: content_of(documents[path]) for path in paths if path in documents}
