"""Small random GGUF checkpoints of every architecture, with llama.cpp's metadata and tensor names, legal for it.

Written from llama.cpp's own conventions and not through the engine's, so that a mistake in the engine's reading of
names, layouts or metadata shows as a difference.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants
from tiny_checkpoint import add_vocabulary

CONTEXT = 512
VOCABULARY = 288
K_QUANTS = {Type.Q4_K: 48 * 4.6, Type.Q5_K: 48 * 9.2, Type.Q6_K: 74 * 18.5}
"""Types that the Python package cannot round to, so that their blocks are drawn: their spread at a scale of one."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a checkpoint; all widths are multiples of 256, the super-block of the K-quants."""

    layers: int = 3
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head: int = 64
    intermediate: int = 512
    experts: int = 16
    used: int = 4
    expert_width: int = 256
    shared_width: int = 256
    rotary: int = 32
    interval: int = 3
    key_heads: int = 2
    value_heads: int = 4
    linear_head: int = 64
    kernel: int = 4


@dataclass
class RandomGguf:
    """A checkpoint in memory: name to (type, raw bytes [..., bytes a row], shape in elements)."""

    architecture: str
    sizes: Sizes
    tied: bool = False
    named: str = ""
    """The architecture's name in the file, if it is to be another."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Further keys, without the architecture's name in front; floats, integers, strings and lists of flags."""
    tensors: dict[str, tuple[Type, np.ndarray, tuple[int, ...]]] = field(default_factory=dict)

    def write(self, path: Path, *, dequantised: bool = False, tensors_a_file: int = 0) -> Path:
        """Write the file, or several, and return the (first) path; `dequantised`: with the same weights in fp32."""
        name = self.named or self.architecture
        writer = gguf.GGUFWriter(path, name, split_max_tensors=tensors_a_file)
        _metadata(writer, self.architecture, self.sizes)
        for key, value in self.metadata.items():
            add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
            writer.kv_data[0].pop(f"{name}.{key}", None)
            add[type(value)](f"{name}.{key}", value)
        for name, (kind, raw, shape) in self.tensors.items():
            if kind == Type.F32 or dequantised:
                values = quants.dequantize(raw, kind).astype(np.float32)
                writer.add_tensor(name, values.reshape(shape))
            else:
                writer.add_tensor(name, raw.reshape(*shape[:-1], -1), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        shards = sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))
        return shards[0] if shards else path

    def _take(self, name: str) -> tuple[Type, np.ndarray, tuple[int, ...]]:
        return self.tensors.pop(name)

    def fuse(self) -> RandomGguf:
        """Fuse q, k and v, and the experts' gate and up projections, as newer converters may."""
        for index in range(self.sizes.layers):
            prefix = f"blk.{index}"
            for kind in ("weight", "bias"):
                names = [f"{prefix}.attn_{part}.{kind}" for part in "qkv"]
                if names[0] in self.tensors:
                    taken = [self._take(name) for name in names]
                    shape = (sum(one[2][0] for one in taken), *taken[0][2][1:])
                    raw = np.concatenate([one[1] for one in taken], axis=0 if kind == "weight" else 1)
                    self.tensors[f"{prefix}.attn_qkv.{kind}"] = taken[0][0], raw, shape
            if f"{prefix}.ffn_gate_exps.weight" in self.tensors:
                pair = [self._take(f"{prefix}.ffn_{part}_exps.weight") for part in ("gate", "up")]
                experts, width, hidden = pair[0][2]
                raw = np.concatenate([one[1].reshape(experts, width, -1) for one in pair], axis=1)
                fused = pair[0][0], raw.reshape(experts * 2 * width, -1), (experts, 2 * width, hidden)
                self.tensors[f"{prefix}.ffn_gate_up_exps.weight"] = fused
        return self

    def order_by_key_head(self) -> RandomGguf:
        """Order the projections of Gated DeltaNet by key head, in one tensor, as older converters did."""
        size = self.sizes
        served = size.value_heads // size.key_heads
        for index in range(size.layers):
            prefix = f"blk.{index}"
            if f"{prefix}.ssm_a" not in self.tensors:
                continue
            (kind, qkv, (_, hidden)), (_, z, _) = (
                self._take(f"{prefix}.attn_{part}.weight") for part in ("qkv", "gate")
            )
            q, k, v = np.split(qkv, np.cumsum([size.key_heads * size.linear_head] * 2))
            rows = []
            for head in range(size.key_heads):
                for part, heads in ((q, 1), (k, 1), (v, served), (z, served)):
                    step = heads * size.linear_head
                    rows.append(part[head * step : (head + 1) * step])
            raw = np.concatenate(rows)
            self.tensors[f"{prefix}.ssm_in.weight"] = kind, raw, (len(raw), hidden)
        return self

    def add_prediction_block(self) -> RandomGguf:
        """Add a block of multi-token prediction, which follows the model's own."""
        prefix = f"blk.{self.sizes.layers}"
        last = {name: one for name, one in self.tensors.items() if name.startswith(f"blk.{self.sizes.layers - 1}.")}
        for name, one in last.items():
            self.tensors[prefix + name[len(prefix) :]] = one
        norm = self.tensors["output_norm.weight"]
        self.tensors |= {f"{prefix}.nextn.{part}.weight": norm for part in ("enorm", "hnorm", "shared_head_norm")}
        random = np.random.RandomState(0).standard_normal((self.sizes.hidden, 2 * self.sizes.hidden))
        projection = random.astype(np.float32).view(np.uint8)
        self.tensors[f"{prefix}.nextn.eh_proj.weight"] = Type.F32, projection, random.shape
        self.metadata |= {"block_count": self.sizes.layers + 1, "nextn_predict_layers": 1}
        return self


