"""Random small configurations of every architecture, by Hugging Face's `model_type`."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st


@st.composite
def ropes(draw) -> dict[str, Any]:
    rope = {"rope_theta": draw(st.sampled_from([1e4, 1e6, 1e7]))}
    kind = draw(st.sampled_from(["default", "default", "linear", "yarn"]))
    if kind == "yarn":
        rope["original_max_position_embeddings"] = draw(st.sampled_from([16, 64]))
        if draw(st.booleans()):
            rope |= {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}
    if kind != "default":
        rope["factor"] = draw(st.sampled_from([2.0, 4.0]))
    return {"rope_type": kind, **rope}


@st.composite
def configs(draw, model_type: str) -> dict[str, Any]:
    """A small configuration: layers and their interleave, heads, head sizes, experts, biases, tying, rope."""
    layers = draw(st.integers(1, 4))
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    head = draw(st.sampled_from([16, 32, 64, 128]))
    config: dict[str, Any] = {
        "vocab_size": 288, "hidden_size": draw(st.sampled_from([64, 96, 160])),
        "intermediate_size": draw(st.sampled_from([32, 80])), "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads, "head_dim": head,
        "max_position_embeddings": 128, "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_word_embeddings": draw(st.booleans()), "rope_parameters": draw(ropes()),
    }  # fmt: skip
    if model_type in ("qwen3", "qwen3_moe"):
        config["attention_bias"] = draw(st.booleans())
    if model_type in ("qwen2", "qwen2_moe"):
        config["hidden_size"] = config["num_attention_heads"] * head
        del config["head_dim"]
    if model_type == "qwen2_moe":
        config["qkv_bias"] = draw(st.booleans())
    if model_type not in ("qwen2", "qwen3"):
        experts = draw(st.sampled_from([4, 7, 32]))
        config |= {
            "num_experts": experts, "num_experts_per_tok": draw(st.integers(1, min(experts, 10))),
            "moe_intermediate_size": draw(st.sampled_from([16, 48])), "norm_topk_prob": draw(st.booleans()),
            "decoder_sparse_step": draw(st.sampled_from([1, 1, 2])),
            "mlp_only_layers": draw(st.lists(st.integers(0, layers - 1), max_size=1)),
        }  # fmt: skip
    if model_type in ("qwen2_moe", "qwen3_next"):
        config["shared_expert_intermediate_size"] = draw(st.sampled_from([16, 64]))
    if model_type == "qwen3_next":
        kinds = st.sampled_from(["linear_attention", "full_attention"])
        config |= {
            "layer_types": draw(st.lists(kinds, min_size=layers, max_size=layers)),
            "linear_num_key_heads": (keys := draw(st.integers(1, 3))),
            "linear_num_value_heads": keys * draw(st.sampled_from([1, 2, 4])),
            "linear_key_head_dim": draw(st.sampled_from([8, 16, 64])),
            "linear_value_head_dim": draw(st.sampled_from([8, 24, 64])),
            "linear_conv_kernel_dim": draw(st.sampled_from([2, 3, 4])),
        }
        rotary = draw(st.sampled_from([size for size in (16, 32, 64, 128) if size <= head]))
        config["rope_parameters"]["partial_rotary_factor"] = rotary / head
    return config
