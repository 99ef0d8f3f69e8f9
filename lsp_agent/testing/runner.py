"""The runner protocol: the agent and the server know only this."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lsp_agent.cancel import CancelToken
from lsp_agent.testing.results import TestRun


class Runner(Protocol):
    """Runs the tests of a tree."""

    def run(
        self,
        tree: Path,
        nodeids: Sequence[str] = (),
        *,
        timeout_s: float,
        cancel: CancelToken,
        coverage: bool = False,
        fail_fast: bool = False,
    ) -> TestRun:
        """Run all tests of `tree`, or only `nodeids`, and kill the whole process group after `timeout_s` seconds.

        `tree` is a scratch copy that stands in for the workspace: what the tests write stays in it. Raises
        `Cancelled` within a second of `cancel`, and `UserError` when there is no usable interpreter. Everything
        else, a broken conftest or a crashed interpreter too, is said in the returned `TestRun`.
        """

    def is_protected(self, path: str) -> bool:
        """Whether `path` (relative, posix) is a test, a conftest or test configuration, which no run may change."""
