"""A tiny Qwen2 checkpoint with random weights in any of GGUF's types, the same on every machine."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import TokenType, quants
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE, CONTEXT = 256, 2, 4, 2, 512, 512
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
]  # fmt: skip
MERGES = ["Ġ Ġ", "r e", "re t", "d e", "de f", "i n", "ĠĠ ĠĠ"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUANTISED = (Type.Q4_0, Type.Q4_1, Type.Q4_K, Type.Q5_0, Type.Q5_1, Type.Q5_K, Type.Q6_K, Type.Q8_0)
MIXED = "mixed"
"""q and k in one type and v in another, and so on: as the published Q4_K_M files have it."""


def vocabulary() -> tuple[list[str], list[int]]:
    """Tokens and their kinds: the byte alphabet, the merges, the special tokens, padding to 288."""
    tokens = sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
    kinds = [TokenType.NORMAL] * len(tokens) + [TokenType.CONTROL] * len(SPECIAL) + [TokenType.USER_DEFINED]
    tokens += [*SPECIAL, "<tool_call>"]
    padding = 288 - len(tokens)
    return tokens + [f"[PAD{i}]" for i in range(padding)], kinds + [TokenType.UNUSED] * padding


def random_blocks(kind: Type, rows: int, columns: int, random: np.random.RandomState) -> np.ndarray:
    """Random bytes [rows, bytes a row] whose scales make weights of a sensible size (about 0.05)."""
    per_block, size = quants.GGML_QUANT_SIZES[kind]
    if kind in (Type.F32, Type.F16, Type.BF16):
        return quants.quantize((random.standard_normal((rows, columns)) * 0.05).astype(np.float32), kind).view(np.uint8)
    raw = np.frombuffer(random.bytes(rows * columns // per_block * size), np.uint8).reshape(rows, -1, size).copy()

    def half(scale: float) -> np.ndarray:
        values = scale * (0.5 + random.random_sample((rows, raw.shape[1], 1)))
        return values.astype(np.float16).view(np.uint8)

    typical = {Type.Q4_0: 0.01, Type.Q4_1: 0.01, Type.Q5_0: 0.005, Type.Q5_1: 0.005, Type.Q8_0: 0.0007}
    if kind in (Type.Q4_K, Type.Q5_K):
        step, middle = (0.01, 7) if kind == Type.Q4_K else (0.005, 15)
        raw[..., 0:2] = half(step / 32)
        # As in real checkpoints, zero lies within the codes' range; in Q4_1 and Q5_1 below it does not always.
        raw[..., 2:4] = (raw[..., 0:2].view(np.float16) * np.float16(middle)).view(np.uint8)
        raw[..., 4:8] |= 0xA0  # all eight scales of a super-block are at least 32
    elif kind == Type.Q6_K:
        raw[..., 208:] = half(0.00003)
    else:
        raw[..., 0:2] = half(typical[kind])
        if kind in (Type.Q4_1, Type.Q5_1):
            raw[..., 2:4] = (-half(0.08).view(np.float16)).view(np.uint8)
    return raw.reshape(rows, -1)


def tensors(kind: Type | str, tied: bool, seed: int = 7) -> dict[str, tuple[Type, np.ndarray]]:
    """Name -> (type, raw bytes [rows, bytes a row]); vectors have one row."""
    random = np.random.RandomState(seed)
    main, other = (Type.Q4_K, Type.Q6_K) if kind == MIXED else (Type(kind), Type(kind))
    result: dict[str, tuple[Type, np.ndarray]] = {}

    def matrix(name: str, rows: int, columns: int, kind: Type = main) -> None:
        result[f"{name}.weight"] = kind, random_blocks(kind, rows, columns, random)

    def vector(name: str, size: int, mean: float) -> None:
        values = (mean + 0.1 * random.standard_normal((1, size))).astype(np.float32)
        result[name] = Type.F32, values.view(np.uint8)

    width, kv = HIDDEN, KV_HEADS * HIDDEN // HEADS
    matrix("token_embd", 288, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}"
        vector(f"{prefix}.attn_norm.weight", HIDDEN, 1)
        vector(f"{prefix}.ffn_norm.weight", HIDDEN, 1)
        matrix(f"{prefix}.attn_q", width, HIDDEN)
        matrix(f"{prefix}.attn_k", kv, HIDDEN)
        matrix(f"{prefix}.attn_v", kv, HIDDEN, other)
        for part, size in (("q", width), ("k", kv), ("v", kv)):
            vector(f"{prefix}.attn_{part}.bias", size, 0)
        matrix(f"{prefix}.attn_output", HIDDEN, width)
        matrix(f"{prefix}.ffn_gate", INTERMEDIATE, HIDDEN)
        matrix(f"{prefix}.ffn_up", INTERMEDIATE, HIDDEN)
        matrix(f"{prefix}.ffn_down", HIDDEN, INTERMEDIATE, other)
    vector("output_norm.weight", HIDDEN, 1)
    if not tied:
        matrix("output", 288, HIDDEN, other)
    return result


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """Write `vocabulary` as the tokenizer of a GGUF file."""
    tokens, kinds = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))


def write_checkpoint(path: Path, kind: Type | str, tied: bool = False) -> Path:
    """Write the GGUF file and return its path."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    add_vocabulary(writer)
    writer.add_chat_template(TEMPLATE)
    for name, (type_, raw) in tensors(kind, tied).items():
        values = raw.view(np.float32).reshape(-1) if name.endswith((".bias", "norm.weight")) else raw
        if values.dtype == np.uint8 and type_ in (Type.F32, Type.F16):
            values = values.view(np.float32 if type_ == Type.F32 else np.float16)
        if values.dtype == np.uint8:
            writer.add_tensor(name, values, raw_dtype=type_)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
