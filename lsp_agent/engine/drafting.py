"""Guessing the next tokens by copying, so that one run can verify several (prompt lookup, Saxena 2023; Yang et al.,
2023, Inference with Reference).

Code repeats itself, and an agent's answer is often a file that it was given, with an edit. Guesses come from the text
that the answer is said to resemble (`prediction`), from the prompt and from the answer itself. A cursor follows the
place that is being copied; where the answer departs from it, it waits for the answer to come back.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lsp_agent.engine.run_costs import RunCosts

NGRAM = 3
"""Tokens by which a place is found anywhere."""
NEARBY_NGRAM = 2
"""Tokens by which a place is found again near the one where the answer departed."""
NEARBY = 256
PLACES = 16
"""Places that are compared for one n-gram."""
CONFIDENT = 8
"""Matching tokens that make a place the one that is being copied."""
HOPELESS = 0.02
"""Chance of a guess that is not worth thinking about."""
GAIN = 1.05
"""Expected speed-up below which nothing is guessed."""

MATCHES = (0, 1, 2, 3, 4, 6, 9, 16, 32)
"""Least matching tokens of each class whose acceptance is learnt."""
FOUND_PRIOR = (0.05, 0.1, 0.2, 0.4, 0.5, 0.65, 0.8, 0.9, 0.95)
COPIED_PRIOR = (0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98)
"""Acceptance in each class before anything is known: of places found anywhere, and of the one that is copied."""
TRUST = 4.0
"""Observations that count as much as the prior."""
FORGET = 0.96
_CLASSES = [max(i for i, least in enumerate(MATCHES) if least <= matched) for matched in range(MATCHES[-1] + 1)]


class _Text:
    """Tokens and where each n-gram in them ends."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self._places: defaultdict[tuple[int, int, int], list[int]] = defaultdict(list)
        self._indexed = NGRAM

    def after(self, recent: Sequence[int], anchor: int | None) -> Iterable[int]:
        """Places that follow the latest n-gram of `recent`, best first: those from `anchor` on, or the last ones."""
        tokens, start, end = self.tokens, self._indexed - NGRAM, len(self.tokens) - 1
        grams = zip(tokens[start:end], tokens[start + 1 : end], tokens[start + 2 : end], strict=False)
        for place, gram in enumerate(grams, self._indexed):  # what ends at the very end is followed by nothing yet
            self._places[gram].append(place)
        self._indexed = max(self._indexed, end + 1)
        if len(recent) < NGRAM:
            return []
        places = self._places.get((recent[-3], recent[-2], recent[-1]), [])
        if anchor is None:
            return reversed(places[-PLACES:])
        middle = bisect_left(places, anchor)
        return [*places[middle : middle + PLACES], *places[max(middle - PLACES, 0) : middle]]

    def matched(self, place: int, recent: Sequence[int]) -> int:
        """How many tokens before `place` are the latest of `recent`, as far as it matters."""
        most = min(place, len(recent), MATCHES[-1])
        for count in range(most):
            if self.tokens[place - 1 - count] != recent[-1 - count]:
                return count
        return most


class _Cursor(NamedTuple):
    """The next token is guessed to be the one at `place`, before which `matched` tokens were right."""

    text: _Text
    place: int
    matched: int

    @property
    def guess(self) -> int | None:
        """None at the end of the text."""
        return self.text.tokens[self.place] if self.place < len(self.text.tokens) else None


class _Acceptance:
    """How often guesses prove right, by the length of the match before them."""

    def __init__(self, prior: Sequence[float]) -> None:
        self._right = [TRUST * probability for probability in prior]
        self._count = [TRUST] * len(prior)
        self._prior = prior

    def learn(self, matched: int, right: bool) -> None:
        kind = _CLASSES[min(matched, MATCHES[-1])]
        self._right[kind] = FORGET * self._right[kind] + (1 - FORGET) * TRUST * self._prior[kind] + right
        self._count[kind] = FORGET * self._count[kind] + (1 - FORGET) * TRUST + 1

    def of(self, matched: int) -> float:
        kind = _CLASSES[min(matched, MATCHES[-1])]
        return self._right[kind] / self._count[kind]


