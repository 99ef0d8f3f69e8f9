"""A private copy of the workspace in which candidates are tried and tests may write what they like."""

from __future__ import annotations

import filecmp
import os
import shutil
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from lsp_agent.errors import UserError
from lsp_agent.paths import cache_dir
from lsp_agent.workspace import scratch_owner
from lsp_agent.workspace.changes import FileChange
from lsp_agent.workspace.files import copy_file, read_or_none, remove_tree, resolve_inside, tree_digest
from lsp_agent.workspace.workspace import Workspace

_LARGE = 8 << 20  # bytes; above it no second pristine copy is kept while the original is unchanged
_CLOCK_STEP_NS = 50_000_000  # a write this soon after another may leave the same timestamps (kernel ticks are 1–10 ms)

Stamp = tuple[int, int, int, int, int]


def _stamp(status: os.stat_result) -> Stamp:
    """What any write, replacement or change of mode alters; ctime cannot be set back by a test."""
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode)


@dataclass
class _Entry:
    """The base state of one path."""

    mode: int
    """As in `st_mode`: kind and permission bits."""
    link: str = ""
    pristine: Path | None = None
    """Where a regular file's content is taken from again."""
    original: Stamp | None = None
    """Set if `pristine` is the user's own large file: its stamp when it was copied."""
    mtime_ns: int = 0
    stamp: Stamp | None = None
    """The copy's stamp when it was last known to be right; None: not known to be right."""
    settled: bool = False
    """Whether an equal stamp proves equal content (the stamp was not taken right after the write)."""


