"""The durable record of every run that changed, or was about to change, the user's files."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lsp_agent.errors import ExitCode, UserError
from lsp_agent.paths import fsync_directory
from lsp_agent.workspace.files import write_durably

Status = Literal["begun", "applying", "applied", "awaiting_editor", "interrupted", "rolled_back", "unchanged"]
"""`begun`: nothing written yet. `applying`: the intended writes are known, some may be done (only while the lock is
held, or after a crash). `awaiting_editor`: ours are written, the editor has not confirmed its part. `interrupted`:
a crash or error left files that the user edited since. `unchanged`: ended without changing a file."""

CHANGED: tuple[Status, ...] = ("applied", "awaiting_editor", "interrupted")
"""States in which a run's changes may be in the user's files."""

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")


@dataclass
class FileRecord:
    """One file's intended write."""

    path: str
    before: str | None
    """Blob id of the content before; None: the file did not exist."""
    after: str | None
    mode: int | None = None
    """Permission bits that the file had, for when it must be made again."""
    by_editor: bool = False
    """The editor writes this one, not we."""


@dataclass
class Record:
    """One run, or the undoing of one."""

    id: str
    undoes: str | None = None
    status: Status = "begun"
    sequence: int = 0
    """Order of application within the workspace."""
    time: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    token: str = field(default_factory=lambda: secrets.token_hex(4))
    """In the names of this record's temporary files."""
    snapshot: str | None = None
    """Commit of the whole workspace before the run."""
    files: list[FileRecord] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    """Folders that did not exist before, outermost first."""
    version: int = 1


class Journal:
    """Records as JSON files in `folder`, each replaced atomically; the caller holds the lock of the workspace."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self) -> None:
        """Make the folder."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def load(self) -> list[Record]:
        """All records, oldest first; damaged ones are skipped and stay on disk."""
        records = []
        for place in self._folder.glob("*.json"):
            try:
                records.append(_parse(json.loads(place.read_bytes())))
            except (OSError, ValueError, TypeError, KeyError):
                continue
        return sorted(records, key=lambda record: record.sequence)

    def save(self, record: Record) -> None:
        """Write `record` durably."""
        write_durably(self._place(record.id), _dump(record))

    def prepare_commit(self, record: Record) -> None:
        """Write `record` aside, so that `commit` needs no disk space."""
        write_durably(self._place(record.id).with_suffix(".next"), _dump(record))

    def commit(self, record: Record) -> None:
        """Make what `prepare_commit` wrote the record, by one rename."""
        self._place(record.id).with_suffix(".next").replace(self._place(record.id))
        fsync_directory(self._folder)

    def discard(self, record: Record) -> None:
        """Remove a record."""
        for suffix in (".next", ".json"):
            self._place(record.id).with_suffix(suffix).unlink(missing_ok=True)

    def _place(self, run_id: str) -> Path:
        return self._folder / f"{run_id}.json"


def check_run_id(run_id: str) -> str:
    """Return `run_id` if it is usable as a file name and a git reference; `UserError` otherwise."""
    if not _RUN_ID.fullmatch(run_id) or run_id.endswith(".lock") or len(run_id) > 150:
        raise UserError(f"{run_id!r} is not a run: see `lsp-agent undo --list`.", ExitCode.USAGE)
    return run_id


def undone_ids(records: Iterable[Record]) -> set[str]:
    """Records whose changes were taken back by a later record that itself still stands."""
    undone: set[str] = set()
    for record in sorted(records, key=lambda record: -record.sequence):
        if record.undoes is not None and record.status in ("applied", "awaiting_editor") and record.id not in undone:
            undone.add(record.undoes)
    return undone


def next_sequence(records: Iterable[Record]) -> int:
    """The place in the order of application after all `records`."""
    return max((record.sequence for record in records), default=0) + 1


def find(records: Sequence[Record], run_id: str) -> Record:
    """The record of a run; `UserError` if there is none."""
    for record in records:
        if record.id == run_id:
            return record
    raise UserError(f"There is no run {run_id} in this workspace: see `lsp-agent undo --list`.", ExitCode.USAGE)


def _dump(record: Record) -> bytes:
    # ASCII escapes also carry names that are not UTF-8.
    return json.dumps(dataclasses.asdict(record), indent=1).encode("ascii")


def _parse(data: dict[str, Any]) -> Record:
    if data["version"] != 1:
        raise ValueError(data["version"])
    return Record(**{**data, "files": [FileRecord(**file) for file in data["files"]]})
