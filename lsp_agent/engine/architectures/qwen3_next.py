"""Qwen3-Next (Qwen3-Coder-Next): Gated DeltaNet and, in every fourth block, gated attention; routed experts."""

from __future__ import annotations

from lsp_agent.engine.architecture import Architecture, Block, Layer, ModelConfig
from lsp_agent.engine.delta_net import GatedDeltaNet
from lsp_agent.engine.layers import Attention
from lsp_agent.engine.moe import mlp_of_block


def _block(config: ModelConfig, index: int) -> Block:
    bias = config.attention_bias
    mixer: Layer = Attention(bias=bias, output_bias=bias, qk_norm=True, gate=True)
    if config.linear_attention is not None and index in config.linear_attention.layers:
        mixer = GatedDeltaNet()
    return Block(mixer, mlp_of_block(config, index, shared=True))


QWEN3_NEXT = Architecture(
    name="qwen3next", hf_name="qwen3_next", block=_block, zero_centred=True, mlp_norm="post_attention_norm"
)
