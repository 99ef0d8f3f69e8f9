"""The decoder as an ONNX graph over a package's weights: what the execution providers have in common.

`CpuGraph` and `CudaGraph` add what differs between their kernels; the layers know only this class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from lsp_agent.engine.architecture import CONTRIB, LinearAttentionConfig, ModelConfig
from lsp_agent.engine.package import WEIGHTS, Experts, Extent, Linear, LinearPart, Package
from lsp_agent.engine.rotary import rotary_tables
from lsp_agent.engine.state import StateSpec

OPSET = 21
IR_VERSION = 10
SWIGLU: dict[str, Any] = {
    # Gate and up are interleaved (the CPU kernel knows no other order), alpha 1 and beta 0 make it plain SwiGLU.
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
}


Accuracy = Literal["exact", "fast"]
"""exact: fp32 arithmetic throughout (CPU only). fast: the provider's fastest kernels for the package's codes."""

_ONNX_TYPES = {"uint8": TensorProto.UINT8, "float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}


class GraphBuilder(ABC):
    """Appends nodes; every `x` is the name of a value. Activations have the type `element`.

    `embeddings` [batch, length, hidden], `lengths` [batch] int32 (index of each sequence's last token after this
    run), `total_length` [1] int32 (largest length after this run) and `rows` [n] int64 (which of the batch * length
    positions get logits) are the graph's inputs besides the states.
    """

    embeddings, lengths, total_length, rows = "embeddings", "lengths", "total_length", "rows"
    element: Literal["float32", "float16"] = "float32"
    opset, ir_version = OPSET, IR_VERSION

    def __init__(self, package: Package, context: int) -> None:
        self._package = package
        self._context = context
        self._nodes: list[NodeProto] = []
        self._initialisers: dict[str, TensorProto] = {}
        self._block_sums: dict[tuple[str, int], str] = {}
        self._outputs: list[ValueInfoProto] = []
        self._count = 0
        self.in_memory: dict[str, np.ndarray] = {}
        self.domains = {CONTRIB}
        self.states: list[StateSpec] = []
        hidden = package.config.hidden
        self._inputs = [
            helper.make_tensor_value_info(self.embeddings, _ONNX_TYPES[self.element], ["batch", "length", hidden]),
            helper.make_tensor_value_info(self.lengths, TensorProto.INT32, ["batch"]),
            helper.make_tensor_value_info(self.total_length, TensorProto.INT32, [1]),
            helper.make_tensor_value_info(self.rows, TensorProto.INT64, ["rows"]),
        ]

    # What the providers do differently.

    @abstractmethod
    def attention(self, config: ModelConfig, prefix: str, qkv: list[str], normalised: bool) -> str:
        """Causal grouped-query attention over the cache `prefix`, [batch, length, heads * head size].

        `qkv`: query, key and value [batch, length, heads * head size] or all packed into the first. `normalised`:
        each head of q and k gets an RMS norm of its own before it is rotated.
        """

    @abstractmethod
    def delta_rule(self, linear: LinearAttentionConfig, prefix: str, qkv: list[str], step: str, rate: str) -> str:
        """The gated delta rule over the state `prefix`, [batch, length, value heads * value size].

        `qkv` after the convolution, [batch, length, heads * head size] each; `step` and `rate` [batch, length, value
        heads], as projected: the decay is `exp(a * softplus(step + dt))`, the update rate `sigmoid(rate)`.
        """

    @abstractmethod
    def experts(self, x: str, logits: str, gate_up: str, down: str, used: int, normalise: bool) -> str:
        """SwiGLU experts: of each token of `x` [batch, length, hidden] the `used` best by `logits` [tokens, experts].

        Their results are weighted by the softmax of `logits`, over the experts used if `normalise`, else over all.
        """

    @abstractmethod
    def _dense(self, x: str, name: str, part: LinearPart) -> str:
        """`x` times the transpose of an unquantised part."""

    @abstractmethod
    def _quantised(self, x: str, name: str, columns: int, part: LinearPart) -> str:
        """`x` times the transpose of a quantised part, corrections included."""

    # What they share.

    def replayable(self, name: str, x: str, width: int) -> str:  # noqa: ARG002
        """`x` [batch, length, width], read by a recurrence: a provider may keep it, to move the state on by fewer
        tokens than a run has read."""
        return x

    def convolved(self, linear: LinearAttentionConfig, prefix: str, mixed: str) -> tuple[list[str], str]:
        """q, k and v of `mixed` [batch, length, channels + gates] after the causal convolution over the state `prefix`,
        [batch, length, heads * head size] each; and where `gated_norm` finds the gates."""
        keys, values = linear.key_heads * linear.key_size, linear.value_heads * linear.value_size
        qkv, gates = self.split(mixed, [2 * keys + values, values])
        past, present = self.recurrent_state(f"{prefix}.conv", (linear.kernel - 1, 2 * keys + values))
        convolved = self.op(
            "CausalConvWithState",
            [qkv, self.vector(f"{prefix}.ssm_conv1d"), "", past],
            domain=CONTRIB,
            more_outputs=(present,),
            activation="silu",
            channels_last=1,
        )
        return self.split(convolved, [keys, keys, values]), gates

    def gated_norm(self, prefix: str, attended: str, gates: str) -> str:
        """The RMS norm of each value head of `attended` [batch, length, values], times SiLU of the gates, for which
        `convolved` gave `gates`."""
        inputs = [attended, self.vector(f"{prefix}.ssm_norm"), gates]  # the vector's size is a head's
        epsilon = self._package.config.rms_epsilon
        return self.op("GatedRMSNorm", inputs, domain=CONTRIB, activation="silu", epsilon=epsilon)

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

    def external(self, name: str, extent: Extent, shape: tuple[int, ...] | None = None, kind: int | None = None) -> str:
        """A constant that is mapped from the package as it lies there; `kind` is an ONNX type that numpy lacks."""
        tensor = TensorProto(name=name, data_type=kind or _ONNX_TYPES[extent.dtype], dims=shape or extent.shape)
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

    def values(self, name: str) -> np.ndarray:
        """A weight of kind `vector`, fp32."""
        extent = self._package.weights[name]
        assert isinstance(extent, Extent)
        return self._package.array(extent)

    def vector(self, name: str) -> str:
        """A weight of kind `vector` as a constant of the activations' type."""
        # Its own name is that of the fp32 values, where weights are shared between sessions.
        known = name if self.element == "float32" else f"{name}.{self.element}"
        return self.constant(known, self.values(name).astype(self.element, copy=False))

    def linear(self, x: str, name: str) -> str:
        """`x` [..., columns] times the transpose of the weight `name`; parts of different formats are concatenated."""
        weight = self._package.weights[name]
        assert isinstance(weight, Linear)
        outputs = []
        for index, part in enumerate(weight.parts):
            known = f"{name}.{index}"
            dense = part.format is None
            outputs.append(self._dense(x, known, part) if dense else self._quantised(x, known, weight.columns, part))
        return outputs[0] if len(outputs) == 1 else self.op("Concat", outputs, axis=-1)

    def expert_weights(self, name: str) -> Experts:
        """A weight of kind `experts`."""
        weight = self._package.weights[name]
        assert isinstance(weight, Experts)
        return weight

    def _block_sum(self, x: str, columns: int, block: int) -> str:
        """Sums of `x` over blocks of columns, computed once for all linears that read the same `x`."""
        if (x, block) not in self._block_sums:
            blocked = self.op("Reshape", [x, self.integers([0, 0, columns // block, block])])
            sums = self.op("ReduceSum", [blocked, self.integers([-1])], keepdims=0)
            # Of no rows at all (the head within a prefill) ORT returns the shape unreduced.
            self._block_sums[x, block] = self.op("Reshape", [sums, self.integers([0, 0, columns // block])])
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

    def kv_state(self, name: str, config: ModelConfig) -> tuple[str, str]:
        """A key or value cache [batch, kv heads, capacity, head size]: names of its past input and present output."""
        shape = (config.kv_heads, config.head_size)
        spec = StateSpec(f"past.{name}", f"present.{name}", shape, growing=True, dtype=self.element)
        return self._state(spec, ["batch", config.kv_heads, "capacity", config.head_size])

    def recurrent_state(self, name: str, shape: tuple[int, ...], dtype: str | None = None) -> tuple[str, str]:
        """A state [batch, *shape] that every run replaces: names of its past input and present output."""
        spec = StateSpec(f"past.{name}", f"present.{name}", shape, growing=False, dtype=dtype or self.element)
        return self._state(spec, ["batch", *shape])

    def _state(self, spec: StateSpec, shape: list[str | int]) -> tuple[str, str]:
        kind = _ONNX_TYPES[spec.dtype]
        self._inputs.append(helper.make_tensor_value_info(spec.past, kind, shape))
        self._outputs.append(helper.make_tensor_value_info(spec.present, kind, shape))
        self.states.append(spec)
        return spec.past, spec.present

    def rotary_tables(self, config: ModelConfig) -> tuple[str, str]:
        """Cosines and sines [context, rotary size / 2] of the rotary embedding."""
        if "rotary.cos" not in self._initialisers:
            for name, table in zip(("cos", "sin"), rotary_tables(config, self._context), strict=True):
                self.constant(f"rotary.{name}", table.astype(self.element, copy=False))
        return "rotary.cos", "rotary.sin"

    def select_rows(self, x: str, hidden: int) -> str:
        """The positions that get logits, [1, rows, hidden], of `x` [batch, length, hidden]."""
        flat = self.op("Reshape", [x, self.integers([1, -1, hidden])])
        return self.op("Gather", [flat, self.rows], axis=1)

    def logits(self, x: str, vocabulary: int) -> None:
        """Make `x` the output `logits` [1, rows, vocabulary]."""
        self._nodes.append(helper.make_node("Identity", [x], ["logits"]))
        info = helper.make_tensor_value_info("logits", _ONNX_TYPES[self.element], [1, "rows", vocabulary])
        self._outputs.insert(0, info)

    def model(self) -> ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, list(self._initialisers.values())
        )
        domains = [helper.make_opsetid(domain, 1) for domain in sorted(self.domains)]
        opsets = [helper.make_opsetid("", self.opset), *domains]
        return helper.make_model(graph, opset_imports=opsets, ir_version=self.ir_version)

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
