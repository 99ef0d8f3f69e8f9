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
        mixed, rates = (
            graph.replayable(name, graph.linear(x, name), width)
            for name, width in zip(self.projections(prefix), self._widths(config), strict=True)
        )
        attended, gates = self.recur(graph, config, prefix, mixed, rates)
        gated = graph.gated_norm(prefix, attended, gates)
        return graph.linear(gated, f"{prefix}.ssm_out")

    def projections(self, prefix: str) -> tuple[str, str]:
        """Names of the weights whose results `recur` reads."""
        return f"{prefix}.ssm_qkvz", f"{prefix}.ssm_ba"

    def _widths(self, config: ModelConfig) -> tuple[int, int]:
        linear, key, value = _sizes(config)
        return 2 * key + 2 * value, 2 * linear.value_heads

    def recur(self, graph: GraphBuilder, config: ModelConfig, prefix: str, mixed: str, rates: str) -> tuple[str, str]:
        """The part that moves the states: the convolution and the delta rule of the projections `mixed` (q, k, v and z)
        and `rates` (b and a by key head). Returns the result and where `gated_norm` finds the gates."""
        linear, _, _ = _sizes(config)
        qkv, gates = graph.convolved(linear, prefix, mixed)
        served = linear.value_heads // linear.key_heads
        by_key_head = graph.reshape(rates, [0, 0, linear.key_heads, 2 * served])
        rate, step = (
            graph.reshape(part, [0, 0, linear.value_heads]) for part in graph.split(by_key_head, [served, served])
        )
        return graph.delta_rule(linear, prefix, qkv, step, rate), gates


def _sizes(config: ModelConfig) -> tuple[LinearAttentionConfig, int, int]:
    linear = config.linear_attention
    assert linear is not None
    return linear, linear.key_heads * linear.key_size, linear.value_heads * linear.value_size
