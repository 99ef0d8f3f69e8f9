"""Writes a GGUF file in the shape of Qwen3-Coder-Next with random weights in Q4_0 and any number of layers.

    python benchmarks/synthetic_qwen3_next.py LAYERS OUT.gguf [--tokenizer MODEL.gguf]

At least 4 layers: attention is in every fourth, and llama.cpp fails without any. Matrices have the size of trained
ones (fan-in), so that activations stay near 1 and the router chooses by token and layer. Quantised matrices of one
shape have the same bytes in all layers; routers are each their own, so that layers route differently. The tokenizer is
copied from `MODEL.gguf`, any Qwen2.5 file: llama.cpp wants one for text, but not for `llama-bench`.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE = 2048, 16, 2, 256
KEY_HEADS, VALUE_HEADS, STATE, KERNEL = 16, 32, 128, 4
EXPERTS, USED, WIDTH, VOCABULARY = 512, 10, 512, 151936
ATTENTION_EVERY = 4
CODE_RMS = 4.3
"""Root mean square of the codes -7..7."""
ROUTER_SPREAD = 1.5
"""Standard deviation of a router's logits."""


def _header(writer: GGUFWriter, layers: int) -> None:
    writer.add_block_count(layers)
    writer.add_context_length(262144)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(5120)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_SIZE)
    writer.add_value_length(HEAD_SIZE)
    writer.add_rope_freq_base(1e7)
    writer.add_rope_dimension_count(64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(USED)
    writer.add_expert_feed_forward_length(WIDTH)
    writer.add_expert_shared_feed_forward_length(WIDTH)
    writer.add_ssm_conv_kernel(KERNEL)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_group_count(KEY_HEADS)
    writer.add_ssm_time_step_rank(VALUE_HEADS)
    writer.add_ssm_inner_size(VALUE_HEADS * STATE)
    writer.add_uint32("qwen3next.full_attention_interval", ATTENTION_EVERY)
    writer.add_quantization_version(2)


def _copy_tokenizer(writer: GGUFWriter, source: Path) -> None:
    for name, field in GGUFReader(source).fields.items():
        if not name.startswith("tokenizer."):
            continue
        kind = field.types[0]
        if kind == GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), kind)


class _Weights:
    """Random tensors; quantised ones are made once for each shape."""

    def __init__(self, writer: GGUFWriter) -> None:
        self._writer = writer
        self.tensors: list[np.ndarray] = []
        self._random = np.random.default_rng(0)
        self._made: dict[tuple[int, ...], np.ndarray] = {}

    def quantised(self, name: str, *shape: int) -> None:
        """Q4_0 [..., rows, columns] whose products with vectors of unit variance have about unit variance."""
        if shape not in self._made:
            blocks = int(np.prod(shape)) // 32
            raw = np.empty((blocks, 18), np.uint8)
            # Codes -7..7: with -8 their mean would not be 0, and all tokens would go one way and route alike.
            low, high = (self._random.integers(1, 16, (blocks, 16), dtype=np.uint8) for _ in range(2))
            raw[:, 2:] = low | high << 4
            scale = (0.75 + 0.5 * self._random.random(blocks, dtype=np.float32)) / (CODE_RMS * np.sqrt(shape[-1]))
            raw[:, :2] = scale.astype(np.float16).view(np.uint8).reshape(blocks, 2)
            self._made[shape] = raw.reshape(*shape[:-1], shape[-1] // 32 * 18)
        self._add(name, self._made[shape], GGMLQuantizationType.Q4_0)

    def floats(self, name: str, *shape: int, mean: float = 0.0, spread: float = 0.0) -> None:
        """fp32 values of the given mean and standard deviation."""
        values = mean + spread * self._random.standard_normal(shape, dtype=np.float32)
        self._add(name, values.astype(np.float32))

    def _add(self, name: str, values: np.ndarray, kind: GGMLQuantizationType | None = None) -> None:
        self._writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes, kind)
        self.tensors.append(values)