def random_gguf(
    architecture: str,
    kinds: Mapping[str, Type] | None = None,
    *,
    sizes: Sizes | None = None,
    tied: bool = False,
    seed: int = 0,
) -> RandomGguf:
    """Draw a checkpoint. `kinds`: the type of matrices by a part of their name, "" for all others (else fp32)."""
    made = RandomGguf(architecture, sizes or Sizes(), tied)
    kinds = kinds or {}

    def matrix(name: str, *shape: int, scale: float = 1.0) -> None:
        kind = next((kind for part, kind in kinds.items() if part and part in name), kinds.get("", Type.F32))
        if "ffn_gate_inp" in name or "ssm_conv1d" in name:  # llama.cpp keeps these in fp32
            kind = Type.F32
        random = np.random.RandomState(zlib.crc32(f"{name} {seed}".encode()))
        rows, columns = int(np.prod(shape[:-1])), shape[-1]
        if kind in K_QUANTS:
            raw = _k_quant(kind, rows, columns, scale / np.sqrt(columns), random)
        else:
            values = random.standard_normal((rows, columns)) * scale / np.sqrt(columns)
            raw = np.ascontiguousarray(quants.quantize(values.astype(np.float32), kind)).view(np.uint8)
        made.tensors[f"{name}.weight"] = kind, raw, shape

    def vector(name: str, values: Callable[[np.random.RandomState], np.ndarray]) -> None:
        drawn = values(np.random.RandomState(zlib.crc32(f"{name} {seed}".encode()))).astype(np.float32)
        made.tensors[name] = Type.F32, drawn.reshape(1, -1).view(np.uint8), drawn.shape

    _tensors(made, matrix, vector)
    return made


