"""Answers that are an indented block: they end where the model goes on at the margin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from lsp_agent.engine.constraints import grammar

if TYPE_CHECKING:
    from lsp_agent.engine.constraints import Constraint
    from lsp_agent.engine.tokens import Tokenizer


def ending_at_the_margin(make: Callable[[], Constraint], tokenizer: Tokenizer) -> Callable[[], Constraint]:
    """Let tokens that begin a line at the margin end an answer wherever it may end.

    A model that has written a function goes on with an example, or closes its code fence. Were that not allowed, it
    would have to go on inside of the function, since the end token was not what it had in mind.
    """
    margin, ends = grammar.beginning_with_no_space(tokenizer), np.array(sorted(tokenizer.end_ids))
    return lambda: _MarginConstraint(make(), tokenizer, margin, ends)


class _MarginConstraint:
    def __init__(self, inner: Constraint, tokenizer: Tokenizer, margin: np.ndarray, ends: np.ndarray) -> None:
        self._inner, self._tokenizer, self._margin, self._ends = inner, tokenizer, margin, ends
        self._line_begins = False
        self._left = False

    def allowed(self) -> np.ndarray:
        """See `Constraint.allowed`."""
        allowed = self._inner.allowed()
        return allowed | self._margin if self._line_begins and allowed[self._ends].any() else allowed

    def accept(self, token: int) -> None:
        """See `Constraint.accept`."""
        if self._margin[token] and not self._inner.allowed()[token] and self.allowed()[token]:
            self._left = True
            return
        self._inner.accept(token)
        self._line_begins = self._tokenizer.token_bytes(token).endswith(b"\n")

    def forced(self) -> list[int]:
        """See `Constraint.forced`."""
        return [] if self._left else self._inner.forced()

    def ended(self) -> bool:
        """See `Constraint.ended`."""
        return self._left or self._inner.ended()

    def left_out(self) -> bool:
        """See `Constraint.left_out`."""
        return self._left
