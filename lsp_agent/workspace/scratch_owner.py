"""Folders that belong to a living process: made with their owner's name in them, removed when the owner is gone."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from pathlib import Path

import filelock
import psutil

from lsp_agent.workspace.files import remove_tree, write_durably

_FOREIGN_MAX_AGE_S = 7 * 86400.0  # another machine's processes cannot be seen on a shared home folder


def claim(parent: Path) -> Path:
    """Make a new private (0700) folder in `parent` for this process, and remove those of processes that died."""
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with filelock.FileLock(parent / ".lock", mode=0o600):
        dead = [_condemn(home) for home in parent.iterdir() if home.is_dir() and not _is_alive(home)]
        home = Path(tempfile.mkdtemp(prefix="tree-", dir=parent))
        owner = {
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "host": socket.gethostname(),
        }
        write_durably(home / "owner.json", json.dumps(owner).encode())
    for folder in dead:
        remove_tree(folder)
    return home


def _condemn(home: Path) -> Path:
    """Take a dead folder's name away under the lock, so that the slow removal happens outside of it."""
    if home.name.startswith("dead-"):
        return home
    return home.rename(home.with_name(f"dead-{time.time_ns()}-{home.name}"))


def _is_alive(home: Path) -> bool:
    if home.name.startswith("dead-"):
        return False
    try:
        owner = json.loads((home / "owner.json").read_bytes())
        if owner["host"] != socket.gethostname():
            return time.time() - home.stat().st_mtime < _FOREIGN_MAX_AGE_S
        # The kernel's start time is reckoned from the boot time, which clock corrections move by fractions of a second.
        return abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) < 2.0
    except (OSError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):
        return False  # made under the lock, so a folder without an owner is one whose maker died
    except psutil.AccessDenied:
        return True
