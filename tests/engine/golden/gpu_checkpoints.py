"""Small random checkpoints whose sizes the CUDA kernels take: heads of 64 and 128, widths that are multiples of 64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tiny_hf import ROPE, random_weights, write_hf_checkpoint

COMMON = {
    "vocab_size": 288, "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rope_parameters": ROPE, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "head_dim": 64,
}  # fmt: skip
MOE = {
    "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip
SHARED = {"shared_expert_intermediate_size": 128}
NEXT = {
    **SHARED, "head_dim": 256, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"], "partial_rotary_factor": 0.25,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25},
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {**COMMON, "model_type": "qwen2", "num_hidden_layers": 2},
    "qwen3": {**COMMON, "model_type": "qwen3", "num_hidden_layers": 2, "attention_bias": False},
    "qwen2-moe": {
        **COMMON, **MOE, **SHARED, "model_type": "qwen2_moe", "num_hidden_layers": 2, "norm_topk_prob": False,
        "qkv_bias": True,
    },
    "qwen3-moe": {**COMMON, **MOE, "model_type": "qwen3_moe", "num_hidden_layers": 2, "attention_bias": False},
    "qwen3-next": {
        **COMMON, **MOE, **NEXT, "model_type": "qwen3_next", "num_hidden_layers": 4, "attention_bias": False,
    },
    "qwen3-next-top10": {
        **COMMON, **MOE, **NEXT, "model_type": "qwen3_next", "num_hidden_layers": 4, "attention_bias": False,
        "num_experts": 64, "num_experts_per_tok": 10,
    },
}  # fmt: skip
SMALL = {
    **COMMON, **MOE, **NEXT, "model_type": "qwen3_next", "num_hidden_layers": 2, "attention_bias": False,
    "layer_types": ["linear_attention", "full_attention"], "hidden_size": 128, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "num_experts": 64, "num_experts_per_tok": 10,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
}  # fmt: skip
"""One block of each kind, too small for ONNX Runtime's kernels on a GPU: for thousands of emulated launches."""


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights by Hugging Face's names."""
    hidden, vocabulary, kind = config["hidden_size"], config["vocab_size"], config["model_type"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (vocabulary, hidden),
        "lm_head": (vocabulary, hidden),
        "model.norm": (hidden,),
    }
    for index in range(config["num_hidden_layers"]):
        parts: dict[str, tuple[int, ...]] = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        linear = config.get("layer_types", ["full_attention"] * (index + 1))[index] == "linear_attention"
        parts |= _delta_net(config) if linear else _attention(config, kind)
        parts |= _mlp(config)
        found |= {f"model.layers.{index}.{name}": shape for name, shape in parts.items()}
    bare = ("A_log", "dt_bias", ".bias")
    return {name if name.endswith(bare) else f"{name}.weight": shape for name, shape in found.items()}


def _attention(config: dict[str, Any], kind: str) -> dict[str, tuple[int, ...]]:
    hidden, size = config["hidden_size"], config["head_dim"]
    width, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    parts: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (width * (2 if kind == "qwen3_next" else 1), hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, width),
    }
    if kind.startswith("qwen3"):
        parts |= {"self_attn.q_norm": (size,), "self_attn.k_norm": (size,)}
    else:
        parts |= {f"self_attn.{part}_proj.bias": (width if part == "q" else kv,) for part in "qkv"}
    return parts


def _delta_net(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    key = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    value = heads * config["linear_value_head_dim"]
    return {
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.conv1d": (2 * key + value, 1, config["linear_conv_kernel_dim"]),
        "linear_attn.in_proj_qkvz": (2 * key + 2 * value, hidden),
        "linear_attn.in_proj_ba": (2 * heads, hidden),
        "linear_attn.norm": (config["linear_value_head_dim"],),
        "linear_attn.out_proj": (hidden, value),
    }


def _mlp(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden = config["hidden_size"]

    def swiglu(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        sizes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        return {f"{prefix}.{part}_proj": shape for part, shape in sizes.items()}

    if "num_experts" not in config:
        return swiglu("mlp", config["intermediate_size"])
    parts: dict[str, tuple[int, ...]] = {"mlp.gate": (config["num_experts"], hidden)}
    for expert in range(config["num_experts"]):
        parts |= swiglu(f"mlp.experts.{expert}", config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        parts |= swiglu("mlp.shared_expert", config["shared_expert_intermediate_size"])
        parts["mlp.shared_expert_gate"] = (1, hidden)
    return parts


def write(folder: Path, name: str) -> Path:
    """Write the checkpoint of a config; activations are kept within what fp16 is good for."""
    config = SMALL if name == "small" else CONFIGS[name]
    weights = random_weights(shapes(config), config)
    scaled = {key: values * np.float32(0.5) if values.ndim == 2 else values for key, values in weights.items()}
    return write_hf_checkpoint(folder, config, scaled)
