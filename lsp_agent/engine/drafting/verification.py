"""Verification: several ids are read in one run, and as many of them are kept as turn out to be right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lsp_agent.engine.sampling import Logits


@dataclass(frozen=True)
class Verified:
    """What a run over some ids says, before it is decided how many of them the state keeps.

    `logits`: one for each id, what follows it. `accept(count)` counts the first `count` (at least 1) ids as read and
    forgets the others, once and before the state is used again; a state of which nothing is accepted is as before the
    run.
    """

    logits: list[Logits]
    accept: Callable[[int], None]
