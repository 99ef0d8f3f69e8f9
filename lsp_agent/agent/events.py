"""What a run tells whoever watches it: the command line's progress and the server's progress reports.

Events are plain data, sent in order from the thread that runs `fix`; a handler must return quickly and must not raise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lsp_agent.chat_model import Usage


@dataclass(frozen=True)
class BaselineDone:
    """The first test run, on the unchanged tree, ended."""

    tests: int
    failing: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class ModelReady:
    """The model is loaded."""

    name: str
    seconds: float


@dataclass(frozen=True)
class TargetStarted:
    """Work on one failing test begins; `suspects` are functions as `path:name`, most suspicious first."""

    nodeid: str
    message: str
    suspects: tuple[str, ...]


@dataclass(frozen=True)
class Trying:
    """A turn begins: the model is about to be asked."""

    turn: int
    stage: str
    where: str
    """`path:line`, or `path:line name`."""
    tokens: int
    """Tokens read anew and written so far."""
    seconds: float
    """Since the run began."""


@dataclass(frozen=True)
class CandidateJudged:
    """One candidate edit was refused by a gate or run against the tests."""

    turn: int
    stage: str
    where: str
    verdict: str
    """`refused: …`, `fails`, `further` (it still fails, but later in the test), `breaks others`, `passes`."""
    tests_run: int
    seconds: float


@dataclass(frozen=True)
class TargetSolved:
    """The failing test passes and nothing else got worse."""

    nodeid: str
    stage: str
    fixed: tuple[str, ...]


@dataclass(frozen=True)
class Verifying:
    """The final full run, on a fresh copy of the user's tree with the changes."""


@dataclass(frozen=True)
class Finished:
    """The run ended; the result says the rest."""

    status: str
    turns: int
    usage: Usage
    seconds: float


Event = BaselineDone | ModelReady | TargetStarted | Trying | CandidateJudged | TargetSolved | Verifying | Finished
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Take an event and do nothing with it."""
