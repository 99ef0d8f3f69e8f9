"""The graph for ONNX Runtime's CPU provider: fp32 activations, int8 inside the kernels of the fast graph."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from lsp_agent.engine.architecture import LinearAttentionConfig, ModelConfig
from lsp_agent.engine.graph import CONTRIB, SWIGLU, Accuracy, GraphBuilder
from lsp_agent.engine.package import CORRECTION_BLOCK, Experts, Extent, LinearPart, Package
from lsp_agent.engine.quantisation import BlockFormat

L2_EPSILON = 1e-6


class CpuGraph(GraphBuilder):
    """Exact graphs compute in fp32; fast ones round activations to int8 per block inside `MatMulNBits` and `QMoE`.

    Of a recurrent model there is one more input, `kept` [1] int64: of how many positions a run puts out what the
    recurrences read, see `replayed`.
    """

    kept = "kept"

    def __init__(self, package: Package, context: int, accuracy: Accuracy) -> None:
        super().__init__(package, context)
        self._accuracy = accuracy
        self.replayed: dict[str, int] = {}
        """Outputs [batch, kept, width] that `Replay` reads, and their widths."""

    @property
    def _level(self) -> int:
        """`accuracy_level` of the quantised kernels."""
        return 0 if self._accuracy == "exact" else 4

    def attention(self, config: ModelConfig, prefix: str, qkv: list[str], normalised: bool) -> str:
        """See `GraphBuilder.attention`."""
        if normalised:
            # On the CPU, GroupQueryAttention refuses its own q and k norms, so they are separate nodes.
            query, key, value = qkv
            query = self._head_norm(query, f"{prefix}.attn_q_norm", config.heads, config)
            qkv = [query, self._head_norm(key, f"{prefix}.attn_k_norm", config.kv_heads, config), value]
        past_key, present_key = self.kv_state(f"{prefix}.key", config)
        past_value, present_value = self.kv_state(f"{prefix}.value", config)
        inputs = [*qkv, *[""] * (3 - len(qkv)), past_key, past_value, self.lengths, self.total_length]
        return self.op(
            "GroupQueryAttention",
            [*inputs, *self.rotary_tables(config)],
            domain=CONTRIB,
            more_outputs=(present_key, present_value),
            num_heads=config.heads,
            kv_num_heads=config.kv_heads,
            do_rotary=1,
        )

    def _head_norm(self, x: str, name: str, heads: int, config: ModelConfig) -> str:
        """An RMS norm over each head of `x` [batch, length, heads * head size]."""
        by_head = self.reshape(x, [0, 0, heads, config.head_size])
        scale = self.vector(name)
        normed = self.op("SimplifiedLayerNormalization", [by_head, scale], axis=-1, epsilon=config.rms_epsilon)
        return self.reshape(normed, [0, 0, heads * config.head_size])

    def replayable(self, name: str, x: str, width: int) -> str:
        """See `GraphBuilder.replayable`."""
        if not self.replayed:
            self._inputs.append(helper.make_tensor_value_info(self.kept, TensorProto.INT64, [1]))
        # A slice, empty in most runs: of a long prompt the whole would take a lot of memory until the run ends.
        output = self.output_of(name)
        inputs = [x, self.integers([0]), self.kept, self.integers([1])]
        self._nodes.append(helper.make_node("Slice", inputs, [output], name=f"n_{output}"))
        self._outputs.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", "kept", width]))
        self.replayed[output] = width
        return x

    def output_of(self, name: str) -> str:
        """The output with the first positions of the projection `name`."""
        return f"kept.{name}"

    def delta_rule(self, linear: LinearAttentionConfig, prefix: str, qkv: list[str], step: str, rate: str) -> str:
        """See `GraphBuilder.delta_rule`."""
        key_width = linear.key_heads * linear.key_size
        query, key, value = qkv
        query = self.reshape(self._unit_length(query, linear), [0, 0, key_width])
        # LinearAttention shares queries between heads, but not keys: they are repeated for each value head.
        served = linear.value_heads // linear.key_heads
        key = self._unit_length(key, linear)
        if served > 1:
            key = self.reshape(key, [0, 0, linear.key_heads, 1, linear.key_size])
            key = self.op("Expand", [key, self.integers([1, 1, 1, served, 1])])
        key = self.reshape(key, [0, 0, linear.value_heads * linear.key_size])
        beta = f"{prefix}.beta"
        gates = [step, self.vector(f"{prefix}.ssm_dt"), self.vector(f"{prefix}.ssm_a"), rate]
        decay = self.op("LinearAttentionGate", gates, domain=CONTRIB, more_outputs=(beta,))
        shape = (linear.value_heads, linear.key_size, linear.value_size)
        past, present = self.recurrent_state(f"{prefix}.delta", shape)
        return self.op(
            "LinearAttention",
            [query, key, value, past, decay, beta],
            domain=CONTRIB,
            more_outputs=(present,),
            q_num_heads=linear.key_heads,
            kv_num_heads=linear.value_heads,
            update_rule="gated_delta",
        )

    def _unit_length(self, x: str, linear: LinearAttentionConfig) -> str:
        """`x / sqrt(sum(x^2) + 1e-6)` over each key head, [batch, length, key heads, key size].

        An RMS norm with weights 1 / sqrt(size) and an epsilon divided by the size is the same; LpNormalization has
        none.
        """
        size = linear.key_size
        weights = self.constant(f"unit_{size}", np.full(size, 1 / math.sqrt(size), np.float32))
        heads = self.reshape(x, [0, 0, linear.key_heads, size])
        return self.op("SimplifiedLayerNormalization", [heads, weights], axis=-1, epsilon=L2_EPSILON / size)

    def _dense(self, x: str, name: str, part: LinearPart) -> str:
        assert part.values is not None
        return self.op("MatMul", [x, self._floats(name, part.values)])

    def _floats(self, name: str, extent: Extent, shape: tuple[int, ...] | None = None) -> str:
        """Values in fp32; those kept in 16 bits are converted once, when the session is made."""
        stored = self.external(name, extent, shape)
        return stored if extent.dtype == "float32" else self.op("Cast", [stored], to=TensorProto.FLOAT)

    def _in_fp32_only(self, form: BlockFormat) -> bool:
        """Whether exact arithmetic needs dense weights: the CPU provider has no (fast) fp32 kernel for 8-bit codes."""
        return self._accuracy == "exact" and (form.bits == 8 or form.element == "e2m1")

    def _quantised(self, x: str, name: str, columns: int, part: LinearPart) -> str:
        form = part.format
        assert form is not None
        if self._in_fp32_only(form):
            dense = self._package.blocks(part).dequantise()
            return self.op("MatMul", [x, self.constant(name, dense.T)])
        if form.element == "e2m1":
            wide = self._package.blocks(part).widen()
            inputs = [self.constant(f"{name}.codes", wide.codes), self.constant(f"{name}.scales", wide.scales)]
            return self._matmul_nbits(x, inputs, columns, part.rows, wide.format)
        product = self._matmul_nbits(x, self._stored(name, part, ""), columns, part.rows, form)
        if part.corrections is None:
            return product
        sums = self._block_sum(x, columns, form.block)
        if self._accuracy == "fast" and part.correction_codes is not None:
            inputs = self._stored(name, part, "correction_")
            eight = BlockFormat(8, CORRECTION_BLOCK)
            correction = self._matmul_nbits(sums, inputs, columns // form.block, part.rows, eight)
        else:
            corrections = self.external(f"{name}.corrections", part.corrections)
            correction = self.op("FusedMatMul", [sums, corrections], domain=CONTRIB, transB=1)
        return self.op("Add", [product, correction])

    def _stored(self, name: str, part: LinearPart, prefix: str) -> list[str]:
        extents = part.extents()
        fields = [f"{prefix}{field}" for field in ("codes", "scales", "zero_points")]
        return [self.external(f"{name}.{field}", extents[field]) for field in fields if field in extents]

    def _matmul_nbits(self, x: str, weights: list[str], columns: int, rows: int, form: BlockFormat) -> str:
        return self.op(
            "MatMulNBits",
            [x, *weights],
            domain=CONTRIB,
            K=columns,
            N=rows,
            bits=form.bits,
            block_size=form.block,
            accuracy_level=self._level,
        )

    def experts(self, x: str, logits: str, gate_up: str, down: str, used: int, normalise: bool) -> str:
        """See `GraphBuilder.experts`."""
        first, second = self.expert_weights(gate_up), self.expert_weights(down)
        routing: dict[str, Any] = {"k": used, "normalize_routing_weights": int(normalise), "domain": CONTRIB}
        one, two = first.part.format, second.part.format
        if one is None or two is None or self._in_fp32_only(one):
            # QMoE rounds activations to int8 whenever weights have 8 bits.
            dense = [self._dense_experts(gate_up, first), "", self._dense_experts(down, second)]
            mixed = self.op("MoE", [x, logits, *dense], **routing, **SWIGLU)
            # The CPU kernel lets the planner put its output where its input is, and then spoils what it still reads.
            # A later reader of `x` keeps its buffer from being given away.
            return self.op("Where", [self.constant("true", np.array([True])), mixed, x])
        # Left to itself, the CPU kernel normalises in either case, so the softmax over all experts comes from here.
        mixing = "" if normalise else self.op("Softmax", [logits], axis=-1)
        up, down_ = self._quantised_experts(gate_up, first), self._quantised_experts(down, second)
        inputs = [x, logits, *up[:2], "", *down_[:2], *[""] * 4, up[2], down_[2], "", mixing]
        while not inputs[-1]:
            inputs.pop()
        return self.op(
            "QMoE",
            inputs,
            expert_weight_bits=8 if one.element == "e2m1" else one.bits,
            block_size=one.block,
            accuracy_level=self._level,
            **routing,
            **SWIGLU,
        )

    def _dense_experts(self, name: str, experts: Experts) -> str:
        part, shape = experts.part, (experts.count, experts.part.rows // experts.count, experts.columns)
        if part.values is not None:
            return self._floats(name, part.values, shape)
        return self.constant(name, self._package.blocks(part, experts.count).dequantise().reshape(shape))

    def _quantised_experts(self, name: str, experts: Experts) -> list[str]:
        """Codes, scales, and zero points or an empty name."""
        part, shape = experts.part, (experts.count, experts.part.rows // experts.count)
        assert part.format is not None and part.codes is not None and part.scales is not None
        if part.format.element == "e2m1":
            # No kernel of the CPU provider reads MXFP4, but 8-bit codes mean the same values exactly: at twice the
            # memory, all of it resident.
            wide = self._package.blocks(part, experts.count).widen()
            arrays = {"codes": wide.codes, "scales": wide.scales}
            return [*(self.constant(f"{name}.{k}", a.reshape(*shape, -1)) for k, a in arrays.items()), ""]
        row_bytes = experts.columns * part.format.bits // 8
        blocks = experts.columns // part.format.block
        zero_points = ""
        if part.zero_points is not None:
            packed = (*shape, part.zero_points.shape[-1])
            zero_points = self.external(f"{name}.zero_points", part.zero_points, packed)
        return [
            self.external(f"{name}.codes", part.codes, (*shape, row_bytes)),
            self.external(f"{name}.scales", part.scales, (*shape, blocks)),
            zero_points,
        ]
