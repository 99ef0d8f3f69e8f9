"""Runs of step graphs, of one token or a few: captured once for each state, replayed by one launch, few bytes back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnxruntime as ort

from lsp_agent.engine.device import Array, Device, bind_input, bind_output
from lsp_agent.engine.drafting.verification import Verified
from lsp_agent.engine.gpu.step_builder import CANDIDATES, NoKernel
from lsp_agent.engine.sampling import HostLogits, Logits
from lsp_agent.engine.state import State

log = logging.getLogger(__name__)
CONTROL = 4
"""Integers of the graph's input `control`."""
VERIFIED = (1, 2, 4, 8)
"""Tokens of the graphs that verify: other numbers are filled up, so that a state has few captured graphs."""


class DeviceLogits:
    """Logits that stay on the device until they are wanted: the next step overwrites them.

    `tokens` and `values` are the best, best first; `log_sum_exp` normalises them.
    """

    def __init__(
        self, tokens: np.ndarray, values: np.ndarray, log_sum_exp: float, fetch: Callable[[], np.ndarray]
    ) -> None:
        self._tokens, self._values, self._log_sum_exp, self._fetch = tokens, values, log_sum_exp, fetch
        self._fetched: np.ndarray | None = None

    def top(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Logits.top`."""
        if 0 < count <= len(self._tokens):
            return self._tokens[:count], self._values[:count]
        return HostLogits(self.all()).top(count)

    def log_probability(self, token: int) -> float:
        """See `Logits.log_probability`."""
        (place,) = np.nonzero(self._tokens == token)
        value = self._values[place[0]] if len(place) else self.all()[token]
        return float(value) - self._log_sum_exp

    def all(self) -> np.ndarray:
        """See `Logits.all`."""
        if self._fetched is None:
            self._fetched = self._fetch()
        return self._fetched


class Sequences(Protocol):
    """What steps need of a `State`, or of other sequences that decode together.

    `captured` holds the runs that were captured for the addresses of the buffers, by sequences and tokens of each; it
    is emptied when these change.
    """

    captured: dict[tuple[int, int], object]

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens that each sequence has read."""

    @property
    def capacity(self) -> int:
        """Most tokens of each."""

    @property
    def turn(self) -> int:
        """See `State.turn`."""

    @property
    def ring_size(self) -> int:
        """See `State.ring_size`."""

    @property
    def buffers(self) -> Mapping[str, Array]:
        """See `State.buffers`."""

    def begin(self) -> None:
        """See `State.begin`."""

    def commit(self) -> None:
        """See `State.commit`."""


@dataclass
class _Buffers:
    """Where the runs of one size read and write: addresses are part of a captured graph.

    `sent` holds control, lengths and ids, `received` the candidates' values and ids and the log-sum-exps; each crosses
    the bus as one copy.
    """

    sent: Array
    received: Array
    logits: Array
    session: ort.InferenceSession


@dataclass
class _Captured:
    binding: ort.IOBinding
    run: Callable[[], None]


class StepRunner:
    """Runs steps of one token for each sequence, and of several tokens of one; at most `most` tokens in all."""

    def __init__(
        self, device: Device, vocabulary: int, most: int, make: Callable[[int, int], ort.InferenceSession]
    ) -> None:
        """`make(batch, rows)` opens the session of a step graph of `rows` tokens of each of `batch` sequences."""
        self._device, self._vocabulary, self.most, self._make = device, vocabulary, most, make
        self._buffers: dict[tuple[int, int], _Buffers] = {}  # by sequences and tokens of each
        self._uncovered: set[tuple[int, int]] = set()

    def covers(self, batch: int, rows: int = 1) -> bool:
        """Whether there are steps of `rows` tokens of each of `batch` sequences; made at the first call."""
        if batch * rows > self.most or (batch, rows) in self._uncovered:
            return False
        try:
            self.prepare(batch, rows)
        except NoKernel as error:
            log.info("%d sequences decode %d tokens at a time without kernels of our own: %s", batch, rows, error)
            self._uncovered.add((batch, rows))
            return False
        return True

    def prepare(self, batch: int, rows: int = 1) -> None:
        """Make what such steps need; raises `NoKernel`."""
        if (batch, rows) not in self._buffers:
            self._buffers[batch, rows] = self._new_buffers(batch, rows)

    def prepare_all(self, together: int) -> None:
        """Make what `verify` and steps of up to `together` sequences need, as far as there are kernels for it: a
        machine's first time takes seconds for each number of tokens, for which nobody is to wait in the middle of an
        answer."""
        for rows in VERIFIED:
            self.covers(1, rows)
        for batch in range(2, together + 1):
            self.covers(batch)

    @property
    def most_verified(self) -> int:
        """Most ids that `verify` takes; 1 where there are no kernels for more."""
        return next((rows for rows in reversed(VERIFIED) if self.covers(1, rows)), 1)

    def run(self, tokens: Sequence[int], sequences: Sequences) -> list[Logits]:
        """Append one token to each of the sequences, which the caller counts; returns what each says next."""
        sequences.begin()
        logits = self._run((len(tokens), 1), tokens, sequences.lengths, sequences)
        sequences.commit()
        return logits

    def verify(self, ids: Sequence[int], state: State) -> Verified:
        """Read at most `most_verified` `ids` after a state of one sequence, of which the caller accepts the first few.

        All recurrent states between them are there then: whatever is accepted, no id is read again.
        """
        count = len(ids)
        rows = next(rows for rows in VERIFIED if rows >= count)
        state.begin(count)
        filled = [*ids, *[ids[-1]] * (rows - count)]
        lengths = [state.length + min(row, count - 1) for row in range(rows)]
        logits = self._run((1, rows), filled, lengths, state, count)

        def accept(accepted: int) -> None:
            if not 0 < accepted <= count:
                raise ValueError(f"cannot accept {accepted} of {count} ids")
            state.commit(accepted)
            state.extend(ids[:accepted])

        return Verified(logits[:count], accept)

    def _run(
        self, size: tuple[int, int], ids: Sequence[int], lengths: Sequence[int], sequences: Sequences, count: int = 1
    ) -> list[Logits]:
        self.prepare(*size)
        buffers = self._buffers[size]
        integers = [sequences.turn, sequences.capacity, sequences.ring_size, count, *lengths]
        integers += [0] * (-len(integers) % 2)  # the ids are of 64 bits
        sent = np.concatenate([np.array(integers, np.int32), np.array(ids, np.int64).view(np.int32)])
        self._device.assign(buffers.sent, sent)
        captured = sequences.captured.get(size)
        if not isinstance(captured, _Captured):
            captured = sequences.captured[size] = self._capture(buffers, sequences)
        captured.run()
        received = self._device.host(buffers.received)
        return [self._logits(buffers, received, row) for row in range(len(ids))]

    def _logits(self, buffers: _Buffers, received: np.ndarray, row: int) -> Logits:
        tokens = len(buffers.logits)
        values, best = received[: 2 * tokens * CANDIDATES].reshape(2, tokens, CANDIDATES)[:, row]
        log_sum_exp = float(received[2 * tokens * CANDIDATES + row])
        fetch = lambda: self._device.host(buffers.logits[row])  # noqa: E731
        ids = best.view(np.int32)
        known = ids >= 0  # a small vocabulary has fewer
        return DeviceLogits(ids[known], values[known], log_sum_exp, fetch)

    def _new_buffers(self, batch: int, rows: int) -> _Buffers:
        tokens = batch * rows
        control = CONTROL + tokens + (CONTROL + tokens) % 2
        return _Buffers(
            self._device.zeros((control + 2 * tokens,), "int32"),
            self._device.zeros((2 * tokens * CANDIDATES + tokens,), "float32"),
            self._device.zeros((tokens, self._vocabulary), "float32"),
            self._make(batch, rows),
        )

    def _capture(self, buffers: _Buffers, sequences: Sequences) -> _Captured:
        binding = buffers.session.io_binding()
        tokens, sent, received = len(buffers.logits), buffers.sent, buffers.received
        bind_input(self._device, binding, "control", sent[:CONTROL])
        bind_input(self._device, binding, "lengths", sent[CONTROL : CONTROL + tokens])
        bind_input(self._device, binding, "ids", sent[-2 * tokens :].view(np.int64).reshape(tokens, 1))
        for name, array in sequences.buffers.items():
            bind_input(self._device, binding, name, array)
        best = tokens * CANDIDATES
        bind_output(self._device, binding, "logits", buffers.logits)
        bind_output(self._device, binding, "values", received[:best].reshape(tokens, CANDIDATES))
        bind_output(
            self._device, binding, "tokens", received[best : 2 * best].view(np.int32).reshape(tokens, CANDIDATES)
        )
        bind_output(self._device, binding, "log_sum_exp", received[2 * best :].reshape(tokens, 1))
        return _Captured(binding, self._device.captured(buffers.session, binding))
