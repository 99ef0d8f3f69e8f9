"""A decoder of emulated kernels, which says what one on the GPU would say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from emulator import EmulatedKernels

from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.cuda_graph import CudaGraph
from lsp_agent.engine.decoder import build_decoder
from lsp_agent.engine.device import CpuDevice
from lsp_agent.engine.gpu.memory import HostMemory
from lsp_agent.engine.gpu.operators import Launcher, register
from lsp_agent.engine.gpu.placement import Placement
from lsp_agent.engine.gpu.step_builder import DeviceTrace, StepBuilder
from lsp_agent.engine.gpu.step_graph import build_step
from lsp_agent.engine.gpu.steps import StepRunner
from lsp_agent.engine.gpu.weights import DeviceWeights
from lsp_agent.engine.package import Package
from lsp_agent.engine.session import Decoder
from lsp_agent.engine.state import State

CONTEXT = 64


class EmulatedDecoder:
    """Steps of a package on the CPU's provider, and states for them."""

    def __init__(
        self,
        package: Package,
        kernels: EmulatedKernels,
        placement: Placement | None = None,
        context: int = CONTEXT,
    ) -> None:
        self.device, self._kernels, self._package, self._context = CpuDevice(), kernels, package, context
        graph = CudaGraph(package, context)
        build_decoder(architecture(package.config.architecture), package.config, graph)
        self.states = graph.states
        self.memory = HostMemory()
        self.weights = DeviceWeights(package, self.memory, placement)
        self.steps = self._runner()

    def _runner(self, trace: DeviceTrace | None = None) -> StepRunner:
        make = lambda batch, rows: self._session(batch, rows, trace)  # noqa: E731
        return StepRunner(self.device, self._package.config.vocabulary, 8, make)

    def _session(self, batch: int, rows: int, trace: DeviceTrace | None) -> ort.InferenceSession:
        graph = StepBuilder(self._package, self.states, self.weights, self._kernels, batch, self._context, trace, rows)
        build_step(graph)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        launcher = Launcher("CPUExecutionProvider", self._kernels.launcher, 0, self._kernels.error_string)
        register(options, launcher)
        return ort.InferenceSession(graph.model().SerializeToString(), options, providers=["CPUExecutionProvider"])

    def follow(self, logits: np.ndarray) -> None:
        """See `GpuRuntime.follow`."""
        layers = {f"blk.{block}": self.memory.store(logits[:, block]) for block in range(logits.shape[1])}
        self.steps = self._runner(DeviceTrace(len(logits), layers))

    def new_state(self) -> State:
        """An empty state."""
        return State(self.states, self._context, self.device)

    def read(self, tokens: Sequence[int], state: State) -> np.ndarray:
        """Logits [tokens, vocabulary] of tokens that are read one by one."""
        rows = []
        for token in tokens:
            (logits,) = self.steps.run([token], state)
            rows.append(logits.all())
            state.extend([token])
        return np.array(rows)


def exact(package: Package, tokens: Sequence[int], context: int = CONTEXT) -> np.ndarray:
    """The logits of the CPU's exact graph."""
    cpu = Decoder(package, 1, context, "exact")
    return cpu.run(np.array([tokens]), cpu.new_state(context), range(len(tokens)))


def assert_close(found: np.ndarray, wanted: np.ndarray, tolerance: float = 0.02) -> None:
    """Nine of ten positions: fp16 activations may route a token between two near experts."""
    errors = np.abs(found - wanted).max(axis=-1) / np.abs(wanted).max()
    assert np.quantile(errors, 0.9) < tolerance
    assert np.corrcoef(found.reshape(-1), wanted.reshape(-1))[0, 1] > 0.999
