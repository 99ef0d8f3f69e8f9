"""Key-value caches: preallocated buffers that the graph extends in place, kept for prompts that share a prefix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnxruntime as ort

from lsp_agent.engine.architecture import ModelConfig


class KvCache:
    """Keys and values of `batch` sequences, each `length` tokens long, up to `capacity` tokens.

    `ids` are the tokens whose keys and values are in the buffers (for a batch: those that all sequences share).
    Buffers are zero pages until written, so capacity costs address space, not memory.
    """

    def __init__(self, config: ModelConfig, states: Iterable[str], capacity: int, batch: int = 1) -> None:
        shape = (batch, config.kv_heads, capacity, config.head_size)
        self.capacity = capacity
        self.length = 0
        self.ids: list[int] = []
        self._arrays = {name: np.zeros(shape, np.float32) for name in states}
        self._share()

    def _share(self) -> None:
        # The values borrow the arrays' memory: both live as long as this cache.
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self._arrays.items()}
        self._binding: ort.IOBinding | None = None

    def binding(self, session: ort.InferenceSession, states: Mapping[str, str]) -> ort.IOBinding:
        """A binding of every state in place (past input -> present output); the rest is bound at each run.

        Kept between runs: binding some hundred values at every step costs a few percent of a small model's time.
        """
        if self._binding is None:
            self._binding = session.io_binding()
            for past, present in states.items():
                self._binding.bind_ortvalue_input(past, self._values[past])
                self._binding.bind_ortvalue_output(present, self._values[past])
        return self._binding

    def extend(self, ids: Sequence[int]) -> None:
        """Count tokens that a run has just written (of a cache of one sequence)."""
        self.ids.extend(ids)
        self.length += len(ids)

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        del self.ids[length:]
        self.length = length

    def copy_prefix(self, source: KvCache, length: int) -> None:
        """Take over the first `length` tokens of `source` into every sequence of this cache."""
        for name, array in self._arrays.items():
            array[:, :, :length] = source._arrays[name][:1, :, :length]
        self.ids = source.ids[:length]
        self.length = length

    def keep(self, rows: Sequence[int]) -> None:
        """Shrink the batch to `rows` (ascending); the others are forgotten."""
        for name, array in self._arrays.items():
            for target, row in enumerate(rows):
                if target != row:
                    array[target, :, : self.length] = array[row, :, : self.length]
            self._arrays[name] = array[: len(rows)]
        self._share()


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


class PrefixCache:
    """A few caches of past prompts, the least recently used one recycled first.

    Filling in a file asks many prompts that share a long beginning: only what follows it is read again.
    """

    def __init__(self, config: ModelConfig, states: Iterable[str], capacity: int, slots: int = 4) -> None:
        self.capacity = capacity
        self._make = lambda: KvCache(config, states, capacity)
        self._slots = slots
        self._caches: list[KvCache] = []  # least recently used first

    def take(self, ids: Sequence[int]) -> KvCache:
        """A cache that holds the longest known prefix of `ids` and nothing else; its `ids` say how much.

        At least the last token is left out, since its logits are needed.
        """
        wanted = ids[:-1]
        best = max(self._caches, key=lambda cache: shared_prefix(cache.ids, wanted), default=None)
        shared = shared_prefix(best.ids, wanted) if best else 0
        if best is None or self._worth_keeping(best, shared):
            fresh = self._recycle(keep=best)
            if best is not None:
                fresh.copy_prefix(best, shared)
            best = fresh
        best.truncate(shared)
        self._touch(best)
        return best

    def empty(self) -> KvCache:
        """The least recently used cache, emptied."""
        cache = self._recycle(keep=None)
        self._touch(cache)
        return cache

    def clear(self) -> None:
        """Forget every prompt and free its memory."""
        self._caches.clear()

    def _touch(self, cache: KvCache) -> None:
        if cache in self._caches:
            self._caches.remove(cache)
        self._caches.append(cache)

    def _worth_keeping(self, cache: KvCache, shared: int) -> bool:
        """Whether the tail that `cache` would lose is longer than a decoded answer of ordinary length."""
        return self._slots > 1 and len(cache.ids) - shared > 64

    def _recycle(self, keep: KvCache | None) -> KvCache:
        if len(self._caches) < self._slots:
            return self._make()
        cache = next(cache for cache in self._caches if cache is not keep)
        self._caches.remove(cache)
        cache.truncate(0)
        return cache
