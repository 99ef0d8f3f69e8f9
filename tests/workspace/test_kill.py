"""kill -9 at random points of applies and undos: all or nothing, no edit of the user's lost, their git untouched."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path

from lsp_agent.errors import UserError
from lsp_agent.workspace.changes import FileChange
from lsp_agent.workspace.checkpoints import Checkpoints
from lsp_agent.workspace.workspace import Workspace

KILLS = 32
NAMES = ("a.py", "pkg/b.py", "pkg/c.py", "d.txt")
FILLER = b"-\n" * 8


def content(version: bytes, user: bytes) -> bytes:
    """A block that runs change, and far from it a block that the user changes."""
    return (version + b"\n") * 50 + FILLER + user


def split(text: bytes) -> tuple[bytes, bytes]:
    """The version and the user's block; fails unless `text` is whole."""
    head, separator, user = text.partition(FILLER)
    lines = head.splitlines()
    assert separator
    assert len(lines) == 50
    assert len(set(lines)) == 1, "a part of one version and a part of another"
    return lines[0], user


def slow_down(owner: object, name: str) -> None:
    """A slow disk, so that kills meet writes about as often as everything else."""
    real = getattr(owner, name)

    def slow(*args: object, **kwargs: object) -> object:
        time.sleep(0.003)
        return real(*args, **kwargs)

    setattr(owner, name, slow)


def work(root: Path, state: Path, seed: int, progress: Connection) -> None:
    """Apply and undo runs until killed."""
    choose = random.Random(seed)
    slow_down(os, "fsync")
    slow_down(Path, "replace")
    slow_down(Path, "unlink")
    checkpoints = Checkpoints(root, state)
    started = time.monotonic()
    number = 0
    while True:
        try:
            if choose.random() < 0.6:
                number += 1
                run_id = f"r{seed}-{number}"
                checkpoints.begin(run_id, Workspace(root))
                changes = [FileChange(name, (root / name).read_bytes(), None) for name in NAMES]
                changes = [
                    FileChange(change.path, change.before, content(run_id.encode(), split(change.before or b"")[1]))
                    for change in changes
                ]
                created = root / f"new/{run_id}"
                changes.append(FileChange(f"new/{run_id}", None, b"created"))
                checkpoints.apply(run_id, changes)
                assert created.exists()
            elif choose.random() < 0.7:
                checkpoints.undo()
            else:
                checkpoints.undo(choose.choice([info.id for info in checkpoints.runs()] or ["none"]))
        except UserError:
            pass
        progress.send(time.monotonic() - started)
        started = time.monotonic()


def git_state(root: Path) -> tuple[str, dict[str, str]]:
    hashes = {
        str(place.relative_to(root)): hashlib.sha256(place.read_bytes()).hexdigest()
        for place in (root / ".git").rglob("*")
        if place.is_file()
    }
    head = subprocess.run(["git", "rev-parse", "HEAD", "stash@{0}"], cwd=root, capture_output=True, check=True)
    return head.stdout.decode(), hashes


def make_project(root: Path) -> None:
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content(b"original", b"user's own\n"))
    (root / "pkg/c.py").chmod(0o755)
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    (root / "stashed").write_text("1")
    for command in (
        ["init", "-q"],
        ["add", "a.py", "pkg"],
        ["commit", "-qm", "1"],
        ["add", "stashed"],
        ["stash", "-q"],
        ["add", "d.txt"],
    ):
        subprocess.run(["git", *identity, *command], cwd=root, check=True)


def test_kill_9_at_random_points(tmp_path: Path) -> None:
    root, state = tmp_path / "project", tmp_path / "state"
    root.mkdir()
    make_project(root)
    git_before = git_state(root)
    choose = random.Random(2)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["lsp_agent.workspace.checkpoints", "test_kill"])
    typed: dict[str, list[bytes]] = {name: [] for name in NAMES}
    taken_back = 0
    seen: set[tuple[bytes, ...]] = set()
    legitimate: set[tuple[bytes, ...]] = set()

    for kill in range(KILLS):
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=work, args=(root, state, kill, sender))
        process.start()
        # Reckoned in the worker's own speed, so that a busy machine changes nothing about where the kills fall.
        duration = 0.1
        for _ in range(choose.randrange(1, 3)):
            assert receiver.poll(60)
            duration = receiver.recv()
        time.sleep(choose.uniform(0.0, 1.2 * duration))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL

        edited = None
        if choose.random() < 0.4:  # the user types before anything has recovered
            edited = choose.choice(NAMES)
            line = b"typed %d\n" % kill
            typed[edited].append(line)
            with (root / edited).open("ab") as file:
                file.write(line)

        checkpoints = Checkpoints(root, state)
        messages = checkpoints.recover()
        taken_back += len(messages)
        infos = {info.id: info for info in checkpoints.runs()}
        assert "applying" not in {info.status for info in infos.values()}
        versions = {}
        for name in NAMES:
            versions[name], user = split((root / name).read_bytes())
            assert user == b"user's own\n" + b"".join(typed[name])
            assert versions[name] == b"original" or versions[name].decode() in infos
        state_now = tuple(versions[name] for name in NAMES)
        if edited is not None and messages:
            # The edited file stays as it is; the others are still all or nothing. Undoing may lead back here.
            assert len({versions[name] for name in NAMES if name != edited}) == 1
            legitimate.add(state_now)
        assert len(set(state_now)) == 1 or state_now in legitimate, (messages, versions)
        seen.add(state_now)
        for place in (root / "new").glob("*"):
            assert infos[place.name].status in ("applied", "interrupted")
        assert (root / "pkg/c.py").stat().st_mode & 0o777 == 0o755
        assert not list(root.rglob(".lsp-agent*"))
        assert git_state(root) == git_before
    assert taken_back >= 3, "no kill met a write; the test shows nothing"
    assert len(seen) >= 10
