"""What a decoder remembers of a sequence: keys and values that grow with it, and recurrent states of fixed size.

Keys and values are preallocated buffers that the graph extends in place: forgetting the last tokens only means to
count them no longer. A recurrent state (of Gated DeltaNet and its convolution) is replaced by every run, which reads
one buffer of a ring and writes the next: it can go back to before each of the last few runs, and to checkpoints:
copies of it at a few lengths, from which a prefix can be taken up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from lsp_agent.engine.device import Array, CpuDevice, Device, bind_input, bind_output
from lsp_agent.engine.prefixes.host_memory import HostMemory, Shapes
from lsp_agent.engine.prefixes.recurrent_copies import RecurrentCopies
from lsp_agent.engine.prefixes.tree import shared_prefix

CHECKPOINT_EVERY = 2048
"""Tokens after which a recurrent state is remembered wherever it is: most that a branch has to read again."""


@dataclass(frozen=True)
class StateSpec:
    """One state of the graph, its input `past` and its output `present`.

    `growing`: keys or values, [batch, heads, capacity, head size] of the `shape` (heads, head size). Otherwise the
    array is [batch, *shape]; a `State` is a batch of one. `dtype` is numpy's name of the elements' type.
    """

    past: str
    present: str
    shape: tuple[int, ...]
    growing: bool
    dtype: str = "float32"


def segment_shapes(specs: Iterable[StateSpec], tokens: int) -> Shapes:
    """Keys and values [heads, tokens, head size] of consecutive tokens, by `past` name."""
    return {spec.past: ((spec.shape[0], tokens, spec.shape[1]), spec.dtype) for spec in specs if spec.growing}


def recurrent_shapes(specs: Iterable[StateSpec]) -> Shapes:
    """Recurrent states [1, ...] of one sequence, by `past` name."""
    return {spec.past: ((1, *spec.shape), spec.dtype) for spec in specs if not spec.growing}


@dataclass(frozen=True)
class Snapshot:
    """A copy of a whole state in main memory: `ids`, keys and values up to their length, recurrent states; by `past`
    name."""

    ids: tuple[int, ...]
    growing: dict[str, np.ndarray]
    recurrent: dict[str, np.ndarray]


class State:
    """The state of a sequence of `length` tokens, `ids`, up to `capacity` tokens.

    Buffers are zero pages until written, so capacity costs address space, not memory. `memory`: where checkpoints are
    counted. `arrays`: keys and values [1, heads, capacity, head size] and recurrent states [1, ...] to use instead of
    new ones.
    """

    def __init__(
        self,
        specs: Iterable[StateSpec],
        capacity: int,
        device: Device | None = None,
        memory: HostMemory | None = None,
        arrays: Mapping[str, Array] | None = None,
    ) -> None:
        self.capacity = capacity
        self.length = 0
        self.ids: list[int] = []
        self.stops: tuple[int, ...] = ()
        """Lengths at which a recurrent state is to be remembered while a prompt is read, see `until_stop`."""
        self._device: Device = device or CpuDevice()
        self._specs = tuple(specs)
        self._replaced = [spec for spec in self._specs if not spec.growing]
        self._growing: dict[str, Array] = {}
        self._rings: dict[str, Array] = {}
        for spec in self._specs:
            shape = (1, spec.shape[0], capacity, spec.shape[1]) if spec.growing else (1, *spec.shape)
            array = self._device.zeros(shape, spec.dtype) if arrays is None else arrays[spec.past]
            if spec.growing:
                self._growing[spec.past] = array
            else:
                self._rings[spec.past] = array[None]
        self.checkpoints = RecurrentCopies(recurrent_shapes(self._specs), self._device, memory)
        self._turn = 0
        self._resize_rings(1)

    def _resize_rings(self, size: int) -> None:
        """Keep the present buffer of each ring only, as the first of `size`."""
        if self._rings and len(next(iter(self._rings.values()))) != size:
            kept = self.recurrent
            for spec in self._replaced:
                ring = self._device.zeros((size, 1, *spec.shape), spec.dtype)
                self._device.assign(ring[0], kept[spec.past])
                self._rings[spec.past] = ring
            self._turn = 0
        self.captured: dict[tuple[int, int], object] = {}
        """Runs that were captured for the addresses of these buffers, see `StepRunner`."""
        self._bindings: list[ort.IOBinding | None] = [None] * size
        self._history: list[tuple[int, int]] = []  # length and place in the ring of earlier states, oldest first

    @property
    def turn(self) -> int:
        """Which buffer of the rings the next run reads."""
        return self._turn

    @property
    def ring_size(self) -> int:
        """Buffers of each ring: a run reads the one at `turn` and writes the one after it."""
        return len(self._bindings)

    @property
    def lengths(self) -> list[int]:
        """Tokens that the one sequence has read; see `Sequences`."""
        return [self.length]

    @property
    def buffers(self) -> dict[str, Array]:
        """By `past` name: keys and values [1, heads, capacity, head size], rings [ring size, 1, ...]."""
        return self._growing | self._rings

    @property
    def recurrent(self) -> dict[str, Array]:
        """The present recurrent states [1, ...] by `past` name."""
        return self._slot(self._turn)

    def _slot(self, place: int) -> dict[str, Array]:
        return {name: ring[place] for name, ring in self._rings.items()}

    def binding(self, session: ort.InferenceSession) -> ort.IOBinding:
        """A binding of every state, past input and present output; the rest is bound at each run.

        Kept between runs: binding some hundred values at every step costs a few percent of a small model's time.
        """
        self.begin()
        bound = self._bindings[self._turn]
        if bound is None:
            bound = self._bindings[self._turn] = session.io_binding()
            self.bind(bound)
        return bound

    def begin(self, count: int = 1) -> None:
        """Prepare for a run that writes the `count` buffers of the rings after the present one, the oldest ones,
        whether they are taken over or not."""
        if self._replaced and self.ring_size <= count:
            # A run reads one buffer and writes the next: the CPU kernels are wrong in place, and it may be cancelled.
            self._resize_rings(1 + max(count, self._device.history))
        written = [(self._turn + ahead) % self.ring_size for ahead in range(1, count + 1)] if self._replaced else []
        self._history = [(length, place) for length, place in self._history if place not in written]

    def bind(self, binding: ort.IOBinding) -> None:
        """Bind every state as it is for the next run, after `begin`."""
        recurrent, following = self.recurrent, self._slot(self._following)
        for spec in self._specs:
            past = (self._growing if spec.growing else recurrent)[spec.past]
            present = past if spec.growing else following[spec.past]
            bind_input(self._device, binding, spec.past, past)
            bind_output(self._device, binding, spec.present, present)

    @property
    def _following(self) -> int:
        return (self._turn + 1) % self.ring_size

    def commit(self, count: int = 1) -> None:
        """Take over the first `count` buffers that a run has just written, one for each token; without it the state is
        as before the run. The caller counts the tokens (`extend`) afterwards."""
        if self._replaced:
            for ahead in range(count):
                self._history.append((self.length + ahead, self._turn))
                self._turn = self._following

    def trim(self) -> None:
        """Give back the memory of the history: the state can go back to checkpoints only."""
        if self._replaced:
            self._resize_rings(1)

    def extend(self, ids: Sequence[int]) -> None:
        """Count tokens that a run has just read, and remember the state where it is due: at `stops` and every few
        thousand tokens."""
        self.ids.extend(ids)
        self.length += len(ids)
        self._checkpoint_if_due()

    def append(self, ids: Sequence[int], growing: Mapping[str, Array], recurrent: Mapping[str, Array]) -> None:
        """Take over `ids` that another state has read after the same tokens: their keys and values [heads, len(ids),
        head size] and the recurrent states [1, ...] after them, by `past` name."""
        self.write(self.length, growing)
        self.resume([*self.ids, *ids], recurrent)
        self._checkpoint_if_due()

    def until_stop(self, limit: int) -> int:
        """How many of the next `limit` tokens of a prompt may be read in one run: a recurrent state, of which only the
        last is left after a run, is to be remembered in between (`extend` does that)."""
        if not self._replaced:
            return limit
        return min([limit, *(stop - self.length for stop in self.stops if stop > self.length)])

    def _checkpoint_if_due(self) -> None:
        if self._replaced:
            latest = max(self.checkpoints.lengths, default=0)
            if self.length in self.stops or self.length - latest >= CHECKPOINT_EVERY:
                self.checkpoint()

    def checkpoint(self) -> None:
        """Remember this length as one to come back to; costs nothing where every length is."""
        if self._replaced and self.length:
            self.checkpoints.add(self.length, self.recurrent)

    def reachable(self, length: int) -> int:
        """The largest length up to `length` that this state can go back to."""
        if length >= self.length:
            return self.length
        if not self._replaced:
            return length
        return max((one for one in self.points if one <= length), default=0)

    @property
    def points(self) -> set[int]:
        """Lengths at which recurrent states are known: the present one, those before the last runs, checkpoints."""
        return {self.length, *self.checkpoints.lengths, *(earlier for earlier, _ in self._history)}

    def at(self, length: int) -> Mapping[str, Array]:
        """The recurrent states [1, ...] after the first `length` tokens, which must be `reachable`."""
        if not self._replaced or not length:
            return {}
        if length == self.length:
            return self.recurrent
        if (place := dict(self._history).get(length)) is not None:
            return self._slot(place)
        arrays = self.checkpoints.at(length)
        if arrays is None:
            raise ValueError(f"there is no checkpoint at {length} tokens")
        return arrays

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens; only lengths that are `reachable` can be given."""
        if length >= self.length:
            return
        place = dict(self._history).get(length)
        if length and place is not None:
            self._turn = place
            self._history = [(earlier, place) for earlier, place in self._history if earlier < length]
            self.checkpoints.forget_after(length)
            del self.ids[length:]
            self.length = length
        else:
            self.resume(self.ids[:length], self.at(length))

    def copy_prefix(self, source: State, length: int) -> None:
        """Take over the first `length` tokens of `source`, `reachable` there."""
        self.copy_keys_values(source, 0, length)
        self.resume(source.ids[:length], source.at(length))
        self.checkpoints.share(source.checkpoints, length)

    def copy_keys_values(self, source: State, start: int, stop: int) -> None:
        """Those of some tokens of another state; see `resume`."""
        for name, array in self._growing.items():
            self._device.assign(array[:, :, start:stop], source._growing[name][:, :, start:stop])

    def write(self, start: int, growing: Mapping[str, Array]) -> None:
        """Keys and values [heads, tokens, head size] of tokens from `start` on; see `resume`."""
        for name, values in growing.items():
            self._device.assign(self._growing[name][:, :, start : start + values.shape[-2]], values)

    def fetch(self, start: int, into: Mapping[str, np.ndarray]) -> None:
        """Copy keys and values of tokens from `start` on to main memory, into arrays [heads, tokens, head size]."""
        for name, array in into.items():
            self._device.fetch(self._growing[name][0, :, start : start + array.shape[1]], array)

    def resume(self, ids: Sequence[int], recurrent: Mapping[str, Array]) -> None:
        """Be one that has read `ids`, whose keys and values are in place, with these recurrent states [1, ...] after
        them (of no tokens: zeros)."""
        shared = shared_prefix(self.ids, ids)
        self._history.clear()
        self.ids, self.length = [], 0  # what an error leaves: recurrent states of several lengths are those of none
        try:
            for name, array in self.recurrent.items():
                self._device.assign(array, recurrent[name] if ids else 0)
        except Exception:
            self.checkpoints.forget_after(0)
            raise
        self.checkpoints.forget_after(shared)
        self.ids, self.length = list(ids), len(ids)

    def snapshot(self) -> Snapshot:
        """A copy of the whole state, independent of what happens to it later."""
        growing = {name: self._device.host(array[:, :, : self.length]) for name, array in self._growing.items()}
        recurrent = {name: self._device.host(array) for name, array in self.recurrent.items()}
        return Snapshot(tuple(self.ids), growing, recurrent)

    def restore(self, snapshot: Snapshot) -> None:
        """Become what the state of a snapshot was; the snapshot stays usable. Checkpoints are forgotten."""
        self.write(0, {name: values[0] for name, values in snapshot.growing.items()})
        self.checkpoints.forget_after(0)
        self.resume(snapshot.ids, snapshot.recurrent)
