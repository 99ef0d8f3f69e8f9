"""A package that is being written: what is finished survives a kill, and the next attempt takes it up.

Beside the package `NAME` lies, until it is complete, the folder `.NAME.partial`:

lock       held by the process that writes; the system releases it however that process ends
journal    one JSON object a line: what is being made of what, then each finished weight and file hash
package/   becomes `NAME` by one rename

A weight is journalled only after its bytes have reached the disk, so after a power cut, too, what the journal names is
there. What was written after it is written again, to the same place.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from lsp_agent.engine.package import WEIGHTS, Weight, decode_weight, encode_weight
from lsp_agent.errors import UserError
from lsp_agent.paths import fsync_directory

SYNC_BYTES = 1 << 26
SYNC_SECONDS = 1.0
"""Weights are journalled together until they have this size or age: each journalling waits for the disk."""


def partial_folder(package: Path) -> Path:
    """Where the beginning of `package` is kept."""
    return package.parent / f".{package.name}.partial"


class PartialPackage:
    """The partial package of `package`, locked; use `open_partial`."""

    def __init__(self, package: Path, identity: dict[str, Any]) -> None:
        self._package, self._outer = package, partial_folder(package)
        self.folder = self._outer / "package"
        self.finished: dict[str, Weight] = {}
        """The weights that need not be written again."""
        self.hashes: dict[str, str] = {}
        """SHA-256 of source files that need not be read again for it."""
        path = self._outer / "journal"
        kept = self._take_up(path, identity)
        if not kept:
            shutil.rmtree(self.folder, ignore_errors=True)
            path.unlink(missing_ok=True)
        self.folder.mkdir(exist_ok=True)
        self._journal: IO[bytes] = path.open("r+b" if kept else "x+b")
        self._journal.truncate(kept)
        self._journal.seek(kept)
        self.weights: IO[bytes] = (self.folder / WEIGHTS).open("r+b" if kept else "x+b")
        if not kept:
            self._append(identity)
            self._sync_journal()
            for folder in (self.folder, self._outer, package.parent):
                fsync_directory(folder)
        self._pending: list[tuple[str, Weight]] = []
        self._pending_bytes, self._synced_at = 0, time.monotonic()

    def _take_up(self, path: Path, identity: dict[str, Any]) -> int:
        """Read the journal of an earlier attempt; returns how many of its bytes hold, 0 if it is of something else."""
        try:
            lines = path.read_bytes().splitlines(keepends=True)
            if not lines or json.loads(lines[0]) != json.loads(json.dumps(identity)):
                return 0
            if not (self.folder / WEIGHTS).is_file():
                return 0
        except (OSError, ValueError):
            return 0
        kept = len(lines[0])
        for line in lines[1:]:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else {}
                if "weight" in entry:
                    self.finished[entry["weight"]] = decode_weight(entry["index"])
                else:
                    self.hashes[entry["file"]] = entry["sha256"]
            except (ValueError, KeyError, TypeError):
                break  # the end, half written when the process was killed
            kept += len(line)
        return kept

    def _append(self, entry: dict[str, Any]) -> None:
        self._journal.write(json.dumps(entry).encode() + b"\n")

    def _sync_journal(self) -> None:
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def note_hash(self, name: str, sha256: str) -> None:
        """Remember the hash of a source file."""
        self.hashes[name] = sha256
        self._append({"file": name, "sha256": sha256})
        self._sync_journal()

    def note_finished(self, name: str, weight: Weight, size: int) -> None:
        """Remember that a weight of `size` bytes is wholly written to `weights`."""
        self._pending.append((name, weight))
        self._pending_bytes += size
        if self._pending_bytes >= SYNC_BYTES or time.monotonic() - self._synced_at >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bring everything noted so far to the disk."""
        if self._pending:
            self.weights.flush()
            os.fsync(self.weights.fileno())
            for name, weight in self._pending:
                self.finished[name] = weight
                self._append({"weight": name, "index": encode_weight(weight)})
            self._sync_journal()
        self._pending, self._pending_bytes, self._synced_at = [], 0, time.monotonic()

    def allocated_bytes(self) -> int:
        """Disk that the partial package takes already."""
        status = os.fstat(self.weights.fileno())
        return status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size

    def publish(self) -> None:
        """Give the complete package its name, in place of what has it."""
        self.sync()
        self.weights.close()
        for path in self.folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        fsync_directory(self.folder)
        if self._package.exists():
            shutil.rmtree(self._outer / "replaced", ignore_errors=True)
            self._package.rename(self._outer / "replaced")
        self.folder.rename(self._package)
        fsync_directory(self._package.parent)
        self.discard()

    def discard(self) -> None:
        """Remove everything; the lock, held to the end, last."""
        self.close()
        for path in sorted(self._outer.iterdir(), key=lambda path: path.name == "lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        with suppress(OSError):  # the next process may be at the door already
            self._outer.rmdir()

    def close(self) -> None:
        """Close the files."""
        for file in (self._journal, self.weights):
            with suppress(OSError):  # bytes that a full disk did not take; nothing that is journalled
                file.close()


@contextmanager
def open_partial(package: Path, identity: dict[str, Any]) -> Iterator[PartialPackage]:
    """Lock, and take up what an earlier attempt of the same `identity` (JSON) left; of another it is thrown away.

    What is finished also stays when the block raises (Ctrl-C, a full disk, a source that cannot be read), unless trying
    again must fail again: a `UserError` that no `OSError` caused. Raises `UserError` when another process writes the
    same package.
    """
    outer = partial_folder(package)
    outer.mkdir(parents=True, exist_ok=True)
    lock = FileLock(outer / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"Another process is importing into {package}; wait until it has finished.") from error
    try:
        partial = PartialPackage(package, identity)
        try:
            yield partial
        except BaseException as error:
            hopeless = isinstance(error, UserError) and not isinstance(error.__cause__, OSError)
            with suppress(OSError):  # a full disk: what was journalled before still counts
                partial.sync()
            if hopeless or not partial.finished:
                partial.discard()
            raise
        finally:
            partial.close()
    finally:
        lock.release()
