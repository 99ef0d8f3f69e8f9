"""Guessing the next tokens by copying, so that one run can verify several (prompt lookup, Saxena 2023; Inference with
Reference, Yang et al., 2023).

Code repeats itself, and an agent's answer is often a file that it was given, with an edit. Guesses come from the text
that the answer is said to resemble (`prediction`), from the prompt and from the answer itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from lsp_agent.engine.drafting.copying import Acceptance, Copying, Finding, Text
from lsp_agent.engine.drafting.run_costs import RunCosts

FOUND = (0.05, 0.1, 0.2, 0.4, 0.5, 0.65, 0.8, 0.9, 0.95)
COPIED = (0.1, 0.4, 0.5, 0.7, 0.85, 0.9, 0.95, 0.97, 0.98)
"""Acceptance before anything is known, of places found anywhere and of the one that is copied."""
CONFIDENT = 8
"""Matching tokens that make a place the one that is copied."""
GAIN = 1.05
"""Expected speed-up below which nothing is guessed."""
HOPELESS = 0.02
"""Chance of a guess that is not worth thinking about."""


class CopyDrafter:
    """Guesses the tokens of one answer.

    Each token that is decoded shows whether the guess for it would have been right, whether or not it was made: so
    trying again after a rest costs nothing, and a guess is made only where it is expected to pay.
    """

    def __init__(self, prompt: Sequence[int], prediction: Sequence[int] = (), costs: RunCosts | None = None) -> None:
        """`costs` of the decoder's runs are shared by all who draft for it."""
        self._costs = costs or RunCosts()
        self._history = Text(prompt)
        self._texts = [Text(prediction), self._history] if prediction else [self._history]
        self._found_acceptance, self._copied_acceptance = Acceptance(FOUND), Acceptance(COPIED)
        self._copied: Copying | None = None
        if prediction:  # As if a token had matched: an answer that resembles the prediction often begins with it.
            self._copied = Copying(self._texts[0], 0, 1, self._copied_acceptance)
        self._found = self._search()

    def extend(self, tokens: Sequence[int]) -> None:
        """Take note of tokens that were decoded."""
        written = self._history.tokens
        for token in tokens:
            followed = self._found is not None and self._found.follow(token)
            written.append(token)
            if self._copied is not None:
                self._copied.follow(token, written)
            if not followed:
                self._found = self._search()
            self._promote()

    def propose(self, limit: int, least: float = GAIN) -> list[int]:
        """Up to `limit` tokens that may come next, as many as make decoding fastest; often none.

        `least`: none either unless that is expected to be so many times as fast as one token at a time.
        """
        best, draft = least, list[int]()
        for cursor in (self._copied, self._found):
            if cursor is None:
                continue
            tokens, alive, expected = list[int](), 1.0, 1.0
            for token, chance in cursor.ahead(limit):
                alive *= chance
                if alive < HOPELESS:
                    break
                tokens.append(token)
                expected += alive
                if (speed := expected / self._costs.of(1 + len(tokens))) > best:
                    best, draft = speed, tokens[:]
        return draft

    def _search(self) -> Finding | None:
        """The place anywhere that matches longest, the prediction's first."""
        copied, recent = self._copied, self._history.tokens
        if copied is not None and copied.matched >= CONFIDENT:
            return None
        best: Finding | None = None
        for text in self._texts:
            anchor = copied.anchor if copied is not None and copied.text is text else None
            for place in text.after(recent, anchor):
                matched = text.matched(place, recent)
                if best is None or matched > best.matched:
                    best = Finding(text, place, matched, self._found_acceptance)
        return best

    def _promote(self) -> None:
        """Copy from the place that was found when it matches long, and longer than the one that is copied."""
        found, copied = self._found, self._copied
        if found is None or found.matched < CONFIDENT or (copied is not None and copied.matched >= found.matched):
            return
        if copied is None:
            self._copied = Copying(found.text, found.place, found.matched, self._copied_acceptance)
        else:
            copied.jump(found.text, found.place, found.matched)
        self._found = None
