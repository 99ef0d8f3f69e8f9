"""Gated DeltaNet: linear attention whose state per head is a matrix, decayed and corrected by every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lsp_agent.engine.architecture import LinearAttentionConfig, ModelConfig, WeightSpec

if TYPE_CHECKING:
    from lsp_agent.engine.graph import GraphBuilder


@dataclass(frozen=True)
class GatedDeltaNet:
    """Yang et al., 2024 (Gated Delta Networks), as Qwen3-Next has it.

    A short causal convolution over q, k and v; q and k of unit length; per value head the state
    `S = exp(g) S + b k (v - exp(g) S^T k)^T` with `g = a_scale * softplus(a + dt)` and `b = sigmoid(b)`; the result
    `S^T q / sqrt(key size)` is RMS-normalised and gated by `silu(z)`. Each key head serves consecutive value heads.
    """

    def weights(self, config: ModelConfig, prefix: str) -> Sequence[WeightSpec]:
        """Projections qkv and z as one linear, b and a (by key head) as another, convolution, decay, norm, output."""
        linear, key, value = _sizes(config)
        channels = 2 * key + value
        names = (f"{prefix}.attn_qkv.weight", f"{prefix}.attn_gate.weight")
        ba, out = f"{prefix}.ssm_ba", f"{prefix}.ssm_out"
        heads = linear.value_heads
        conv = f"{prefix}.ssm_conv1d"
        return [
            WeightSpec(f"{prefix}.ssm_qkvz", names, "linear", (channels + value, config.hidden)),
            WeightSpec(ba, (f"{ba}.weight",), "linear", (2 * heads, config.hidden), sensitive=True),
            WeightSpec(conv, (f"{conv}.weight",), "vector", (channels, 1, linear.kernel)),
            WeightSpec(f"{prefix}.ssm_a", (f"{prefix}.ssm_a",), "vector", (heads,)),
            WeightSpec(f"{prefix}.ssm_dt", (f"{prefix}.ssm_dt.bias",), "vector", (heads,)),
            WeightSpec(f"{prefix}.ssm_norm", (f"{prefix}.ssm_norm.weight",), "vector", (linear.value_size,)),
            WeightSpec(out, (f"{out}.weight",), "linear", (config.hidden, value)),
        ]

    def build(self, graph: GraphBuilder, config: ModelConfig, prefix: str, x: str) -> str:
        """See `Layer.build`."""
        linear, _, _ = _sizes(config)
        qkv, gates = graph.convolved(linear, prefix, graph.linear(x, f"{prefix}.ssm_qkvz"))
        served = linear.value_heads // linear.key_heads
        by_key_head = graph.reshape(graph.linear(x, f"{prefix}.ssm_ba"), [0, 0, linear.key_heads, 2 * served])
        rate, step = (
            graph.reshape(part, [0, 0, linear.value_heads]) for part in graph.split(by_key_head, [served, served])
        )
        attended = graph.delta_rule(linear, prefix, qkv, step, rate)
        gated = graph.gated_norm(prefix, attended, gates)
        return graph.linear(gated, f"{prefix}.ssm_out")


def _sizes(config: ModelConfig) -> tuple[LinearAttentionConfig, int, int]:
    linear = config.linear_attention
    assert linear is not None
    return linear, linear.key_heads * linear.key_size, linear.value_heads * linear.value_size
