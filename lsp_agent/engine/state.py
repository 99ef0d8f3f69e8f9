"""What a decoder remembers of a sequence: keys and values that grow with it, and recurrent states of fixed size.

Keys and values are preallocated buffers that the graph extends in place: forgetting the last tokens only means to
count them no longer. A recurrent state (of Gated DeltaNet and its convolution) is replaced by every run and cannot go
back, so copies of it are kept at a few lengths: the checkpoints that a prefix can be taken up from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnxruntime as ort

MOST_CHECKPOINTS = 16


@dataclass(frozen=True)
class StateSpec:
    """One state of the graph, its input `past` and its output `present`.

    `growing`: keys or values, [batch, heads, capacity, head size] of the `shape` (heads, head size). Otherwise the
    array is [batch, *shape]. `dtype` is numpy's name of the elements' type.
    """

    past: str
    present: str
    shape: tuple[int, ...]
    growing: bool
    dtype: str = "float32"


@dataclass(frozen=True)
class Snapshot:
    """A copy of a whole state: `ids`, keys and values up to their length, recurrent states; fp32, by `past` name."""

    ids: tuple[int, ...]
    growing: dict[str, np.ndarray]
    recurrent: dict[str, np.ndarray]


class State:
    """The state of `batch` sequences, each `length` tokens long, up to `capacity` tokens.

    `ids` are the tokens that the state has read (for a batch: those that all sequences share). Buffers are zero pages
    until written, so capacity costs address space, not memory.
    """

    def __init__(self, specs: Iterable[StateSpec], capacity: int, batch: int = 1) -> None:
        self.capacity = capacity
        self.length = 0
        self.ids: list[int] = []
        self._specs = tuple(specs)
        self._growing: dict[str, np.ndarray] = {}
        self._recurrent: dict[str, np.ndarray] = {}
        # A run reads one buffer and writes the other: the CPU kernels are wrong in place, and a run may be cancelled.
        self._spare: dict[str, np.ndarray] = {}
        for spec in self._specs:
            if spec.growing:
                heads, size = spec.shape
                self._growing[spec.past] = np.zeros((batch, heads, capacity, size), np.float32)
            else:
                self._recurrent[spec.past] = np.zeros((batch, *spec.shape), np.float32)
                self._spare[spec.past] = np.zeros((batch, *spec.shape), np.float32)
        self._checkpoints: dict[int, dict[str, np.ndarray]] = {}  # by length, ascending
        self._share()

    def _share(self) -> None:
        # The values borrow the arrays' memory: both live as long as this state.
        def borrow(arrays: dict[str, np.ndarray]) -> dict[str, ort.OrtValue]:
            return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}

        self._growing_values = borrow(self._growing)
        self._recurrent_values, self._spare_values = borrow(self._recurrent), borrow(self._spare)

        self._bindings: list[ort.IOBinding | None] = [None, None]  # one for each way the buffers are turned
        self._turn = 0

    def binding(self, session: ort.InferenceSession) -> ort.IOBinding:
        """A binding of every state, past input and present output; the rest is bound at each run.

        Kept between runs: binding some hundred values at every step costs a few percent of a small model's time.
        """
        bound = self._bindings[self._turn]
        if bound is None:
            bound = self._bindings[self._turn] = session.io_binding()
            for spec in self._specs:
                if spec.growing:
                    past = present = self._growing_values[spec.past]
                else:
                    past, present = self._recurrent_values[spec.past], self._spare_values[spec.past]
                bound.bind_ortvalue_input(spec.past, past)
                bound.bind_ortvalue_output(spec.present, present)
        return bound

    def commit(self) -> None:
        """Take over what a run has just written; without it the state is as before the run."""
        if self._recurrent:
            self._recurrent, self._spare = self._spare, self._recurrent
            self._recurrent_values, self._spare_values = self._spare_values, self._recurrent_values
            self._turn = 1 - self._turn

    def extend(self, ids: Sequence[int]) -> None:
        """Count tokens that a run has just read (of a state of one sequence)."""
        self.ids.extend(ids)
        self.length += len(ids)

    def checkpoint(self) -> None:
        """Remember this length as one to come back to; costs nothing where every length is."""
        if not self._recurrent or not self.length or self.length in self._checkpoints:
            return
        self._checkpoints[self.length] = {name: array.copy() for name, array in self._recurrent.items()}
        if len(self._checkpoints) > MOST_CHECKPOINTS:
            # The one that is closest to its predecessor is missed least; the latest stays.
            gaps = [(after - before, after) for before, after in pairwise([0, *self._checkpoints])]
            del self._checkpoints[min(gaps[:-1])[1]]

    def reachable(self, length: int) -> int:
        """The largest length up to `length` that this state can go back to."""
        if length >= self.length:
            return self.length
        if not self._recurrent:
            return length
        return max((known for known in self._checkpoints if known <= length), default=0)

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens; only lengths that are `reachable` can be given."""
        self._recall(self, length)
        self._checkpoints = {known: arrays for known, arrays in self._checkpoints.items() if known <= length}
        del self.ids[length:]
        self.length = length

    def copy_prefix(self, source: State, length: int) -> None:
        """Take over the first `length` tokens of `source`, `reachable` there, into every sequence of this state."""
        for name, array in self._growing.items():
            array[:, :, :length] = source._growing[name][:1, :, :length]
        self._recall(source, length)
        self._checkpoints = {known: arrays for known, arrays in source._checkpoints.items() if known <= length}
        self.ids = source.ids[:length]
        self.length = length

    def _recall(self, source: State, length: int) -> None:
        if not self._recurrent or (source is self and length == self.length):
            return
        if source.reachable(length) != length:
            raise ValueError(f"there is no checkpoint at {length} tokens")
        arrays = source._recurrent if length == source.length else source._checkpoints.get(length)
        for name, array in self._recurrent.items():
            array[:] = 0 if arrays is None else arrays[name][:1]

    def keep(self, rows: Sequence[int]) -> None:
        """Shrink the batch to `rows` (ascending); the others are forgotten."""
        for name, array in self._growing.items():
            for target, row in enumerate(rows):
                if target != row:
                    array[target, :, : self.length] = array[row, :, : self.length]
            self._growing[name] = array[: len(rows)]
        for name, array in self._recurrent.items():
            self._recurrent[name] = array[list(rows)]
            self._spare[name] = self._spare[name][: len(rows)]
        self._checkpoints.clear()
        self._share()

    def snapshot(self) -> Snapshot:
        """A copy of the whole state (of one sequence), independent of what happens to it later."""
        growing = {name: array[:, :, : self.length].copy() for name, array in self._growing.items()}
        return Snapshot(tuple(self.ids), growing, {name: array.copy() for name, array in self._recurrent.items()})

    def restore(self, snapshot: Snapshot) -> None:
        """Become what the state of a snapshot was; the snapshot stays usable. Checkpoints are forgotten."""
        length = len(snapshot.ids)
        for name, array in snapshot.growing.items():
            self._growing[name][:, :, :length] = array
        for name, array in snapshot.recurrent.items():
            self._recurrent[name][:] = array
        self._checkpoints.clear()
        self.ids, self.length = list(snapshot.ids), length


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


