"""The private copy: faithful, isolated, and back at its base state in milliseconds whatever tests did to it."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lsp_agent.errors import UserError
from lsp_agent.workspace import scratch as scratch_module
from lsp_agent.workspace.changes import FileChange
from lsp_agent.workspace.scratch import ScratchTree
from lsp_agent.workspace.workspace import Workspace


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "pkg/deep").mkdir(parents=True)
    (folder / "a.py").write_bytes(b"\xef\xbb\xbfa = 1\r\nno newline")
    (folder / "pkg/b.py").write_text("b = 1\n")
    (folder / "pkg/deep/c.bin").write_bytes(bytes(range(256)))
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "read_only.txt").write_text("r")
    (folder / "read_only.txt").chmod(0o444)
    (folder / "link.py").symlink_to("pkg/b.py")
    (folder / "away").symlink_to("/etc")
    (folder / ".gitignore").write_text("*.log\n")
    (folder / "x.log").write_text("ignored")
    (folder / ".venv").mkdir()
    (folder / ".venv/x").write_text("")
    return folder


def picture(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every path below `folder` with mode and content."""
    found: dict[str, tuple[int, bytes]] = {}
    for place in folder.rglob("*"):
        mode = place.lstat().st_mode
        if stat.S_ISLNK(mode):
            found[str(place.relative_to(folder))] = (mode, os.fsencode(place.readlink()))
        else:
            found[str(place.relative_to(folder))] = (mode, place.read_bytes() if stat.S_ISREG(mode) else b"")
    return found


def test_the_copy_is_private_faithful_and_removed(root: Path, cache: Path) -> None:
    workspace = Workspace(root, {"pkg/b.py": b"unsaved", "pkg/new.py": b"new"})
    with ScratchTree(workspace) as tree:
        assert tree.path.stat().st_mode & 0o777 == 0o700
        assert tree.path.parent.stat().st_mode & 0o777 == 0o700
        copied = picture(tree.path)
        expected = {path: seen for path, seen in picture(root).items() if path not in ("x.log", ".venv", ".venv/x")}
        assert copied.pop("pkg/new.py")[1] == b"new"
        assert copied.pop("pkg/b.py")[1] == b"unsaved"
        expected.pop("pkg/b.py")
        assert copied == expected
        assert (tree.path / "a.py").stat().st_ino != (root / "a.py").stat().st_ino
        assert (tree.path / "a.py").stat().st_mtime_ns == (root / "a.py").stat().st_mtime_ns
        assert tree.digest() == workspace.digest()
        assert tree.skipped == []
    assert [place.name for place in (cache / "scratch").iterdir()] == [".lock"]


def test_apply_gives_exactly_the_tree_that_the_user_would_get(root: Path) -> None:
    changes = [
        FileChange("a.py", (root / "a.py").read_bytes(), b"a = 2\r\n"),
        FileChange("pkg/b.py", b"b = 1\n", None),
        FileChange("new/folder/n.py", None, b"n"),
        FileChange("run.sh", b"#!/bin/sh\n", b"#!/bin/sh\nexit 1\n"),
    ]
    workspace = Workspace(root)
    with ScratchTree(workspace) as tree:
        base = picture(tree.path)
        tree.apply(changes)
        digest = tree.digest()
        assert (tree.path / "run.sh").stat().st_mode & 0o777 == 0o755
        assert workspace.digest() != digest
        tree.reset()
        assert picture(tree.path) == base
        assert tree.digest() == workspace.digest()
    for change in changes:
        (root / change.path).parent.mkdir(parents=True, exist_ok=True)
        if change.after is None:
            (root / change.path).unlink()
        else:
            (root / change.path).write_bytes(change.after)
    assert workspace.digest() == digest


