"""What past prompts left in main memory: keys and values in a radix tree over tokens, and recurrent states."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import numpy as np

from lsp_agent.engine.device import Array
from lsp_agent.engine.host_memory import HostMemory, bytes_of
from lsp_agent.engine.prefix_tree import Node, PrefixTree
from lsp_agent.engine.recurrent_copies import RecurrentCopies
from lsp_agent.engine.state import StateSpec, recurrent_shapes, segment_shapes

Segment = dict[str, np.ndarray]
"""Keys and values [heads, tokens, head size] of consecutive tokens, by `past` name."""
Checkpoint = Mapping[str, np.ndarray]
"""Recurrent states [1, ...] by `past` name."""
Kept = Node[Segment, Checkpoint]
Path = list[tuple[Kept, int]]
"""Nodes from the root on, and how many tokens of each agree with what was looked up: all but of the last one."""


class Readable(Protocol):
    """A state, or a row of a batch: what has read `ids`."""

    ids: list[int]
    checkpoints: RecurrentCopies

    def fetch(self, start: int, into: Mapping[str, np.ndarray]) -> None:
        """See `State.fetch`."""

    @property
    def recurrent(self) -> Mapping[str, Array]:
        """See `State.recurrent`."""


@dataclass
class StoreStats:
    """Now: `tokens` whose keys and values are here, copies of recurrent states (`checkpoints`); `evictions` so far."""

    tokens: int = 0
    checkpoints: int = 0
    evictions: int = 0


class PrefixStore:
    """Within the budget of `memory`, what is evicted first is what was used least lately and is cheapest to read again
    for its bytes (GreedyDual-Size; Cao and Irani, 1997).

    A node may lack its keys and values while a state in the device's memory has them: a branch is kept without a second
    copy of what it shares with that state, and is usable as long as that state is.
    """

    def __init__(self, specs: Iterable[StateSpec], memory: HostMemory) -> None:
        self._specs = tuple(specs)
        self._memory = memory
        self._recurrent = bytes_of(recurrent_shapes(self._specs))
        self._a_token = bytes_of(segment_shapes(self._specs, 64)) / 64
        self._tree: PrefixTree[Segment, Checkpoint] = PrefixTree(self._split)
        self._clock = 0.0
        self._uses = count(1)
        self._heap: list[tuple[tuple[float, int], int, Kept]] = []
        self._evictions = 0

    def walk(self, ids: Sequence[int]) -> Path:
        """What is known of a prompt."""
        return self._tree.walk(ids)

    def save(self, view: Readable, start: int, deadline: float = float("inf")) -> bool:
        """Keep what `view` has read from token `start` on, as far as it is not here and there is room.

        False when `deadline` (of `time.monotonic`) came first; another call goes on. Of a recurrent model what follows
        the last checkpoint is kept up to the present state, which is copied as well.
        """
        ids = view.ids
        marks = {*view.checkpoints.lengths, len(ids)} if self._recurrent else set()
        marks = {length for length in marks if start < length <= len(ids)}
        if len(ids) <= start or self._has(ids, start, marks):
            return True
        for length in sorted({start, *marks}):
            self._tree.insert(ids[:length])
        nodes = self._tree.insert(ids)
        self._touch(nodes)
        waiting = [node for node in nodes if node.end > start and self._lacks(node, marks)]
        done = True
        for place, node in enumerate(waiting, 1):
            if not self._fill(node, view, node.end in marks):
                break
            if time.monotonic() > deadline and place < len(waiting):
                done = False
                break
        self._prune(nodes[-1])
        self._touch(node for node in nodes if node.parent is not None)
        return done

    def _lacks(self, node: Kept, marks: set[int]) -> bool:
        return node.content is None or (node.mark is None and node.end in marks)

    def _fill(self, node: Kept, view: Readable, mark: bool) -> bool:
        if node.content is None:
            content = self._memory.arrays(segment_shapes(self._specs, len(node.tokens)))
            if content is None:
                return False
            view.fetch(node.start, content)
            node.content = content
        if mark and node.mark is None:
            node.mark = view.checkpoints.in_main_memory(node.end, self._memory)
            if node.mark is None and node.end == len(view.ids):
                node.mark = view.checkpoints.copied(view.recurrent, self._memory)
        return True

    def extent(self, path: Path, start: int) -> int:
        """How many tokens of a path are here without a gap, if the first `start` are elsewhere; at least `start`."""
        reached = start
        for node, agreed in path:
            if node.end <= start:
                continue
            if node.content is None:
                break
            reached = max(reached, node.start + agreed)
        return reached

    def parts(self, path: Path, start: int, stop: int) -> Iterator[tuple[int, Segment]]:
        """Keys and values of the tokens from `start` to `stop`, in pieces, each with where it begins."""
        for node, _ in path:
            first, last = max(start, node.start), min(stop, node.end)
            if first < last:
                assert node.content is not None
                places = slice(first - node.start, last - node.start)
                yield first, {name: array[:, places] for name, array in node.content.items()}

    def _has(self, ids: Sequence[int], start: int, marks: set[int]) -> bool:
        path = self.walk(ids)
        known = {node.end for node, agreed in path if node.mark is not None and agreed == len(node.tokens)}
        return self.extent(path, start) >= len(ids) and marks <= known

    def _split(self, content: Segment, at: int) -> tuple[Segment, Segment]:
        """Copies: views would keep all of the bytes for as long as one part is needed."""
        halves = []
        for part in (slice(None, at), slice(at, None)):
            shapes = {name: (array[:, part].shape, array.dtype.name) for name, array in content.items()}
            half = self._memory.arrays(shapes, forced=True)
            assert half is not None
            for name, array in content.items():
                half[name][...] = array[:, part]
            halves.append(half)
        return halves[0], halves[1]

    # Eviction

    def touch(self, path: Path) -> None:
        """Note that these were used."""
        self._touch([node for node, _ in path])

    def evict(self) -> bool:
        """Give back the memory of what is worth least; False when there is nothing left.

        Keys and values go from the ends of branches, copies of recurrent states from anywhere.
        """
        while self._heap:
            priority, _, node = heapq.heappop(self._heap)
            if priority != node.priority or node.parent is None:
                continue
            if node.children and node.mark is None:
                continue  # its turn comes when it ends a branch
            self._clock = max(self._clock, priority[0])
            self._evictions += 1
            if node.children:
                node.mark = None
            else:
                node.content = node.mark = None
                self._prune(node)
            return True
        return False

    def clear(self) -> None:
        """Forget everything."""
        for node in self._tree:
            node.content = node.mark = None  # parents and children refer to each other
        self._tree = PrefixTree(self._split)
        self._heap.clear()

    def stats(self) -> StoreStats:
        """How much is here."""
        stats = StoreStats(evictions=self._evictions)
        for node in self._tree:
            stats.tokens += len(node.tokens) if node.content is not None else 0
            stats.checkpoints += node.mark is not None
        return stats

    def _touch(self, nodes: Iterable[Kept]) -> None:
        use = next(self._uses)
        for node in nodes:
            node.priority = (self._clock + self._value(node), use)
            self._push(node)

    def _push(self, node: Kept) -> None:
        if node.mark is not None or (node.content is not None and not node.children):
            heapq.heappush(self._heap, (node.priority, next(self._uses), node))

    def _value(self, node: Kept) -> float:
        """What would be read again without it, over its bytes; 1 for keys and values alone."""
        if not self._recurrent:
            return 1.0
        if node.mark is None:
            return 0.0  # no prompt can end here
        kept = self._recurrent + (0 if node.children or node.content is None else len(node.tokens) * self._a_token)
        before = node.parent
        while before is not None and before.mark is None:
            before = before.parent
        return (node.end - (before.end if before else 0)) * self._a_token / kept

    def _prune(self, node: Kept) -> None:
        """Take out what keeps nothing, from the end of a branch back."""
        while node.parent is not None and not node.children and node.content is None and node.mark is None:
            parent = node.parent
            self._tree.remove(node)
            node.parent = None
            node = parent
        if node.parent is not None:
            self._push(node)
