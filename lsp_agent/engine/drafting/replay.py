"""Moving the recurrent states on by some of the tokens that a run has read, without reading them again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.cpu_graph import CpuGraph
from lsp_agent.engine.delta_net import GatedDeltaNet
from lsp_agent.engine.device import CpuDevice, bind_input, bind_output
from lsp_agent.engine.graph import Accuracy
from lsp_agent.engine.package import Package
from lsp_agent.engine.state import State


class _Recurrences(CpuGraph):
    """The recurrences of all layers alone; what they read, the outputs `replayed` of the whole graph, are inputs."""

    def __init__(self, package: Package, accuracy: Accuracy, replayed: Mapping[str, int]) -> None:
        super().__init__(package, 0, accuracy)
        self._inputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "tokens", width])
            for name, width in replayed.items()
        ]
        config = package.config
        for index in range(config.layers):
            mixer, prefix = architecture(config.architecture).block(config, index).mixer, f"blk.{index}"
            if isinstance(mixer, GatedDeltaNet):
                mixed, rates = (self.output_of(name) for name in mixer.projections(prefix))
                mixer.recur(self, config, prefix, mixed, rates)


class Replay:
    """A session of the recurrences alone. They read what the run has computed, so they write the same bits."""

    def __init__(self, package: Package, threads: int, accuracy: Accuracy, replayed: Mapping[str, int]) -> None:
        self._device = CpuDevice()
        self._widths = dict(replayed)
        graph = _Recurrences(package, accuracy, replayed)
        self._specs = graph.states
        self._constants = graph.in_memory  # the session reads them without owning them
        options, model = graph.session_options(threads), graph.model()
        providers = self._device.providers({})
        self._session = ort.InferenceSession(model.SerializeToString(), options, providers=providers)

    def bind(self, binding: ort.IOBinding, count: int) -> dict[str, np.ndarray]:
        """Let a run of the whole graph put out what the recurrences read of its first `count` tokens."""
        kept = {name: np.empty((1, count, width), np.float32) for name, width in self._widths.items()}
        for name, array in kept.items():
            bind_output(self._device, binding, name, array)
        return kept

    def run(self, state: State, kept: Mapping[str, np.ndarray], count: int) -> None:
        """Write the states after the first `count` tokens of `kept` where a run writes; the caller commits."""
        binding = self._session.io_binding()
        following, buffers = (state.turn + 1) % state.ring_size, state.buffers
        for spec in self._specs:
            bind_input(self._device, binding, spec.past, buffers[spec.past][state.turn])
            bind_output(self._device, binding, spec.present, buffers[spec.past][following])
        for name, array in kept.items():
            bind_input(self._device, binding, name, array[:, :count])
        self._session.run_with_iobinding(binding)
