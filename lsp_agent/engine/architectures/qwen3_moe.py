"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-Coder-30B-A3B): Qwen3's attention and routed experts."""

from __future__ import annotations

from lsp_agent.engine.architecture import Architecture, Block, ModelConfig
from lsp_agent.engine.layers import Attention
from lsp_agent.engine.moe import mlp_of_block


def _block(config: ModelConfig, index: int) -> Block:
    bias = config.attention_bias
    return Block(Attention(bias=bias, output_bias=bias, qk_norm=True), mlp_of_block(config, index, shared=False))


QWEN3_MOE = Architecture(name="qwen3moe", hf_name="qwen3_moe", block=_block)
