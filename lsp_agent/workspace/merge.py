"""Three-way merge of one file's bytes, by git."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lsp_agent.workspace.git import run_git


class ConflictError(Exception):
    """Both sides changed the same lines, or the content has no lines."""


def merge(ours: bytes | None, base: bytes | None, theirs: bytes | None) -> bytes | None:
    """Carry the change from `base` to `theirs` over to `ours`; None: the file does not exist.

    Line endings, byte order marks and a missing final newline survive. Raises `ConflictError`.
    """
    if ours == base:
        return theirs
    if theirs in (base, ours):
        return ours
    if ours is None or base is None or theirs is None or any(b"\0" in side for side in (ours, base, theirs)):
        raise ConflictError
    with tempfile.TemporaryDirectory(prefix="lsp-agent-merge-") as folder:
        for name, content in (("ours", ours), ("base", base), ("theirs", theirs)):
            Path(folder, name).write_bytes(content)
        own = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CEILING_DIRECTORIES": folder}
        merged = run_git(["merge-file", "-p", "-q", "ours", "base", "theirs"], Path(folder), env=own)
    if merged.returncode != 0:
        raise ConflictError
    return merged.stdout
