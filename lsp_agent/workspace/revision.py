"""Which commit a workspace stands on, for the record of a run."""

from __future__ import annotations

import os
from pathlib import Path


def revision(root: Path) -> str | None:
    """The commit id (hex) that HEAD of the repository around `root` points to; None outside one, or before a commit.

    Only files are read: no git program runs, so nothing that the repository configures does.
    """
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # GitPython otherwise insists on a git program when imported
    from git import InvalidGitRepositoryError, NoSuchPathError, Repo, SymbolicReference

    try:
        with Repo(root, search_parent_directories=True) as repository:
            return SymbolicReference.dereference_recursive(repository, "HEAD")
    except (InvalidGitRepositoryError, NoSuchPathError, ValueError, OSError):
        return None
