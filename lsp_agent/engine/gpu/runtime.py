"""A package on the GPU: its weights in our memory, a session that reads prompts, and one for each size of step."""

from __future__ import annotations

import logging

import numpy as np
import onnxruntime as ort

from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.cuda_graph import CudaGraph
from lsp_agent.engine.decoder import build_decoder
from lsp_agent.engine.device import Array, CudaDevice
from lsp_agent.engine.gpu.compiler import CudaCompiler
from lsp_agent.engine.gpu.cuda_memory import CudaMemory
from lsp_agent.engine.gpu.expert_staging import ExpertStaging
from lsp_agent.engine.gpu.memory import Progress
from lsp_agent.engine.gpu.operators import cuda_launcher, register
from lsp_agent.engine.gpu.placement import Placement
from lsp_agent.engine.gpu.prompt_kernels import PromptKernels
from lsp_agent.engine.gpu.shared_experts import SharedExperts
from lsp_agent.engine.gpu.split_delta import SplitDelta, covers
from lsp_agent.engine.gpu.step_builder import DeviceTrace, NoKernel, StepBuilder
from lsp_agent.engine.gpu.step_graph import build_step
from lsp_agent.engine.gpu.steps import StepRunner
from lsp_agent.engine.gpu.weights import DeviceWeights
from lsp_agent.engine.package import Package

log = logging.getLogger(__name__)
MOST_STEPS = 8
"""Tokens that a step graph is made for, of as many sequences or of one; more decode as prompts are read."""


class GpuRuntime:
    """What a decoder on the GPU runs. `steps` is None where our kernels do not cover the model."""

    element = "float16"

    def __init__(
        self,
        package: Package,
        device: CudaDevice,
        context: int,
        threads: int,
        placement: Placement | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        self._package, self._device, self._context = package, device, context
        memory, self._compiler = CudaMemory(), CudaCompiler()
        self._weights = DeviceWeights(package, memory, placement, on_progress)
        table, kind = self._weights.embedding()
        width = {"f16": "float16", "bf16": "uint16", "f32": "float32"}[kind]
        self._table = device.borrow(table, (package.config.vocabulary, package.config.hidden), width)
        staging = None
        if placement is not None and placement.kind in ("host", "hybrid"):
            staging = ExpertStaging(self._weights.experts, memory, self._compiler)
        linear = package.config.linear_attention
        self._experts: SharedExperts | None = None
        if not self._weights.experts.has_zero_points:  # those are in nodes of their own, with what ORT packs for each
            self._experts = self._shared_experts(staging)
        kernels = PromptKernels(self._weights.address, self._compiler)
        self._delta: SplitDelta | None = None
        if linear is not None and covers(linear):
            self._delta = SplitDelta(linear, self._weights.constant, device.name, device.providers({}))
        graph = CudaGraph(package, context, True, staging, self._experts, kernels, self._delta)
        build_decoder(architecture(package.config.architecture), package.config, graph)
        self.states = graph.states
        options, model = graph.session_options(threads), graph.model()
        register(options, cuda_launcher())
        self._shared = self._weights.share(model, options, "cuda", staging)  # the session reads it without owning it
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=device.providers({}))
        if self._experts is not None:
            self._experts.try_tiles(placement.chunk if placement is not None else device.prefill_chunk, device)
        self._trace: DeviceTrace | None = None
        self.steps: StepRunner | None = StepRunner(device, package.config.vocabulary, MOST_STEPS, self._step_session)
        try:
            self.steps.prepare(1)
        except NoKernel as error:
            log.info("decoding without kernels of our own: %s", error)
            self.steps = None

    def _shared_experts(self, staging: ExpertStaging | None) -> SharedExperts:
        def address(name: str) -> int:
            staged = staging.address(name) if staging is not None else None
            return staged or self._weights.address(name)

        # Memory as it is asked for: twice as much each time would be more than the plan has.
        providers = self._device.providers({"arena_extend_strategy": "kSameAsRequested"})
        return SharedExperts(address, self._device.name, providers)

    def follow(self, logits: np.ndarray) -> None:
        """Let the steps of states that are made from now on route by these router logits, fp32 [tokens, blocks,
        experts], the token at position p by row p modulo tokens, instead of the model's own: to measure."""
        tokens, blocks, _ = logits.shape
        layers = {f"blk.{block}": self._weights.constant(f"trace.{block}", logits[:, block]) for block in range(blocks)}
        self._trace = DeviceTrace(tokens, layers)
        self.steps = StepRunner(self._device, self._package.config.vocabulary, MOST_STEPS, self._step_session)

    def expert_hits(self) -> tuple[int, int]:
        """Experts that single tokens found in slots, and all that they used, since loading; of hybrid placements."""
        counts = self._weights.experts.counts()
        return counts.hits, counts.hits + counts.misses

    def remember(self) -> None:
        """See `DeviceWeights.remember`."""
        self._weights.remember()

    def _step_session(self, batch: int, rows: int) -> ort.InferenceSession:
        graph = StepBuilder(
            self._package, self.states, self._weights, self._compiler, batch, self._context, self._trace, rows
        )
        build_step(graph)
        options = ort.SessionOptions()
        # Nothing to optimise, and no pattern of memory to keep: shapes are static and every node is a kernel of ours.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        register(options, cuda_launcher())
        model = graph.model().SerializeToString()
        return ort.InferenceSession(model, options, providers=self._device.providers({}))

    def embed(self, ids: np.ndarray) -> Array:
        """fp16 rows [batch, length, hidden] of ids [batch, length], read over the bus from page-locked memory."""
        with self._device.stream:
            rows = self._table[self._device.array(ids)]
            if rows.dtype == np.uint16:  # bfloat16 is the upper half of fp32
                rows = (rows.astype(np.uint32) << 16).view(np.float32)
            return rows.astype(np.float16)
