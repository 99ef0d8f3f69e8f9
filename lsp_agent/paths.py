"""Where lsp-agent keeps things: models in the user's cache folder, runs and checkpoints in the user's state folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import platformdirs

APP = "lsp-agent"


def cache_dir() -> Path:
    """Files that can be downloaded or made again (`LSP_AGENT_CACHE_DIR` overrides it)."""
    return Path(os.environ.get("LSP_AGENT_CACHE_DIR") or platformdirs.user_cache_path(APP))


def state_dir() -> Path:
    """Trajectories, checkpoints and logs (`LSP_AGENT_STATE_DIR` overrides it)."""
    return Path(os.environ.get("LSP_AGENT_STATE_DIR") or platformdirs.user_state_path(APP))


def models_dir() -> Path:
    """Installed model packages, one folder a model."""
    return cache_dir() / "models"


def fsync_directory(folder: Path) -> None:
    """Make the names in `folder` survive a power cut; where the system cannot, do nothing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