def _k_quant(kind: Type, rows: int, columns: int, spread: float, random: np.random.RandomState) -> np.ndarray:
    """Random blocks of mean zero; the layouts are those of llama.cpp's `block_q4_K`, `block_q5_K` and `block_q6_K`."""
    _, size = quants.GGML_QUANT_SIZES[kind]
    raw = random.randint(0, 256, (rows, columns // 256, size)).astype(np.uint8)
    step = (spread / K_QUANTS[kind] * random.uniform(0.5, 1.5, (*raw.shape[:2], 1))).astype(np.float16)
    if kind == Type.Q6_K:
        raw[..., 208:] = step.view(np.uint8)
        return raw.reshape(rows, -1)
    raw[..., 0:2] = step.view(np.uint8)
    raw[..., 2:4] = (step * np.float16(7.5 if kind == Type.Q4_K else 15.5)).view(np.uint8)
    # Scales of 32 to 63; the minima, which the same middle code cancels, differ from them in the lowest bits only.
    raw[..., 4:8] |= 0xA0
    raw[..., 8:12] = raw[..., 4:8] ^ (raw[..., 8:12] & 0x03)
    raw[..., 12:16] = (raw[..., 12:16] & 0x0F) * 0x11 ^ (raw[..., 12:16] & 0x30)
    return raw.reshape(rows, -1)


def _tensors(made: RandomGguf, matrix: Callable[..., None], vector: Callable[..., None]) -> None:
    size, name = made.sizes, made.architecture
    # A large embedding that is the head too would make every token its own likeliest successor.
    matrix("token_embd", VOCABULARY, size.hidden, scale=1 if made.tied else 8)
    for index in range(size.layers):
        block = f"blk.{index}"
        _norm(vector, f"{block}.attn_norm", size.hidden)
        if name == "qwen3next" and (index + 1) % size.interval:
            _delta_net(size, block, matrix, vector)
        else:
            _attention(size, name, block, matrix, vector)
        _norm(vector, f"{block}.{'post_attention' if name == 'qwen3next' else 'ffn'}_norm", size.hidden)
        if name in ("qwen2", "qwen3"):
            _mlp(block, "", size.hidden, size.intermediate, matrix)
        else:
            _experts(size, name, block, matrix)
    _norm(vector, "output_norm", size.hidden)
    if not made.tied:
        matrix("output", VOCABULARY, size.hidden, scale=4)


def _norm(vector: Callable[..., None], name: str, width: int) -> None:
    vector(f"{name}.weight", lambda random: 1 + 0.2 * random.standard_normal(width))


def _attention(size: Sizes, name: str, block: str, matrix: Callable[..., None], vector: Callable[..., None]) -> None:
    widths = {"q": size.heads * size.head, "k": size.kv_heads * size.head, "v": size.kv_heads * size.head}
    for part, width in widths.items():
        gated = name == "qwen3next" and part == "q"
        matrix(f"{block}.attn_{part}", width * (2 if gated else 1), size.hidden, scale=2)
        if name in ("qwen2", "qwen2moe"):
            vector(f"{block}.attn_{part}.bias", lambda random, width=width: 0.3 * random.standard_normal(width))
        elif part != "v":
            _norm(vector, f"{block}.attn_{part}_norm", size.head)
    matrix(f"{block}.attn_output", size.hidden, widths["q"])


def _delta_net(size: Sizes, block: str, matrix: Callable[..., None], vector: Callable[..., None]) -> None:
    key, value, heads = size.key_heads * size.linear_head, size.value_heads * size.linear_head, size.value_heads
    matrix(f"{block}.attn_qkv", 2 * key + value, size.hidden)
    matrix(f"{block}.attn_gate", value, size.hidden)
    matrix(f"{block}.ssm_ba", 2 * heads, size.hidden)
    matrix(f"{block}.ssm_conv1d", 2 * key + value, size.kernel)
    vector(f"{block}.ssm_a", lambda random: -random.uniform(0.01, 16, heads))
    vector(f"{block}.ssm_dt.bias", lambda random: 1 - 4 * random.random_sample(heads))
    _norm(vector, f"{block}.ssm_norm", size.linear_head)
    matrix(f"{block}.ssm_out", size.hidden, value)


def _mlp(block: str, suffix: str, hidden: int, width: int, matrix: Callable[..., None]) -> None:
    matrix(f"{block}.ffn_gate{suffix}", width, hidden)
    matrix(f"{block}.ffn_up{suffix}", width, hidden)
    matrix(f"{block}.ffn_down{suffix}", hidden, width, scale=2)


def _experts(size: Sizes, name: str, block: str, matrix: Callable[..., None]) -> None:
    matrix(f"{block}.ffn_gate_inp", size.experts, size.hidden, scale=3)  # routing without near ties
    matrix(f"{block}.ffn_gate_exps", size.experts, size.expert_width, size.hidden)
    matrix(f"{block}.ffn_up_exps", size.experts, size.expert_width, size.hidden)
    matrix(f"{block}.ffn_down_exps", size.experts, size.hidden, size.expert_width, scale=4)
    if name != "qwen3moe":
        matrix(f"{block}.ffn_gate_inp_shexp", size.hidden)
        _mlp(block, "_shexp", size.hidden, size.shared_width, matrix)


def _metadata(writer: gguf.GGUFWriter, name: str, size: Sizes) -> None:
    writer.add_name("random")
    writer.add_block_count(size.layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(size.hidden)
    writer.add_feed_forward_length(size.intermediate)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.kv_heads)
    writer.add_key_length(size.head)
    writer.add_value_length(size.head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if name not in ("qwen2", "qwen3"):
        writer.add_expert_count(size.experts)
        writer.add_expert_used_count(size.used)
        writer.add_expert_feed_forward_length(size.expert_width)
    if name in ("qwen2moe", "qwen3next"):
        writer.add_expert_shared_feed_forward_length(size.shared_width)
    if name == "qwen3next":
        writer.add_rope_dimension_count(size.rotary)
        writer.add_ssm_conv_kernel(size.kernel)
        writer.add_ssm_state_size(size.linear_head)
        writer.add_ssm_group_count(size.key_heads)
        writer.add_ssm_time_step_rank(size.value_heads)
        writer.add_ssm_inner_size(size.value_heads * size.linear_head)
        writer.add_full_attention_interval(size.interval)
    add_vocabulary(writer)
