"""Log probabilities of an answer's tokens, in the shapes of OpenAI's two APIs."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lsp_agent.engine.request import Step
from lsp_agent.engine.tokens import Tokenizer

if TYPE_CHECKING:
    from lsp_agent.engine.scoring import Scoring

LEAST = -9999.0
"""What stands for minus infinity, which JSON does not know: as OpenAI's API."""


@dataclass(frozen=True)
class Shown:
    """One token of an answer; `text` is what it alone reads as, `data` its bytes, `offset` the characters before it."""

    text: str
    data: bytes
    logprob: float | None
    top: tuple[tuple[str, bytes, float], ...]
    offset: int


class TokenLog:
    """The tokens behind the text of one answer, given out with the text that they make.

    A token that ends the answer is none of its text, nor is one that only belongs to a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int], offset: int = 0) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._waiting: deque[Shown] = deque()
        self._read = self._shown = offset  # characters of the tokens, and of the text that was shown
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, step: Step) -> list[Shown]:
        """Take a step and give the tokens whose text has begun to be shown."""
        is_end = step.finish_reason == "stop" and step.token in self._stop_ids
        if not is_end:
            self._waiting.append(self._token(step))
            self._read += len(self._decoder.decode(self._tokenizer.token_bytes(step.token)))
        self._shown += len(step.text)
        all_shown = step.finish_reason == "length" or is_end
        given = []
        while self._waiting and (all_shown or self._waiting[0].offset < self._shown):
            given.append(self._waiting.popleft())
        return given

    def _token(self, step: Step) -> Shown:
        top = tuple((*spell(self._tokenizer, token), max(logprob, LEAST)) for token, logprob in step.top)
        return Shown(*spell(self._tokenizer, step.token), max(step.logprob, LEAST), top, self._read)


def spell(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    """A token as text, which may lack a part of a character, and as bytes."""
    data = tokenizer.spelled(token)
    return data.decode(errors="replace"), data


def chat_logprobs(tokens: Sequence[Shown]) -> dict[str, Any]:
    """Write tokens as `/v1/chat/completions` has them."""

    def entry(text: str, data: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    content = [
        {**entry(token.text, token.data, token.logprob), "top_logprobs": [entry(*best) for best in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[Shown], top: int) -> dict[str, Any]:
    """Write tokens as `/v1/completions` has them; those of a prompt begin with one that has no probability."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [None if token.logprob is None else _by_text(token) for token in tokens] if top else None,
        "text_offset": [token.offset for token in tokens],
    }


def _by_text(token: Shown) -> dict[str, float]:
    """The best tokens by what they read as; of two that read the same, the better."""
    best: dict[str, float] = {}
    for text, _, logprob in token.top:
        best.setdefault(text, logprob)
    return best


def scored_tokens(tokenizer: Tokenizer, ids: Sequence[int], scoring: Scoring) -> list[Shown]:
    """The tokens of a scored text; the first, having no context, has no probability."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    shown, offset = [], 0
    best = [(), *scoring.best]
    for token, logprob, others in zip(ids, [None, *scoring.scores], best, strict=True):
        top = tuple((*spell(tokenizer, other), max(value, LEAST)) for other, value in others)
        text, data = spell(tokenizer, token)
        shown.append(Shown(text, data, None if logprob is None else max(logprob, LEAST), top, offset))
        offset += len(decoder.decode(data))
    return shown