class PrefixCache:
    """The states of a few past prompts, the least recently used one recycled first.

    Filling in a file asks many prompts that share a long beginning: only what follows it is read again.
    """

    def __init__(self, specs: Iterable[StateSpec], capacity: int, slots: int = 4) -> None:
        self.capacity = capacity
        known = tuple(specs)
        self._make = lambda: State(known, capacity)
        self._slots = slots
        self._states: list[State] = []  # least recently used first

    def take(self, ids: Sequence[int]) -> State:
        """A state that has read the longest known prefix of `ids` and nothing else; its `ids` say how much.

        At least the last token is left out, since its logits are needed.
        """
        wanted = ids[:-1]
        best, shared = None, 0
        for state in self._states:
            reached = state.reachable(shared_prefix(state.ids, wanted))
            if best is None or reached > shared:
                best, shared = state, reached
        if best is None or self._worth_keeping(best, shared):
            fresh = self._recycle(keep=best)
            if best is not None:
                fresh.copy_prefix(best, shared)
            best = fresh
        best.truncate(shared)
        self._touch(best)
        return best

    def empty(self) -> State:
        """The least recently used state, emptied."""
        state = self._recycle(keep=None)
        self._touch(state)
        return state

    def clear(self) -> None:
        """Forget every prompt and free its memory."""
        self._states.clear()

    def _touch(self, state: State) -> None:
        if state in self._states:
            self._states.remove(state)
        self._states.append(state)

    def _worth_keeping(self, state: State, shared: int) -> bool:
        """Whether the tail that `state` would lose is longer than a decoded answer of ordinary length."""
        return self._slots > 1 and len(state.ids) - shared > 64

    def _recycle(self, keep: State | None) -> State:
        if len(self._states) < self._slots:
            return self._make()
        state = next(state for state in self._states if state is not keep)
        self._states.remove(state)
        state.truncate(0)
        return state
