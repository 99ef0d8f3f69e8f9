"""Decode steps on the step graph: captured once for each state, replayed by one launch, few bytes back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from lsp_agent.engine.device import Array, Device, bind_input, bind_output
from lsp_agent.engine.gpu.step_builder import CANDIDATES, NoKernel
from lsp_agent.engine.sampling import HostLogits, Logits
from lsp_agent.engine.state import State

log = logging.getLogger(__name__)
CONTROL = 4
"""Integers of the graph's input `control`."""


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


@dataclass
class _Buffers:
    """Where the steps of one batch size read and write: addresses are part of a captured graph.

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
    """Runs steps of one token for each sequence, at most `most` sequences."""

    def __init__(self, device: Device, vocabulary: int, most: int, make: Callable[[int], ort.InferenceSession]) -> None:
        """`make(batch)` opens the session of a step graph."""
        self._device, self._vocabulary, self.most, self._make = device, vocabulary, most, make
        self._buffers: dict[int, _Buffers] = {}
        self._uncovered: set[int] = set()

    def covers(self, batch: int) -> bool:
        """Whether there are steps of `batch` sequences; made at the first call."""
        if batch > self.most or batch in self._uncovered:
            return False
        try:
            self.prepare(batch)
        except NoKernel as error:
            log.info("%d sequences decode without kernels of our own: %s", batch, error)
            self._uncovered.add(batch)
            return False
        return True

    def prepare(self, batch: int) -> None:
        """Make what steps of `batch` sequences need; raises `NoKernel`."""
        if batch not in self._buffers:
            self._buffers[batch] = self._new_buffers(batch)

    def run(self, tokens: Sequence[int], state: State) -> list[Logits]:
        """Append one token to each sequence of `state`, which the caller counts; returns what each says next."""
        batch = len(tokens)
        self.prepare(batch)
        buffers = self._buffers[batch]
        state.begin()
        integers = [state.turn, state.capacity, state.ring_size, 0, *state.lengths]
        integers += [0] * (-len(integers) % 2)  # the ids are of 64 bits
        sent = np.concatenate([np.array(integers, np.int32), np.array(tokens, np.int64).view(np.int32)])
        self._device.assign(buffers.sent, sent)
        captured = state.captured.get(batch)
        if not isinstance(captured, _Captured):
            captured = state.captured[batch] = self._capture(buffers, state)
        captured.run()
        received = self._device.host(buffers.received)
        state.commit()
        return [self._logits(buffers, received, row) for row in range(batch)]

    def _logits(self, buffers: _Buffers, received: np.ndarray, row: int) -> Logits:
        batch = len(buffers.logits)
        values, tokens = received[: 2 * batch * CANDIDATES].reshape(2, batch, CANDIDATES)[:, row]
        log_sum_exp = float(received[2 * batch * CANDIDATES + row])
        fetch = lambda: self._device.host(buffers.logits[row])  # noqa: E731
        ids = tokens.view(np.int32)
        known = ids >= 0  # a small vocabulary has fewer
        return DeviceLogits(ids[known], values[known], log_sum_exp, fetch)

    def _new_buffers(self, batch: int) -> _Buffers:
        control = CONTROL + batch + (CONTROL + batch) % 2
        return _Buffers(
            self._device.zeros((control + 2 * batch,), "int32"),
            self._device.zeros((2 * batch * CANDIDATES + batch,), "float32"),
            self._device.zeros((batch, self._vocabulary), "float32"),
            self._make(batch),
        )

    def _capture(self, buffers: _Buffers, state: State) -> _Captured:
        binding = buffers.session.io_binding()
        batch, sent, received = len(buffers.logits), buffers.sent, buffers.received
        bind_input(self._device, binding, "control", sent[:CONTROL])
        bind_input(self._device, binding, "lengths", sent[CONTROL : CONTROL + batch])
        bind_input(self._device, binding, "ids", sent[-2 * batch :].view(np.int64).reshape(batch, 1))
        for name, array in state.buffers.items():
            bind_input(self._device, binding, name, array)
        best = batch * CANDIDATES
        bind_output(self._device, binding, "logits", buffers.logits)
        bind_output(self._device, binding, "values", received[:best].reshape(batch, CANDIDATES))
        bind_output(
            self._device, binding, "tokens", received[best : 2 * best].view(np.int32).reshape(batch, CANDIDATES)
        )
        bind_output(self._device, binding, "log_sum_exp", received[2 * best :].reshape(batch, 1))
        return _Captured(binding, self._device.captured(buffers.session, binding))
