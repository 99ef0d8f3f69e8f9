"""The record of a run: one JSON object a line, written as it happens, so that a killed run leaves all it did.

Files lie under `paths.state_dir()/runs/`, readable by the user only: they hold prompts and therefore source code.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsp_agent import paths

KEEP = 200
"""Runs kept; older ones are removed when a new one begins."""


class Trajectory:
    """An open record; every `write` is one line, handed to the operating system before it returns."""

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or paths.state_dir() / "runs"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_oldest(folder)
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        self.path = folder / f"{stamp}-{uuid.uuid4().hex[:8]}.jsonl"
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._began = time.monotonic()

    def write(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Append one record: `kind`, seconds since the run began, and `fields` (anything JSON can hold)."""
        if self._fd < 0:
            return
        record = {"kind": kind, "t": round(time.monotonic() - self._began, 3), **fields}
        os.write(self._fd, (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode("utf-8", "replace"))

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _remove_oldest(folder: Path) -> None:
    # Only names that this class gives: nothing else in the folder is ours to remove.
    runs = sorted(p for p in folder.glob("*.jsonl") if re.fullmatch(r"\d{8}T\d{6}-[0-9a-f]{8}\.jsonl", p.name))
    for path in runs[: max(0, len(runs) - KEEP + 1)]:
        path.unlink(missing_ok=True)
