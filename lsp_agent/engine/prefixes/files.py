"""Which nodes of the prefix tree are in files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from lsp_agent.engine.prefixes.disk import PrefixDisk, PrefixLostError, Stored, prompt_hash
from lsp_agent.engine.prefixes.host_memory import HostMemory
from lsp_agent.engine.prefixes.tree import Node

Segment = Mapping[str, np.ndarray]
"""Keys and values [heads, tokens, head size] of consecutive tokens, by `past` name."""
Checkpoint = Mapping[str, np.ndarray]
"""Recurrent states [1, ...] by `past` name."""
Kept = Node[Segment, Checkpoint]


class NodeFiles:
    """The nodes that `disk` has; without a disk, none."""

    def __init__(self, disk: PrefixDisk | None) -> None:
        self.disk = disk
        self.evictions = 0
        self._files: dict[Kept, Stored] = {}

    def __contains__(self, node: Kept) -> bool:
        return node in self._files

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are in files."""
        return sum(len(stored.tokens) for stored in list(self._files.values()))

    def has_checkpoint(self, node: Kept) -> bool:
        """Whether a file has the recurrent states after a node."""
        return node in self._files and self._files[node].checkpoint

    def attach(self, root: Kept) -> Iterator[Kept]:
        """Hang what an earlier process left below `root`."""
        if self.disk is None:
            return
        known = {prompt_hash(()): root}
        for stored in self.disk.found():
            parent = known.get(stored.before)
            if parent is None or stored.tokens[0] in parent.children or parent.end != stored.start:
                self.disk.remove(stored)
                continue
            node: Kept = Node(stored.tokens, parent)
            parent.children[stored.tokens[0]] = known[stored.after] = node
            self._files[node] = stored
            yield node

    def store(self, node: Kept, size: int, evicting: bool = True) -> tuple[bool, list[Kept]]:
        """Have a node, of about `size` bytes, in a file, in the place of others if need be and if `evicting`.

        Returns whether it is there now, and those others.
        """
        gone: list[Kept] = []
        if node in self._files:
            return True, gone
        if self.disk is None or node.content is None or size > self.disk.limit:
            return False, gone
        while self.disk.used + size > self.disk.limit:
            ends = [one for one in self._files if not any(child in self._files for child in one.children.values())]
            if not evicting or not ends:
                return False, gone
            gone.append(min(ends, key=lambda one: one.priority))
            self.evictions += 1
            self.forget(gone[-1])
        ids: list[int] = []
        above: Kept | None = node
        while above is not None:
            ids[:0], above = above.tokens, above.parent
        stored = self.disk.write(ids, node.start, node.content, node.mark)
        if stored is not None:
            self._files[node] = stored
        return stored is not None, gone

    def read(self, node: Kept, memory: HostMemory) -> tuple[Segment, Checkpoint | None, bool]:
        """See `PrefixDisk.read`; raises `PrefixLostError`, and the file is then forgotten."""
        if self.disk is None or node not in self._files:
            raise PrefixLostError
        try:
            return self.disk.read(self._files[node], memory)
        except PrefixLostError:
            self.forget(node)
            raise

    def forget(self, node: Kept) -> None:
        """Remove a node's file."""
        stored = self._files.pop(node, None)
        if stored is not None and self.disk is not None:
            self.disk.remove(stored)

    def clear(self, remove: bool) -> None:
        """Forget every node, and maybe `remove` the files."""
        if remove:
            for node in list(self._files):
                self.forget(node)
        self._files.clear()
