"""Reads the numbers that every decoder's GGUF metadata holds under its architecture's name."""

from __future__ import annotations

from lsp_agent.engine.architecture import ModelConfig
from lsp_agent.engine.gguf_file import GgufFile
from lsp_agent.errors import UserError


def read_decoder_config(file: GgufFile) -> ModelConfig:
    """The config of a checkpoint; raises `UserError` when a number is missing or a feature is not supported."""
    name = str(file.require("general.architecture"))
    scaling = file.get(f"{name}.rope.scaling.type")
    if scaling not in (None, "none"):
        raise UserError(f"{file.path} uses rope scaling {scaling!r}, which is not supported; use the base checkpoint.")
    hidden, heads = int(file.require(f"{name}.embedding_length")), int(file.require(f"{name}.attention.head_count"))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{file.path} lacks the tensor token_embd.weight; use a complete checkpoint of the model.")
    return ModelConfig(
        architecture=name,
        layers=int(file.require(f"{name}.block_count")),
        hidden=hidden,
        heads=heads,
        kv_heads=int(file.get(f"{name}.attention.head_count_kv", heads)),
        head_size=int(file.get(f"{name}.attention.key_length", hidden // heads)),
        intermediate=int(file.require(f"{name}.feed_forward_length")),
        vocabulary=embedding.rows,
        context=int(file.require(f"{name}.context_length")),
        rope_base=float(file.get(f"{name}.rope.freq_base", 10000.0)),
        rms_epsilon=float(file.require(f"{name}.attention.layer_norm_rms_epsilon")),
    )
