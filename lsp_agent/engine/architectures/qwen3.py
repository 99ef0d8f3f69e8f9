"""Qwen3 (dense): grouped-query attention with norms on q and k, and a SwiGLU MLP."""

from __future__ import annotations

from lsp_agent.engine.architecture import Architecture, Block, ModelConfig
from lsp_agent.engine.layers import Attention, DenseMlp


def _block(config: ModelConfig, index: int) -> Block:  # noqa: ARG001 - every block is alike
    bias = config.attention_bias
    return Block(Attention(bias=bias, output_bias=bias, qk_norm=True), DenseMlp())


QWEN3 = Architecture(name="qwen3", hf_name="qwen3", block=_block)
