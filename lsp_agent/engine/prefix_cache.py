"""The states of past prompts: a new one reads only what follows the longest beginning that it shares with any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lsp_agent.engine.device import Device
from lsp_agent.engine.prefix_tree import shared_prefix
from lsp_agent.engine.state import State, StateSpec

PREFIX_SLOTS = 4
"""States in the device's memory: those of running sequences and of past prompts."""


@dataclass(frozen=True)
class CacheStats:
    """Since the start: `requests`, tokens `asked` for and those `found`. Now: `states`, and those `taken`."""

    requests: int = 0
    asked: int = 0
    found: int = 0
    states: int = 0
    taken: int = 0


class PrefixCache:
    """States to be taken for a prompt and given back, the least recently used one recycled first."""

    def __init__(
        self, specs: Iterable[StateSpec], capacity: int, slots: int = PREFIX_SLOTS, device: Device | None = None
    ) -> None:
        self.capacity = capacity
        known = tuple(specs)
        self._make = lambda: State(known, capacity, device=device)
        self._slots = slots
        self._states: list[State] = []  # least recently used first
        self._taken: list[State] = []
        self._requests = self._asked = self._found = 0

    def take(self, ids: Sequence[int], boundaries: Sequence[int] = (), seconds: float = float("inf")) -> State | None:  # noqa: ARG002
        """A state that has read the longest known prefix of `ids` and nothing else; its `ids` say how much.

        It is the caller's alone until `release`. At least the last token is left out, since its logits are needed.
        `boundaries`: lengths that later prompts may branch off; `State.until_stop` stops a run there. None when all
        states are taken, or when more than `seconds` would have to be spent on moving tokens between tiers: then
        another call goes on with it.
        """
        wanted = ids[:-1]
        best, shared = None, 0
        for state in self._states:
            reached = state.reachable(shared_prefix(state.ids, wanted))
            if best is None or reached > shared:
                best, shared = state, reached
        if best is None or best in self._taken or len(best.ids) - shared > 64:
            fresh = self._recycle(keep=best)
            if fresh is None:
                return None
            if best is not None and best is not fresh:
                fresh.copy_prefix(best, shared)
            best = fresh
        best.truncate(min(shared, best.length))
        best.stops = tuple(boundaries)
        self._requests += 1
        self._asked += len(ids)
        self._found += best.length
        return self._touch(best)

    def empty(self) -> State | None:
        """An empty state, the caller's alone until `release`; None when all are taken."""
        state = self._recycle(keep=None)
        return None if state is None else self._touch(state)

    def release(self, state: State) -> None:
        """Give a state back; what it has read is kept for later prompts."""
        self._taken = [other for other in self._taken if other is not state]

    def keep(self, view: State) -> None:
        """Remember what `view`, such as a row of a batch, has read beyond what is known."""

    def clear(self) -> None:
        """Forget every prompt and free its memory; states that are taken stay their takers'."""
        self._states = list(self._taken)

    def stats(self) -> CacheStats:
        """How well it works, and what it holds."""
        return CacheStats(self._requests, self._asked, self._found, len(self._states), len(self._taken))

    def _touch(self, state: State) -> State:
        self._states = [other for other in self._states if other is not state]
        for other in self._states:
            if other not in self._taken:
                other.trim()
        self._states.append(state)
        self._taken.append(state)
        return state

    def _recycle(self, keep: State | None) -> State | None:
        if len(self._states) < self._slots:
            return self._make()
        idle = [state for state in self._states if state not in self._taken]
        if not idle:
            return None
        state = next((state for state in idle if state is not keep), idle[0])
        if state is not keep:
            state.truncate(0)
        return state