class ScratchTree:
    """A private (0700) copy of `workspace`, unsaved buffers included, without `.git` and ignored files.

    Use as a context manager: the copy is made on entering and removed on leaving; copies of processes that died are
    removed on entering too. One thread at a time. Raises `UserError` if the disk cannot hold the copy.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.skipped: list[str] = []
        """Files that could not be read and so are not in the copy."""
        self._base: dict[str, _Entry] = {}
        self._applied: set[str] = set()
        self._clone = True
        self._home: Path | None = None

    @property
    def path(self) -> Path:
        """The root of the copy."""
        return self._place / "tree"

    @property
    def _place(self) -> Path:
        assert self._home is not None, "a ScratchTree is used inside `with`"
        return self._home

    def __enter__(self) -> ScratchTree:
        self._home = scratch_owner.claim(cache_dir().absolute() / "scratch")
        try:
            self._copy_workspace()
        except OSError as error:
            self.close()
            reason = error.strerror or error
            raise UserError(f"The workspace could not be copied to {cache_dir()}: {reason}.") from error
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the copy; may be called again."""
        if self._home is not None:
            remove_tree(self._home)
            self._home = None

    def apply(self, changes: Sequence[FileChange]) -> None:
        """Write `changes` into the copy, all or none.

        Raises `ValueError` if a file there is not what its change says it was before (call `reset` first), and
        `UserError` for a path that leads out of the tree.
        """
        places = [(change, resolve_inside(self.path, change.path)) for change in changes]
        for change, place in places:
            if read_or_none(place) != change.before:
                raise ValueError(f"{change.path} is not what the change expects; reset the scratch tree first")
        for change, place in places:
            mode = place.stat().st_mode & 0o777 if change.before is not None else 0o644
            self._applied.add(change.path)
            relative = place.relative_to(self.path).as_posix()
            self._applied.add(relative)
            if relative in self._base:
                self._base[relative].stamp = None
            place.unlink(missing_ok=True)
            if change.after is not None:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(change.after)
                place.chmod(mode)
            # Python trusts a .pyc whose source has the same size and second: two quick candidates would look alike.
            for stale in place.parent.glob("__pycache__/*.pyc"):
                if stale.name.startswith(place.stem + "."):
                    stale.unlink(missing_ok=True)

    def reset(self) -> None:
        """Return to the base state, undoing `apply` and whatever tests wrote, changed, moved or deleted.

        Untouched files cost one `lstat` each. Raises `UserError` if a large file of the user's, of which no second
        copy was kept, was changed both here and there.
        """
        try:
            self._reset_in_place()
        except (OSError, RecursionError):
            # Something that cannot be taken apart in place, as folders nested beyond the longest path.
            try:
                self.path.rename(self._place / f"discarded-{time.monotonic_ns()}")
                self._build_tree()
            except OSError as error:
                raise UserError(f"The scratch copy in {cache_dir()} is lost: {error.strerror or error}.") from error
        self._applied.clear()

    def digest(self) -> str:
        """As `Workspace.digest`, of the files that belong here: the base's and the applied ones, as they are now.

        Other files that tests left behind do not count.
        """
        belonging = {path for path, entry in self._base.items() if not stat.S_ISDIR(entry.mode)}
        return tree_digest(self.path, belonging | self._applied)

    def _copy_workspace(self) -> None:
        files = self.workspace.scan()
        size = sum(status.st_size for status in files.values() if status is not None)
        free = shutil.disk_usage(self._place).free
        if size > free:
            raise UserError(
                f"The workspace has {size >> 20} MiB and the disk of {cache_dir()} only {free >> 20} MiB free: make "
                "room, or list large folders in .lspagentignore."
            )
        (self._place / "base").mkdir()
        for number, (path, status) in enumerate(sorted(files.items())):
            try:
                entry = self._take(path, status, self._place / "base" / str(number))
            except (FileNotFoundError, PermissionError):
                self.skipped.append(path)
                continue
            parent = path.rpartition("/")[0]
            while parent and parent not in self._base:
                self._base[parent] = _Entry(stat.S_IFDIR | self._folder_mode(parent))
                parent = parent.rpartition("/")[0]
            self._base[path] = entry
        self._build_tree()

    def _folder_mode(self, path: str) -> int:
        try:
            return (self.workspace.root / path).stat().st_mode & 0o777 | 0o700
        except OSError:
            return 0o755

    def _take(self, path: str, status: os.stat_result | None, pristine: Path) -> _Entry:
        """Keep the base state of one file of the workspace."""
        source = self.workspace.root / path
        unsaved = self.workspace.overlay.get(path)
        if unsaved is not None:
            pristine.write_bytes(unsaved)
            mode = status.st_mode & 0o777 if status is not None else 0o644
            return _Entry(stat.S_IFREG | mode, pristine=pristine, mtime_ns=pristine.stat().st_mtime_ns)
        assert status is not None, "only unsaved buffers may be missing on disk"
        if stat.S_ISLNK(status.st_mode):
            return _Entry(stat.S_IFLNK | 0o777, link=os.readlink(source))  # noqa: PTH115 - keeps the text as it is
        entry = _Entry(stat.S_IFREG | status.st_mode & 0o777, mtime_ns=status.st_mtime_ns)
        if status.st_size > _LARGE and os.access(source, os.R_OK):
            entry.pristine, entry.original = source, _stamp(status)
        else:
            self._clone = copy_file(source, pristine, clone=self._clone)
            entry.pristine = pristine
        return entry

    def _build_tree(self) -> None:
        self.path.mkdir(mode=0o700)
        for path in sorted(self._base):
            self._restore(path, self._base[path])

    def _reset_in_place(self) -> None:
        self.path.mkdir(mode=0o700, exist_ok=True)
        self.path.chmod(0o700)
        seen: set[str] = set()
        pending = [""]
        while pending:
            folder = pending.pop()
            for found in list(os.scandir(self.path / folder)):
                path = f"{folder}/{found.name}" if folder else found.name
                entry = self._base.get(path)
                status = found.stat(follow_symlinks=False)
                if entry is None or stat.S_IFMT(entry.mode) != stat.S_IFMT(status.st_mode):
                    self._remove(self.path / path, status)
                    continue
                if stat.S_ISDIR(entry.mode):
                    if status.st_mode != entry.mode:
                        (self.path / path).chmod(stat.S_IMODE(entry.mode))
                    pending.append(path)
                elif not self._is_untouched(path, entry, status):
                    self._remove(self.path / path, status)
                    continue
                seen.add(path)
        for path in sorted(self._base.keys() - seen):
            self._restore(path, self._base[path])

    def _is_untouched(self, path: str, entry: _Entry, status: os.stat_result) -> bool:
        if entry.stamp != _stamp(status):
            return False
        if entry.settled or stat.S_ISLNK(entry.mode):
            return stat.S_ISREG(entry.mode) or os.readlink(self.path / path) == entry.link  # noqa: PTH115
        assert entry.pristine is not None
        entry.settled = time.time_ns() - status.st_ctime_ns > _CLOCK_STEP_NS
        return filecmp.cmp(self.path / path, entry.pristine, shallow=False)

    @staticmethod
    def _remove(place: Path, status: os.stat_result) -> None:
        if stat.S_ISDIR(status.st_mode):
            remove_tree(place)
        else:
            place.unlink(missing_ok=True)

    def _restore(self, path: str, entry: _Entry) -> None:
        """Make `path`, which is missing, what it was."""
        place = self.path / path
        if stat.S_ISDIR(entry.mode):
            place.mkdir(mode=0o700)
            place.chmod(stat.S_IMODE(entry.mode))
            return
        if stat.S_ISLNK(entry.mode):
            place.symlink_to(entry.link)
        else:
            assert entry.pristine is not None
            try:
                self._clone = copy_file(entry.pristine, place, clone=self._clone)
                unchanged = entry.original in (None, _stamp(entry.pristine.stat()))
            except (FileNotFoundError, PermissionError):
                unchanged = False
            if not unchanged:
                raise UserError(f"{path} changed while lsp-agent worked on a copy of it: start again.")
            place.chmod(stat.S_IMODE(entry.mode))
            os.utime(place, ns=(entry.mtime_ns, entry.mtime_ns))
        status = place.lstat()
        entry.stamp = _stamp(status)
        entry.settled = entry.original is not None
        if entry.settled:
            time.sleep(_CLOCK_STEP_NS / 1e9)  # comparing a large file later would cost more than this