class CopyDrafter:
    """Guesses the tokens of one answer.

    Each token that is decoded shows whether the guess for it would have been right, whether or not it was made: so
    trying again after a rest costs nothing, and a guess is made only where it is expected to pay.
    """

    def __init__(self, prompt: Sequence[int], prediction: Sequence[int] = (), costs: RunCosts | None = None) -> None:
        """`costs` of the decoder's runs are shared by all who draft for it."""
        self._costs = costs or RunCosts()
        self._history = _Text(prompt)
        self._prediction = _Text(prediction) if prediction else None
        self._copied: _Cursor | None = _Cursor(self._prediction, 0, 0) if self._prediction else None
        self._anchor = 0  # where the answer departed from the place that is copied, or that place
        self._found = self._search()
        self._copying, self._finding = _Acceptance(COPIED_PRIOR), _Acceptance(FOUND_PRIOR)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take note of tokens that were decoded."""
        for token in tokens:
            for cursor, acceptance in ((self._copied, self._copying), (self._found, self._finding)):
                if cursor is not None and cursor.guess is not None:
                    acceptance.learn(cursor.matched, cursor.guess == token)
            self._history.tokens.append(token)
            self._copied = self._follow(token)
            found = self._found
            right = found is not None and found.guess == token
            self._found = _moved(found) if found is not None and right else self._search()
            self._promote()

    def propose(self, limit: int) -> list[int]:
        """Up to `limit` tokens that may come next, as many as make decoding fastest; often none."""
        best, draft = GAIN, []
        for cursor, acceptance in ((self._copied, self._copying), (self._found, self._finding)):
            if cursor is None:
                continue
            rest = cursor.text.tokens[cursor.place : cursor.place + limit]
            alive, expected = 1.0, 1.0
            for count in range(1, len(rest) + 1):
                alive *= acceptance.of(cursor.matched + count - 1)
                if alive < HOPELESS:
                    break
                expected += alive
                if (speed := expected / self._costs.of(1 + count)) > best:
                    best, draft = speed, rest[:count]
        return draft

    def _follow(self, token: int) -> _Cursor | None:
        """The cursor of what is being copied after `token`."""
        cursor = self._copied
        if cursor is None:
            return None
        replaced = _Cursor(cursor.text, cursor.place + 1, 0)  # perhaps one token was replaced by another
        cursor = _moved(cursor) if cursor.guess == token else replaced
        if cursor.matched >= NEARBY_NGRAM:
            self._anchor = cursor.place
            return cursor
        tokens, recent = cursor.text.tokens, self._history.tokens
        for place in range(max(self._anchor, NEARBY_NGRAM), min(self._anchor + NEARBY, len(tokens))):
            if tokens[place - 1] == recent[-1] and tokens[place - 2] == recent[-2]:
                return _Cursor(cursor.text, place, cursor.text.matched(place, recent))
        return cursor

    def _search(self) -> _Cursor | None:
        """The place anywhere that matches longest, the prediction's first."""
        if self._copied is not None and self._copied.matched >= CONFIDENT:
            return None
        best: _Cursor | None = None
        recent = self._history.tokens
        for text in (self._prediction, self._history):
            if text is None:
                continue
            anchor = self._anchor if self._copied is not None and self._copied.text is text else None
            for place in text.after(recent, anchor):
                matched = text.matched(place, recent)
                if best is None or matched > best.matched:
                    best = _Cursor(text, place, matched)
        return best

    def _promote(self) -> None:
        """Copy from the place that was found when it matches long, and longer than the one that is copied."""
        found, copied = self._found, self._copied
        if found is None or found.matched < CONFIDENT or (copied is not None and copied.matched >= found.matched):
            return
        self._copied, self._anchor, self._found = found, found.place, None


def _moved(cursor: _Cursor) -> _Cursor:
    return _Cursor(cursor.text, cursor.place + 1, cursor.matched + 1)


class PromptLookup:
    """Proposes what followed the last occurrence of the latest n-gram; rests while its guesses are bad."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._history = list(prompt)
        self._followed_by: dict[tuple[int, ...], int] = {}
        self._indexed = 3
        self._acceptance = 0.5

    def extend(self, token: int) -> None:
        """Take note of a decoded token."""
        self._history.append(token)

    def propose(self, limit: int) -> list[int]:
        """Up to `limit` tokens that may follow the history."""
        for end in range(self._indexed, len(self._history)):
            self._followed_by[tuple(self._history[end - 3 : end])] = end
        self._indexed = max(self._indexed, len(self._history))
        self._acceptance += 0.01 * (0.5 - self._acceptance)  # forget slowly, so that guessing is tried again
        start = self._followed_by.get(tuple(self._history[-3:]))
        if start is None or self._acceptance < 0.35:
            return []
        length = 3 if self._acceptance > 0.8 else 2
        return self._history[start : start + min(length, limit)]

    def judge(self, proposed: int, accepted: int) -> None:
        """Learn how many of the `proposed` tokens were right; the first wrong one ends the look."""
        for hit in [1.0] * accepted + [0.0] * (accepted < proposed):
            self._acceptance += 0.15 * (hit - self._acceptance)
