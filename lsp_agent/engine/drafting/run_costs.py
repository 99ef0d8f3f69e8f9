"""What a run of several tokens costs in steps of one, learnt from the runs themselves."""

from __future__ import annotations

from collections import deque
from statistics import median

STEPS = 5
"""Latest steps whose median a run is compared with: both depend on the length and on what else the machine does."""
FRESH = 16
"""Runs after which the latest steps say nothing any more."""
FORGET = 0.98
FIRST, EACH = 0.1, 0.2
"""Cost of a run at all and of each further token before anything is known (CPU, 0.5B and 1.5B models)."""
CERTAINTY = 2.0
"""How many observations of either that is worth."""
TRUST = 4.0
"""Observations of one number of tokens that count as much as the line through all."""


class RunCosts:
    """One for each decoder. A straight line through all runs, corrected where a number of tokens was often seen:
    kernels are made for some numbers, and runs of others are padded."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._runs_since_step = 0
        self._sums = [0.0] * 5  # of 1, x, x^2, y and x y, forgotten slowly; x are further tokens and y further steps
        self._seen: dict[int, tuple[float, float]] = {}  # by tokens: observations and their sum
        self._known: dict[int, float] = {}
        self._line = self._fit()

    def note(self, tokens: int, seconds: float) -> None:
        """Take note of a run that read `tokens` of one sequence; one token is a step."""
        if tokens == 1:
            self._steps.append(seconds)
            self._runs_since_step = 0
            return
        self._runs_since_step += 1
        if not self._steps or self._runs_since_step > FRESH:
            return
        # A first run of its size may make what later ones need.
        cost = min(seconds / median(self._steps), 2 * self.of(tokens))
        x, y = tokens - 1, cost - 1
        # Weighted by 1 / x^2: long runs vary by more.
        terms = (1 / x**2, 1 / x, 1, y / x**2, y / x)
        self._sums = [FORGET * old + new for old, new in zip(self._sums, terms, strict=True)]
        count, total = self._seen.get(tokens, (0.0, 0.0))
        self._seen[tokens] = count * FORGET + 1, total * FORGET + cost
        self._line = self._fit()
        self._known.clear()

    def of(self, tokens: int) -> float:
        """Steps that a run of `tokens` takes."""
        if tokens == 1:
            return 1.0
        known = self._known.get(tokens)
        if known is None:
            first, slope = self._line
            count, total = self._seen.get(tokens, (0.0, 0.0))
            known = (total + TRUST * (1 + first + slope * (tokens - 1))) / (count + TRUST)
            self._known[tokens] = known
        return known

    def _fit(self) -> tuple[float, float]:
        """Least squares over what was seen, drawn towards what is known before (ridge regression)."""
        n, x1, x2, y1, xy = self._sums
        n, x2, y1, xy = n + CERTAINTY, x2 + CERTAINTY, y1 + CERTAINTY * FIRST, xy + CERTAINTY * EACH
        slope = max((n * xy - x1 * y1) / (n * x2 - x1 * x1), 0.0)
        return max((y1 - slope * x1) / n, 0.0), slope
