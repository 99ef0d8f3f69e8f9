"""Showing a diff: as a file that the editor opens where it can, else in a message and the log."""

from __future__ import annotations

import os
import time
import uuid

from lsp_agent import paths
from lsp_agent.lsp.convert import uri_of
from lsp_agent.lsp.folder import Folder

KEEP = 20
"""Diffs kept; older ones are removed."""


def show_diff(folder: Folder, diff: str) -> None:
    """Write `diff` to a file that only the user can read, and open it or say where it is."""
    if not diff:
        return
    place = paths.state_dir() / "diffs"
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    for old in sorted(place.glob("*.diff"))[: -KEEP + 1]:
        old.unlink(missing_ok=True)
    path = place / f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}.diff"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(diff)
    if not folder.editor.show_document(uri_of(path)):
        folder.editor.show(f"The diff is in {path}.")
