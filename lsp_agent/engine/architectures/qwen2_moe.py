"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): Qwen2's attention, routed experts beside a gated shared one."""

from __future__ import annotations

from lsp_agent.engine.architecture import Architecture, Block, ModelConfig
from lsp_agent.engine.layers import Attention
from lsp_agent.engine.moe import mlp_of_block


def _block(config: ModelConfig, index: int) -> Block:
    return Block(Attention(bias=config.attention_bias), mlp_of_block(config, index, shared=True))


QWEN2_MOE = Architecture(name="qwen2moe", hf_name="qwen2_moe", block=_block, normalise_experts=False)