def test_apply_refuses_stale_changes_and_paths_outside(root: Path) -> None:
    with ScratchTree(Workspace(root)) as tree:
        base = picture(tree.path)
        good = FileChange("pkg/b.py", b"b = 1\n", b"b = 2\n")
        with pytest.raises(ValueError, match=r"a\.py"):
            tree.apply([good, FileChange("a.py", b"wrong", b"")])
        for path in ("../x", "/etc/x", "away/x", ".git/config"):
            with pytest.raises(UserError):
                tree.apply([good, FileChange(path, None, b"")])
        assert picture(tree.path) == base


def vandalise(tree: Path) -> None:
    (tree / "a.py").write_text("broken")
    (tree / "pkg/b.py").unlink()
    (tree / "pkg/b.py").mkdir()
    (tree / "pkg/b.py/inside").write_text("")
    (tree / "run.sh").chmod(0o600)
    (tree / "link.py").unlink()
    (tree / "link.py").symlink_to("a.py")
    (tree / "pkg/deep").rename(tree / "moved")
    (tree / "pkg/deep").symlink_to("/etc")
    (tree / "read_only.txt").unlink()
    (tree / "extra/one/two").mkdir(parents=True)
    (tree / "extra/one/two/file").write_text("x")
    (tree / "extra/one").chmod(0o500)
    (tree / "extra").chmod(0o000)
    os.mkfifo(tree / "pipe")
    (tree / "pkg").chmod(0o555)


def test_reset_undoes_whatever_tests_did(root: Path) -> None:
    with ScratchTree(Workspace(root)) as tree:
        base = picture(tree.path)
        for _ in range(2):
            vandalise(tree.path)
            tree.reset()
            assert picture(tree.path) == base


def test_reset_sees_a_same_sized_write_within_the_same_clock_tick(root: Path) -> None:
    with ScratchTree(Workspace(root)) as tree:
        status = (tree.path / "pkg/b.py").stat()
        for _ in range(30):
            with (tree.path / "pkg/b.py").open("r+b") as file:
                file.write(b"X")
            os.utime(tree.path / "pkg/b.py", ns=(status.st_mtime_ns, status.st_mtime_ns))
            tree.reset()
            assert (tree.path / "pkg/b.py").read_text() == "b = 1\n"


def test_reset_sees_a_write_whose_times_were_put_back(root: Path) -> None:
    with ScratchTree(Workspace(root)) as tree:
        time.sleep(0.06)
        tree.reset()
        place = tree.path / "pkg/b.py"
        status = place.stat()
        place.write_text("c = 1\n")
        os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))
        tree.reset()
        assert place.read_text() == "b = 1\n"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder outside of pytest's own, which pytest cannot remove when a killed test left deep folders in it."""
    folder = Path(tempfile.mkdtemp(prefix="lsp-agent-deep-"))
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(folder))
    yield folder
    subprocess.run(["rm", "-rf", "--", folder], check=True)


def test_folders_nested_beyond_the_longest_path_are_removed(root: Path, elsewhere: Path) -> None:
    nest = "import os\nfor _ in range(1500):\n    os.mkdir('d' * 9)\n    os.chdir('d' * 9)\n"
    with ScratchTree(Workspace(root)) as tree:
        base = picture(tree.path)
        subprocess.run([sys.executable, "-c", nest], cwd=tree.path, check=True)
        tree.reset()
        assert picture(tree.path) == base
        place = tree.path.parent
        assert place.is_relative_to(elsewhere)
    assert not place.exists()


def test_a_stale_pyc_never_stands_in_for_a_new_candidate(root: Path) -> None:
    show = [sys.executable, "-c", "from pkg.b import b; print(b)"]
    with ScratchTree(Workspace(root)) as tree:
        for number in range(2, 6):
            before = (tree.path / "pkg/b.py").read_bytes()
            tree.apply([FileChange("pkg/b.py", before, f"b = {number}\n".encode())])
            os.utime(tree.path / "pkg/b.py", (1e9, 1e9))
            answer = subprocess.run(show, cwd=tree.path, capture_output=True, check=True, text=True)
            assert answer.stdout == f"{number}\n"


