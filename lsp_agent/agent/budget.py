"""What a run has spent, and when it must stop."""

from __future__ import annotations

import time

from lsp_agent.agent.request import Limits
from lsp_agent.chat_model import Usage


class BudgetSpent(Exception):  # noqa: N818 - control flow, not a fault
    """A limit is reached; the message says which."""


class Budget:
    """Turns, tokens and seconds of one run. `reserve_s` is kept for the final proof."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.turns = 0
        self.usage = Usage()
        self.reserve_s = 0.0
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._began

    @property
    def seconds_left(self) -> float:
        """Until the search must end; never negative."""
        return max(0.0, self.limits.max_seconds - self.reserve_s - self.seconds)

    @property
    def seconds_to_end(self) -> float:
        """Until the limit, with what is kept for the proof; never negative."""
        return max(0.0, self.limits.max_seconds - self.seconds)

    @property
    def tokens(self) -> int:
        """Tokens read anew and tokens written."""
        return self.usage.prompt_tokens - self.usage.cached_tokens + self.usage.completion_tokens

    def check(self) -> None:
        """Raise `BudgetSpent` when nothing more may be tried."""
        if self.turns >= self.limits.max_turns:
            raise BudgetSpent(f"the limit of {self.limits.max_turns} turns was reached")
        if self.tokens >= self.limits.max_tokens:
            raise BudgetSpent(f"the limit of {self.limits.max_tokens} tokens was reached")
        if self.seconds_left <= 0:
            raise BudgetSpent(f"the limit of {self.limits.max_seconds:.0f} seconds was reached")
