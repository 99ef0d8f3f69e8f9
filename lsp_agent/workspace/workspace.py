"""The files of the user's project, unsaved buffers first."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from lsp_agent.errors import UserError
from lsp_agent.workspace.files import resolve_inside, tree_digest
from lsp_agent.workspace.ignore import IgnoreRules


class Workspace:
    """A folder and the unsaved buffers over it; every path is relative to `root`, in posix form.

    Names that are not valid UTF-8 are carried as surrogate escapes. Raises `UserError` if `root` is not a folder.
    """

    def __init__(self, root: Path, overlay: Mapping[str, bytes] | None = None) -> None:
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise UserError(f"{root} is not a folder: give the folder of the project.")
        self.overlay: dict[str, bytes] = {self._canonical(path): text for path, text in (overlay or {}).items()}
        """Relative path → unsaved content; a buffer opened through a link inside the root is kept under its target."""

    def _canonical(self, path: str) -> str:
        return resolve_inside(self.root, path).relative_to(self.root).as_posix()

    def files(self) -> list[str]:
        """Regular files and symbolic links that belong, sorted: on disk and not ignored, or unsaved.

        In a git work tree git decides (tracked, or untracked and not ignored; submodules included); elsewhere the
        .gitignore files and a list of well-known junk do. `.lspagentignore` at the root leaves out more.
        """
        return sorted(self.scan())

    def scan(self) -> dict[str, os.stat_result | None]:
        """`files()` with each one's `lstat`, or None for a buffer that is nowhere on disk."""
        rules = IgnoreRules(self.root)
        real_folders = {"": True}
        found: dict[str, os.stat_result | None] = {}
        for path in rules.listed():
            # git lists tracked files below a folder that has since become a link; what is behind it is not ours.
            if not self._is_real_folder(path.rpartition("/")[0], real_folders):
                continue
            try:
                status = (self.root / path).lstat()
            except (OSError, ValueError):
                continue  # tracked but deleted
            if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                found[path] = status
        unlisted = [path for path in self.overlay if path not in found]
        hidden = rules.ignored(unlisted) if unlisted else set()
        for path in unlisted:
            if path not in hidden:
                found[path] = None
        return found

    def _is_real_folder(self, folder: str, known: dict[str, bool]) -> bool:
        if folder not in known:
            parent = folder.rpartition("/")[0]
            known[folder] = self._is_real_folder(parent, known) and not (self.root / folder).is_symlink()
        return known[folder]

    def ignored(self, paths: Iterable[str]) -> set[str]:
        """Those of `paths` that do not belong to the workspace (they need not exist)."""
        return IgnoreRules(self.root).ignored(paths)

    def read(self, path: str) -> bytes:
        """The content of `path`, unsaved first; a link inside the root is followed.

        Raises `FileNotFoundError`, `IsADirectoryError`, and `UserError` for a path that leads out of the root.
        """
        if path in self.overlay:
            return self.overlay[path]
        real = resolve_inside(self.root, path)
        unsaved = self.overlay.get(real.relative_to(self.root).as_posix())
        if unsaved is not None:
            return unsaved
        if real.exists() and not real.is_file() and not real.is_dir():
            raise UserError(f"{path} is not a regular file: lsp-agent reads only regular files.")
        return real.read_bytes()

    def digest(self) -> str:
        """SHA-256 (hex) of exactly this tree: path, kind, executable bit and content of all `files()`."""
        return tree_digest(self.root, self.files(), self.overlay)