def _write_all(writer: GGUFWriter, tensors: list[np.ndarray]) -> None:
    """As `GGUFWriter.write_tensors_to_file`, by several threads: 45 GB into a RAM disk within seconds."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    file.flush()
    pad = writer.ggml_pad
    offset = pad(file.tell(), writer.data_alignment)

    def put(values: np.ndarray, offset: int) -> None:
        view = memoryview(np.ascontiguousarray(values)).cast("B")
        while view:
            written = os.pwrite(file.fileno(), view, offset)
            view, offset = view[written:], offset + written

    with ThreadPoolExecutor() as pool:
        jobs = []
        for values in tensors:
            jobs.append(pool.submit(put, values, offset))
            offset = pad(offset + values.nbytes, writer.data_alignment)
        for job in jobs:
            job.result()
    os.truncate(file.fileno(), offset)
    writer.close()


def write(path: Path, layers: int, tokenizer: Path | None = None) -> None:
    """Write the file: 0.92 GB a layer and 0.35 GB besides."""
    writer = gguf.GGUFWriter(path, "qwen3next")
    _header(writer, layers)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(VOCABULARY)
    else:
        _copy_tokenizer(writer, tokenizer)
    weights = _Weights(writer)
    weights.quantised("token_embd.weight", VOCABULARY, HIDDEN)
    weights.quantised("output.weight", VOCABULARY, HIDDEN)
    weights.floats("output_norm.weight", HIDDEN, mean=1)
    keys, values = KEY_HEADS * STATE, VALUE_HEADS * STATE
    for index in range(layers):
        block = f"blk.{index}."
        weights.floats(f"{block}attn_norm.weight", HIDDEN, mean=1)
        weights.floats(f"{block}post_attention_norm.weight", HIDDEN, mean=1)
        if (index + 1) % ATTENTION_EVERY:
            weights.quantised(f"{block}attn_qkv.weight", 2 * keys + values, HIDDEN)
            weights.quantised(f"{block}attn_gate.weight", values, HIDDEN)
            weights.quantised(f"{block}ssm_ba.weight", 2 * VALUE_HEADS, HIDDEN)
            weights.quantised(f"{block}ssm_out.weight", HIDDEN, values)
            weights.floats(f"{block}ssm_conv1d.weight", 2 * keys + values, KERNEL, spread=0.5)
            weights.floats(f"{block}ssm_a", VALUE_HEADS, mean=-0.5)
            weights.floats(f"{block}ssm_dt.bias", VALUE_HEADS)
            weights.floats(f"{block}ssm_norm.weight", STATE, mean=1)
        else:
            weights.quantised(f"{block}attn_q.weight", 2 * HEADS * HEAD_SIZE, HIDDEN)
            weights.quantised(f"{block}attn_k.weight", KV_HEADS * HEAD_SIZE, HIDDEN)
            weights.quantised(f"{block}attn_v.weight", KV_HEADS * HEAD_SIZE, HIDDEN)
            weights.quantised(f"{block}attn_output.weight", HIDDEN, HEADS * HEAD_SIZE)
            weights.floats(f"{block}attn_q_norm.weight", HEAD_SIZE, mean=1)
            weights.floats(f"{block}attn_k_norm.weight", HEAD_SIZE, mean=1)
        weights.floats(f"{block}ffn_gate_inp.weight", EXPERTS, HIDDEN, spread=ROUTER_SPREAD / HIDDEN**0.5)
        weights.floats(f"{block}ffn_gate_inp_shexp.weight", 1, HIDDEN, spread=1 / HIDDEN**0.5)
        weights.quantised(f"{block}ffn_gate_exps.weight", EXPERTS, WIDTH, HIDDEN)
        weights.quantised(f"{block}ffn_up_exps.weight", EXPERTS, WIDTH, HIDDEN)
        weights.quantised(f"{block}ffn_down_exps.weight", EXPERTS, HIDDEN, WIDTH)
        weights.quantised(f"{block}ffn_gate_shexp.weight", WIDTH, HIDDEN)
        weights.quantised(f"{block}ffn_up_shexp.weight", WIDTH, HIDDEN)
        weights.quantised(f"{block}ffn_down_shexp.weight", HIDDEN, WIDTH)
    _write_all(writer, weights.tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    arguments = parser.parse_args()
    write(arguments.out, arguments.layers, arguments.tokenizer)


if __name__ == "__main__":
    main()
