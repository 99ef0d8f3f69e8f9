"""What past prompts left in main memory and on disk: keys and values in a radix tree over tokens, recurrent states."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lsp_agent.engine.device import Array
from lsp_agent.engine.prefixes.disk import PrefixDisk, PrefixLostError
from lsp_agent.engine.prefixes.eviction import GreedyDual
from lsp_agent.engine.prefixes.files import Checkpoint, Kept, NodeFiles, Segment
from lsp_agent.engine.prefixes.host_memory import HostMemory, bytes_of
from lsp_agent.engine.prefixes.recurrent_copies import RecurrentCopies
from lsp_agent.engine.prefixes.tree import LONGEST, PrefixTree
from lsp_agent.engine.state import StateSpec, recurrent_shapes, segment_shapes

NODES = 16
"""For as many nodes of keys and values there is room at least."""
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
    """Now: `tokens` whose keys and values are in main memory, copies of recurrent states there (`checkpoints`), and
    `disk_tokens` in files; `evictions` from main memory and from disk so far."""

    tokens: int = 0
    checkpoints: int = 0
    disk_tokens: int = 0
    evictions: int = 0
    disk_evictions: int = 0


@dataclass(frozen=True)
class Part:
    """Tokens `start` to `stop` of a prompt, which are kept in `node`: in `content`, or on disk.

    `first`: where the node began, which moves when it is split.
    """

    start: int
    stop: int
    node: Kept
    first: int
    content: Segment | None


class PrefixStore:
    """Within the budget of `memory`, what is evicted first is what was used least lately and is cheapest to read again
    for its bytes; it goes to `disk`, if there is one.

    A node may lack its keys and values while a state in the device's memory has them: a branch is kept without a second
    copy of what it shares with that state, and is usable as long as that state is.
    """

    def __init__(self, specs: Iterable[StateSpec], memory: HostMemory, disk: PrefixDisk | None = None) -> None:
        self._specs = tuple(specs)
        self._memory = memory
        self._recurrent = bytes_of(recurrent_shapes(self._specs))
        self._a_token = bytes_of(segment_shapes(self._specs, 64)) / 64
        self._tree = self._new_tree()
        self._queue: GreedyDual[Kept] = GreedyDual()
        self._evictions = 0
        self._files = NodeFiles(disk)
        self._touch(self._files.attach(self._tree.root))

    def _new_tree(self) -> PrefixTree[Segment, Checkpoint]:
        """Of nodes that are small beside the budget."""
        room = int(self._memory.limit / NODES / self._a_token) if self._a_token else LONGEST
        return PrefixTree(self._split, min(LONGEST, max(1, room)))

    # Finding

    def walk(self, ids: Sequence[int]) -> Path:
        """What is known of a prompt."""
        return self._tree.walk(ids)

    def extent(self, path: Path, start: int) -> int:
        """How many tokens of a path are here without a gap, if the first `start` are elsewhere; at least `start`."""
        reached = start
        for node, agreed in path:
            if node.end <= start:
                continue
            if node.content is None and node not in self._files:
                break
            reached = max(reached, node.start + agreed)
        return reached

    def points(self, path: Path) -> set[int]:
        """Lengths after which recurrent states are here."""
        return {node.end for node, agreed in path if agreed == len(node.tokens) and self._marked(node)}

    def parts(self, path: Path, start: int, stop: int) -> list[Part]:
        """The tokens from `start` to `stop`; what is in main memory stays there as long as a part refers to it."""
        found = []
        for node, _ in path:
            first, last = max(start, node.start), min(stop, node.end)
            if first < last:
                found.append(Part(first, last, node, node.start, node.content))
        return found

    def read(self, part: Part) -> Segment:
        """Keys and values of a part; raises `PrefixLostError` when they were on disk and are no more."""
        content = part.content if part.content is not None else self._from_disk(part.node)[0]
        places = slice(part.start - part.first, part.stop - part.first)
        return {name: array[:, places] for name, array in content.items()}

    def checkpoint(self, path: Path, length: int) -> Checkpoint:
        """The recurrent states after `length` tokens, one of the `points`; raises `PrefixLostError`."""
        node = next(node for node, _ in path if node.end == length)
        mark = node.mark if node.mark is not None else self._from_disk(node)[1]
        if mark is None:
            raise PrefixLostError
        return mark

    def touch(self, path: Path) -> None:
        """Note that these were used."""
        self._touch(node for node, _ in path)

    def _marked(self, node: Kept) -> bool:
        return node.mark is not None or self._files.has_checkpoint(node)

    # Keeping

    def save(self, view: Readable, start: int, deadline: float = float("inf")) -> bool:
        """Keep what `view` has read from token `start` on, as far as it is not here and there is room.

        False when `deadline` (of `time.monotonic`) came first; another call goes on. Of a recurrent model the copies of
        its states are kept, and one of the present state.
        """
        ids = view.ids
        marks: set[int] = set()
        if self._recurrent:
            known = (length for length in {*view.checkpoints.lengths, len(ids)} if start < length <= len(ids))
            marks = set(view.checkpoints.worth_moving(known))
        path = self.walk(ids)
        if len(ids) <= start or (self.extent(path, start) >= len(ids) and marks <= self.points(path)):
            return True
        for length in sorted({start, *marks}):
            self._insert(ids[:length])
        nodes = self._insert(ids)
        self._touch(nodes)
        waiting = [node for node in nodes if node.end > start and self._lacks(node, marks)]
        done = True
        for place, node in enumerate(waiting, 1):
            if not self._fill(node, view, node.end in marks):
                break
            if self._files.disk is not None:
                self._push(node)  # what follows may need its place
            if time.monotonic() > deadline and place < len(waiting):
                done = False
                break
        self._prune(nodes[-1])
        self._touch(node for node in nodes if node.alive)
        return done

    def flush(self) -> None:
        """Write to disk what is not there, the latest in use first, as far as there is room."""
        for node in sorted(self._tree, key=lambda node: (-node.priority[1], node.start)):
            self._store(node, evicting=False)

    def clear(self, disk: bool = True) -> None:
        """Forget everything; without `disk` only what is in main memory."""
        for node in self._tree:
            node.content = node.mark = None  # parents and children refer to each other
        self._files.clear(remove=disk)
        self._tree = self._new_tree()
        self._queue.clear()

    def stats(self) -> StoreStats:
        """How much is here; for any thread."""
        stats = StoreStats(evictions=self._evictions, disk_evictions=self._files.evictions)
        for node in self._tree:
            stats.tokens += len(node.tokens) if node.content is not None else 0
            stats.checkpoints += node.mark is not None
        stats.disk_tokens = self._files.tokens
        return stats

    def _lacks(self, node: Kept, marks: set[int]) -> bool:
        if node in self._files:
            return node.end in marks and not self._marked(node)
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
            if node.mark is not None and node in self._files:
                self._files.forget(node)  # which lacks it
        return True

    def _insert(self, ids: Sequence[int]) -> list[Kept]:
        """As the tree's; a node that is about to be split comes back from disk."""
        path = self.walk(ids)
        if path and path[-1][1] < len(path[-1][0].tokens) and (node := path[-1][0]) in self._files:
            with suppress(PrefixLostError):
                node.content, node.mark, _ = self._from_disk(node)
                self._files.forget(node)
        return self._tree.insert(ids)

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

    # Files

    def _store(self, node: Kept, evicting: bool = True) -> bool:
        """Have a node on disk, in the place of others if need be and if `evicting`."""
        size = int(len(node.tokens) * (self._a_token + 16)) + self._recurrent + 1024
        stored, gone = self._files.store(node, size, evicting)
        for other in gone:
            self._prune(other)
        return stored

    def _from_disk(self, node: Kept) -> tuple[Segment, Checkpoint | None, bool]:
        """What is in a node's file, which main memory then has as well if there is room; raises `PrefixLostError`."""
        try:
            content, mark, roomy = self._files.read(node, self._memory)
        except PrefixLostError:
            self._prune(node)
            raise
        if roomy:
            node.content = content if node.content is None else node.content
            node.mark = mark if node.mark is None else node.mark
            self._push(node)
        return content, mark, roomy

    # Eviction

    def evict(self) -> bool:
        """Give back the memory of what is worth least; False when there is nothing left.

        Keys and values go from the ends of branches, if not to disk, and copies of recurrent states from anywhere.
        """
        while (node := self._queue.pop()) is not None:
            stored = self._store(node)
            if node.children and node.mark is None and not (stored and node.content is not None):
                continue  # its turn comes when it ends a branch
            self._queue.evicted(node)
            self._evictions += 1
            node.mark = None
            if stored or not node.children:
                node.content = None
            self._prune(node)
            return True
        return False

    def _touch(self, nodes: Iterable[Kept]) -> None:
        use = self._queue.use()
        for node in nodes:
            node.priority = self._queue.priority(self._value(node), use)
            self._push(node)

    def _push(self, node: Kept) -> None:
        if node.mark is not None or (node.content is not None and (self._files.disk is not None or not node.children)):
            self._queue.push(node)

    def _value(self, node: Kept) -> float:
        """What would be read again without it, over its bytes; 1 for keys and values alone."""
        if not self._recurrent:
            return 1.0
        if not self._marked(node):
            return 0.0  # no prompt can end here
        kept = self._recurrent + (0 if node.children or node.content is None else len(node.tokens) * self._a_token)
        before = node.parent
        while before is not None and not self._marked(before):
            before = before.parent
        return (node.end - (before.end if before else 0)) * self._a_token / kept

    def _prune(self, node: Kept) -> None:
        """Take out what keeps nothing, from the end of a branch back."""
        while node.parent is not None and not node.children and self._is_bare(node):
            parent = node.parent
            self._tree.remove(node)
            node = parent
        if node.alive:
            self._push(node)

    def _is_bare(self, node: Kept) -> bool:
        return node.content is None and node.mark is None and node not in self._files
