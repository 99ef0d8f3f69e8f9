"""Prefill, then decode step by step: one sequence, or several that share one reading of the prompt."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.engine.drafting import PromptLookup
from lsp_agent.engine.sampling import HostLogits, Logits, Sampler
from lsp_agent.engine.session import Decoder
from lsp_agent.engine.state import PrefixCache, State
from lsp_agent.engine.tokens import StopStrings, TextStream, Tokenizer
from lsp_agent.errors import PromptTooLong, UserError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Step:
    """One token of sequence `index`; `text` is what it lets be shown. A stop token has no text of its own."""

    index: int
    token: int
    text: str
    logprob: float
    finish_reason: FinishReason | None


@dataclass
class Timings:
    """Wall seconds and tokens of one request; `decoded_tokens` counts all sequences.

    Of the `drafted_tokens` that were guessed, `accepted_tokens` were what the model would have said.
    """

    prefill_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    decoded_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass
class _Sequence:
    index: int
    sampler: Sampler
    stream: TextStream
    stops: StopStrings
    tokens: list[int] = field(default_factory=list)


def prefill(
    decoder: Decoder, state: State, ids: Sequence[int], cancel: CancelToken, chunk: int | None = None
) -> np.ndarray:
    """Read `ids` after what `state` has read, at most `chunk` at a time (by default what suits the device).

    Returns the last token's logits [vocabulary].
    """
    chunk = chunk or decoder.prefill_chunk
    logits = np.empty((0, decoder.config.vocabulary), np.float32)
    for start in range(0, len(ids), chunk):
        cancel.raise_if_cancelled()
        part = list(ids[start : start + chunk])
        rows = [len(part) - 1] if start + chunk >= len(ids) else []
        logits = decoder.run(np.array([part], np.int64), state, rows, cancel)
        state.extend(part)
        state.checkpoint()
    return logits[0]


class Generation(Iterator[Step]):
    """The steps of one request, made as they are asked for; `timings` grows with them.

    Iterating raises `Cancelled` within one step of `cancel`. The prompt's keys and values stay in the prefix cache.
    """

    def __init__(
        self,
        decoder: Decoder,
        prefixes: PrefixCache,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        sampling: Sampling,
        cancel: CancelToken,
        n: int,
        stop_ids: Iterable[int],
        drafting: bool,
    ) -> None:
        context = prefixes.capacity
        if not prompt:
            raise UserError("The prompt is empty; give the model something to read.")
        if len(prompt) >= context:
            message = f"The prompt has {len(prompt)} tokens and the context holds {context}; shorten the prompt."
            raise PromptTooLong(message)
        self._decoder, self._prefixes, self._tokenizer = decoder, prefixes, tokenizer
        self._prompt, self._sampling, self._cancel = list(prompt), sampling, cancel
        self._stop_ids = frozenset(stop_ids)
        self._drafting = drafting and not decoder.recurrent  # a recurrent state cannot drop wrong guesses
        self._limit = min(sampling.max_tokens, context - len(prompt))
        self._sequences = [
            _Sequence(i, Sampler(sampling, i), TextStream(tokenizer), StopStrings(sampling.stop)) for i in range(n)
        ]
        self.timings = Timings(prompt_tokens=len(prompt))
        self._steps = self._run()

    def __next__(self) -> Step:
        return next(self._steps)

    def _run(self) -> Iterator[Step]:
        if self._limit <= 0:
            return
        started = time.perf_counter()
        state = self._prefixes.take(self._prompt)
        self.timings.cached_tokens = state.length
        first = prefill(self._decoder, state, self._prompt[state.length :], self._cancel)
        self.timings.prefill_s = time.perf_counter() - started
        yield from self._decode_one(state, first) if len(self._sequences) == 1 else self._decode_batch(state, first)

    def _decode_one(self, state: State, logits: np.ndarray) -> Iterator[Step]:
        """Each run takes the last token and guesses after it; draws from the model's own logits decide them."""
        (sequence,) = self._sequences
        lookup = PromptLookup(self._prompt)
        draft: list[int] = []
        rows: list[Logits] = [HostLogits(logits)]
        while True:
            accepted = 0
            for row, guess in zip(rows, [*draft, None], strict=True):
                step = self._advance(sequence, row)
                if step.finish_reason is None and step.token == guess:
                    accepted += 1
                    state.extend([step.token])
                lookup.extend(step.token)
                yield step
                if step.finish_reason is not None:
                    return
                self._cancel.raise_if_cancelled()
                if step.token != guess:
                    break
            started = time.perf_counter()
            lookup.judge(len(draft), accepted)
            self.timings.drafted_tokens += len(draft)
            self.timings.accepted_tokens += accepted
            draft = lookup.propose(self._limit - len(sequence.tokens) - 1) if self._drafting else []
            ids = [sequence.tokens[-1], *draft]
            if draft:
                rows = [HostLogits(row) for row in self._decoder.run(np.array([ids]), state, range(len(ids)))]
            else:
                rows = self._decoder.step(ids, state)
            state.extend(ids[:1])
            self.timings.decode_s += time.perf_counter() - started

    def _decode_batch(self, shared: State, first: np.ndarray) -> Iterator[Step]:
        """All sequences advance in step; one that has ended leaves the batch."""
        live = self._sequences
        logits: list[Logits] = [HostLogits(first)] * len(live)
        capacity = len(self._prompt) + self._limit
        state = self._decoder.new_state(capacity, len(live))
        state.copy_prefix(shared, shared.length)
        while True:
            kept = []
            for row, sequence in enumerate(live):
                step = self._advance(sequence, logits[row])
                if step.finish_reason is None:
                    kept.append(row)
                yield step
            if not kept:
                return
            self._cancel.raise_if_cancelled()
            started = time.perf_counter()
            if len(kept) < len(live):
                live = [live[row] for row in kept]
                state.keep(kept)
            logits = self._decoder.step([sequence.tokens[-1] for sequence in live], state)
            state.length += 1
            self.timings.decode_s += time.perf_counter() - started

    def _advance(self, sequence: _Sequence, logits: Logits) -> Step:
        started = time.perf_counter()
        token = sequence.sampler.draw(logits, self._prompt + sequence.tokens)
        logprob = logits.log_probability(token)
        sequence.tokens.append(token)
        self.timings.decoded_tokens += 1
        reason: FinishReason | None = None
        text = ""
        if token in self._stop_ids:
            reason = "stop"
        else:
            text = sequence.stops.push(sequence.stream.push(token))
            if sequence.stops.found:
                reason = "stop"
            elif len(sequence.tokens) >= self._limit:
                reason = "length"
        if reason and not sequence.stops.found:
            text += sequence.stops.push(sequence.stream.finish())
            text += sequence.stops.finish()
        self.timings.decode_s += time.perf_counter() - started
        return Step(sequence.index, token, text, logprob, reason)
