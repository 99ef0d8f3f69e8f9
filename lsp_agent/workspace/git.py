"""Run git so that neither the environment nor the user's configuration can make it run programs or alter content."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lsp_agent.errors import UserError

# A repository's own configuration may name programs (`core.fsmonitor`, hooks, the pager, those that fetch what a
# partial clone lacks): other people's code is hostile, and listing files must not run it. A folder that only looks
# like a bare repository may be part of the code, so it is none unless GIT_DIR names it.
_HARMLESS = (
    *("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-c", "core.pager=cat"),
    *("-c", "safe.bareRepository=explicit"),
)
# Before git 2.39.4 GIT_NO_LAZY_FETCH is unknown; an empty list of protocols stops every transport in all versions.
_OFFLINE = {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "", "GIT_TERMINAL_PROMPT": "0"}


class GitMissingError(UserError):
    """There is no git program."""

    def __init__(self) -> None:
        super().__init__("git was not found: install git and make sure that it is on PATH.")


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The process environment without any `GIT_*` variable (a hook of the user's may have set them), plus `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return {**kept, **_OFFLINE, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C", **(extra or {})}


def run_git(
    args: Sequence[str], cwd: Path, *, input: bytes = b"", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run `git args` in `cwd` with `input` on stdin; the caller looks at `returncode`. Raises `GitMissingError`.

    GitPython is not used here: it cannot drop inherited `GIT_*` variables, nor pass bytes to stdin.
    """
    try:
        return subprocess.run(
            ["git", *_HARMLESS, *args],
            cwd=cwd,
            input=input,
            capture_output=True,
            env=clean_environment(env),
            check=False,
        )
    except FileNotFoundError as error:
        if not cwd.is_dir():
            raise UserError(f"The folder {cwd} does not exist.") from error
        raise GitMissingError from error


def split_z(output: bytes) -> list[str]:
    """Split NUL-separated paths; names that are not UTF-8 keep their bytes as surrogate escapes."""
    return [os.fsdecode(part) for part in output.split(b"\0") if part]
