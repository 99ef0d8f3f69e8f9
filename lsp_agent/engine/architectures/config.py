"""Reads a decoder's numbers off GGUF metadata or Hugging Face's config.json: the same keys for every architecture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lsp_agent.engine.architecture import Architecture, ExpertsConfig, LinearAttentionConfig, ModelConfig, RopeScaling
from lsp_agent.errors import UserError

MOST_LAYERS = 1000


class GgufMetadata(Protocol):
    """The metadata of a GGUF file."""

    path: Path

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default`."""

    def require(self, key: str) -> Any:
        """The value of `key`; raises `UserError` without one."""


def gguf_config(file: GgufMetadata, architecture: Architecture, vocabulary: int, attention_bias: bool) -> ModelConfig:
    """The config in a GGUF file; raises `UserError` when a number is missing or a feature is not supported.

    `vocabulary` and `attention_bias` are not in the metadata but follow from the tensors.
    """
    with _refusing_nonsense(file.path):
        return _checked(_gguf_config(file, architecture, vocabulary, attention_bias))


def _gguf_config(file: GgufMetadata, architecture: Architecture, vocabulary: int, attention_bias: bool) -> ModelConfig:
    name = architecture.name
    hidden, heads = int(file.require(f"{name}.embedding_length")), int(file.require(f"{name}.attention.head_count"))
    layers = _layers(int(file.require(f"{name}.block_count")) - int(file.get(f"{name}.nextn_predict_layers", 0)))
    head_size = file.get(f"{name}.attention.key_length")
    head_size = int(head_size) if head_size is not None else hidden // heads
    rotary = file.get(f"{name}.rope.dimension_count")
    return ModelConfig(
        architecture=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=int(file.get(f"{name}.attention.head_count_kv", heads)),
        head_size=head_size,
        intermediate=int(file.get(f"{name}.feed_forward_length", 0)),
        vocabulary=vocabulary,
        context=int(file.require(f"{name}.context_length")),
        rope_base=float(file.get(f"{name}.rope.freq_base", 10000.0)),
        rms_epsilon=float(file.require(f"{name}.attention.layer_norm_rms_epsilon")),
        rotary=int(rotary) if rotary is not None and int(rotary) != head_size else None,
        rope_scaling=_gguf_scaling(file, name),
        attention_bias=attention_bias,
        experts=_gguf_experts(file, architecture),
        linear_attention=_gguf_linear_attention(file, name, layers),
    )


