from __future__ import annotations

import subprocess
from pathlib import Path

from lsp_agent.workspace.revision import revision


def git(root: Path, *args: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *who, *args], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def test_a_folder_inside_a_repository_has_its_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert revision(tmp_path) is None, "there is no commit yet"
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    (tmp_path / "package").mkdir()
    assert revision(tmp_path / "package") == git(tmp_path, "rev-parse", "HEAD")
    git(tmp_path, "checkout", "-q", "--detach")
    assert revision(tmp_path) == git(tmp_path, "rev-parse", "HEAD")


def test_a_plain_folder_has_none(tmp_path: Path) -> None:
    assert revision(tmp_path) is None
    assert revision(tmp_path / "missing") is None


def test_nothing_the_repository_configures_is_run(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    for name in ("core.fsmonitor", "core.sshCommand", "core.pager"):
        git(tmp_path, "config", name, f"touch {tmp_path}/ran")
    assert revision(tmp_path)
    assert not (tmp_path / "ran").exists()
