"""A private git object store: durable content for checkpoints that never touches the user's repository."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lsp_agent.errors import UserError
from lsp_agent.workspace.files import remove_tree, write_durably
from lsp_agent.workspace.git import run_git, split_z
from lsp_agent.workspace.workspace import Workspace

_LARGE = 16 << 20  # bytes; larger files are not in snapshots (the files that a run changes always are in the store)

_CONFIG = b"""[core]
\trepositoryformatversion = 0
\tbare = true
\tfilemode = true
\tautocrlf = false
\tlogAllRefUpdates = false
\tprotectNTFS = false
\tprotectHFS = false
\tfsync = all
\tfsyncMethod = batch
[gc]
\tauto = 0
"""

# This file outranks every .gitattributes of the user's: bytes go in as they are, and no filter program runs.
_ATTRIBUTES = b"* -text -eol -crlf -ident -filter -working-tree-encoding\n"


def blob_id(content: bytes) -> str:
    """The git object id (hex SHA-1) of `content` as a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class ObjectStore:
    """A bare repository of our own at `folder`; the caller holds the lock of the workspace for every method."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self) -> None:
        """Make the store, or finish making it, and remove the locks of processes that were killed."""
        if not (self._folder / "info/attributes").exists():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._git("init", "--quiet", "--bare", "--object-format=sha1", "--template=", str(self._folder))
            (self._folder / "info").mkdir(exist_ok=True)
            write_durably(self._folder / "config", _CONFIG)
            write_durably(self._folder / "info/attributes", _ATTRIBUTES)
        for lock in [*self._folder.glob("*.lock"), *self._folder.glob("refs/**/*.lock")]:
            lock.unlink(missing_ok=True)
        for left in self._folder.glob("incoming-*"):
            remove_tree(left)

    def put(self, contents: Sequence[bytes]) -> list[str]:
        """Store blobs durably; their ids in order."""
        if not contents:
            return []
        with tempfile.TemporaryDirectory(prefix="incoming-", dir=self._folder) as incoming:
            names = [Path(incoming, str(number)) for number in range(len(contents))]
            for name, content in zip(names, contents, strict=True):
                name.write_bytes(content)
            listing = "".join(f"{_quote(str(name))}\n" for name in names).encode("utf-8", "surrogateescape")
            output = self._git("hash-object", "-w", "--no-filters", "--stdin-paths", input=listing)
        ids = output.decode().split()
        assert ids == [blob_id(content) for content in contents], "git stored other bytes than it was given"
        return ids

    def get(self, blob: str) -> bytes:
        """The content of a blob."""
        return self._git("cat-file", "blob", blob)

    def keep(self, run_id: str, blobs: Sequence[str]) -> None:
        """Hold `blobs` with a reference for as long as the run is kept."""
        unique = sorted(set(blobs))
        listing = b"".join(f"100644 blob {blob}\t{blob}\0".encode() for blob in unique)
        tree = self._git("mktree", "-z", input=listing).decode().strip()
        self._git("update-ref", f"refs/runs/{run_id}/files", tree)

    def snapshot(self, run_id: str, workspace: Workspace) -> str:
        """Store tracked, untracked and unsaved files of `workspace` as a commit `refs/runs/<run_id>/base`; its id.

        Only files that changed since the last snapshot are read. Unreadable files and those above 16 MiB are left out.
        """
        files = workspace.scan()
        wanted = [path for path, status in files.items() if status is not None and _fits(workspace.root / path, status)]
        index = {"GIT_WORK_TREE": str(workspace.root), "GIT_INDEX_FILE": str(self._folder / "index")}
        try:
            self._refresh_index(wanted, workspace.root, index)
        except UserError:
            # A cache of ours that a crash damaged must not stand in the way: take everything anew.
            (self._folder / "index").unlink(missing_ok=True)
            self._refresh_index(wanted, workspace.root, index)
        if workspace.overlay:
            index["GIT_INDEX_FILE"] = str(self._folder / "index.unsaved")
            with contextlib.suppress(FileNotFoundError):
                (self._folder / "index.unsaved").write_bytes((self._folder / "index").read_bytes())
            names = sorted(workspace.overlay)
            blobs = self.put([workspace.overlay[name] for name in names])
            lines = [f"100644 {blob}\t{name}" for blob, name in zip(blobs, names, strict=True)]
            self._git("update-index", "--replace", "-z", "--index-info", input=_join_z(lines), env=index)
        tree = self._git("write-tree", env=index).decode().strip()
        who = {f"GIT_{role}_{what}": "lsp-agent" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        commit = self._git("commit-tree", "-m", f"Before run {run_id}", tree, env=who).decode().strip()
        self._git("update-ref", f"refs/runs/{run_id}/base", commit)
        return commit

    def _refresh_index(self, wanted: Sequence[str], root: Path, index: dict[str, str]) -> None:
        known = split_z(self._git("ls-files", "-z", cwd=root, env=index))
        gone = _join_z(sorted(set(known) - set(wanted)))
        self._git("update-index", "--force-remove", "-z", "--stdin", input=gone, cwd=root, env=index)
        add = ("update-index", "--add", "--remove", "--replace", "-z", "--stdin")
        self._git(*add, input=_join_z(sorted(wanted)), cwd=root, env=index)
        self._git("write-tree", env=index)

    def forget(self, run_ids: Sequence[str]) -> None:
        """Drop what runs held, and give the space back (not what is recent: a killed process's git may still write)."""
        for run_id in run_ids:
            for name in ("files", "base"):
                self._git("update-ref", "-d", f"refs/runs/{run_id}/{name}")
        self._git("gc", "--quiet", "--prune=1.hour.ago")

    def _git(self, *args: str, input: bytes = b"", cwd: Path | None = None, env: dict[str, str] | None = None) -> bytes:
        own = {"GIT_DIR": str(self._folder), "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        done = run_git(args, cwd or self._folder, input=input, env=own | (env or {}))
        if done.returncode != 0:
            last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
            raise UserError(f"The checkpoint could not be written to {self._folder}: {last or 'git failed'}.")
        return done.stdout


def _fits(place: Path, status: os.stat_result) -> bool:
    return stat.S_ISLNK(status.st_mode) or (status.st_size <= _LARGE and os.access(place, os.R_OK))


def _join_z(paths: Sequence[str]) -> bytes:
    return b"".join(os.fsencode(path) + b"\0" for path in paths)


def _quote(path: str) -> str:
    """A path as git reads it from a line: in C quotes if it holds something special."""
    if not any(character in path for character in '"\\\n\t'):
        return path
    quoted = path.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{quoted}"'
