"""Sequences of different lengths that step in one run: copies of their states in the rows of common arrays.

The arrays are made once, for the most rows; a run of B rows takes the first B of each, at the same address, so that
captured graphs stay valid. Recurrent states need two buffers, one of which a run reads while it writes the other; these
are laid out for B rows, and anew when B changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import onnxruntime as ort

from lsp_agent.engine.device import Array, Device, bind_input, bind_output
from lsp_agent.engine.state import State, StateSpec

Owner = TypeVar("Owner")


@dataclass
class Row(Generic[Owner]):
    """`length` tokens of its owner's lie in a row. `fresh`: its recurrent state is the one after them."""

    owner: Owner
    length: int
    fresh: bool = True


class Batch(Generic[Owner]):
    """Rows for at most `most` sequences of up to `capacity` tokens; the rows of a run are the first `width`."""

    def __init__(self, specs: Sequence[StateSpec], capacity: int, most: int, device: Device) -> None:
        self.capacity, self.most = capacity, most
        self.rows: list[Row[Owner]] = []
        self.width = 0
        self.captured: dict[tuple[int, int], object] = {}
        """Runs that were captured for these arrays, see `StepRunner`."""
        self._device, self._specs = device, tuple(specs)
        self._turn = 0
        self._growing: dict[str, Array] = {}
        self._flat: dict[str, Array] = {}
        for spec in self._specs:
            if spec.growing:
                heads, size = spec.shape
                self._growing[spec.past] = device.zeros((most, heads, capacity, size), spec.dtype)
            else:
                self._flat[spec.past] = device.zeros((2 * most * math.prod(spec.shape),), spec.dtype)
        self.written = 0
        """Bytes of keys and values that rows have held at the most, one after the other or at once."""
        self._a_token = sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs if spec.growing)
        self._longest = [0] * most
        self._shapes = {spec.past: spec.shape for spec in self._specs}
        self._views: dict[int, dict[str, Array]] = {}  # by width
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}  # by width and turn

    # What a run needs, see `StepRunner` and `Decoder.step`

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row of the next run."""
        return [row.length for row in self.rows[: self.width]]

    @property
    def turn(self) -> int:
        """Which of the two buffers of recurrent states the next run reads."""
        return self._turn

    @property
    def ring_size(self) -> int:
        """Buffers of recurrent states."""
        return 2 if self._flat else 1

    @property
    def buffers(self) -> dict[str, Array]:
        """By `past` name: keys and values [width, heads, capacity, head size], rings [2, width, ...]."""
        views = self._views.get(self.width)
        if views is None:
            views = {name: array[: self.width] for name, array in self._growing.items()}
            for name, flat in self._flat.items():
                shape = (2, self.width, *self._shapes[name])
                views[name] = flat[: math.prod(shape)].reshape(shape)
            self._views[self.width] = views
        return views

    def begin(self) -> None:
        """Prepare for a run."""

    def binding(self, session: ort.InferenceSession) -> ort.IOBinding:
        """See `State.binding`."""
        bound = self._bindings.get((self.width, self._turn))
        if bound is None:
            bound = self._bindings[self.width, self._turn] = session.io_binding()
            for spec in self._specs:
                array = self.buffers[spec.past]
                past, present = (array, array) if spec.growing else (array[self._turn], array[1 - self._turn])
                bind_input(self._device, bound, spec.past, past)
                bind_output(self._device, bound, spec.present, present)
        return bound

    def commit(self) -> None:
        """Take over the recurrent states that a run has just written."""
        if self._flat:
            self._turn = 1 - self._turn

    # Who is in the rows

    def find(self, owner: Owner) -> Row[Owner] | None:
        """The row of `owner`, if it has one."""
        return next((row for row in self.rows if row.owner is owner), None)

    def join(self, owner: Owner, source: State) -> Row[Owner]:
        """Take over what `source` has read, of which the row of `owner` may hold a beginning already."""
        row = self.find(owner)
        if row is None:
            row = Row(owner, 0)
            self.rows.append(row)
        place = self.rows.index(row)
        if row.length < source.length:
            for name, array in self._growing.items():
                new = source.buffers[name][0, :, row.length : source.length]
                self._device.assign(array[place, :, row.length : source.length], new)
            row.length, row.fresh = source.length, False
            if row.length > self._longest[place]:
                self.written += (row.length - self._longest[place]) * self._a_token
                self._longest[place] = row.length
        if not row.fresh:
            self._widen(place + 1)
            for name, array in source.recurrent.items():
                self._device.assign(self.buffers[name][self._turn, place], array[0])
            row.fresh = True
        return row

    def leave(self, row: Row[Owner]) -> None:
        """Free a row; the last one takes its place."""
        place, last = self.rows.index(row), len(self.rows) - 1
        if place < last:
            moved = self.rows[last]
            for array in self._growing.values():
                self._device.assign(array[place, :, : moved.length], array[last, :, : moved.length])
            if moved.fresh:
                self._widen(last + 1)
                for name in self._flat:
                    present = self.buffers[name][self._turn]
                    self._device.assign(present[place], present[last])
            self.rows[place] = moved
        self.rows.pop()

    def copy_back(self, row: Row[Owner], ids: Sequence[int], state: State) -> None:
        """Let `state`, which has read a beginning of `ids`, have read as many of these as `row`."""
        start, place = state.length, self.rows.index(row)
        if start >= row.length:
            return
        growing = {name: array[place, :, start : row.length] for name, array in self._growing.items()}
        state.append(ids[start : row.length], growing, self._recurrent(place))

    def view(self, row: Row[Owner], ids: Sequence[int]) -> State:
        """A row as a state that can be read from until the next run; `ids` begin with the tokens in it."""
        place = self.rows.index(row)
        growing = {name: array[place : place + 1] for name, array in self._growing.items()}
        state = State(self._specs, self.capacity, device=self._device, arrays=growing | self._recurrent(place))
        state.ids, state.length = list(ids[: row.length]), row.length
        return state

    def _recurrent(self, place: int) -> dict[str, Array]:
        """The present recurrent states [1, ...] of a row."""
        return {name: self.buffers[name][self._turn, place : place + 1] for name in self._flat}

    def prepare(self, stepping: Sequence[Row[Owner]]) -> list[Row[Owner]]:
        """Let the next run take the rows up to the last of those `stepping`; returns all it takes.

        The others among them, whose owners have states of their own, lose their recurrent states and nothing else.
        """
        places = [place for place, row in enumerate(self.rows) if any(row is one for one in stepping)]
        self._lay_out(places[-1] + 1)
        for place, row in enumerate(self.rows):
            row.fresh = place in places
        return self.rows[: self.width]

    def _widen(self, width: int) -> None:
        if width > self.width:
            self._lay_out(width)

    def _lay_out(self, width: int) -> None:
        """Lay recurrent states out for runs of `width` rows."""
        if width == self.width:
            return
        kept = min(width, self.width)
        present = {name: self._device.copy(self.buffers[name][self._turn, :kept]) for name in self._flat if kept}
        self.width, self._turn = width, 0
        for name, array in present.items():
            self._device.assign(self.buffers[name][0, :kept], array)
