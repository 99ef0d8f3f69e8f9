"""Which files of a folder belong to the workspace: git's own answer, or .gitignore files and well-known junk."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import pathspec

from lsp_agent.paths import cache_dir, state_dir
from lsp_agent.workspace.git import GitMissingError, run_git, split_z

IGNORE_FILE = ".lspagentignore"
"""At the workspace root, in .gitignore syntax: files that the agent leaves out, tracked ones too."""

TEMPORARY_PREFIX = ".lsp-agent-"
"""Start of the names of our own temporary files beside the user's."""

_VERSION_CONTROL = (".git", ".hg", ".svn")
_PYTHON = (
    ".venv",
    "__pycache__",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    ".tox",
    ".nox",
    ".hypothesis",
    ".eggs",
)
JUNK = frozenset((*_VERSION_CONTROL, *_PYTHON, "node_modules", ".ipynb_checkpoints", ".DS_Store"))


class IgnoreRules:
    """The ignore rules of one root, asked of git where the root is a work tree."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.in_git = self._ask_git()
        self._own = _spec(root / IGNORE_FILE)
        self._ours = tuple(
            f"{folder.relative_to(root).as_posix()}/"
            for folder in (cache_dir().resolve(), state_dir().resolve())
            if folder.is_relative_to(root) and folder != root
        )
        self._specs: dict[str, pathspec.GitIgnoreSpec | None] = {}
        self._virtualenvs: dict[str, bool] = {}

    def _ask_git(self) -> bool:
        """Whether git answers for the root; not if the root lies in an ignored folder of a bigger repository."""
        try:
            inside = run_git(["rev-parse", "--is-inside-work-tree"], self._root)
            if inside.stdout.strip() != b"true":
                return False
            return run_git(["check-ignore", "-q", "."], self._root).returncode != 0
        except GitMissingError:
            return False

    def listed(self) -> set[str]:
        """Candidate paths, existing or not, of files and symbolic links; folders are not among them."""
        paths = set(self._git_files("")) if self.in_git else set(self._walk(""))
        return {path for path in paths if not self._left_out(path)}

    def ignored(self, paths: Iterable[str]) -> set[str]:
        """Those of `paths` that do not belong to the workspace; they need not exist."""
        paths = list(paths)
        ignored = {path for path in paths if self._left_out(path) or self._is_junk(path)}
        if self.in_git:
            rest = [path for path in paths if path not in ignored]
            # Per nested repository: git refuses to judge paths inside a submodule from outside.
            by_repository: dict[str, list[str]] = {}
            for path in rest:
                by_repository.setdefault(self._repository_of(path), []).append(path)
            for prefix, group in by_repository.items():
                ignored |= self._check_ignore(prefix, group)
            return ignored
        return ignored | {path for path in paths if any(self._matches(part, d) for part, d in _with_parents(path))}

    def _check_ignore(self, prefix: str, paths: list[str]) -> set[str]:
        """Those of `paths`, all in the repository at `prefix`, that its ignore rules name."""
        # "./" keeps a name such as ":(top)x" from being read as a pattern.
        names = b"\0".join(b"./" + os.fsencode(path.removeprefix(prefix)) for path in paths)
        answer = run_git(["check-ignore", "-z", "--stdin"], self._root / prefix, input=names)
        if answer.returncode in (0, 1):
            return {prefix + name.removeprefix("./") for name in split_z(answer.stdout)}
        # One path that git cannot judge, such as one behind a symbolic link, fails them all; alone, it is not ours.
        if len(paths) == 1:
            return set(paths)
        half = len(paths) // 2
        return self._check_ignore(prefix, paths[:half]) | self._check_ignore(prefix, paths[half:])

    def _left_out(self, path: str) -> bool:
        name = path.rpartition("/")[2]
        # A root such as the home folder holds our own copies and checkpoints.
        if name.startswith(TEMPORARY_PREFIX) or path.startswith(self._ours):
            return True
        return self._own is not None and self._own.match_file(path)

    def _is_junk(self, path: str) -> bool:
        parts = path.split("/")
        if not JUNK.isdisjoint(parts):
            return True
        return any(self._is_virtualenv("/".join(parts[:end])) for end in range(1, len(parts)))

    def _is_virtualenv(self, folder: str) -> bool:
        if folder not in self._virtualenvs:
            self._virtualenvs[folder] = (self._root / folder / "pyvenv.cfg").is_file()
        return self._virtualenvs[folder]

    def _repository_of(self, path: str) -> str:
        """The innermost nested repository that holds `path`, as a prefix ending in "/", or ""."""
        parts = path.split("/")
        for end in range(len(parts) - 1, 0, -1):
            prefix = "/".join(parts[:end])
            if (self._root / prefix / ".git").exists() and not (self._root / prefix).is_symlink():
                return prefix + "/"
        return ""

    def _git_files(self, prefix: str) -> Iterator[str]:
        """Tracked files, and untracked files that are neither ignored nor junk, of one repository and those in it."""
        folder = self._root / prefix
        tracked = split_z(run_git(["ls-files", "-z", "--cached"], folder).stdout)
        untracked = split_z(run_git(["ls-files", "-z", "--others", "--exclude-standard"], folder).stdout)
        tracked_paths = {prefix + name for name in tracked}
        for path in sorted(tracked_paths | {prefix + name for name in untracked}):
            nested = path.rstrip("/")
            if path not in tracked_paths and self._is_junk(nested):
                continue
            if path.endswith("/") or (path in tracked_paths and _is_folder(self._root / path)):
                # A submodule or a repository inside this one; without a `.git` of its own git would answer for us.
                if (self._root / nested / ".git").exists():
                    yield from self._git_files(nested + "/")
            else:
                yield path

    def _walk(self, folder: str) -> Iterator[str]:
        try:
            entries = list(os.scandir(self._root / folder))
        except OSError:
            return  # vanished or unreadable: the tests could not read it either
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if entry.name in JUNK or self._matches(path, is_folder):
                continue
            if not is_folder:
                yield path
            elif not self._is_virtualenv(path):
                yield from self._walk(path)

    def _matches(self, path: str, is_folder: bool) -> bool:
        """Whether the .gitignore files above `path` ignore it: the innermost file that says anything decides."""
        folder = path
        while folder:
            folder = folder.rpartition("/")[0]
            if folder not in self._specs:
                self._specs[folder] = _spec(self._root / folder / ".gitignore")
            spec = self._specs[folder]
            if spec is not None:
                below = path[len(folder) + 1 :] if folder else path
                verdict = spec.check_file(below + "/" if is_folder else below).include
                if verdict is not None:
                    return verdict
        return False


def _with_parents(path: str) -> Iterator[tuple[str, bool]]:
    parts = path.split("/")
    for end in range(1, len(parts)):
        yield "/".join(parts[:end]), True
    yield path, False


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _spec(file: Path) -> pathspec.GitIgnoreSpec | None:
    try:
        lines = file.read_bytes().decode("utf-8", "surrogateescape").splitlines()
    except OSError:
        return None
    return pathspec.GitIgnoreSpec.from_lines(line for line in lines if _parses(line))


def _parses(line: str) -> bool:
    """git skips a pattern that it cannot use; one bad line must not cost the whole file."""
    try:
        pathspec.GitIgnoreSpec.from_lines([line])
    except ValueError:
        return False
    return True
