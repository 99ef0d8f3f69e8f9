"""Places in a text from which an answer may be copying, and the edits that it makes on the way."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

NGRAM = 3
"""Tokens by which a place is found anywhere."""
NEARBY_NGRAM = 2
"""Tokens by which a place is found again near the one where the answer departed."""
NEARBY = 256
PLACES = 16
"""Places that are compared for one n-gram."""
MOST_REPLACED, MOST_REPLACING = 4, 8
"""Tokens of an edit that may be made again, such as a name that is changed throughout."""

MATCHES = (0, 1, 2, 3, 4, 6, 9, 16, 32)
"""Least matching tokens of each class whose acceptance is learnt."""
_CLASSES = [max(i for i, least in enumerate(MATCHES) if least <= matched) for matched in range(MATCHES[-1] + 1)]
TRUST = 4.0
"""Observations that count as much as the prior."""
FORGET = 0.98


class Text:
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

    def near(self, recent: Sequence[int], start: int) -> int | None:
        """The first place from `start` on, and not far, that follows the latest two tokens of `recent`."""
        tokens, before, last = self.tokens, recent[-2:-1], recent[-1]
        place, stop = max(start, NEARBY_NGRAM), min(start + NEARBY, len(self.tokens))
        try:
            while True:
                place = tokens.index(last, place - 1, stop - 1) + 1
                if tokens[place - 2 : place - 1] == before:
                    return place
                place += 1
        except ValueError:  # there is no other
            return None

    def matched(self, place: int, recent: Sequence[int]) -> int:
        """How many tokens before `place` are the latest of `recent`, as far as it matters."""
        most = min(place, len(recent), MATCHES[-1])
        for count in range(most):
            if self.tokens[place - 1 - count] != recent[-1 - count]:
                return count
        return most


class Acceptance:
    """How often guesses prove right, by the length of the match before them."""

    def __init__(self, prior: Sequence[float]) -> None:
        """`prior`: what is assumed of each of the classes `MATCHES`."""
        self._right = [TRUST * probability for probability in prior]
        self._count = [TRUST] * len(prior)
        self._prior = prior

    def learn(self, matched: int, right: bool) -> None:
        """Take note of what became of a guess after `matched` tokens."""
        kind = _CLASSES[min(matched, MATCHES[-1])]
        self._right[kind] = FORGET * self._right[kind] + (1 - FORGET) * TRUST * self._prior[kind] + right
        self._count[kind] = FORGET * self._count[kind] + (1 - FORGET) * TRUST + 1

    def of(self, matched: int) -> float:
        """The chance of a guess after `matched` tokens."""
        kind = _CLASSES[min(matched, MATCHES[-1])]
        return self._right[kind] / self._count[kind]


class Finding:
    """A place found by what precedes it; given up at the first token that differs."""

    def __init__(self, text: Text, place: int, matched: int, acceptance: Acceptance) -> None:
        self.text, self.place, self.matched, self._acceptance = text, place, matched, acceptance

    def ahead(self, limit: int) -> Iterator[tuple[int, float]]:
        """Up to `limit` tokens that may come next, each with its chance if those before it are right."""
        for count, token in enumerate(self.text.tokens[self.place : self.place + limit]):
            yield token, self._acceptance.of(self.matched + count)

    def follow(self, token: int) -> bool:
        """Move on with a token that was decoded; whether it was the one expected."""
        tokens = self.text.tokens
        right = self.place < len(tokens) and tokens[self.place] == token
        if self.place < len(tokens):
            self._acceptance.learn(self.matched, right)
        self.place, self.matched = self.place + 1, self.matched + 1
        return right


@dataclass
class _Edit:
    old: list[int]
    new: list[int]
    right: float = 1.0
    count: float = 2.0

    @property
    def chance(self) -> float:
        return self.right / self.count

    def learn(self, right: bool) -> None:
        self.right, self.count = self.right + right, self.count + 1


class Copying:
    """The place that is being copied. Where the answer departs from it, it waits for the answer to come back.

    `anchor` is where the answer departed, or the place itself. An edit of a few tokens that it has made is expected
    again.
    """

    def __init__(self, text: Text, place: int, matched: int, acceptance: Acceptance) -> None:
        self.text, self.place, self.matched, self._acceptance = text, place, matched, acceptance
        self.anchor = place
        self._written: int | None = None  # the answer's length where it departed
        self._pending: list[int] = []  # what is left of an edit that is being made again
        self._edits: dict[int, _Edit] = {}  # by the first token that is replaced

    def jump(self, text: Text, place: int, matched: int) -> None:
        """Copy from another place."""
        if text is not self.text:
            self._edits = {}
        self.text, self.place, self.matched, self.anchor = text, place, matched, place
        self._written, self._pending = None, []

    def ahead(self, limit: int) -> Iterator[tuple[int, float]]:
        """See `Finding.ahead`."""
        place, matched, pending, tokens = self.place, self.matched, list(self._pending), self.text.tokens
        for _ in range(limit):
            if pending:
                yield pending.pop(0), self._acceptance.of(matched)
            elif (edit := self._edit_at(place)) is not None:
                place += len(edit.old)
                pending = edit.new[1:]
                yield edit.new[0], edit.chance
            elif place < len(tokens):
                yield tokens[place], self._acceptance.of(matched)
                place += 1
            else:
                return
            matched += 1

    def _edit_at(self, place: int) -> _Edit | None:
        """The edit that is expected at a place."""
        tokens = self.text.tokens
        edit = self._edits.get(tokens[place]) if place < len(tokens) else None
        expected = edit is not None and edit.chance >= 0.5 and tokens[place : place + len(edit.old)] == edit.old
        return edit if expected else None

    def follow(self, token: int, written: Sequence[int]) -> None:
        """Move on with a token that was decoded, the last of `written`."""
        if not self._expected(token):
            if self._written is None:
                self._written = len(written) - 1
            # Perhaps one token was replaced by another.
            self.place, self.matched, self._pending = self.place + 1, 0, []
        if self.matched < NEARBY_NGRAM and self._written is not None:
            place = self.text.near(written, self.anchor)
            if place is None:
                return
            self.place, self.matched = place, self.text.matched(place, written)
        if self._written is not None:
            self._learn(written, self._written)
            self._written = None
        self.anchor = self.place

    def _expected(self, token: int) -> bool:
        """Whether `token` is one that could be expected; moves on if it is."""
        tokens, place = self.text.tokens, self.place
        if self._pending:
            right = self._pending.pop(0) == token
        else:
            original = place < len(tokens) and tokens[place] == token
            edit = self._edit_at(place)
            again = edit is not None and edit.new[0] == token
            if edit is None and place < len(tokens):
                self._acceptance.learn(self.matched, original)
            elif edit is not None and again != original:  # else it cannot be told yet
                edit.learn(again)
            right = original or again
            if edit is not None and again:
                self.place, self._pending = place + len(edit.old), edit.new[1:]
            elif original:
                self.place = place + 1
        self.matched += 1
        return right

    def _learn(self, written: Sequence[int], departed: int) -> None:
        """Remember what was replaced by what between the departure and the tokens that match again."""
        old = self.text.tokens[self.anchor : max(self.place - self.matched, self.anchor)]
        new = written[departed : max(len(written) - self.matched, departed)]
        if 0 < len(old) <= MOST_REPLACED and 0 < len(new) <= MOST_REPLACING:
            self._edits[old[0]] = _Edit(old, list(new))