def test_a_reset_after_a_candidate_takes_milliseconds(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file but the candidate's is read; the best of several is measured against listing the files alone."""
    for number in range(200):
        (root / f"pkg/m{number}.py").write_text(f"x = {number}\n" * 50)
    read: set[str] = set()
    compare, copy = scratch_module.filecmp.cmp, scratch_module.copy_file

    def noted_compare(place: Path, pristine: Path, shallow: bool) -> bool:
        read.add(place.name)
        return compare(place, pristine, shallow)

    def noted_copy(pristine: Path, place: Path, *, clone: bool) -> bool:
        read.add(place.name)
        return copy(pristine, place, clone=clone)

    with ScratchTree(Workspace(root)) as tree:
        time.sleep(0.06)
        tree.reset()
        monkeypatch.setattr(scratch_module.filecmp, "cmp", noted_compare)
        monkeypatch.setattr(scratch_module, "copy_file", noted_copy)
        resets, listings = [], []
        for _ in range(15):
            tree.apply([FileChange("pkg/b.py", b"b = 1\n", b"b = 2\n")])
            started = time.perf_counter()
            tree.reset()
            resets.append(time.perf_counter() - started)
            started = time.perf_counter()
            assert len([place.lstat() for place in tree.path.rglob("*")]) > 200
            listings.append(time.perf_counter() - started)
        assert read == {"b.py"}
        assert min(resets) < max(0.02, 10 * min(listings))


def test_large_files_are_restored_from_the_original_or_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch_module, "_LARGE", 100)
    with ScratchTree(Workspace(root)) as tree:
        copy, original = tree.path / "pkg/deep/c.bin", root / "pkg/deep/c.bin"
        assert copy.stat().st_ino != original.stat().st_ino
        copy.write_bytes(b"x")
        tree.reset()
        assert copy.read_bytes() == original.read_bytes()
        original.write_bytes(b"the user's edit")
        tree.reset()
        copy.write_bytes(b"x")
        with pytest.raises(UserError, match=r"c\.bin changed"):
            tree.reset()
        assert original.read_bytes() == b"the user's edit"


def test_copies_of_dead_processes_are_removed_and_living_ones_kept(root: Path, cache: Path) -> None:
    die = (
        "import os, sys, signal\nfrom pathlib import Path\n"
        "from lsp_agent.workspace.scratch import ScratchTree\nfrom lsp_agent.workspace.workspace import Workspace\n"
        f"tree = ScratchTree(Workspace(Path({str(root)!r})))\ntree.__enter__()\n"
        "print(tree.path.parent, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    died = subprocess.run([sys.executable, "-c", die], capture_output=True, text=True, check=False)
    left = Path(died.stdout.strip())
    assert left.is_dir()
    reused_pid = cache / "scratch/tree-reused"
    reused_pid.mkdir()
    owner = {"pid": os.getpid(), "started": 5.0, "host": socket.gethostname()}
    (reused_pid / "owner.json").write_text(json.dumps(owner))
    foreign = cache / "scratch/tree-foreign"
    foreign.mkdir()
    (foreign / "owner.json").write_text(json.dumps(owner | {"host": "another machine"}))
    halfway = cache / "scratch/tree-halfway"
    halfway.mkdir()
    with ScratchTree(Workspace(root)) as first, ScratchTree(Workspace(root)) as second:
        assert not left.exists()
        names = {place.name for place in (cache / "scratch").iterdir()}
        assert names == {".lock", "tree-foreign", first.path.parent.name, second.path.parent.name}


def test_too_little_disk_is_one_sentence_and_leaves_nothing(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch_module.shutil, "disk_usage", lambda path: _Usage())
    with pytest.raises(UserError, match="MiB free"):
        ScratchTree(Workspace(root)).__enter__()

    def full(*args: object, **kwargs: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(cache))
    monkeypatch.setattr(scratch_module, "copy_file", full)
    with pytest.raises(UserError, match="No space left"):
        ScratchTree(Workspace(root)).__enter__()
    assert [place.name for place in (cache / "scratch").iterdir()] == [".lock"]


class _Usage:
    free = 10
