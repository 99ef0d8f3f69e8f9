"""Qwen2 and Qwen2.5 (dense): grouped-query attention with biases on q, k and v, and a SwiGLU MLP."""

from __future__ import annotations

from lsp_agent.engine.architecture import Architecture, Block, ModelConfig
from lsp_agent.engine.layers import Attention, DenseMlp


def _block(config: ModelConfig, index: int) -> Block:  # noqa: ARG001 - every block is alike
    return Block(Attention(bias=True), DenseMlp())


QWEN2 = Architecture(name="qwen2", hf_name="qwen2", block=_block)
