"""What to evict first: what was used least lately and is worth least for its bytes."""

from __future__ import annotations

import heapq
from itertools import count
from typing import Generic, Protocol, TypeVar

LEAST = 1024
"""Entries beyond which those that no longer hold are looked for."""


class Ranked(Protocol):
    """What can be evicted, as long as it is `alive`; the least `priority` goes first."""

    priority: tuple[float, int]

    @property
    def alive(self) -> bool:
        """Whether it is still there."""


T = TypeVar("T", bound=Ranked)


class GreedyDual(Generic[T]):
    """GreedyDual-Size (Cao and Irani, 1997): an item's value counts from the value of what was evicted when the item
    was used last, so that values age; equal ones go in order of use."""

    def __init__(self) -> None:
        self._clock = 0.0
        self._uses = count(1)
        self._heap: list[tuple[tuple[float, int], int, T]] = []
        self._most = LEAST

    def __len__(self) -> int:
        """Entries, with those that no longer hold."""
        return len(self._heap)

    def use(self) -> int:
        """A number for what is used together now."""
        return next(self._uses)

    def priority(self, value: float, use: int) -> tuple[float, int]:
        """Of an item that is used now, by what it is worth for its bytes."""
        return self._clock + value, use

    def push(self, item: T) -> None:
        """Have an item among those that can be evicted, by its priority; earlier ones of it no longer count."""
        heapq.heappush(self._heap, (item.priority, next(self._uses), item))
        if len(self._heap) > self._most:
            live = {id(entry[2]): entry for entry in self._heap if self._holds(entry[0], entry[2])}
            self._heap = list(live.values())
            heapq.heapify(self._heap)
            self._most = LEAST + 2 * len(self._heap)

    def pop(self) -> T | None:
        """The next one, which is pushed again if it has to stay."""
        while self._heap:
            priority, _, item = heapq.heappop(self._heap)
            if self._holds(priority, item):
                return item
        return None

    def evicted(self, item: T) -> None:
        """Note what was evicted, before its priority changes."""
        self._clock = max(self._clock, item.priority[0])

    def clear(self) -> None:
        """Forget all items."""
        self._heap.clear()

    @staticmethod
    def _holds(priority: tuple[float, int], item: T) -> bool:
        return item.alive and priority == item.priority
