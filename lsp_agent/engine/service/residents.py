"""A loaded model, and one on its way."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from lsp_agent.engine.engine import Engine
from lsp_agent.engine.request import Timings
from lsp_agent.engine.service.catalog import ServedModel, Source

OnProgress = Callable[[int, int], None]

RECENT = 32
"""Finished requests over which speeds are averaged."""


@dataclass(eq=False)
class Resident:
    """A loaded model. Times are monotonic seconds, `loaded_at` Unix seconds; `active` counts its unfinished work.

    `memory`: bytes of main memory by estimate, since the package may be removed meanwhile. `leaving`: it takes nothing
    new and is unloaded when its work is done.
    """

    source: Source | None
    engine: Engine
    name: str
    stamp: tuple[int, ...] = ()
    memory: int = 0
    loaded_at: float = field(default_factory=time.time)
    last_used: float = field(default_factory=time.monotonic)
    active: int = 0
    answered: int = 0
    leaving: bool = False
    recent: deque[Timings] = field(default_factory=lambda: deque(maxlen=RECENT))

    @property
    def outdated(self) -> bool:
        """Whether another package was put in its place. (One that was removed can still answer.)"""
        return self.source is not None and self.source.stamp not in ((), self.stamp)

    @property
    def served(self) -> ServedModel:
        """Its entry in the list of models."""
        sampling, infills = (self.source.sampling, self.source.infills) if self.source else ({}, None)
        return ServedModel(self.name, self.engine.context_length, int(self.loaded_at), True, sampling, infills)

    def status(self) -> dict[str, Any]:
        """What it holds and does, as plain data; for any thread, so nothing of it is exact."""
        engine, recent = self.engine, [*self.recent]
        read = sum(timings.prompt_tokens - timings.cached_tokens for timings in recent)
        return {
            "context_length": engine.context_length,
            "placement": engine.placement,
            "loaded_s": round(time.time() - self.loaded_at, 1),
            "idle_s": round(time.monotonic() - self.last_used, 1),
            "answered": self.answered,
            "queue": engine.scheduler.status(),
            "cache": asdict(engine.prefixes.stats()),
            "tokens_per_s": {
                "prompt": _rate(read, sum(timings.prefill_s for timings in recent)),
                "answer": _rate(
                    sum(timings.decoded_tokens for timings in recent), sum(timings.decode_s for timings in recent)
                ),
            },
        }


@dataclass(eq=False)
class Loading:
    """A model on its way. `progress`: (done, total) of what a machine's first load prepares."""

    task: asyncio.Task[None] | None = None
    progress: tuple[int, int] | None = None
    listeners: list[OnProgress] = field(default_factory=list)

    def report(self, done: int, total: int) -> None:
        """Tell all who wait."""
        self.progress = done, total
        for listener in self.listeners:
            listener(done, total)


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 1) if seconds > 0 else 0.0
