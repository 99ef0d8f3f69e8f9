"""The graph for ONNX Runtime's CUDA provider: fp16 activations, recurrent states in fp32."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto

from lsp_agent.engine.architecture import LinearAttentionConfig, ModelConfig
from lsp_agent.engine.gpu.expert_staging import ExpertStaging
from lsp_agent.engine.gpu.operators import DOMAIN
from lsp_agent.engine.gpu.prompt_kernels import PromptKernels, covers
from lsp_agent.engine.gpu.shared_experts import SharedExperts
from lsp_agent.engine.gpu.split_delta import DELTA_RULE, SplitDelta
from lsp_agent.engine.graph import CONTRIB, SWIGLU, GraphBuilder
from lsp_agent.engine.package import Experts, Extent, LinearPart, Package
from lsp_agent.errors import UserError

EXPERT_ALIGNMENT = 64
"""The CUDA kernels of the experts want hidden and intermediate sizes that are multiples of this."""


class CudaGraph(GraphBuilder):
    """The graph that reads prompts, and decodes where `step_graph` does not cover a model: all of it on the GPU.

    `shared`: matrices and experts are read from memory that `DeviceWeights.share` gives the session, so the graph only
    names them, and integer experts are packed. `staging`: experts are in main memory and are fetched through it.
    `calls`: integer experts without zero points are called through it. `kernels`: ours, where they are faster.
    `delta`: the delta rule is called through it. With any of these four the session must know our operators.
    """

    element = "float16"

    def __init__(
        self,
        package: Package,
        context: int,
        shared: bool = False,
        staging: ExpertStaging | None = None,
        calls: SharedExperts | None = None,
        kernels: PromptKernels | None = None,
        delta: SplitDelta | None = None,
    ) -> None:
        super().__init__(package, context)
        self._shared, self._staging, self._calls = shared, staging, calls
        self._kernels, self._delta = kernels, delta
        if calls is not None:
            # With this variant of its kernel for few tokens ONNX Runtime finds no tiles for int4 gate and up of
            # prompts: it asks for memory that the search for the best ones does not give, so each fails and the
            # smallest is taken.
            os.environ.setdefault("ORT_DISABLE_MOE_GEMV_SPLITK2_SWIGLU", "1")
        self._raw_mxfp4 = False
        self._converted: dict[int, np.ndarray] = {}

    def session_options(self, threads: int) -> ort.SessionOptions:
        """As its base; weights go to the GPU's memory once, not through an arena that rounds up."""
        options = super().session_options(threads)
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        if self._raw_mxfp4 or (self._staging is not None and self._staging.stages_scales):
            # What is packed would be a second copy, and is not there yet where it is staged.
            options.add_session_config_entry("session.disable_prepacking", "1")
        # cuDNN's attention, which ONNX Runtime prefers on an H100, builds a graph for each length of a run: 0.25 to
        # 0.35 s, longer than reading the prompt takes, and nearly every prompt has a length of its own.
        os.environ.setdefault("ORT_ENABLE_CUDNN_FLASH_ATTENTION", "0")
        if self._raw_mxfp4:
            os.environ["ORT_FP4_SM80_GEMM"] = "0"  # only this path of the kernel reads what is not packed
        return options

    def attention(self, config: ModelConfig, prefix: str, qkv: list[str], normalised: bool) -> str:
        """See `GraphBuilder.attention`."""
        past_key, present_key = self.kv_state(f"{prefix}.key", config)
        past_value, present_value = self.kv_state(f"{prefix}.value", config)
        inputs = [*qkv, *[""] * (3 - len(qkv)), past_key, past_value, self.lengths, self.total_length]
        inputs += self.rotary_tables(config)
        attributes: dict[str, Any] = {}
        if normalised:
            inputs += [*[""] * 5, self.vector(f"{prefix}.attn_q_norm"), self.vector(f"{prefix}.attn_k_norm")]
            attributes["qk_norm_epsilon"] = config.rms_epsilon
        return self.op(
            "GroupQueryAttention",
            inputs,
            domain=CONTRIB,
            more_outputs=(present_key, present_value),
            num_heads=config.heads,
            kv_num_heads=config.kv_heads,
            do_rotary=1,
            **attributes,
        )

    def convolved(self, linear: LinearAttentionConfig, prefix: str, mixed: str) -> tuple[list[str], str]:
        """See `GraphBuilder.convolved`; of our kernels' the gates are still in `mixed`."""
        if self._kernels is None or not covers(linear):
            return super().convolved(linear, prefix, mixed)
        channels = 2 * linear.key_heads * linear.key_size + linear.value_heads * linear.value_size
        past, present = self.recurrent_state(f"{prefix}.conv", (linear.kernel - 1, channels))
        qkv = [f"{prefix}.{name}" for name in ("q", "k", "v")]
        self._nodes.append(self._kernels.convolve(linear, f"{prefix}.ssm_conv1d", [mixed, past], [*qkv, present]))
        self.domains.add(DOMAIN)
        return qkv, mixed

    def gated_norm(self, prefix: str, attended: str, gates: str) -> str:
        """See `GraphBuilder.gated_norm`."""
        config = self._package.config
        linear = config.linear_attention
        if self._kernels is None or linear is None or not covers(linear):
            return super().gated_norm(prefix, attended, gates)
        gated = f"{prefix}.gated"
        self._nodes.append(
            self._kernels.gate(linear, config.rms_epsilon, f"{prefix}.ssm_norm", [attended, gates], gated)
        )
        return gated

    def delta_rule(self, linear: LinearAttentionConfig, prefix: str, qkv: list[str], step: str, rate: str) -> str:
        """See `GraphBuilder.delta_rule`."""
        gates = [self.op("Cast", [gate], to=TensorProto.FLOAT) for gate in (step, rate)]
        # The kernel wants A_log, of which the package holds -exp(A_log).
        a_log, dt = np.log(-self.values(f"{prefix}.ssm_a")), self.values(f"{prefix}.ssm_dt")
        shape = (linear.value_heads, linear.value_size, linear.key_size)
        past, present = self.recurrent_state(f"{prefix}.delta", shape, "float32")
        if self._delta is not None:
            self.domains.add(DOMAIN)
            attended = f"{prefix}.attended"
            self._nodes.append(self._delta.node(prefix, [*qkv, *gates, past], [attended, present], a_log, dt))
            return attended
        shapes = [(linear.key_heads, linear.key_size)] * 2 + [(linear.value_heads, linear.value_size)]
        heads = [self.reshape(part, [0, 0, *shape]) for part, shape in zip(qkv, shapes, strict=True)]
        constants = [self.constant(f"{prefix}.a_log", a_log), self.constant(f"{prefix}.ssm_dt.fp32", dt)]
        inputs = [*heads, "", *gates, past, *constants]
        attended = self.op("GatedDeltaNet", inputs, domain=CONTRIB, more_outputs=(present,), **DELTA_RULE)
        value_width = linear.value_heads * linear.value_size
        return self.reshape(attended, [0, 0, value_width])

    def _half(self, name: str, values: np.ndarray) -> str:
        return self.constant(name, values.astype(np.float16))

    def _half_of(self, name: str, extent: Extent, shape: tuple[int, ...] | None = None) -> str:
        """Stored floats as fp16: mapped where they are that already, else converted once for all who share them."""
        if extent.dtype == "float16" or self._shared:
            return self.external(name, replace(extent, dtype="float16"), shape)
        if extent.offset not in self._converted:
            self._converted[extent.offset] = self._package.array(extent).astype(np.float16)
        return self.constant(name, self._converted[extent.offset].reshape(shape or extent.shape))

    def _dense(self, x: str, name: str, part: LinearPart) -> str:
        assert part.values is not None
        return self.op("MatMul", [x, self._half_of(name, part.values)])

    def _quantised(self, x: str, name: str, columns: int, part: LinearPart) -> str:
        assert part.format is not None and part.codes is not None and part.scales is not None
        inputs = [x, self.external(f"{name}.codes", part.codes), self._half_of(f"{name}.scales", part.scales)]
        if part.zero_points is not None:
            inputs.append(self.external(f"{name}.zero_points", part.zero_points))
        product = self.op(
            "MatMulNBits",
            inputs,
            domain=CONTRIB,
            K=columns,
            N=part.rows,
            bits=part.format.bits,
            block_size=part.format.block,
        )
        if part.corrections is None:
            return product
        sums = self._block_sum(x, columns, part.format.block)
        corrections = self._half(f"{name}.corrections", self._package.array(part.corrections).T)
        return self.op("Add", [product, self.op("MatMul", [sums, corrections])])

    def experts(self, x: str, logits: str, gate_up: str, down: str, used: int, normalise: bool) -> str:
        """See `GraphBuilder.experts`."""
        first, second = self.expert_weights(gate_up), self.expert_weights(down)
        if first.columns % EXPERT_ALIGNMENT or second.columns % EXPERT_ALIGNMENT:
            raise UserError(
                f"{self._package.path} has experts of {second.columns} x {first.columns}, which are no multiples of "
                f"{EXPERT_ALIGNMENT}: this model cannot run on the GPU; use the CPU."
            )
        attributes: dict[str, Any] = {"k": used, "normalize_routing_weights": int(normalise), "domain": CONTRIB}
        attributes |= SWIGLU
        form = first.part.format
        if form is None or second.part.format != form:
            dense = [self._dense_experts(gate_up, first), "", self._dense_experts(down, second)]
            return self.op("MoE", [x, logits, *dense], **attributes)
        if self._staging is not None:
            x = self._staged(self._staging, x, logits, gate_up, down, used)
        names = (gate_up, down)
        codes, scales, zero_points = zip(*map(self._expert_arrays, names, (first, second)), strict=True)
        inputs = [x, logits, codes[0], scales[0], "", codes[1], scales[1]]
        attributes |= {"expert_weight_bits": form.bits, "block_size": form.block}
        if form.element == "e2m1":
            self.opset, self.ir_version = 25, 11  # the first that know the type of MXFP4's scales
            self._raw_mxfp4 = self._shared
            ones = [self.constant(f"{name}.ones", np.ones(first.count, np.float32)) for name in names]
            return self.op("QMoE", [*inputs, *[""] * 8, *ones], quant_type="fp4", **attributes)
        # `ExpertMemory` packs the codes when it loads them, so that they need not be the session's own; else they are
        # in rows, as in the package.
        attributes["weights_prepacked"] = int(self._shared)
        if form.asymmetric:
            inputs += [*[""] * 4, *zero_points]
        elif self._calls is not None:
            return self._called(self._calls, inputs, attributes)
        return self.op("QMoE", inputs, **attributes)

    def _called(self, calls: SharedExperts, inputs: list[str], attributes: dict[str, Any]) -> str:
        """The result of a QMoE of these inputs and attributes, whose weights are none of this graph's."""
        self.domains.add(DOMAIN)
        weights = [self._initialisers.pop(name) if name else None for name in inputs[2:]]
        result = f"{inputs[2]}.result"
        known = {name: value for name, value in attributes.items() if name != "domain"}
        self._nodes.append(calls.node(inputs[:2], weights, result, **known))
        return result

    def _staged(self, staging: ExpertStaging, x: str, logits: str, gate_up: str, down: str, used: int) -> str:
        """`x`, when the experts that it is routed to have been fetched."""
        self.domains.add(DOMAIN)
        there = f"{gate_up}.there"
        count = self.op("Size", [logits])
        self._nodes += staging.nodes(gate_up, down, logits, count, used, there)
        return self.op("Add", [x, there])

    def _dense_experts(self, name: str, experts: Experts) -> str:
        part, shape = experts.part, (experts.count, experts.part.rows // experts.count, experts.columns)
        if part.values is not None:
            return self._half_of(name, part.values, shape)
        return self._half(name, self._package.blocks(part, experts.count).dequantise().reshape(shape))

    def _expert_arrays(self, name: str, experts: Experts) -> tuple[str, str, str]:
        """Names of codes [experts, rows, bytes], scales and zero points [experts, rows, blocks]."""
        part, rows = experts.part, experts.part.rows // experts.count
        assert part.format is not None and part.codes is not None and part.scales is not None
        blocks = experts.columns // part.format.block
        shape = (experts.count, rows, blocks)
        if part.format.element == "e2m1":
            codes = self.external(f"{name}.codes", part.codes, (experts.count, experts.columns, rows // 2))
            scales = self.external(f"{name}.scales", part.scales, shape, TensorProto.FLOAT8E8M0)
            return codes, scales, ""
        row_bytes = experts.columns * part.format.bits // 8
        codes = self.external(f"{name}.codes", part.codes, (experts.count, rows, row_bytes))
        scales = self._half_of(f"{name}.scales", part.scales, shape)
        if part.zero_points is None:
            return codes, scales, ""
        packed = (experts.count, rows, -(-blocks * part.format.bits // 8))
        return codes, scales, self.external(f"{name}.zero_points", part.zero_points, packed)
