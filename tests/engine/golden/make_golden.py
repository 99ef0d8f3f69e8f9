"""Makes golden.npz from transformers: `python tests/engine/golden/make_golden.py` where torch is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import quants
from tiny_checkpoint import (
    CONTEXT,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    MIXED,
    QUANTISED,
    Type,
    tensors,
)  # fmt: skip
from transformers import Qwen2Config, Qwen2ForCausalLM

PROMPT, GREEDY = 40, 24
CASES = [(kind, False) for kind in (*QUANTISED, Type.F16, Type.BF16, Type.F32, MIXED)] + [(Type.Q4_K, True)]
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def reference(kind: Type | str, tied: bool) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=288, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=tied,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).float().eval()
    state = {}
    for name, (type_, raw) in tensors(kind, tied).items():
        values = quants.dequantize(raw, type_)
        if name in NAMES:
            target = NAMES[name]
        else:
            _, layer, part, suffix = name.split(".")
            target = f"model.layers.{layer}.{NAMES[part]}.{suffix}"
        state[target] = torch.tensor(values.reshape(-1) if len(values) == 1 else values)
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not surplus and set(missing) <= {"lm_head.weight"}, (missing, surplus)
    model.tie_weights()
    return model


def main() -> None:
    arrays = {}
    prompt = np.random.RandomState(3).randint(0, 256, PROMPT)
    arrays["prompt"] = prompt
    for kind, tied in CASES:
        model = reference(kind, tied)
        name = f"{kind if kind == MIXED else Type(kind).name}{'-tied' if tied else ''}"
        ids = prompt.tolist()
        with torch.no_grad():
            arrays[f"{name}.logits"] = model(torch.tensor([ids])).logits[0, -4:].numpy()
            for _ in range(GREEDY):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        arrays[f"{name}.greedy"] = np.array(ids[PROMPT:])
    np.savez_compressed(Path(__file__).with_name("golden.npz"), **arrays)


if __name__ == "__main__":
    main()
