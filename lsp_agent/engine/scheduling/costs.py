"""What runs cost, as measured: how long a piece of a prompt may be, and whether sequences should step together."""

from __future__ import annotations

import math
from collections import deque

DECAY = 0.9
"""Weight of what was known at each new measurement."""
RETRY = 256
"""Steps after which a way of stepping that was slower is tried again: costs change with lengths and neighbours."""
LATEST = 4
"""Steps of so many sequences that are remembered."""
PRIOR = 0.3
"""What a further sequence adds to a step, in steps, before it was measured."""


class PromptCosts:
    """A run over a piece of a prompt costs `fixed + each * tokens` seconds: a decayed least-squares fit."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of weights, tokens, seconds, tokens squared, tokens times seconds

    def note(self, tokens: int, seconds: float) -> None:
        """Learn from a run."""
        terms = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        self._sums = [DECAY * old + new for old, new in zip(self._sums, terms, strict=True)]

    def tokens_for(self, seconds: float, least: int, most: int) -> int:
        """Tokens that a run of about `seconds` reads, between `least` and `most`; at first `least`.

        Where every run costs much, it may take longer: at least half of its time goes to tokens.
        """
        weight, x, y, xx, xy = self._sums
        if not weight or not x:
            return least
        spread = weight * xx - x * x
        each = (weight * xy - x * y) / spread if spread > 1e-6 * weight * xx else 0.0
        if not 0 < each * x <= y:
            each = y / x  # too few different lengths to tell
        fixed = max(0.0, (y - each * x) / weight)
        tokens = max((seconds - fixed) / each, fixed / each) if each > 0 else most
        return int(max(least, min(most, tokens)))


class StepCosts:
    """Seconds of a step of 1, 2, … sequences together, and of copying tokens into their rows."""

    def __init__(self) -> None:
        self._latest: dict[int, deque[float]] = {}
        self._asked = 0
        self._a_copy: float | None = None  # seconds a token
        self._missed = 0.0

    def note(self, sequences: int, seconds: float) -> None:
        """Learn from a step. The first of so many does not count: it allocates, and captures on a GPU."""
        if sequences in self._latest:
            self._latest[sequences].append(seconds)
        else:
            self._latest[sequences] = deque(maxlen=LATEST)

    def _cost(self, sequences: int) -> float | None:
        """Seconds of a step; what neighbours on the machine add to single ones is left out."""
        return min(self._latest.get(sequences, ()), default=None)

    def note_copy(self, tokens: int, seconds: float) -> None:
        """Learn what copying `tokens` took."""
        if tokens:
            known = seconds / tokens if self._a_copy is None else self._a_copy
            self._a_copy = known + 0.5 * (seconds / tokens - known)
        self._missed = 0.0

    def together(self, sequences: int, tokens: int) -> bool:
        """Whether that many sequences are best stepped in one run, not one after the other; tried once one is known.

        Where `tokens` must be copied for that, steps are taken one by one until what this lost is as much as the copy
        costs: then it is worth it, however soon one of them ends (as skis are rented before they are bought).
        """
        self._asked += 1
        one, all_ = self._cost(1), self._cost(sequences)
        if one is None:
            return False
        if all_ is None:
            all_ = one * (1 + PRIOR * (sequences - 1))
        saved = sequences * one - all_
        if saved <= 0:
            return self._asked % RETRY == 0
        self._missed += saved
        return tokens * (self._a_copy or 0.0) <= self._missed

    def speed(self, sequences: int) -> float:
        """Tokens that so many decode, as they are best stepped, in the time of one step alone."""
        one, all_ = self._cost(1), self._cost(sequences)
        return max(1.0, sequences * one / all_) if one and all_ else 1.0

    def forbid(self, sequences: int) -> None:
        """Step so many one after the other, for a while."""
        self._latest[sequences] = deque([math.inf], maxlen=1)
