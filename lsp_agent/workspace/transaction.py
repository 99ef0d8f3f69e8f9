"""Write several files so that a crash or a full disk leaves a state that can be told apart and mended."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lsp_agent.errors import ExitCode, UserError
from lsp_agent.paths import fsync_directory
from lsp_agent.workspace.files import open_private, read_or_none, resolve_inside
from lsp_agent.workspace.ignore import TEMPORARY_PREFIX
from lsp_agent.workspace.journal import FileRecord, Record
from lsp_agent.workspace.store import blob_id


class FileChangedError(UserError):
    """A file is not what the change expects."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"{path} was changed in the meantime, so nothing was written: start again.", ExitCode.NOT_GREEN
        )


@dataclass(frozen=True)
class _Write:
    """One of our writes, with its real place."""

    file: FileRecord
    place: Path
    temporary: Path


def check(root: Path, path: str, before: bytes | None, after: bytes | None) -> int | None:
    """The permission bits of `path`, None if it does not exist; `UserError` unless it can go from before to after."""
    place = resolve_inside(root, path)
    try:
        status = place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        status = None
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file: lsp-agent changes only regular files.")
    if status is not None and after is None and place != root / path:
        raise UserError(f"{path} is reached through a symbolic link, and so cannot be deleted: delete it yourself.")
    if (place.read_bytes() if status is not None else None) != before:
        raise FileChangedError(path)
    if status is not None and (not status.st_mode & stat.S_IWUSR or not os.access(place, os.W_OK)):
        raise UserError(f"{path} is read-only: make it writable (chmod u+w) and try again.")
    return stat.S_IMODE(status.st_mode) if status is not None else None


def missing_folders(root: Path, paths: list[str]) -> list[str]:
    """Folders that must be made for `paths`, relative to `root`, outermost first."""
    missing: set[str] = set()
    for path in paths:
        folder = resolve_inside(root, path).parent
        while folder != root and not folder.exists():
            missing.add(folder.relative_to(root).as_posix())
            folder = folder.parent
    return sorted(missing)


def carry_out(root: Path, record: Record, get: Callable[[str], bytes], commit: Callable[[], None]) -> None:
    """Write the files of `record` that are ours, then `commit`; after an error the caller calls `roll_back`.

    First every new content is written and fsynced beside its file, so that a full disk is met before anything has
    changed; then the files are renamed into place, each checked once more.
    """
    writes = _writes(root, record)
    for folder in record.folders:
        (root / folder).mkdir(exist_ok=True)
    for write in writes:
        if write.file.after is not None:
            _stage(write, get(write.file.after))
    for write in writes:
        if _current(write.place) != write.file.before:
            raise FileChangedError(write.file.path)
        if write.file.after is None:
            write.place.unlink()
        else:
            write.temporary.replace(write.place)
    made = {(root / folder).parent for folder in record.folders}
    for folder_place in made | {write.place.parent for write in writes}:
        fsync_directory(folder_place)
    commit()


def roll_back(root: Path, record: Record, get: Callable[[str], bytes]) -> list[str]:
    """Bring our files of `record` back to their content before; the paths that someone edited since are left alone.

    Also removes temporary files and folders made. Returns the paths left alone.
    """
    edited: list[str] = []
    for write in _writes(root, record, edited):
        current = _current(write.place)
        if current == write.file.after and current != write.file.before:
            if write.file.before is None:
                write.place.unlink(missing_ok=True)
            else:
                _stage(write, get(write.file.before))
                write.temporary.replace(write.place)
            fsync_directory(write.place.parent)
        elif current != write.file.before:
            edited.append(write.file.path)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            write.temporary.unlink()
    remove_empty(root, record.folders)
    return edited


def remove_empty(root: Path, folders: list[str]) -> None:
    """Remove those of `folders` that are empty, innermost first."""
    for folder in sorted(folders, reverse=True):
        with contextlib.suppress(OSError):
            (root / folder).rmdir()


def _writes(root: Path, record: Record, unreachable: list[str] | None = None) -> list[_Write]:
    """Our writes of `record`; paths that by now lead out of the root are added to `unreachable`, or raise."""
    writes = []
    for number, file in enumerate(record.files):
        if file.by_editor or file.before == file.after:
            continue
        try:
            place = resolve_inside(root, file.path)
        except UserError:
            if unreachable is None:
                raise
            unreachable.append(file.path)
            continue
        writes.append(_Write(file, place, place.with_name(f"{TEMPORARY_PREFIX}{record.token}-{number}.tmp")))
    return writes


def _current(place: Path) -> str | None:
    """Blob id of what is there, None if nothing is; what is no readable file equals no content."""
    try:
        content = read_or_none(place)
    except OSError:
        return "unreadable"
    return None if content is None else blob_id(content)


def _stage(write: _Write, content: bytes) -> None:
    """Write `content` durably to the temporary file, with the permissions and attributes of the file to replace."""
    write.temporary.unlink(missing_ok=True)
    write.place.parent.mkdir(parents=True, exist_ok=True)
    with open_private(write.temporary, exclusive=True) as file:
        file.write(content)
        file.flush()
        _copy_attributes(write.place, write.temporary, write.file.mode)
        os.fsync(file.fileno())


def _copy_attributes(source: Path, target: Path, mode: int | None) -> None:
    try:
        status = source.stat()
    except (FileNotFoundError, NotADirectoryError):
        target.chmod(mode if mode is not None else 0o666 & ~_umask())
        return
    with contextlib.suppress(OSError):
        if (status.st_uid, status.st_gid) != (os.getuid(), os.getgid()):
            os.chown(target, status.st_uid, status.st_gid)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            for name in os.listxattr(source):
                os.setxattr(target, name, os.getxattr(source, name))
    target.chmod(stat.S_IMODE(status.st_mode))


def _umask() -> int:
    """The process's umask; reading it any other way would set it for every thread for a moment."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except OSError:
        pass
    return 0o022
