"""The graph of a decode step: one more token for each sequence, in our own kernels where ONNX Runtime launches many.

ONNX Runtime's operators compute a token of Qwen3-Coder-Next in about 1,100 kernels of a few microseconds each; here it
takes six or seven a block. Every node is an operator of `operators`, shapes are static, and weights are addresses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from lsp_agent.engine.architecture import ModelConfig
from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.decoder import HEAD
from lsp_agent.engine.delta_net import GatedDeltaNet
from lsp_agent.engine.gpu import expert_kernels, projection, sequence_kernels
from lsp_agent.engine.gpu.compiler import KernelCompiler
from lsp_agent.engine.gpu.expert_kernels import ExpertForm, ExpertSizes, SharedExpert
from lsp_agent.engine.gpu.launch import Launch
from lsp_agent.engine.gpu.operators import DOMAIN, Output, launch_node
from lsp_agent.engine.gpu.projection import Norm, Prologue, Segment
from lsp_agent.engine.gpu.weights import DeviceWeights
from lsp_agent.engine.graph import IR_VERSION, OPSET
from lsp_agent.engine.layers import Attention, DenseMlp
from lsp_agent.engine.moe import SHARED, MoeMlp
from lsp_agent.engine.package import Experts, Extent, Linear, Package
from lsp_agent.engine.rotary import rotary_tables
from lsp_agent.engine.state import StateSpec

Result = tuple[str, int]
"""An output's type, `h`, `f` or `i`, and its elements for each sequence."""


CANDIDATES = 64
"""Tokens whose logits a step hands over; the others stay on the GPU until they are asked for."""
EMBEDDING_TYPES: dict[str, Literal["float16", "bfloat16", "float32"]] = {
    "f16": "float16",
    "bf16": "bfloat16",
    "f32": "float32",
}


class NoKernel(Exception):  # noqa: N818 - said as it is
    """The decode kernels do not cover this model; the message says what of it."""


