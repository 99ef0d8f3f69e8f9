"""Decode steps of one token as CUDA graphs: the launches of a whole step are replayed by one call."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import numpy as np
import onnxruntime as ort

from lsp_agent.engine.architecture import ModelConfig
from lsp_agent.engine.device import Array, Device, bind_input, bind_output
from lsp_agent.engine.state import State

FIRST_BUCKET = 1024
"""Attention is captured for lengths up to a power of two, from this one on."""
NOT_CAPTURED = "-1"
"""The id of runs that are not captured: prefill, whose shapes vary."""


@dataclass
class _Inputs:
    """Where captured steps of one batch size read and write: addresses are part of a captured graph."""

    embeddings: Array
    lengths: Array
    rows: Array
    logits: Array


@dataclass
class _Step:
    binding: ort.IOBinding
    options: ort.RunOptions


def run_options(graph: str) -> ort.RunOptions:
    """Options of a run that is captured as, or replays, `graph`."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    return options


class CapturedSteps:
    """Runs steps of one token for each sequence. The first run of a state's buffers and bucket captures the graph.

    The kernels of attention read the true lengths on the GPU; the captured `total_length` is the bucket's.
    """

    def __init__(self, session: ort.InferenceSession, device: Device, config: ModelConfig, element: np.dtype) -> None:
        self._session, self._device, self._config, self._element = session, device, config, element
        self._inputs: dict[int, _Inputs] = {}
        self._ids = count(1)

    def run(self, embeddings: np.ndarray, state: State) -> np.ndarray:
        """`embeddings` [batch, 1, hidden]; returns logits [batch, vocabulary] of the activations' type."""
        batch, length = len(embeddings), state.length + 1
        inputs = self._inputs.get(batch) or self._new_inputs(batch)
        self._device.assign(inputs.embeddings, embeddings)
        self._device.assign(inputs.lengths, np.full(batch, length - 1, np.int32))
        bucket = min(max(FIRST_BUCKET, 1 << (length - 1).bit_length()), state.capacity)
        state.begin()
        step = state.captured.get((state.turn, bucket))
        if not isinstance(step, _Step):
            step = state.captured[state.turn, bucket] = self._new_step(state, inputs, bucket)
        self._session.run_with_iobinding(step.binding, step.options)
        return self._device.host(inputs.logits)[0]

    def _new_inputs(self, batch: int) -> _Inputs:
        device, config = self._device, self._config
        inputs = _Inputs(
            device.zeros((batch, 1, config.hidden), self._element.name),
            device.zeros((batch,), "int32"),
            device.array(np.arange(batch)),
            device.zeros((1, batch, config.vocabulary), self._element.name),
        )
        self._inputs[batch] = inputs
        return inputs

    def _new_step(self, state: State, inputs: _Inputs, bucket: int) -> _Step:
        binding = self._session.io_binding()
        state.bind(binding)
        for name in ("embeddings", "lengths", "rows"):
            bind_input(self._device, binding, name, getattr(inputs, name))
        binding.bind_cpu_input("total_length", np.array([bucket], np.int32))
        bind_output(self._device, binding, "logits", inputs.logits)
        return _Step(binding, run_options(str(next(self._ids))))
