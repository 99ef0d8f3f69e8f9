"""Constrained decoding: which tokens may come next. `docs/constraints.md` says what each format promises."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from lsp_agent.engine.constraints.formats import compile_format
from lsp_agent.engine.constraints.tools import constraint_for_tools

__all__ = ["Constraint", "compile_format", "constraint_for_tools"]


class Constraint(Protocol):
    """What one answer must obey, moved on token by token. Not thread-safe."""

    def allowed(self) -> np.ndarray:
        """Which tokens may come next, bool [vocabulary]; valid until `accept`. End tokens where the answer may end.

        Raises `UserError` when the format has become too complex to go on with.
        """

    def accept(self, token: int) -> None:
        """Take note of the next token, one of those allowed."""

    def forced(self) -> list[int]:
        """The tokens that must come next because nothing else may; often none. `accept` is still called for each."""

    def ended(self) -> bool:
        """Whether the answer is complete and nothing may follow but an end token."""

    def left_out(self) -> bool:
        """Whether the last token was none of the answer's but ended it, as an end token does."""