class StepGraph:
    """The decode graph of `batch` sequences.

    Inputs: `ids` [batch, 1] int64, `lengths` [batch] int32 (the new token's index), `control` [4] int32 (present buffer
    of the rings, capacity of keys and values, size of the rings, 0), and the states by their `past` names, rings
    [size, batch, ...], which are changed in place. Outputs: `logits` [batch, vocabulary], and of the best
    `CANDIDATES` tokens `values` and `tokens` [batch, CANDIDATES], and `log_sum_exp` [batch, 1]. Raises `NoKernel`.
    """

    def __init__(
        self,
        package: Package,
        states: Sequence[StateSpec],
        weights: DeviceWeights,
        compiler: KernelCompiler,
        batch: int,
        context: int,
    ) -> None:
        self._package, self._weights, self._compiler = package, weights, compiler
        self._config: ModelConfig = package.config
        self._batch, self._context = batch, context
        self._nodes: list[NodeProto] = []
        types = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}
        self._inputs = [
            helper.make_tensor_value_info("ids", TensorProto.INT64, [batch, 1]),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, [batch]),
            helper.make_tensor_value_info("control", TensorProto.INT32, [4]),
        ]
        for spec in states:
            heads = [batch, spec.shape[0], "capacity", *spec.shape[1:]]
            shape = heads if spec.growing else ["ring", batch, *spec.shape]
            self._inputs.append(helper.make_tensor_value_info(spec.past, types[spec.dtype], shape))
        try:
            self._build()
        except ValueError as error:
            raise NoKernel(str(error)) from error

    def _build(self) -> None:
        config, batch = self._config, self._batch
        table, kind = self._weights.embedding()
        embed = projection.embed(config.hidden, batch, EMBEDDING_TYPES[kind])
        (residual,) = self._launch(embed, ["ids"], [("h", config.hidden)], [table])
        delta = ""
        for index in range(config.layers):
            block, prefix = architecture(config.architecture).block(config, index), f"blk.{index}"
            if isinstance(block.mixer, Attention):
                residual, delta = self._attention(block.mixer, prefix, residual, delta)
            elif isinstance(block.mixer, GatedDeltaNet):
                residual, delta = self._delta_net(prefix, residual, delta)
            else:
                raise NoKernel(type(block.mixer).__name__)
            if isinstance(block.mlp, MoeMlp):
                residual, delta = self._mixture(block.mlp, prefix, residual, delta)
            elif isinstance(block.mlp, DenseMlp):
                residual, delta = self._mlp(block.mlp, prefix, residual, delta)
            else:
                raise NoKernel(type(block.mlp).__name__)
        logits, _, _ = self._normed(residual, delta, "output_norm", [HEAD], name="logits")
        self._candidates(logits)

    def _candidates(self, logits: str) -> None:
        """The outputs beside the logits."""
        vocabulary, batch = self._config.vocabulary, self._batch
        _, *scratch = projection.candidates_scratch(vocabulary, batch, CANDIDATES)
        results: list[Result] = [("f", CANDIDATES), ("i", CANDIDATES), ("f", 1), ("f", math.prod(scratch))]
        launch = projection.candidates(vocabulary, batch, CANDIDATES)
        names = ["values", "tokens", "log_sum_exp"]
        self._launch(launch, [logits], results, [self._counters(batch)], names)

    # Layers: `residual` and what is to be added to it in, the same out.

    def _attention(self, layer: Attention, prefix: str, residual: str, delta: str) -> tuple[str, str]:
        config = self._config
        name = f"{prefix}.attn_qkv"
        bias = f"{name}_bias" if layer.bias else None
        packed, residual, _ = self._normed(residual, delta, f"{prefix}.attn_norm", [name], bias=bias)
        width = config.heads * config.head_size
        stride = self._rows([name])
        kernel = sequence_kernels.attention_step(
            self._batch,
            config.heads,
            config.kv_heads,
            config.head_size,
            config.rotary_size,
            stride,
            layer.gate,
            config.rms_epsilon if layer.qk_norm else None,
        )
        norms = [self._vector(f"{prefix}.attn_{part}_norm") if layer.qk_norm else 0 for part in "qk"]
        tables = rotary_tables(config, self._context)
        rotary = [
            self._weights.constant(f"rotary.{part}", table.astype(np.float16))
            for part, table in zip(("cos", "sin"), tables, strict=True)
        ]
        caches = [f"past.{prefix}.{part}" for part in ("key", "value")]
        attended, _ = self._launch(
            kernel.launch,
            [packed, *caches, "lengths", "control"],
            [("f", width), ("f", -(-kernel.scratch // self._batch))],
            [*norms, *rotary, self._counters(kernel.counters)],
        )
        output = f"{prefix}.attn_output"
        bias = f"{output}_bias" if layer.output_bias else None
        if layer.gate:
            return residual, self._projected(
                projection.Gate(config.head_size, stride), [attended, packed], output, bias=bias
            )
        return residual, self._projected(projection.Plain(), [attended], output, bias=bias)

    def _delta_net(self, prefix: str, residual: str, delta: str) -> tuple[str, str]:
        linear = self._config.linear_attention
        assert linear is not None
        names = [f"{prefix}.ssm_qkvz", f"{prefix}.ssm_ba"]
        packed, residual, _ = self._normed(residual, delta, f"{prefix}.attn_norm", names)
        stride, width = self._rows(names), linear.value_heads * linear.value_size
        kernel = sequence_kernels.delta_step(self._batch, linear, stride)
        pointers = [self._vector(f"{prefix}.{name}") for name in ("ssm_conv1d", "ssm_a", "ssm_dt")]
        (attended,) = self._launch(
            kernel.launch,
            [packed, f"past.{prefix}.conv", f"past.{prefix}.delta", "control"],
            [("f", width)],
            [*pointers, self._counters(kernel.counters)],
        )
        offset = 2 * linear.key_heads * linear.key_size + width
        prologue = projection.GatedNorm(self._config.rms_epsilon, linear.value_size, stride, offset)
        norm = self._vector(f"{prefix}.ssm_norm")
        return residual, self._projected(prologue, [attended, packed], f"{prefix}.ssm_out", norm)

    def _mlp(self, layer: DenseMlp, prefix: str, residual: str, delta: str) -> tuple[str, str]:
        names = [f"{prefix}.ffn_{part}{layer.suffix}" for part in ("gate", "up", "down")]
        packed, residual, _ = self._normed(residual, delta, f"{prefix}.ffn_norm", names[:2])
        return residual, self._projected(projection.Swiglu(), [packed], names[2])

    def _mixture(self, layer: MoeMlp, prefix: str, residual: str, delta: str) -> tuple[str, str]:
        sizes = ExpertSizes(layer.experts.count, layer.experts.used, self._config.hidden, layer.experts.intermediate)
        router, gate_up, down = (f"{prefix}.{name}" for name in ("ffn_gate_inp", "experts_gate_up", "experts_down"))
        linears, shared = [router], None
        shared_down: list[int] = [0, 0, 0]
        if layer.shared:
            linears += [f"{router}{SHARED}", *(f"{prefix}.ffn_{part}{SHARED}" for part in ("gate", "up"))]
            (segment, *others), _, shared_down = self._segments([f"{prefix}.ffn_down{SHARED}"])
            if others:
                raise NoKernel(f"{prefix}.ffn_down{SHARED} has parts of several formats")
            shared = SharedExpert(segment, layer.experts.shared_intermediate, sizes.count + 1, sizes.count)
        r, residual, normed = self._normed(residual, delta, f"{prefix}.ffn_norm", linears, normed=True)
        stride, form, batch = self._rows(linears), self._expert_form(gate_up, down), self._batch
        table = self._weights.expert_table(gate_up, down)
        used, width = sizes.used, sizes.width
        route = expert_kernels.route(batch, sizes, stride, layer.experts.normalise)
        experts, weights = self._launch(route, [r], [("i", used), ("f", used)], [])
        up = expert_kernels.experts_up(batch, sizes, form)
        (activations,) = self._launch(up.launch, [normed, experts], [("h", used * width)], [table])
        kernel = expert_kernels.experts_down(batch, sizes, form, stride, shared)
        results: list[Result] = [("h", sizes.hidden)]
        if kernel.scratch:
            results.append(("f", -(-kernel.scratch // batch)))
        counters = [self._counters(kernel.counters)] if kernel.counters else []
        inputs = [activations, experts, weights, r if shared else ""]
        delta, *_ = self._launch(kernel.launch, inputs, results, [table, *counters, *shared_down])
        return residual, delta

    def _expert_form(self, gate_up: str, down: str) -> ExpertForm:
        first, second = (self._package.weights[name] for name in (gate_up, down))
        assert isinstance(first, Experts) and isinstance(second, Experts)
        form = first.part.format
        if form is None or second.part.format != form or form.corrected:
            raise NoKernel(f"{gate_up} in a format that the kernels do not read")
        return ExpertForm(form.element, form.bits, form.block, form.asymmetric)

    # Pieces.

    def _normed(
        self,
        residual: str,
        delta: str,
        norm: str,
        linears: Sequence[str],
        bias: str | None = None,
        normed: bool = False,
        name: str | None = None,
    ) -> tuple[str, str, str]:
        """The linears of the norm of `residual` plus `delta`; that sum; and, if `normed`, the norm itself."""
        hidden = self._config.hidden
        prologue = Norm(self._config.rms_epsilon, bool(delta), normed)
        more: list[Result] = [("h", hidden)] * (bool(delta) + normed)
        inputs = [residual, delta] if delta else [residual]
        packed, *others = self._project(prologue, inputs, linears, self._vector(norm), bias, more, name=name)
        total = others.pop(0) if delta else residual
        return packed, total, others[0] if normed else ""

    def _projected(
        self, prologue: Prologue, inputs: list[str], linear: str, norm: int = 0, bias: str | None = None
    ) -> str:
        """A linear's fp16 result."""
        return self._project(prologue, inputs, [linear], norm, bias, half=True)[0]

    def _project(
        self,
        prologue: Prologue,
        inputs: list[str],
        linears: Sequence[str],
        norm: int = 0,
        bias: str | None = None,
        more: Sequence[Result] = (),
        half: bool = False,
        name: str | None = None,
    ) -> list[str]:
        segments, columns, pointers = self._segments(linears)
        launch = projection.project(prologue, segments, columns, self._batch, out_half=half)
        outputs: list[Result] = [("h" if half else "f", sum(segment.rows for segment in segments)), *more]
        bias_pointer = self._vector(bias) if bias else 0
        return self._launch(launch, inputs, outputs, [norm, *pointers, bias_pointer], [name] if name else [])

    def _segments(self, linears: Sequence[str]) -> tuple[list[Segment], int, list[int]]:
        """The matrices' segments, one for each of their parts, the columns of all, and the segments' pointers."""
        segments, pointers, columns = [], [], 0
        for name in linears:
            weight = self._package.weights[name]
            if isinstance(weight, Extent):  # [columns, rows] in fp32: the gate of a shared expert
                segments.append(Segment(weight.shape[1], 16))
                half = self._package.array(weight).astype(np.float16)
                pointers += [self._weights.constant(f"{name}.half", half), 0, 0]
                continue
            assert isinstance(weight, Linear)
            columns = weight.columns
            for index, part in enumerate(weight.parts):
                known = f"{name}.{index}"
                if part.format is None:
                    segments.append(Segment(part.rows, 16))
                    pointers += [self._weights.address(known), 0, 0]
                    continue
                if part.corrections is not None or part.format.element != "int":
                    raise NoKernel(f"{name} has corrections")
                zero_points = part.zero_points is not None
                segments.append(Segment(part.rows, part.format.bits, part.format.block, True, zero_points))
                names = [f"{known}.codes", f"{known}.scales", *([f"{known}.zero_points"] if zero_points else [])]
                pointers += [*map(self._weights.address, names), *([] if zero_points else [0])]
        return segments, columns, pointers

    def _rows(self, linears: Sequence[str]) -> int:
        return sum(segment.rows for segment in self._segments(linears)[0])

    def _vector(self, name: str) -> int:
        return self._weights.address(name)

    def _counters(self, count: int) -> int:
        """Zeroed integers that the kernels leave at zero, the same ones for all: steps run one after another."""
        return self._weights.constant(f"counters.{count}", np.zeros(count, np.int32))

    def _launch(
        self,
        launch: Launch,
        inputs: list[str],
        results: Sequence[Result],
        pointers: list[int],
        called: Sequence[str] = (),
    ) -> list[str]:
        """Append a kernel; returns the names of its outputs [batch, elements], the first ones as they are `called`."""
        count = len(self._nodes)
        names = [*called, *(f"{launch.name}_{count}_{index}" for index in range(len(called), len(results)))]
        outputs: list[Output] = [
            (one, kind, (self._batch, size)) for one, (kind, size) in zip(names, results, strict=True)
        ]
        self._nodes.append(
            launch_node(launch, self._compiler.function(launch), inputs, outputs, pointers, overlap=True)
        )
        return names

    def model(self) -> ModelProto:
        """The finished model."""
        sizes = {"logits": self._config.vocabulary, "values": CANDIDATES, "tokens": CANDIDATES, "log_sum_exp": 1}
        outputs = [
            helper.make_tensor_value_info(
                name, TensorProto.INT32 if name == "tokens" else TensorProto.FLOAT, [self._batch, size]
            )
            for name, size in sizes.items()
        ]
        graph = helper.make_graph(self._nodes, "step", self._inputs, outputs)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
