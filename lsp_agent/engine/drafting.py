"""Guessing the next tokens from the text itself (prompt lookup, Saxena 2023), so that one run can verify several.

Code repeats itself, and decoding waits for memory: verifying two guesses costs half a step more and often saves two.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3
LENGTH = 2
CONFIDENT_LENGTH = 3
CONFIDENT = 0.8
WORTHWHILE = 0.35
"""Acceptance above which guessing pays: on the CPU a run of 2, 3 or 4 tokens costs about 1.3, 1.5 and 1.7 steps."""
PRIOR = 0.5


class PromptLookup:
    """Proposes what followed the last occurrence of the latest n-gram; rests while its guesses are bad."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._history = list(prompt)
        self._followed_by: dict[tuple[int, ...], int] = {}
        self._indexed = NGRAM
        self._acceptance = PRIOR

    def extend(self, token: int) -> None:
        """Take note of a decoded token."""
        self._history.append(token)

    def propose(self, limit: int) -> list[int]:
        """Up to `limit` tokens that may follow the history."""
        for end in range(self._indexed, len(self._history)):
            self._followed_by[tuple(self._history[end - NGRAM : end])] = end
        self._indexed = max(self._indexed, len(self._history))
        self._acceptance += 0.01 * (PRIOR - self._acceptance)  # forget slowly, so that guessing is tried again
        start = self._followed_by.get(tuple(self._history[-NGRAM:]))
        if start is None or self._acceptance < WORTHWHILE:
            return []
        length = CONFIDENT_LENGTH if self._acceptance > CONFIDENT else LENGTH
        return self._history[start : start + min(length, limit)]

    def judge(self, proposed: int, accepted: int) -> None:
        """Learn how many of the `proposed` tokens were right; the first wrong one ends the look."""
        for hit in [1.0] * accepted + [0.0] * (accepted < proposed):
            self._acceptance += 0.15 * (hit - self._acceptance)
