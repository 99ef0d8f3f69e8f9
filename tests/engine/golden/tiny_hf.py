"""Tiny Hugging Face checkpoints with random weights, the same on every machine, written without torch."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tiny_checkpoint import MERGES, SPECIAL, TEMPLATE, vocabulary
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
COMMON = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rope_parameters": ROPE,
}  # fmt: skip
MOE = {"num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
NEXT = {
    "head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {**COMMON, "model_type": "qwen3", "num_hidden_layers": 2, "head_dim": 32, "tie_word_embeddings": True},
    "qwen3-bias": {**COMMON, "model_type": "qwen3", "num_hidden_layers": 2, "head_dim": 16, "attention_bias": True},
    "qwen2-moe": {**COMMON, **MOE, "model_type": "qwen2_moe", "num_hidden_layers": 2},
    "qwen3-moe": {
        **COMMON, **MOE, "model_type": "qwen3_moe", "num_hidden_layers": 2, "head_dim": 32, "norm_topk_prob": True,
    },
    "qwen3-moe-yarn": {
        **COMMON, **MOE, "model_type": "qwen3_moe", "num_hidden_layers": 3, "head_dim": 32, "norm_topk_prob": False,
        "mlp_only_layers": [1], "rope_parameters": YARN,
    },
    "qwen3-next": {**COMMON, **MOE, **NEXT, "model_type": "qwen3_next", "num_hidden_layers": 4},
    "qwen3-next-other": {
        **COMMON, **MOE, **NEXT, "model_type": "qwen3_next", "num_hidden_layers": 3, "norm_topk_prob": False,
        "layer_types": ["full_attention", "linear_attention", "full_attention"], "linear_num_value_heads": 2,
        "linear_conv_kernel_dim": 3, "mlp_only_layers": [2], "tie_word_embeddings": True,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
    },
}  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]


def random_weight(name: str, shape: tuple[int, ...], zero_centred: bool) -> np.ndarray:
    """fp32 values that depend on the name and shape only, of sizes that keep activations lively."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    values = random.standard_normal(shape).astype(np.float32)
    if name.endswith("norm.weight"):
        return values * np.float32(0.2) + np.float32(not zero_centred or "linear_attn" in name)
    if name.endswith("A_log"):
        return np.log(random.uniform(0.01, 16, shape)).astype(np.float32)
    if name.endswith("dt_bias"):
        return values + 1
    if name.endswith("mlp.gate.weight"):
        return values * np.float32(0.3)  # routing without near ties
    return values * np.float32(0.5 if "conv1d" in name or "embed" in name else 0.12)


def random_weights(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All weights of a checkpoint by Hugging Face's names."""
    centred = config["model_type"] == "qwen3_next"
    return {name: random_weight(name, tuple(shape), centred) for name, shape in shapes.items()}


def as_bytes(values: np.ndarray, dtype: str) -> bytes:
    """Values as safetensors stores them; BF16 by rounding to nearest even, as torch does."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
    return np.ascontiguousarray(values, {"F32": np.float32, "F16": np.float16}.get(dtype)).tobytes()


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str = "F32") -> None:
    """One file; arrays of uint8 are written as F8_E4M3."""
    header, data = {}, b""
    for name, values in tensors.items():
        kind = "F8_E4M3" if values.dtype == np.uint8 else dtype
        raw = as_bytes(values, kind)
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json of the same vocabulary that the tiny GGUF checkpoints have."""
    tokens, _ = vocabulary()
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[tuple(merge.split(" ", 1)) for merge in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_hf_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    dtype: str = "F32",
    shards: int = 1,
) -> Path:
    """Write a whole folder and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    write_tokenizer(folder)
    names = sorted(weights)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        write_safetensors(folder / file, {name: weights[name] for name in part}, dtype)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
