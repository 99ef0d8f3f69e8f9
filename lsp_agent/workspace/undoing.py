"""Planning an undo: which run, which files, and what becomes of edits that were made since."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lsp_agent.errors import ExitCode, UserError
from lsp_agent.workspace.changes import FileChange
from lsp_agent.workspace.files import read_or_none, resolve_inside
from lsp_agent.workspace.journal import CHANGED, Record, find, next_sequence, undone_ids
from lsp_agent.workspace.merge import ConflictError, merge


def find_undoable(records: Sequence[Record], run_id: str | None) -> Record:
    """The run to undo (None: the last that is not undone); `records` are the oldest first. Raises `UserError`."""
    undone = undone_ids(records)
    if run_id is not None:
        record = find(records, run_id)
        if record.id in undone or record.status not in CHANGED:
            raise UserError(f"There is nothing to undo: the run {run_id} changes no file now.")
        return record
    for record in reversed(records):
        if record.undoes is None and record.status in CHANGED and record.id not in undone:
            return record
    raise UserError("There is nothing to undo: no run has changed a file of this workspace.")


def plan(
    root: Path, run: Record, overlay: Mapping[str, bytes], get: Callable[[str], bytes]
) -> tuple[list[FileChange], list[str]]:
    """The changes that restore the state before `run`, and the paths with later edits, which are kept by merging.

    `overlay`: unsaved buffers, which count as the current content; `get` gives a blob's content. Raises `UserError`
    (NOT_GREEN) that names the first file that does not merge.
    """
    changes, merged = [], []
    for file in run.files:
        current = overlay.get(file.path)
        if current is None:
            current = read_or_none(resolve_inside(root, file.path))
        before = get(file.before) if file.before is not None else None
        after = get(file.after) if file.after is not None else None
        if current in (before, after):
            target = before
        else:
            try:
                target = merge(current, after, before)
            except ConflictError:
                raise UserError(
                    f"{file.path} was edited or deleted since the run {run.id} in a way that does not merge, so "
                    "nothing was undone: take that edit back first.",
                    ExitCode.NOT_GREEN,
                ) from None
            merged.append(file.path)
        if current != target:
            changes.append(FileChange(file.path, current, target))
    return changes, merged


def new_record(records: Sequence[Record], run: Record) -> Record:
    """The journal's record of an undo of `run`, under a name that is not taken."""
    original = re.sub(r"^undo-\d+-", "", run.id)
    taken = {record.id for record in records}
    number = next(number for number in itertools.count(1) if f"undo-{number}-{original}" not in taken)
    return Record(f"undo-{number}-{original}", undoes=run.id, sequence=next_sequence(records))
