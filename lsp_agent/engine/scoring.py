"""How probable a text is: each token's log probability given all before it, read a piece at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lsp_agent.cancel import CancelToken
from lsp_agent.engine.sampling import log_softmax
from lsp_agent.errors import PromptTooLong

if TYPE_CHECKING:
    from lsp_agent.engine.prefixes.cache import PrefixCache
    from lsp_agent.engine.session import Decoder
    from lsp_agent.engine.state import State

PIECE = 64
"""Positions scored at a time: each has logits over the whole vocabulary."""


class Scoring:
    """Scores `ids[1:]` in calls of `advance`, each a piece, between which the engine may do other work.

    `scores`: natural-log probability of each token scored so far. `best`: the `top` most probable tokens at each of
    these places, with theirs. Raises `PromptTooLong` at once for a text that does not fit.
    """

    def __init__(
        self, decoder: Decoder, prefixes: PrefixCache, ids: Sequence[int], cancel: CancelToken, top: int = 0
    ) -> None:
        if len(ids) > prefixes.capacity:
            message = f"The text has {len(ids)} tokens and the context holds {prefixes.capacity}; shorten it."
            raise PromptTooLong(message)
        self._decoder, self._prefixes, self._ids, self._cancel, self._top = decoder, prefixes, ids, cancel, top
        self._state: State | None = None
        self.scores: list[float] = []
        self.best: list[tuple[tuple[int, float], ...]] = []

    @property
    def done(self) -> bool:
        """Whether all is scored."""
        return len(self.scores) >= len(self._ids) - 1

    def advance(self) -> bool:
        """Score the next piece; False when that cannot be, because all states are taken. Raises `Cancelled`."""
        self._cancel.raise_if_cancelled()
        self._state = self._state or self._prefixes.empty()
        if self._state is None:
            return False
        start = len(self.scores)
        part, following = self._ids[start : start + PIECE], self._ids[start + 1 : start + PIECE + 1]
        if following:
            logits = self._decoder.run(np.array([part], np.int64), self._state, range(len(following)), self._cancel)
            self._state.extend(part)
            values = log_softmax(logits)
            self.scores += values[np.arange(len(following)), following].tolist()
            self.best += [_best(row, self._top) for row in values]
        return True

    def close(self) -> None:
        """Give back what it took; safe to call twice."""
        state, self._state = self._state, None
        if state is not None:
            self._prefixes.release(state)


def _best(values: np.ndarray, count: int) -> tuple[tuple[int, float], ...]:
    if not count:
        return ()
    count = min(count, len(values))
    tokens = np.argpartition(-values, count - 1)[:count]
    return tuple((int(token), float(values[token])) for token in tokens[np.argsort(-values[tokens], kind="stable")])
