"""Builds the ONNX graph of a decoder at load time; quantised weights stay in the package's file, which ORT maps."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from lsp_agent.engine.architecture import ModelConfig
from lsp_agent.engine.package import CORRECTION_BLOCK, WEIGHTS, Experts, Extent, Linear, LinearPart, Package
from lsp_agent.engine.quantisation import BlockFormat
from lsp_agent.engine.rotary import rotary_tables
from lsp_agent.engine.state import StateSpec

CONTRIB = "com.microsoft"
OPSET = 21
IR_VERSION = 10

Accuracy = Literal["exact", "fast"]
"""exact: fp32 arithmetic throughout. fast: activations are rounded to int8 per block inside `MatMulNBits`."""

_ONNX_TYPES = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}


class GraphBuilder:
    """Appends nodes; every `x` is the name of a value.

    `embeddings` [batch, length, hidden] fp32, `lengths` [batch] int32 (index of each sequence's last token after this
    run), `total_length` [1] int32 (largest length after this run) and `rows` [n] int64 (which of the batch * length
    positions get logits) are the graph's inputs besides the states.
    """

    embeddings, lengths, total_length, rows = "embeddings", "lengths", "total_length", "rows"

    def __init__(self, package: Package, accuracy: Accuracy, context: int) -> None:
        self._package = package
        self._accuracy = accuracy
        self._context = context
        self._nodes: list[NodeProto] = []
        self._initialisers: dict[str, TensorProto] = {}
        self._block_sums: dict[tuple[str, int], str] = {}
        self._outputs: list[ValueInfoProto] = []
        self._count = 0
        self.in_memory: dict[str, np.ndarray] = {}
        self.states: list[StateSpec] = []
        hidden = package.config.hidden
        self._inputs = [
            helper.make_tensor_value_info(self.embeddings, TensorProto.FLOAT, ["batch", "length", hidden]),
            helper.make_tensor_value_info(self.lengths, TensorProto.INT32, ["batch"]),
            helper.make_tensor_value_info(self.total_length, TensorProto.INT32, [1]),
            helper.make_tensor_value_info(self.rows, TensorProto.INT64, ["rows"]),
        ]

    def op(
        self, kind: str, inputs: list[str], domain: str = "", more_outputs: tuple[str, ...] = (), **attributes: Any
    ) -> str:
        """Append a node and return the name of its first output."""
        self._count += 1
        name = f"{kind}_{self._count}"
        self._nodes.append(
            helper.make_node(kind, inputs, [name, *more_outputs], name=f"n_{name}", domain=domain, **attributes)
        )
        return name

    def reshape(self, x: str, shape: list[int]) -> str:
        """`Reshape`: 0 keeps a dimension, -1 is what remains."""
        return self.op("Reshape", [x, self.integers(shape)])

    def split(self, x: str, widths: list[int]) -> list[str]:
        """Consecutive pieces of the last dimension."""
        others = tuple(f"Split_{self._count + 1}_{index}" for index in range(1, len(widths)))
        return [self.op("Split", [x, self.integers(widths)], more_outputs=others, axis=-1), *others]

    def _external(self, name: str, extent: Extent, shape: tuple[int, ...] | None = None) -> str:
        tensor = TensorProto(name=name, data_type=_ONNX_TYPES[extent.dtype], dims=shape or extent.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", extent.offset), ("length", extent.nbytes)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        self._initialisers[name] = tensor
        return name

    def constant(self, name: str, values: np.ndarray) -> str:
        """A small constant inside the graph, or a large one handed to the session as memory it shares."""
        if name not in self._initialisers:
            kind = helper.np_dtype_to_tensor_dtype(values.dtype)
            tensor = TensorProto(name=name, data_type=kind, dims=values.shape)
            if values.nbytes <= 1024:
                tensor.raw_data = values.tobytes()
            else:
                tensor.data_location = TensorProto.EXTERNAL
                entry = tensor.external_data.add()
                entry.key, entry.value = "location", "in-memory"
                self.in_memory[name] = np.ascontiguousarray(values)
            self._initialisers[name] = tensor
        return name

    def integers(self, values: list[int]) -> str:
        """A constant int64 vector."""
        return self.constant("i64_" + "_".join(map(str, values)), np.array(values, np.int64))

    def vector(self, name: str) -> str:
        """A weight of kind `vector`."""
        extent = self._package.weights[name]
        assert isinstance(extent, Extent)
        return self.constant(name, self._package.array(extent))

    def linear(self, x: str, name: str) -> str:
        """`x` [..., columns] times the transpose of the weight `name`; parts of different formats are concatenated."""
        weight = self._package.weights[name]
        assert isinstance(weight, Linear)
        outputs = [self._part(x, f"{name}.{i}", weight.columns, part) for i, part in enumerate(weight.parts)]
        return outputs[0] if len(outputs) == 1 else self.op("Concat", outputs, axis=-1)

    def _part(self, x: str, name: str, columns: int, part: LinearPart) -> str:
        if part.format is None:
            assert part.values is not None
            return self.op("MatMul", [x, self._external(name, part.values)])
        if self._accuracy == "exact" and part.format.bits == 8:
            # The CPU provider has no fast fp32 kernel for 8-bit codes (fifty times slower than this).
            dense = self._package.blocks(part).dequantise()
            return self.op("MatMul", [x, self.constant(name, dense.T)])
        product = self._matmul_nbits(x, name, part, "", columns, part.format)
        if part.corrections is None:
            return product
        sums = self._block_sum(x, columns, part.format.block)
        if self._accuracy == "fast" and part.correction_codes is not None:
            form = BlockFormat(8, CORRECTION_BLOCK, False)
            correction = self._matmul_nbits(sums, name, part, "correction_", columns // part.format.block, form)
        else:
            corrections = self._external(f"{name}.corrections", part.corrections)
            correction = self.op("FusedMatMul", [sums, corrections], domain=CONTRIB, transB=1)
        return self.op("Add", [product, correction])

    def _matmul_nbits(self, x: str, name: str, part: LinearPart, prefix: str, columns: int, form: BlockFormat) -> str:
        extents = part.extents()
        fields = [f"{prefix}{field}" for field in ("codes", "scales", "zero_points")]
        return self.op(
            "MatMulNBits",
            [x, *(self._external(f"{name}.{field}", extents[field]) for field in fields if field in extents)],
            domain=CONTRIB,
            K=columns,
            N=part.rows,
            bits=form.bits,
            block_size=form.block,
            accuracy_level=0 if self._accuracy == "exact" else 4,
        )

    def experts(self, x: str, logits: str, gate_up: str, down: str, used: int, normalise: bool) -> str:
        """SwiGLU experts: of each token of `x` [batch, length, hidden] the `used` best by `logits` [tokens, experts].

        Their results are weighted by the softmax of `logits`, over the experts used if `normalise`, else over all.
        """
        first, second = self._package.weights[gate_up], self._package.weights[down]
        assert isinstance(first, Experts) and isinstance(second, Experts)
        routing: dict[str, Any] = {"k": used, "normalize_routing_weights": int(normalise), "domain": CONTRIB}
        # Gate and up are interleaved (the CPU kernel knows no other order); alpha 1 and beta 0 make it plain SwiGLU.
        activation: dict[str, Any] = {
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
        }
        one, two = first.part.format, second.part.format
        if one is None or two is None or (self._accuracy == "exact" and 8 in (one.bits, two.bits)):
            # QMoE rounds activations to int8 whenever weights have 8 bits.
            dense = [self._dense_experts(gate_up, first), "", self._dense_experts(down, second)]
            mixed = self.op("MoE", [x, logits, *dense], **routing, **activation)
            # The CPU kernel lets the planner put its output where its input is, and then spoils what it still reads.
            # A later reader of `x` keeps its buffer from being given away.
            return self.op("Where", [self.constant("true", np.array([True])), mixed, x])
        # Left to itself, the CPU kernel normalises in either case, so the softmax over all experts comes from here.
        weights = [] if normalise else [*[""] * 7, self.op("Softmax", [logits], axis=-1)]
        return self.op(
            "QMoE",
            [x, logits, *self._quantised_experts(gate_up, first), "", *self._quantised_experts(down, second), *weights],
            expert_weight_bits=one.bits,
            block_size=one.block,
            accuracy_level=0 if self._accuracy == "exact" else 4,
            **routing,
            **activation,
        )

    def _dense_experts(self, name: str, experts: Experts) -> str:
        part, shape = experts.part, (experts.count, experts.part.rows // experts.count, experts.columns)
        if part.values is not None:
            return self._external(name, part.values, shape)
        return self.constant(name, self._package.blocks(part).dequantise().reshape(shape))

    def _quantised_experts(self, name: str, experts: Experts) -> list[str]:
        part, rows = experts.part, experts.part.rows // experts.count
        assert part.format is not None and part.codes is not None and part.scales is not None
        row_bytes = experts.columns * part.format.bits // 8
        blocks = experts.columns // part.format.block
        return [
            self._external(f"{name}.codes", part.codes, (experts.count, rows, row_bytes)),
            self._external(f"{name}.scales", part.scales, (experts.count, rows, blocks)),
        ]

    def _block_sum(self, x: str, columns: int, block: int) -> str:
        """Sums of `x` over blocks of columns, computed once for all linears that read the same `x`."""
        if (x, block) not in self._block_sums:
            blocked = self.op("Reshape", [x, self.integers([0, 0, columns // block, block])])
            self._block_sums[x, block] = self.op("ReduceSum", [blocked, self.integers([-1])], keepdims=0)
        return self._block_sums[x, block]

    def rms_norm(self, residual: str, delta: str | None, name: str, epsilon: float) -> tuple[str, str]:
        """The normalised sum of `residual` and `delta` [batch, length, hidden], and the sum itself."""
        scale = self.vector(name)
        if delta is None:
            return self.op("SimplifiedLayerNormalization", [residual, scale], axis=-1, epsilon=epsilon), residual
        total = f"{name}.residual"
        outputs = ("", "", total)
        inputs = [residual, delta, scale]
        normed = self.op("SkipSimplifiedLayerNormalization", inputs, CONTRIB, outputs, epsilon=epsilon)
        return normed, total

    def head_norm(self, x: str, name: str, heads: int, config: ModelConfig) -> str:
        """An RMS norm over each head of `x` [batch, length, heads * head size]."""
        by_head = self.reshape(x, [0, 0, heads, config.head_size])
        scale = self.vector(name)
        normed = self.op("SimplifiedLayerNormalization", [by_head, scale], axis=-1, epsilon=config.rms_epsilon)
        return self.reshape(normed, [0, 0, heads * config.head_size])

    def kv_state(self, name: str, config: ModelConfig) -> tuple[str, str]:
        """A key or value cache [batch, kv heads, capacity, head size]: names of its past input and present output."""
        spec = StateSpec(f"past.{name}", f"present.{name}", (config.kv_heads, config.head_size), growing=True)
        return self._state(spec, ["batch", config.kv_heads, "capacity", config.head_size])

    def recurrent_state(self, name: str, shape: tuple[int, ...]) -> tuple[str, str]:
        """A state [batch, *shape] that every run replaces: names of its past input and present output."""
        return self._state(StateSpec(f"past.{name}", f"present.{name}", shape, growing=False), ["batch", *shape])

    def _state(self, spec: StateSpec, shape: list[str | int]) -> tuple[str, str]:
        self._inputs.append(helper.make_tensor_value_info(spec.past, TensorProto.FLOAT, shape))
        self._outputs.append(helper.make_tensor_value_info(spec.present, TensorProto.FLOAT, shape))
        self.states.append(spec)
        return spec.past, spec.present

    def rotary_tables(self, config: ModelConfig) -> tuple[str, str]:
        """Cosines and sines [context, rotary size / 2] of the rotary embedding."""
        if "rotary.cos" not in self._initialisers:
            cos, sin = rotary_tables(config, self._context)
            self.constant("rotary.cos", cos)
            self.constant("rotary.sin", sin)
        return "rotary.cos", "rotary.sin"

    def select_rows(self, x: str, hidden: int) -> str:
        """The positions that get logits, [1, rows, hidden], of `x` [batch, length, hidden]."""
        flat = self.op("Reshape", [x, self.integers([1, -1, hidden])])
        return self.op("Gather", [flat, self.rows], axis=1)

    def logits(self, x: str, vocabulary: int) -> None:
        """Make `x` the output `logits` [1, rows, vocabulary]."""
        self._nodes.append(helper.make_node("Identity", [x], ["logits"]))
        info = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "rows", vocabulary])
        self._outputs.insert(0, info)

    def model(self) -> ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, list(self._initialisers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)

    def session_options(self, threads: int) -> ort.SessionOptions:
        """Options that find the package's weights, share `in_memory` and never let an idle thread spin."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._package.path)
        )
        if self.in_memory:
            values = [ort.OrtValue.ortvalue_from_numpy(array) for array in self.in_memory.values()]
            options.add_external_initializers(list(self.in_memory), values)
        return options