def _gguf_scaling(file: GgufMetadata, name: str) -> RopeScaling | None:
    kind = file.get(f"{name}.rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(f"{file.path} uses rope scaling {kind!r}, which is not supported; use the base checkpoint.")
    factor, prefix = float(file.require(f"{name}.rope.scaling.factor")), f"{name}.rope.scaling"
    original = file.get(f"{prefix}.original_context_length") or file.require(f"{name}.context_length")
    attention = file.get(f"{prefix}.attn_factor")
    if attention is not None:
        attention = float(attention) * (1 + 0.1 * math.log(factor))  # on top of the usual one
    return RopeScaling(kind=kind, factor=factor, original_context=int(original), attention_factor=attention)


def _gguf_experts(file: GgufMetadata, architecture: Architecture) -> ExpertsConfig | None:
    name = architecture.name
    count = int(file.get(f"{name}.expert_count", 0))
    if not count:
        return None
    return ExpertsConfig(
        count=count,
        used=int(file.require(f"{name}.expert_used_count")),
        intermediate=int(file.require(f"{name}.expert_feed_forward_length")),
        shared_intermediate=int(file.get(f"{name}.expert_shared_feed_forward_length", 0)),
        normalise=architecture.normalise_experts,
    )


def _gguf_linear_attention(file: GgufMetadata, name: str, layers: int) -> LinearAttentionConfig | None:
    inner = file.get(f"{name}.ssm.inner_size")
    if inner is None:
        return None
    value_heads = int(file.require(f"{name}.ssm.time_step_rank"))
    interval = int(file.get(f"{name}.full_attention_interval", 4))
    recurrent = file.get(f"{name}.attention.recurrent_layers") or [(index + 1) % interval for index in range(layers)]
    return LinearAttentionConfig(
        key_heads=int(file.require(f"{name}.ssm.group_count")),
        value_heads=value_heads,
        key_size=int(file.require(f"{name}.ssm.state_size")),
        value_size=int(inner) // value_heads,
        kernel=int(file.require(f"{name}.ssm.conv_kernel")),
        layers=tuple(index for index, flag in enumerate(recurrent[:layers]) if flag),
    )


def hf_config(values: dict[str, Any], path: Path, architecture: str) -> ModelConfig:
    """The config in Hugging Face's config.json; raises `UserError` as `gguf_config` does."""
    with _refusing_nonsense(path):
        return _checked(_hf_config(values, path, architecture))


def _hf_config(values: dict[str, Any], path: Path, architecture: str) -> ModelConfig:
    hidden, heads = int(values["hidden_size"]), int(values["num_attention_heads"])
    layers, head_size = _layers(int(values["num_hidden_layers"])), int(values.get("head_dim") or hidden // heads)
    if values.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"{path} uses the activation {values['hidden_act']!r}, which is not supported; use another model."
        )
    if values.get("use_sliding_window"):
        raise UserError(f"{path} uses sliding-window attention, which is not supported; use a checkpoint without it.")
    rope = values.get("rope_parameters") or {**(values.get("rope_scaling") or {})}
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial is None:
        partial = 0.25 if architecture == "qwen3next" else 1.0  # the default of Qwen3NextConfig
    rotary = int(head_size * float(partial))
    return ModelConfig(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=int(values.get("num_key_value_heads") or heads),
        head_size=head_size,
        intermediate=int(values["intermediate_size"]),
        vocabulary=int(values["vocab_size"]),
        context=int(values["max_position_embeddings"]),
        rope_base=float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
        rms_epsilon=float(values.get("rms_norm_eps", 1e-6)),
        rotary=rotary if rotary != head_size else None,
        rope_scaling=_hf_scaling(rope, values, path),
        attention_bias=bool(values.get("attention_bias", values.get("qkv_bias", architecture == "qwen2moe"))),
        experts=_hf_experts(values, layers),
        linear_attention=_hf_linear_attention(values, layers),
    )


def _hf_scaling(rope: dict[str, Any], values: dict[str, Any], path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "yarn") or rope.get("mscale") or not rope.get("truncate", True):
        raise UserError(f"{path} uses rope scaling {kind!r}, which is not supported; use the base checkpoint.")
    original = rope.get("original_max_position_embeddings") or values["max_position_embeddings"]
    attention = rope.get("attention_factor")
    return RopeScaling(
        kind=kind,
        factor=float(rope["factor"]),
        original_context=int(original),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        attention_factor=None if attention is None else float(attention),
    )


def _hf_experts(values: dict[str, Any], layers: int) -> ExpertsConfig | None:
    count = int(values.get("num_experts", values.get("num_local_experts", 0)))
    if not count:
        return None
    step, dense = int(values.get("decoder_sparse_step", 1)), values.get("mlp_only_layers") or []
    return ExpertsConfig(
        count=count,
        used=int(values["num_experts_per_tok"]),
        intermediate=int(values["moe_intermediate_size"]),
        shared_intermediate=int(values.get("shared_expert_intermediate_size", 0)),
        normalise=bool(values["norm_topk_prob"]),
        dense_layers=tuple(index for index in range(layers) if index in dense or (index + 1) % step),
    )


def _hf_linear_attention(values: dict[str, Any], layers: int) -> LinearAttentionConfig | None:
    if "linear_num_value_heads" not in values:
        return None
    interval = int(values.get("full_attention_interval", 4))
    kinds = values.get("layer_types") or [
        "linear_attention" if (index + 1) % interval else "full_attention" for index in range(layers)
    ]
    return LinearAttentionConfig(
        key_heads=int(values["linear_num_key_heads"]),
        value_heads=int(values["linear_num_value_heads"]),
        key_size=int(values["linear_key_head_dim"]),
        value_size=int(values["linear_value_head_dim"]),
        kernel=int(values["linear_conv_kernel_dim"]),
        layers=tuple(index for index, kind in enumerate(kinds[:layers]) if kind == "linear_attention"),
    )


@contextmanager
def _refusing_nonsense(path: Path) -> Iterator[None]:
    """Whatever a config makes Python stumble over is the fault of the file `path`."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path} lacks {error}; use a complete checkpoint of the model.") from error
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} has a number that makes no sense ({error}); use another checkpoint.") from error


def _layers(count: int) -> int:
    """`count`, before anything is done for each of so many; raises `ValueError`."""
    if not 1 <= count <= MOST_LAYERS:
        raise ValueError(f"{count} layers")
    return count


def _checked(config: ModelConfig) -> ModelConfig:
    """The config; raises `ValueError` for sizes that no model can have."""
    sizes = ["hidden", "heads", "kv_heads", "head_size", "vocabulary", "context", "rotary_size", "rope_base"]
    positive = {name: getattr(config, name) for name in sizes}
    experts, linear, scaling = config.experts, config.linear_attention, config.rope_scaling
    if experts is not None:
        positive |= {"experts used": experts.used, "experts": experts.count, "expert size": experts.intermediate}
        if experts.used > experts.count:
            raise ValueError(f"{experts.used} of {experts.count} experts")
    if linear is not None:
        names = ("key_heads", "value_heads", "key_size", "value_size", "kernel")
        positive |= {name: getattr(linear, name) for name in names}
        if linear.key_heads > 0 and linear.value_heads % linear.key_heads:
            raise ValueError(f"{linear.value_heads} value heads for {linear.key_heads} key heads")
    if scaling is not None:
        positive |= {"rope factor": scaling.factor, "original context": scaling.original_context}
        positive |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    wrong = [f"{name} {value}" for name, value in positive.items() if not 0 < value < math.inf]
    if wrong:
        raise ValueError(", ".join(wrong))
    if config.heads % config.kv_heads or config.rotary_size > config.head_size:
        raise ValueError(f"{config.heads} heads of {config.head_size} for {config.kv_heads} of keys")
    return config
