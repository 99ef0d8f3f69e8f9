"""Checkpoints: every run that changes the user's files is journaled before, can be undone after, and survives a crash.

Laid out as `<state folder>/<workspace id>/`: `runs/` (the journal), `store/` (a bare git repository of our own with
all contents), `lock`. The user's repository is never written to.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock

from lsp_agent.errors import ExitCode, UserError
from lsp_agent.paths import state_dir
from lsp_agent.workspace import transaction, undoing
from lsp_agent.workspace.changes import FileChange
from lsp_agent.workspace.files import resolve_inside, write_durably
from lsp_agent.workspace.journal import (
    FileRecord,
    Journal,
    Record,
    Status,
    check_run_id,
    find,
    next_sequence,
    undone_ids,
)
from lsp_agent.workspace.store import ObjectStore
from lsp_agent.workspace.workspace import Workspace

_KEPT_RUNS = 200
_LOCK_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class RunInfo:
    """One line of the history."""

    id: str
    status: str
    """As `journal.Status`, or `undone`."""
    time: float
    """Seconds since the epoch."""
    files: tuple[str, ...]
    undoes: str | None
    """The run that this one took back."""


@dataclass(frozen=True)
class UndoResult:
    """What an undo did (or, for the editor's files, wants done)."""

    run_id: str
    undo_id: str
    """Undo this one to redo the run."""
    changes: tuple[FileChange, ...]
    """From the content at the time of the undo to the restored content."""
    merged: tuple[str, ...]
    """Paths with later edits, which were kept."""


def workspace_id(root: Path) -> str:
    """A folder name for the state of `root` (resolved): readable, and unique by its path."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", root.name).strip("-")[:40] or "workspace"
    return f"{name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}"


def find_root(folder: Path, state: Path | None = None) -> Path:
    """The innermost of `folder` and the folders above it that has checkpoints; `folder` itself if none has."""
    start = Path(folder).resolve()
    for candidate in (start, *start.parents):
        if ((state or state_dir()) / workspace_id(candidate)).is_dir():
            return candidate
    return start


class Checkpoints:
    """The run journal of the workspace at `root`; `state` replaces the user's state folder.

    `protected` holds the relative paths that no run may write, whether by their name or through a symbolic link.
    Safe for several processes and threads at once: each call holds the workspace's lock, and first mends what a
    process that died left behind. Every method may raise `UserError`; the user's files are then as they were.
    """

    def __init__(self, root: Path, state: Path | None = None, *, protected: Container[str] = ()) -> None:
        self.root = Path(root).resolve()
        self._protected = protected
        self.folder = (state or state_dir()).absolute() / workspace_id(self.root)
        self._journal = Journal(self.folder / "runs")
        self._store = ObjectStore(self.folder / "store")
        self._messages: list[str] = []

    def begin(self, run_id: str, workspace: Workspace) -> None:
        """Checkpoint tracked, untracked and unsaved files before a run changes anything."""
        check_run_id(run_id)
        if workspace.root != self.root:
            raise UserError(f"{workspace.root} is not {self.root}: give the checkpointed folder.")
        with self._locked() as records:
            if any(record.id == run_id for record in records):
                raise UserError(f"The run {run_id} exists already: give another name.", ExitCode.USAGE)
            self._forget_old(records)
            record = Record(run_id, sequence=next_sequence(records))
            record.snapshot = self._store.snapshot(run_id, workspace)
            self._journal.save(record)

    def apply(self, run_id: str, changes: Sequence[FileChange], *, skip: Collection[str] = ()) -> None:
        """Write `changes` to the user's files, all or none; those in `skip` are only recorded: the editor writes them.

        With `skip`, call `mark_applied_by_editor` when the editor has done its part, or `undo` when it refuses.
        Raises `UserError` if a file is protected, is not what its change says it was before, or cannot be written.
        """
        self._refuse_protected(changes)
        with self._locked() as records:
            record = find(records, run_id)
            if record.status not in ("begun", "rolled_back"):
                raise UserError(f"The run {run_id} has already been applied: begin another one.", ExitCode.USAGE)
            record.sequence = next_sequence(records)
            self._carry_out(record, changes, skip, modes={})

    def _refuse_protected(self, changes: Sequence[FileChange]) -> None:
        for path in (change.path for change in changes):
            target = resolve_inside(self.root, path).relative_to(self.root).as_posix()
            if path in self._protected or target in self._protected:
                leads = f" leads to {target}, which" if target != path else ""
                raise UserError(f"{path}{leads} belongs to the tests, which no run may change: nothing was written.")

    def mark_applied_by_editor(self, run_id: str) -> None:
        """The editor has made the changes that `apply` or `undo` left to it."""
        with self._locked() as records:
            record = find(records, run_id)
            if record.status == "awaiting_editor":
                self._set_status(record, "applied")

    def complete(self, run_id: str) -> None:
        """The run ended; one that applied nothing is recorded so."""
        with self._locked() as records:
            record = find(records, run_id)
            if record.status == "begun":
                self._set_status(record, "unchanged")

    def runs(self) -> list[RunInfo]:
        """Every run and undo, newest first."""
        with self._locked() as records:
            undone = undone_ids(records)
            return [
                RunInfo(
                    record.id,
                    "undone" if record.id in undone else record.status,
                    record.time,
                    tuple(file.path for file in record.files),
                    record.undoes,
                )
                for record in reversed(records)
            ]

    def plan_undo(self, run_id: str | None = None, *, overlay: Mapping[str, bytes] | None = None) -> list[FileChange]:
        """The changes that would restore the state before a run (default: the last not undone); nothing is written.

        `overlay`: unsaved buffers (relative path → content), which count as the current content.
        """
        with self._locked() as records:
            return self._plan(undoing.find_undoable(records, run_id), overlay)[0]

    def undo(
        self,
        run_id: str | None = None,
        *,
        skip: Collection[str] = (),
        overlay: Mapping[str, bytes] | None = None,
    ) -> UndoResult:
        """Restore the state before a run (default: the last not undone), also after later runs and edits.

        A file that was edited since is merged; if one cannot be, nothing is changed and `UserError` names it (exit
        code NOT_GREEN; USAGE for an unknown run; ENVIRONMENT if there is nothing to undo). `skip` and `overlay`: as
        for `apply` and `plan_undo`; the editor then makes the changes of the result that are in `skip`.
        """
        with self._locked() as records:
            run = undoing.find_undoable(records, run_id)
            changes, merged = self._plan(run, overlay)
            record = undoing.new_record(records, run)
            self._carry_out(record, changes, skip, modes={file.path: file.mode for file in run.files})
            transaction.remove_empty(self.root, run.folders)
            return UndoResult(run.id, record.id, tuple(changes), tuple(merged))

    def _plan(self, run: Record, overlay: Mapping[str, bytes] | None) -> tuple[list[FileChange], list[str]]:
        return undoing.plan(self.root, run, overlay or {}, self._store.get)

    def recover(self) -> list[str]:
        """Mend what processes that died left behind; one sentence for each thing done."""
        with self._locked():
            messages, self._messages = self._messages, []
            return messages

    @contextmanager
    def _locked(self) -> Iterator[list[Record]]:
        """Hold the workspace's lock; the records, oldest first, none of them half carried out."""
        if not self.root.is_dir():
            raise UserError(f"{self.root} is not a folder: give the folder of the project.")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            with filelock.FileLock(self.folder / "lock", timeout=_LOCK_TIMEOUT_S, mode=0o600):
                self._journal.prepare()
                self._store.prepare()
                if not (self.folder / "workspace").exists():
                    write_durably(self.folder / "workspace", os.fsencode(self.root) + b"\n")
                records = self._journal.load()
                for record in records:
                    if record.status == "applying":
                        self._mend(record)
                yield records
        except filelock.Timeout as error:
            raise UserError("Another lsp-agent is changing this workspace: try again when it is done.") from error
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise UserError(f"The files could not be written: {error.strerror or error}{where}.") from error

    def _mend(self, record: Record) -> None:
        """Take back a run or undo that died half-way: its process cannot be alive, for we hold the lock."""
        edited = transaction.roll_back(self.root, record, self._store.get)
        what = f"the undo of {record.undoes}" if record.undoes else f"the run {record.id}"
        if edited:
            left = ", ".join(edited)
            self._messages.append(f"A crash interrupted {what}: it was taken back, except in {left}, edited since.")
        else:
            self._messages.append(f"A crash interrupted {what}: it was taken back, and no file is changed by it.")
        self._set_status(record, "interrupted" if edited else "rolled_back")

    def _carry_out(
        self, record: Record, changes: Sequence[FileChange], skip: Collection[str], modes: Mapping[str, int | None]
    ) -> None:
        """Journal, write, mark: the one way in which the user's files are changed."""
        if len({resolve_inside(self.root, change.path) for change in changes}) != len(changes):
            raise UserError("Two changes concern the same file: give one change a file.", ExitCode.USAGE)
        record.files = []
        for change in changes:
            mode = modes.get(change.path)
            if change.path not in skip:
                mode = transaction.check(self.root, change.path, change.before, change.after) or mode
            record.files.append(FileRecord(change.path, None, None, mode, change.path in skip))
        contents = [content for change in changes for content in (change.before, change.after) if content is not None]
        blobs = iter(self._store.put(contents))
        for file, change in zip(record.files, changes, strict=True):
            file.before = next(blobs) if change.before is not None else None
            file.after = next(blobs) if change.after is not None else None
        ours = [file.path for file in record.files if not file.by_editor and file.after is not None]
        record.folders = transaction.missing_folders(self.root, ours)
        self._store.keep(record.id, [blob for file in record.files for blob in (file.before, file.after) if blob])
        record.status = "awaiting_editor" if any(file.by_editor for file in record.files) else "applied"
        self._journal.prepare_commit(record)
        record.status = "applying"
        self._journal.save(record)
        known = dict(self._contents(record, changes))
        try:
            transaction.carry_out(self.root, record, known.__getitem__, lambda: self._journal.commit(record))
        except BaseException:
            self._mend_quietly(record)
            raise

    @staticmethod
    def _contents(record: Record, changes: Sequence[FileChange]) -> Iterator[tuple[str, bytes]]:
        for file, change in zip(record.files, changes, strict=True):
            for blob, content in ((file.before, change.before), (file.after, change.after)):
                if blob is not None and content is not None:
                    yield blob, content

    def _mend_quietly(self, record: Record) -> None:
        """After an error whose cause is raised anyway; where even this fails, the next call mends."""
        try:
            edited = transaction.roll_back(self.root, record, self._store.get)
            if record.undoes is not None and not edited:
                self._journal.discard(record)
            else:
                self._set_status(record, "interrupted" if edited else "rolled_back")
        except (OSError, UserError):
            pass

    def _set_status(self, record: Record, status: Status) -> None:
        record.status = status
        self._journal.save(record)

    def _forget_old(self, records: list[Record]) -> None:
        """Keep the newest runs only; a few more than that are let gather, for clearing costs seconds."""
        if len(records) >= _KEPT_RUNS + 50:
            old = records[: len(records) - _KEPT_RUNS]
            for record in old:
                self._journal.discard(record)
            self._store.forget([record.id for record in old])
            del records[: len(old)]
