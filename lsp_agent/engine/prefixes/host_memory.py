"""Main memory for what past prompts left behind, within a budget."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import numpy as np

from lsp_agent.engine.pages import zero_pages

Shapes = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape and numpy's name of the element type of arrays by name."""

_ALIGNMENT = 64


def bytes_of(shapes: Shapes) -> int:
    """Bytes of arrays that lie one after the other in a buffer."""
    return sum(_aligned(_bytes(*shape)) for shape in shapes.values())


def carve(buffer: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    """Arrays of these shapes, views of a buffer of `bytes_of(shapes)` bytes."""
    arrays, offset = {}, 0
    for name, (shape, dtype) in shapes.items():
        size = _bytes(shape, dtype)
        arrays[name] = buffer[offset : offset + size].view(dtype).reshape(shape)
        offset += _aligned(size)
    return arrays


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class HostMemory:
    """Arrays whose bytes count from when they are made until nothing refers to them, so the count is always true.

    `limit` in bytes. When it is reached, `evict` is called until there is room or it returns False.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = self.most_used = 0
        self.evict: Callable[[], bool] = lambda: False

    def arrays(self, shapes: Shapes, forced: bool = False) -> dict[str, np.ndarray] | None:
        """Arrays in one buffer; None when there is no room. `forced`: beyond the limit if need be."""
        size = bytes_of(shapes)
        if not forced and not self.make_room(size):
            return None
        buffer = zero_pages(size, written_whole=True)
        self.used += size
        self.most_used = max(self.most_used, self.used)
        weakref.finalize(buffer, _freed, weakref.ref(self), size).atexit = False
        return carve(buffer, shapes)

    def make_room(self, size: int) -> bool:
        """Evict until `size` bytes are free; False when nothing is left to evict, or all of it would not do."""
        if size > self.limit:
            return False
        while self.used + size > self.limit:
            if not self.evict():
                return False
        return True


def _freed(memory: weakref.ref[HostMemory], size: int) -> None:
    if (one := memory()) is not None:
        one.used -= size
