"""What a caller asks of the agent, and what it gets back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import ChatModel, Usage
from lsp_agent.workspace.changes import FileChange, unified_diff

OpenModel = Callable[[str | None, CancelToken], ChatModel]
"""Opens a model by name (None: the default); `lsp_agent.models.open_model` is one. `fix` closes what it opened."""

Status = Literal["green", "nothing_failing", "flaky", "not_green"]
"""`green`: every target passes and nothing else got worse, proven on the tree that `changes` gives; `nothing_failing`:
no target failed to begin with; `flaky`: targets failed once and passed on the same code; `not_green`: the rest."""


@dataclass(frozen=True)
class Limits:
    """When a run ends without success. One turn is one call of the model."""

    max_turns: int = 300
    max_seconds: float = 600.0
    max_tokens: int = 400_000
    """Tokens read anew plus tokens written."""


@dataclass(frozen=True)
class FixRequest:
    """Make tests pass: those of `nodeids`, or every failing one."""

    nodeids: tuple[str, ...] = ()
    model: str | None = None
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    test_timeout_s: float = 120.0
    """Longest run of the whole test suite."""


@dataclass(frozen=True)
class FixResult:
    """How a run ended. Only a `green` result has `changes`: nothing else is proven, so nothing else is applied."""

    status: Status
    changes: tuple[FileChange, ...] = ()
    """What the caller applies; `before` is the user's file as it was when the proof ran."""
    best: tuple[FileChange, ...] = ()
    """The best attempt, for the report; equal to `changes` when green."""
    fixed: tuple[str, ...] = ()
    """Tests that failed before and pass with `best`."""
    still_failing: tuple[str, ...] = ()
    """Targets that fail with `best`."""
    broken: tuple[str, ...] = ()
    """Tests that `best` makes worse: they fail with it and did not before, or passed and are gone; empty when green."""
    flaky: tuple[str, ...] = ()
    """Targets that failed in the first run and passed in the second, on the same code."""
    other_failing: tuple[str, ...] = ()
    """Tests that nobody asked to fix and that failed before as now."""
    solved_by: tuple[str, ...] = ()
    """The stage that solved each bug, in the order they were solved."""
    turns: int = 0
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0
    trajectory: Path | None = None
    reason: str = ""
    """One sentence on why it is not green; empty otherwise."""

    @property
    def diff(self) -> str:
        """The best attempt as a unified diff."""
        return unified_diff(self.best)
