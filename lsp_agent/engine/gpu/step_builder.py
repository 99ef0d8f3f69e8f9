"""Builds decode graphs of kernels: nodes with static shapes, weights as addresses, projections of several matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from lsp_agent.engine.architecture import ModelConfig
from lsp_agent.engine.gpu import projection
from lsp_agent.engine.gpu.compiler import KernelCompiler
from lsp_agent.engine.gpu.launch import Launch
from lsp_agent.engine.gpu.operators import DOMAIN, Output, launch_node
from lsp_agent.engine.gpu.projection import Norm, Prologue, Segment
from lsp_agent.engine.gpu.weights import DeviceWeights
from lsp_agent.engine.graph import IR_VERSION, OPSET
from lsp_agent.engine.package import Extent, Linear, Package
from lsp_agent.engine.state import StateSpec

Result = tuple[str, int]
"""An output's type, `h`, `f` or `i`, and its elements for each token."""


CANDIDATES = 64
"""Tokens whose logits a step hands over; the others stay on the GPU until they are asked for."""


class NoKernel(Exception):  # noqa: N818 - said as it is
    """The decode kernels do not cover this model; the message says what of it."""


@dataclass(frozen=True)
class DeviceTrace:
    """Router logits fp32 [tokens, experts] for each block (`blk.0`), by the address where they lie."""

    tokens: int
    layers: dict[str, int]


class StepBuilder:
    """A decode graph of `rows` consecutive tokens of each of `batch` sequences while it is made.

    Inputs, `tokens` being batch * rows, a sequence's rows next to each other: `ids` [tokens, 1] int64, `lengths`
    [tokens] int32 (the new token's index), `control` [4] int32 (present buffer of the rings, capacity of keys and
    values, size of the rings, how many of several rows count), and the states by their `past` names, rings [size,
    batch, ...], which are changed in place: each row that counts writes a buffer of its own. Rows that do not only fill
    up; their length is that of the last one that does. Outputs: `logits` [tokens, vocabulary], and of the best
    `CANDIDATES` tokens `values` and `tokens` [tokens, CANDIDATES], and `log_sum_exp` [tokens, 1].
    A `trace` takes the place of the routers.
    """

    def __init__(
        self,
        package: Package,
        states: Sequence[StateSpec],
        weights: DeviceWeights,
        compiler: KernelCompiler,
        batch: int,
        context: int,
        trace: DeviceTrace | None = None,
        rows: int = 1,
    ) -> None:
        self.package, self.weights, self._compiler = package, weights, compiler
        self.config: ModelConfig = package.config
        self.batch, self.rows, self.tokens = batch, rows, batch * rows
        self.context, self.trace = context, trace
        self._nodes: list[NodeProto] = []
        types = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}
        self._inputs = [
            helper.make_tensor_value_info("ids", TensorProto.INT64, [self.tokens, 1]),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, [self.tokens]),
            helper.make_tensor_value_info("control", TensorProto.INT32, [4]),
        ]
        for spec in states:
            shape: list[str | int] = ["ring", batch, *spec.shape]
            if spec.growing:
                shape = [batch, spec.shape[0], "capacity", *spec.shape[1:]]
            self._inputs.append(helper.make_tensor_value_info(spec.past, types[spec.dtype], shape))

    def normed(
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
        hidden = self.config.hidden
        prologue = Norm(self.config.rms_epsilon, bool(delta), normed)
        more: list[Result] = [("h", hidden)] * (bool(delta) + normed)
        inputs = [residual, delta] if delta else [residual]
        packed, *others = self._project(prologue, inputs, linears, self.vector(norm), bias, more, name=name)
        total = others.pop(0) if delta else residual
        return packed, total, others[0] if normed else ""

    def projected(
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
        segments, columns, pointers = self.segments(linears)
        launch = projection.project(prologue, segments, columns, self.tokens, out_half=half)
        outputs: list[Result] = [("h" if half else "f", sum(segment.rows for segment in segments)), *more]
        bias_pointer = self.vector(bias) if bias else 0
        return self.launch(launch, inputs, outputs, [norm, *pointers, bias_pointer], [name] if name else [])

    def segments(self, linears: Sequence[str]) -> tuple[list[Segment], int, list[int]]:
        """The matrices' segments, one for each of their parts, the columns of all, and the segments' pointers."""
        segments, pointers, columns = [], [], 0
        for name in linears:
            weight = self.package.weights[name]
            if isinstance(weight, Extent):  # [columns, rows] in fp32: the gate of a shared expert
                segments.append(Segment(weight.shape[1], 16))
                half = self.package.array(weight).astype(np.float16)
                pointers += [self.weights.constant(f"{name}.half", half), 0, 0, 0]
                continue
            assert isinstance(weight, Linear)
            columns = weight.columns
            for index, part in enumerate(weight.parts):
                known = f"{name}.{index}"
                if part.format is None:
                    segments.append(Segment(part.rows, 16))
                    pointers += [self.weights.address(known), 0, 0, 0]
                    continue
                if part.format.element != "int":
                    raise NoKernel(f"{name} holds 4-bit floats")
                zeros, corrections = part.zero_points is not None, part.corrections is not None
                bits: Literal[4, 8] = 4 if part.format.bits == 4 else 8
                segments.append(Segment(part.rows, bits, part.format.block, True, zeros, corrections))
                fields = {"codes": True, "scales": True, "zero_points": zeros, "corrections": corrections}
                pointers += [self.weights.address(f"{known}.{f}") if there else 0 for f, there in fields.items()]
        return segments, columns, pointers

    def height(self, linears: Sequence[str]) -> int:
        """Rows of all of them together."""
        return sum(segment.rows for segment in self.segments(linears)[0])

    def vector(self, name: str) -> int:
        """The address of a vector, fp32."""
        return self.weights.address(name)

    def counters(self, count: int) -> int:
        """Zeroed integers that the kernels leave at zero, the same ones for all: steps run one after another."""
        return self.weights.constant(f"counters.{count}", np.zeros(count, np.int32))

    def launch(
        self,
        launch: Launch,
        inputs: list[str],
        results: Sequence[Result],
        pointers: list[int],
        called: Sequence[str] = (),
    ) -> list[str]:
        """Append a kernel; returns the names of its outputs [tokens, elements], the first ones as they are `called`."""
        count = len(self._nodes)
        names = [*called, *(f"{launch.name}_{count}_{index}" for index in range(len(called), len(results)))]
        outputs: list[Output] = [
            (one, kind, (self.tokens, size)) for one, (kind, size) in zip(names, results, strict=True)
        ]
        self._nodes.append(
            launch_node(launch, self._compiler.function(launch), inputs, outputs, pointers, overlap=True)
        )
        return names

    def model(self) -> ModelProto:
        """The finished model."""
        sizes = {"logits": self.config.vocabulary, "values": CANDIDATES, "tokens": CANDIDATES, "log_sum_exp": 1}
        outputs = [
            helper.make_tensor_value_info(
                name, TensorProto.INT32 if name == "tokens" else TensorProto.FLOAT, [self.tokens, size]
            )
            for name, size in sizes.items()
        ]
        graph = helper.make_graph(self._nodes, "step", self._inputs, outputs)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
