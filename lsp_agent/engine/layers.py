"""Attention and the dense MLP, as graph fragments over ONNX Runtime's contrib operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lsp_agent.engine.architecture import CONTRIB, ModelConfig, WeightSpec

if TYPE_CHECKING:
    from lsp_agent.engine.graph import GraphBuilder


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention with rotary positions over a key-value cache in shared buffers.

    `bias`: on the projections q, k and v; `output_bias`: on the output's. `qk_norm`: RMS norms over each head of q
    and k. `gate`: the query projection also yields, after each head's query, a gate whose sigmoid scales the head's
    result.
    """

    bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    gate: bool = False

    def _widths(self, config: ModelConfig) -> tuple[int, int]:
        query = config.heads * config.head_size * (2 if self.gate else 1)
        return query, config.kv_heads * config.head_size

    def weights(self, config: ModelConfig, prefix: str) -> Sequence[WeightSpec]:
        """Projections q, k and v as one linear (packed), the output projection, biases and norms."""
        width = config.heads * config.head_size
        query, kv = self._widths(config)
        packed = query + 2 * kv
        names = [f"{prefix}.attn_{part}" for part in "qkv"]
        output = f"{prefix}.attn_output"
        specs = [
            WeightSpec(f"{prefix}.attn_qkv", tuple(f"{n}.weight" for n in names), "linear", (packed, config.hidden)),
            WeightSpec(output, (f"{output}.weight",), "linear", (config.hidden, width)),
        ]
        if self.bias:
            specs.append(WeightSpec(f"{prefix}.attn_qkv_bias", tuple(f"{n}.bias" for n in names), "vector", (packed,)))
        if self.output_bias:
            specs.append(WeightSpec(f"{output}_bias", (f"{output}.bias",), "vector", (config.hidden,)))
        if self.qk_norm:
            for norm in (f"{prefix}.attn_q_norm", f"{prefix}.attn_k_norm"):
                specs.append(WeightSpec(norm, (f"{norm}.weight",), "vector", (config.head_size,)))
        return specs

    def build(self, graph: GraphBuilder, config: ModelConfig, prefix: str, x: str) -> str:
        """See `Layer.build`."""
        packed = graph.linear(x, f"{prefix}.attn_qkv")
        if self.bias:
            packed = graph.op("Add", [packed, graph.vector(f"{prefix}.attn_qkv_bias")])
        qkv, gate = [packed], None
        if self.qk_norm or self.gate:
            qkv, gate = self._unpack(graph, config, packed)
        attended = graph.attention(config, prefix, qkv, normalised=self.qk_norm)
        if gate is not None:
            attended = graph.op("Mul", [attended, graph.op("Sigmoid", [gate])])
        output = graph.linear(attended, f"{prefix}.attn_output")
        if self.output_bias:
            output = graph.op("Add", [output, graph.vector(f"{prefix}.attn_output_bias")])
        return output

    def _unpack(self, graph: GraphBuilder, config: ModelConfig, packed: str) -> tuple[list[str], str | None]:
        """Query, key and value [batch, length, heads * head size], and the gate if there is one."""
        query_width, kv = self._widths(config)
        query, key, value = graph.split(packed, [query_width, kv, kv])
        gate = None
        width = config.heads * config.head_size
        if self.gate:
            heads = graph.reshape(query, [0, 0, config.heads, 2 * config.head_size])
            query, gate = graph.split(heads, [config.head_size, config.head_size])
            query, gate = graph.reshape(query, [0, 0, width]), graph.reshape(gate, [0, 0, width])
        return [query, key, value], gate


@dataclass(frozen=True)
class DenseMlp:
    """SwiGLU: `down(silu(gate(x)) * up(x))`, `intermediate` wide (the config's width when None)."""

    intermediate: int | None = None
    suffix: str = ""

    def weights(self, config: ModelConfig, prefix: str) -> Sequence[WeightSpec]:
        """Gate, up and down projections."""
        size = self.intermediate or config.intermediate
        shapes = {"gate": (size, config.hidden), "up": (size, config.hidden), "down": (config.hidden, size)}
        names = {part: f"{prefix}.ffn_{part}{self.suffix}" for part in shapes}
        return [WeightSpec(names[n], (f"{names[n]}.weight",), "linear", shape) for n, shape in shapes.items()]

    def build(self, graph: GraphBuilder, config: ModelConfig, prefix: str, x: str) -> str:  # noqa: ARG002
        """See `Layer.build`."""
        gate = graph.linear(x, f"{prefix}.ffn_gate{self.suffix}")
        up = graph.linear(x, f"{prefix}.ffn_up{self.suffix}")
        silu = graph.op("QuickGelu", [gate], domain=CONTRIB, alpha=1.0)  # x * sigmoid(alpha * x)
        return graph.linear(graph.op("Mul", [silu, up]), f"{prefix}.ffn_down{self.suffix}")
