"""Copies of recurrent states: a run replaces such a state, so a prefix can only be taken up where a copy was kept."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np

from lsp_agent.engine.device import Array, Device
from lsp_agent.engine.prefixes.host_memory import HostMemory, Shapes

WORTH_MOVING = 16
"""Tokens after a copy below which another is not worth its bytes elsewhere: to read so few tokens again takes about as
long as to move a copy to main memory and back."""


class RecurrentCopies:
    """Checkpoints of one sequence's recurrent states, by the length at which they were made.

    `Device.checkpoints` of them are in the device's memory; the oldest move to main memory, where `memory` has room.
    Arrays are shared between the copies of sequences that share a prefix and never written again.
    """

    def __init__(self, shapes: Shapes, device: Device, memory: HostMemory | None = None) -> None:
        self._shapes, self._device = shapes, device
        self._memory = memory or HostMemory(sys.maxsize)
        self._kept: dict[int, Mapping[str, Array]] = {}  # by length, ascending

    @property
    def lengths(self) -> list[int]:
        """Where copies are, ascending."""
        return list(self._kept)

    def at(self, length: int) -> Mapping[str, Array] | None:
        """The arrays [1, ...] by `past` name, in the device's memory or in main memory."""
        return self._kept.get(length)

    def add(self, length: int, arrays: Mapping[str, Array]) -> None:
        """Copy the arrays of this length, if there is room."""
        if not self._shapes or length in self._kept:
            return
        if self._device.name == "cpu":
            copied: Mapping[str, Array] | None = self.copied(arrays, self._memory)
        else:
            copied = {name: self._device.copy(array) for name, array in arrays.items()}
        if copied is not None:
            self._kept = dict(sorted({**self._kept, length: copied}.items()))
            self._move_oldest()

    def share(self, other: RecurrentCopies, length: int) -> None:
        """Have the copies of another sequence up to `length`, and no others."""
        self._kept = {known: arrays for known, arrays in other._kept.items() if known <= length}

    def forget_after(self, length: int) -> None:
        """Keep those up to `length`."""
        self._kept = {known: arrays for known, arrays in self._kept.items() if known <= length}

    def worth_moving(self, lengths: Iterable[int]) -> list[int]:
        """Those of some lengths, ascending, at which copies are worth their bytes in main memory."""
        worth: list[int] = []
        for length in sorted(lengths):
            if not worth or self._device.name == "cpu" or length - worth[-1] >= WORTH_MOVING:
                worth.append(length)
        return worth

    def thin(self, closer: float = float("inf")) -> bool:
        """Forget the copy in main memory that is missed least: the closest to the one before; the last one at last.

        False when there is none, or none `closer` than so many tokens.
        """
        gaps = [(after - before, after) for before, after in pairwise([0, *self._kept])]
        latest = max(self._kept, default=0)
        gaps = [(gap, length) for gap, length in gaps if gap < closer and _in_main_memory(self._kept[length])]
        if not gaps:
            return False
        del self._kept[min((length == latest, gap, length) for gap, length in gaps)[-1]]
        return True

    def in_main_memory(self, length: int, memory: HostMemory) -> Mapping[str, np.ndarray] | None:
        """The copy of a length, in `memory`; None when there is none, or no room."""
        arrays = self._kept.get(length)
        return arrays if arrays is None or _in_main_memory(arrays) else self.copied(arrays, memory)

    def copied(self, arrays: Mapping[str, Array], memory: HostMemory) -> Mapping[str, np.ndarray] | None:
        """A copy of such arrays in main memory; None when there is no room."""
        copied = memory.arrays(self._shapes)
        if copied is not None:
            for name, array in copied.items():
                self._device.fetch(arrays[name], array)
        return copied

    def _move_oldest(self) -> None:
        on_device = [length for length, arrays in self._kept.items() if not _in_main_memory(arrays)]
        if len(on_device) <= self._device.checkpoints:
            return
        oldest, following = on_device[:2]
        if following - oldest < WORTH_MOVING:
            del self._kept[following]
            return
        moved = self.in_main_memory(oldest, self._memory)
        if moved is None:
            del self._kept[oldest]
        else:
            self._kept[oldest] = moved


def _in_main_memory(arrays: Mapping[str, Array]) -> bool:
    return all(isinstance(array, np.ndarray) for array in arrays.values())
