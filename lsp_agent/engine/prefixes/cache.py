"""The states of past prompts: a new one reads only what follows the longest beginning that it shares with any.

Some lie in the device's memory, in states that can be used as they are; what such a state loses, because another prompt
needs it or branches off, goes to main memory (`store.py`) and comes back by copying.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lsp_agent.engine.device import Array, CpuDevice, Device
from lsp_agent.engine.prefixes.disk import PrefixDisk, PrefixLostError
from lsp_agent.engine.prefixes.host_memory import HostMemory, bytes_of
from lsp_agent.engine.prefixes.limits import memory_limit
from lsp_agent.engine.prefixes.recurrent_copies import WORTH_MOVING
from lsp_agent.engine.prefixes.store import Part, Path, PrefixStore, Readable
from lsp_agent.engine.prefixes.tree import shared_prefix
from lsp_agent.engine.state import State, StateSpec, recurrent_shapes, segment_shapes

PREFIX_SLOTS = 4
"""States in the device's memory: those of running sequences and of past prompts."""
SHORT_TAIL = 64
"""Tokens that a state may lose for a prompt that branches off it without another state being looked for."""
EXACT_STOPS = 8
"""Of a prompt's boundaries, how many of the last ones a recurrent state is remembered at whatever lies between them."""
SPARSE_STOPS = 512
"""Tokens between the earlier boundaries at which it is: each ends a run, which is slow for few tokens."""
CLOSE_STOP = 16
"""Tokens before the end of a prompt within which a boundary serves one that is asked again."""


@dataclass(frozen=True)
class CacheStats:
    """Of a prefix cache, tokens and bytes.

    Since the start: `requests`; tokens that were `asked` for and those `found_in_states`, `found_in_memory` and
    `found_on_disk`, which were not read again; `evictions` from main memory and from disk. Now: `states`, of which some
    are `taken`, and their tokens; tokens and `checkpoints` (copies of recurrent states) in main memory; its
    `memory_bytes` in use of a `memory_limit`; the same of the disk.
    """

    requests: int
    asked: int
    found_in_states: int
    found_in_memory: int
    found_on_disk: int
    evictions: int
    disk_evictions: int
    states: int
    taken: int
    state_tokens: int
    state_bytes: int
    memory_tokens: int
    memory_bytes: int
    memory_limit: int
    checkpoints: int
    disk_tokens: int
    disk_bytes: int
    disk_limit: int


@dataclass(frozen=True)
class _Plan:
    """Where the first `length` tokens of a prompt can be had: `shared` tokens' keys and values from `source`, the rest
    from `path`. `known`: how far the prompt agrees with anything known, also where it cannot be taken up."""

    length: int
    source: State | None
    shared: int
    path: Path
    known: int


