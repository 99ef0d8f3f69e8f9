"""The layers that architectures are made of, as graph fragments over ONNX Runtime's contrib operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lsp_agent.engine.architecture import ModelConfig, WeightSpec
from lsp_agent.engine.graph import CONTRIB, GraphBuilder


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention with rotary positions over a key-value cache in shared buffers."""

    bias: bool = False

    def weights(self, config: ModelConfig, prefix: str) -> Sequence[WeightSpec]:
        """Projections q, k and v as one linear (packed), and the output projection."""
        width = config.heads * config.head_size
        packed = width + 2 * config.kv_heads * config.head_size
        names = [f"{prefix}.attn_{part}" for part in "qkv"]
        specs = [
            WeightSpec(f"{prefix}.attn_qkv", tuple(f"{n}.weight" for n in names), "linear", (packed, config.hidden)),
            WeightSpec(f"{prefix}.attn_output", (f"{prefix}.attn_output.weight",), "linear", (config.hidden, width)),
        ]
        if self.bias:
            specs.append(WeightSpec(f"{prefix}.attn_qkv_bias", tuple(f"{n}.bias" for n in names), "vector", (packed,)))
        return specs

    def build(self, graph: GraphBuilder, config: ModelConfig, prefix: str, x: str) -> str:
        """See `Layer.build`."""
        packed = graph.linear(x, f"{prefix}.attn_qkv")
        if self.bias:
            packed = graph.op("Add", [packed, graph.vector(f"{prefix}.attn_qkv_bias")])
        past_key, key = graph.kv_state(f"{prefix}.key", config)
        past_value, value = graph.kv_state(f"{prefix}.value", config)
        cos, sin = graph.rotary_tables(config)
        attended = graph.op(
            "GroupQueryAttention",
            [packed, "", "", past_key, past_value, graph.lengths, graph.total_length, cos, sin],
            domain=CONTRIB,
            more_outputs=(key, value),
            num_heads=config.heads,
            kv_num_heads=config.kv_heads,
            do_rotary=1,
        )
        return graph.linear(attended, f"{prefix}.attn_output")


@dataclass(frozen=True)
class DenseMlp:
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def weights(self, config: ModelConfig, prefix: str) -> Sequence[WeightSpec]:
        """Gate, up and down projections."""
        wide, narrow = (config.intermediate, config.hidden), (config.hidden, config.intermediate)
        shapes = {"gate": wide, "up": wide, "down": narrow}
        return [WeightSpec(f"{prefix}.ffn_{n}", (f"{prefix}.ffn_{n}.weight",), "linear", s) for n, s in shapes.items()]

    def build(self, graph: GraphBuilder, config: ModelConfig, prefix: str, x: str) -> str:  # noqa: ARG002
        """See `Layer.build`."""
        gate, up = graph.linear(x, f"{prefix}.ffn_gate"), graph.linear(x, f"{prefix}.ffn_up")
        silu = graph.op("QuickGelu", [gate], domain=CONTRIB, alpha=1.0)  # x * sigmoid(alpha * x)
        return graph.linear(graph.op("Mul", [silu, up]), f"{prefix}.ffn_down")
