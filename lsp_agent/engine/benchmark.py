"""Times a decoder: loading, prompts, and decoding after some lengths, alone and several sequences together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lsp_agent.cancel import CancelToken
from lsp_agent.engine.sampling import Logits
from lsp_agent.engine.scheduling.batch import Batch
from lsp_agent.engine.scheduling.prefill import prefill
from lsp_agent.engine.session import Decoder

WARM_UP = 8
"""Steps before the first that counts: the first of a state captures its graph."""


@dataclass(frozen=True)
class Prefill:
    """Reading a prompt of `tokens`: median and best milliseconds, and tokens a second by the median."""

    tokens: int
    ms: float
    best_ms: float
    tokens_s: float


@dataclass(frozen=True)
class Decode:
    """Steps of `batch` sequences after `context` tokens: milliseconds a step, and tokens a second of all together.

    `tokens_s` is by the median. `finite`: the last logits were numbers. `hits`: the share of the experts used that were
    in slots of the GPU's memory, None where there are no slots.
    """

    context: int
    batch: int
    ms: float
    best_ms: float
    tokens_s: float
    finite: bool
    hits: float | None


class Benchmark:
    """Random tokens, each run after a warm-up of its own."""

    def __init__(self, decoder: Decoder, capacity: int, chunk: int | None, seed: int = 1) -> None:
        """`capacity`: of the states, the longest context and what is decoded after it; `chunk`: see `prefill`."""
        self._decoder, self._chunk = decoder, chunk
        self._random = np.random.default_rng(seed)
        self._state = decoder.new_state(capacity)
        self._read_for = 0  # the length of the prompt that the state has read

    def prefill(self, tokens: int, rounds: int) -> Prefill:
        """Read a prompt from the start, once to warm up and then `rounds` times."""
        seconds = [self._read(tokens) for _ in range(rounds + 1)][1:]
        middle = statistics.median(seconds)
        return Prefill(tokens, 1000 * middle, 1000 * min(seconds), tokens / middle)

    def decode(self, context: int, batch: int, tokens: int) -> Decode:
        """Steps of `tokens` random tokens after a prompt of `context` random ones."""
        if self._read_for == context and self._state.reachable(context) == context:
            self._state.truncate(context)
        else:
            self._read(context)
        rows: Batch[int] | None = None
        if batch > 1:
            rows = Batch(self._decoder.states, context + WARM_UP + tokens, batch, self._decoder.device)
            for owner in range(batch):
                rows.join(owner, self._state)
            rows.prepare(rows.rows)
        seconds, logits, before = [], [], (0, 0)
        for step in range(WARM_UP + tokens):
            if step == WARM_UP:
                before = self._decoder.expert_hits()
            ids = self._ids(batch)
            started = time.perf_counter()
            logits = self._decoder.step(ids, self._state if rows is None else rows)
            for one in logits:
                one.top(1)  # waits for the result, as a sampler does
            seconds.append(time.perf_counter() - started)
            if rows is None:
                self._state.extend(ids)
            else:
                for row in rows.rows:
                    row.length += 1
        found, used = (now - then for now, then in zip(self._decoder.expert_hits(), before, strict=True))
        kept = seconds[WARM_UP:]
        middle = statistics.median(kept)
        hits = found / used if used else None
        return Decode(context, batch, 1000 * middle, 1000 * min(kept), batch / middle, _finite(logits), hits)

    def _read(self, tokens: int) -> float:
        self._state.truncate(0)
        self._read_for = tokens
        ids = self._ids(tokens)
        started = time.perf_counter()
        prefill(self._decoder, self._state, ids, CancelToken(), self._chunk)
        return time.perf_counter() - started

    def _ids(self, count: int) -> list[int]:
        ids: list[int] = self._random.integers(0, self._decoder.config.vocabulary, count).tolist()
        return ids


def _finite(logits: Sequence[Logits]) -> bool:
    return all(bool(np.isfinite(one.all()).all()) for one in logits)


def timed(load: Callable[[], Decoder]) -> tuple[Decoder, float]:
    """A decoder and the seconds that loading it took."""
    started = time.perf_counter()
    decoder = load()
    return decoder, time.perf_counter() - started
