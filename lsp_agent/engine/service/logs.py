"""The engine's log: rotated, the user's alone, and with all that native libraries print. Never prompts or answers."""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path

MOST_BYTES = 1_000_000
ROTATED = 3
"""Old logs of one engine."""
ENGINES_KEPT = 10
"""Engines of other settings and versions whose logs stay."""


class _Log(RotatingFileHandler):
    """The process's standard output and error are the log as well, also after it was rotated."""

    def _open(self) -> io.TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")


def log_to(path: Path, *, console: bool = False, most_bytes: int = MOST_BYTES) -> None:
    """Send the log, and all that is printed, to a file; with `console` to the terminal instead."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if not console:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_old(path)
        handler = _Log(path, maxBytes=most_bytes, backupCount=ROTATED)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for chatty in ("httpx", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    faulthandler.enable(file=2)


def _remove_old(path: Path) -> None:
    """Of the logs of other engines keep the newest."""
    others = [other for other in path.parent.glob("engine-*.log*") if not other.name.startswith(path.name)]
    for old in sorted(others, key=lambda other: other.lstat().st_mtime)[:-ENGINES_KEPT]:
        old.unlink(missing_ok=True)