class PrefixCache:
    """States to be taken for a prompt and given back. For one thread.

    `slots`: how many there are at most. `memory`: bytes of main memory for what states have lost and for checkpoints,
    by default `memory_limit()`. `disk`: where goes what has no room there.
    """

    def __init__(
        self,
        specs: Iterable[StateSpec],
        capacity: int,
        slots: int = PREFIX_SLOTS,
        device: Device | None = None,
        memory: int | None = None,
        disk: PrefixDisk | None = None,
    ) -> None:
        self.capacity = capacity
        self._specs = tuple(specs)
        self._device = device or CpuDevice()
        self._slots = slots
        self._memory = HostMemory(memory_limit() if memory is None else memory)
        cache = weakref.ref(self)  # so that memory is given back with the last reference to the cache
        self._memory.evict = lambda: (one := cache()) is not None and one._evict()
        self._disk = disk
        self._store = PrefixStore(self._specs, self._memory, disk)
        weakref.finalize(self, self._store.clear, disk=False).atexit = False
        self._recurrent = bool(recurrent_shapes(self._specs))
        self._states: list[State] = []  # least recently used first
        self._taken: list[State] = []
        self.unfinished = False
        """Whether the last `take` returned None for want of time, not of states."""
        self._requests = self._asked = self._from_states = self._from_memory = self._from_disk = 0

    def take(self, ids: Sequence[int], boundaries: Sequence[int] = (), seconds: float = float("inf")) -> State | None:
        """A state that has read the longest known prefix of `ids` and nothing else; its `ids` say how much.

        It is the caller's alone until `release`. At least the last token is left out, since its logits are needed.
        `boundaries`: lengths that later prompts may branch off; `State.until_stop` stops a run there. None when all
        states are taken, or when more than `seconds` would have to be spent on moving tokens: then it is `unfinished`,
        and another call goes on with it.
        """
        while True:
            try:
                return self._take(list(ids), boundaries, time.monotonic() + seconds)
            except PrefixLostError:  # the next best, then
                continue

    def _take(self, ids: list[int], boundaries: Sequence[int], deadline: float) -> State | None:
        self.unfinished = False
        wanted = ids[:-1]
        plan = self._plan(wanted)
        self._store.touch(plan.path)
        # Held from here on, since what a state loses may take their place.
        parts = self._store.parts(plan.path, plan.shared, plan.length)
        recurrent = self._recurrent_at(wanted, plan)
        target = self._target(plan, deadline)
        if target is None or not self._load(target, wanted, plan, parts, recurrent, deadline):
            return None
        self._use(target)
        target.stops = self._stops(len(ids), plan, boundaries)
        on_disk = sum(part.stop - part.start for part in parts if part.content is None)
        self._requests += 1
        self._asked += len(ids)
        self._from_states += plan.shared
        self._from_memory += plan.length - plan.shared - on_disk
        self._from_disk += on_disk
        self._taken.append(target)
        return target

    def empty(self) -> State | None:
        """An empty state, the caller's alone until `release`; None when all are taken."""
        state = self._vacant(None, float("inf"))
        if state is not None:
            self._use(state)
            self._taken.append(state)
        return state

    def release(self, state: State) -> None:
        """Give a state back; what it has read is kept for later prompts."""
        self._taken = [other for other in self._taken if other is not state]
        if any(other is state for other in self._states):
            self._use(state)

    def keep(self, view: Readable) -> None:
        """Remember what `view`, such as a row of a batch, has read beyond what is known."""
        shared = max((shared_prefix(state.ids, view.ids) for state in self._states if state is not view), default=0)
        self._store.save(view, shared)

    def close(self) -> None:
        """Before the process ends or the model is unloaded: leave what is known on disk, if there is one."""
        if self._disk is not None:
            for state in reversed(self._states):
                self._store.save(state, 0)
            self._store.flush()
            self._disk.close()

    def clear(self) -> None:
        """Forget every prompt and free its memory; states that are taken stay their takers'."""
        self._states = list(self._taken)
        self._store.clear()

    def stats(self) -> CacheStats:
        """How well it works, and what it holds; for any thread."""
        store = self._store.stats()
        tokens = sum(state.length for state in self._states)
        a_token = bytes_of(segment_shapes(self._specs, 64)) // 64
        recurrent = bytes_of(recurrent_shapes(self._specs))
        return CacheStats(
            requests=self._requests,
            asked=self._asked,
            found_in_states=self._from_states,
            found_in_memory=self._from_memory,
            found_on_disk=self._from_disk,
            evictions=store.evictions,
            disk_evictions=store.disk_evictions,
            states=len(self._states),
            taken=len(self._taken),
            state_tokens=tokens,
            state_bytes=tokens * a_token + len(self._states) * recurrent,
            memory_tokens=store.tokens,
            memory_bytes=self._memory.used,
            memory_limit=self._memory.limit,
            checkpoints=store.checkpoints,
            disk_tokens=store.disk_tokens,
            disk_bytes=self._disk.used if self._disk else 0,
            disk_limit=self._disk.limit if self._disk else 0,
        )

    # Finding the longest prefix

    def _plan(self, wanted: list[int]) -> _Plan:
        path = self._store.walk(wanted)
        agreed = [shared_prefix(state.ids, wanted) for state in self._states]
        known = max([*agreed, path[-1][0].start + path[-1][1] if path else 0])
        points: set[int] = {0}
        if self._recurrent:
            points |= self._store.points(path)
            for state, shared in zip(self._states, agreed, strict=True):
                points |= {length for length in state.points if length <= shared}
        plans = []
        for source, shared in zip([None, *self._states], [0, *agreed], strict=True):
            length = self._store.extent(path, shared)
            if self._recurrent:
                length = max(point for point in points if point <= length)
            plans.append(_Plan(length, source if shared else None, min(shared, length), path, known))
        return max(plans, key=self._preference)

    def _preference(self, plan: _Plan) -> tuple[int, int, bool, int]:
        """The longest prefix, with the fewest tokens to copy, from a state that can be had and has least to lose."""
        source = plan.source
        return plan.length, plan.shared, not self._is_taken(source), -(source.length if source else 0)

    def _recurrent_at(self, wanted: list[int], plan: _Plan) -> Mapping[str, Array]:
        """The recurrent states where the plan ends, wherever they are."""
        if not self._recurrent or not plan.length:
            return {}
        for state in self._states:
            if plan.length in state.points and state.ids[: plan.length] == wanted[: plan.length]:
                arrays = state.at(plan.length)
                if state is plan.source:
                    return arrays
                return {name: self._device.copy(array) for name, array in arrays.items()}  # it may be recycled
        return self._store.checkpoint(plan.path, plan.length)

    def _stops(self, total: int, plan: _Plan, boundaries: Sequence[int]) -> tuple[int, ...]:
        """Where a recurrent state is to be remembered while the rest of a prompt of `total` tokens is read.

        Besides at boundaries: where the prompt branches off a known one, since another may (Marconi; Pan et al., 2024),
        and before its last token, in case it is asked again.
        """
        if not self._recurrent:
            return ()
        ahead = sorted({length for length in boundaries if plan.length < length <= total})
        stops = ahead[-EXACT_STOPS:]
        latest = plan.length
        for length in ahead[:-EXACT_STOPS]:
            if latest == 0 or length - latest >= SPARSE_STOPS:
                stops.append(length)
                latest = length
        if min(abs(plan.known - length) for length in [plan.length, *stops]) >= SHORT_TAIL:
            stops.append(plan.known)
        if max(length for length in [0, *stops] if length < total) < total - CLOSE_STOP:
            stops.append(total - 1)
        return tuple(sorted(stops))

    # Getting a state for it

    def _target(self, plan: _Plan, deadline: float) -> State | None:
        """The state to use: the source where it may lose what the prompt does not share, else a vacant one."""
        source = plan.source
        if source is not None and not self._is_taken(source):
            lost = source.length - plan.shared
            if not lost:
                return source
            other = self._oldest(source)
            full = len(self._states) >= self._slots
            if lost <= SHORT_TAIL or (full and (other is None or 2 * lost <= other.length + plan.shared)):
                return source if self._save(source, plan.shared, deadline) else None
        return self._vacant(source, deadline)

    def _vacant(self, spared: State | None, deadline: float) -> State | None:
        """An empty state, made or the least recently used one, after what it had read was kept."""
        if len(self._states) < self._slots:
            self._states.append(self._new_state())
            return self._states[-1]
        state = self._oldest(spared)
        if state is None or not self._save(state, 0, deadline):
            return None
        if self._device.name != "cpu":
            state.resume([], {})
            return state
        self._states = [other for other in self._states if other is not state]
        self._states.append(self._new_state())  # zero pages: main memory that was written to is given back
        return self._states[-1]

    def _save(self, state: State, start: int, deadline: float) -> bool:
        """Keep what `state` is about to lose; False when time ran out."""
        self.unfinished = not self._store.save(state, start, deadline)
        return not self.unfinished

    def _load(
        self,
        target: State,
        wanted: list[int],
        plan: _Plan,
        parts: list[Part],
        recurrent: Mapping[str, Array],
        deadline: float,
    ) -> bool:
        """Let `target` have read what the plan says; False when time ran out, with a part of it done."""
        source = plan.source
        if target is source and plan.length == plan.shared and plan.length in target.points:
            target.truncate(plan.length)
            target.checkpoint()  # of a turn's end
            return True
        if source is not None and target is not source:
            target.copy_keys_values(source, 0, plan.shared)
        for place, part in enumerate(parts):
            if place and not self._recurrent and time.monotonic() > deadline:
                target.resume(wanted[: part.start], {})
                self.unfinished = True
                return False
            try:
                target.write(part.start, self._store.read(part))
            except Exception:
                target.resume([], {})  # some of what it had read is overwritten
                raise
        target.resume(wanted[: plan.length], recurrent)
        if source is not None and target is not source:
            target.checkpoints.share(source.checkpoints, plan.shared)
        return True

    def _is_taken(self, state: State | None) -> bool:
        return any(other is state for other in self._taken)

    def _oldest(self, spared: State | None) -> State | None:
        """The least recently used state that is free."""
        return next((state for state in self._states if state is not spared and not self._is_taken(state)), None)

    def _use(self, state: State) -> None:
        """Note that a state is the latest in use; the others need not go back a few runs."""
        self._states = [other for other in self._states if other is not state]
        for other in self._states:
            if not self._is_taken(other):
                other.trim()
        self._states.append(state)

    def _new_state(self) -> State:
        return State(self._specs, self.capacity, device=self._device, memory=self._memory)

    def _evict(self) -> bool:
        copies = [state.checkpoints for state in self._states]
        return (
            any(one.thin(closer=WORTH_MOVING) for one in copies)
            or self._store.evict()
            or any(one.thin() for one in copies)
        )
