"""Whose turn it is: by priority, then by how much the client was served lately; nobody waits for ever."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lsp_agent.engine.request import ORDINARY
from lsp_agent.engine.scheduling.decoding import Decoding

HALF_LIFE_S = 30.0
"""Service counts half as much after this time."""
STICKY_S = 1.0
"""A prompt that is being read goes on until its client is ahead by so much: switching helps nobody."""
PATIENCE_S = 2.0
"""Who has waited so long for a piece of a prompt goes ahead even of interactive requests."""
PAUSE_S = 0.5
"""Time between two pieces of those who had waited so long."""
STALL_S = 1.0
"""Longest time in which interactive prompts are read while others could decode."""
MOST_CLIENTS = 1000


class Policy:
    """Orders prompts to be read, and shares the time between reading and decoding. Times are the scheduler's clock."""

    def __init__(self) -> None:
        self._served: dict[str, tuple[float, float]] = {}  # by client: seconds, and when they were right
        self._owed = 0.0  # seconds of decoding for those whom reading kept waiting
        self._stalled = 0.0
        self._favoured = -math.inf  # when a piece last went to somebody who had waited long

    def served(self, client: str, now: float) -> float:
        """Seconds of service that a client had lately."""
        seconds, since = self._served.get(client, (0.0, now))
        return float(seconds * 0.5 ** ((now - since) / HALF_LIFE_S))

    def note(self, client: str, seconds: float, now: float) -> None:
        """Count service."""
        total = self.served(client, now) + seconds
        self._served.pop(client, None)  # the order is that of the last service
        self._served[client] = total, now
        if len(self._served) > MOST_CLIENTS:
            del self._served[next(iter(self._served))]

    def order(self, waiting: Sequence[Decoding], now: float) -> list[Decoding]:
        """Who should read a piece of its prompt first, second, …"""
        if len(waiting) < 2:
            return list(waiting)
        most_urgent = min(one.job.request.priority for one in waiting)

        def key(one: Decoding) -> tuple[float, ...]:
            priority = most_urgent if self.starved(one, now) else one.job.request.priority
            ahead = self.served(one.job.request.client, now) - (STICKY_S if one.state is not None else 0.0)
            return priority, ahead, one.job.arrived

        return sorted(waiting, key=key)

    def starved(self, one: Decoding, now: float) -> bool:
        """Whether it has waited long enough to go ahead of others now."""
        return now - one.progressed > PATIENCE_S and now - self._favoured > PAUSE_S

    def reads_first(self, reader: Decoding, decoding: Sequence[Decoding], now: float) -> bool:
        """Whether a piece of the reader's prompt comes before a step of those who decode."""
        if not decoding or self.starved(reader, now):
            return True
        urgent = min(one.job.request.priority for one in decoding)
        if reader.job.request.priority < urgent:
            return self._stalled < STALL_S
        if reader.job.request.priority > urgent and urgent < ORDINARY:
            return False
        return self._owed <= 0

    def note_read(self, reader: Decoding, decoding: Sequence[Decoding], seconds: float, now: float) -> None:
        """Take note of a piece that was read, while others could have decoded."""
        self.note(reader.job.request.client, seconds, now)
        if self.starved(reader, now - seconds):
            self._favoured = now
        self._owed = seconds if decoding else 0.0
        self._stalled = self._stalled + seconds if decoding else 0.0
        reader.progressed = now

    def note_steps(self, decoding: Sequence[Decoding], seconds: float, now: float) -> None:
        """Take note of a step of all of them."""
        self._stalled = 0.0
        self._owed -= seconds
        for one in decoding:
            self.note(one.job.request.client, seconds / len(decoding), now)
            one.progressed = now

    def victim(self, holders: Sequence[Decoding], waiting: Decoding, now: float, quantum: float) -> Decoding | None:
        """Who of those that hold a state has to give it to the one `waiting`: the least urgent, most served.

        One as urgent as the waiting one gives way when it has held it for `quantum` seconds, and the other waited.
        """
        urgency = waiting.job.request.priority

        def gives_way(one: Decoding) -> bool:
            if one.job.request.priority != urgency:
                return one.job.request.priority > urgency
            return now - one.held_since > quantum and now - waiting.progressed > quantum

        yielding = [one for one in holders if gives_way(one)]
        return max(
            yielding,
            key=lambda one: (one.job.request.priority, self.served(one.job.request.client, now)),
            default=None,
        )
