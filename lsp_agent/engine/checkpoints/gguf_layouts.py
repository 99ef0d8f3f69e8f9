"""The layouts in which llama.cpp's converters have written one and the same tensor, brought to one.

The rest of the engine knows the plain one: separate q, k and v, separate gate and up projections of experts, and the
projections of Gated DeltaNet sorted by part (q, k, v; z). A converter may have fused the first two
(`--fuse-gate-up-exps`), and older ones left the last as Hugging Face has it, ordered by key head (`ssm_in`). Rows only
change places, so quantised blocks stay as they are. Blocks of multi-token prediction are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lsp_agent.engine.architecture import Architecture, LinearAttentionConfig, ModelConfig

_BLOCK = re.compile(r"blk\.(\d{1,9})\.(.+)$")
RowMap = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `rows` x `columns` values (a vector has one row) of `type`, in `raw` bytes [rows, bytes a row].

    `source_row` says which rows of `raw` are the tensor's, where they are not all of them in their order.
    """

    name: str
    type: GGMLQuantizationType
    rows: int
    columns: int
    raw: np.ndarray
    source_row: RowMap | None = None

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `CheckpointTensor.read`."""
        if self.source_row is None:
            return self.raw[start:stop]
        return self.raw[self.source_row(np.arange(start, stop))]


def plain_tensors(
    tensors: Mapping[str, GgufTensor], architecture: Architecture, config: ModelConfig
) -> dict[str, GgufTensor]:
    """The tensors under the names and in the layouts that the engine knows; unknown ones stay as they are."""
    plain: dict[str, GgufTensor] = {}
    for name, tensor in tensors.items():
        block = _BLOCK.match(name)
        if block and int(block[1]) >= config.layers:
            continue  # multi-token prediction, whose blocks follow the model's own
        pieces = _pieces(tensor, int(block[1]), block[2], architecture, config) if block else None
        plain |= {piece.name: piece for piece in pieces or [tensor]}
    return plain


def _pieces(
    tensor: GgufTensor, index: int, part: str, architecture: Architecture, config: ModelConfig
) -> list[GgufTensor] | None:
    prefix, linear = f"blk.{index}", config.linear_attention
    if part == "ffn_gate_up_exps.weight" and config.experts is not None:
        return list(_gate_and_up(tensor, prefix, config.experts.intermediate))
    if part in ("attn_qkv.weight", "attn_qkv.bias"):
        kind, kv = part.rpartition(".")[2], config.kv_heads * config.head_size
        names = tuple(f"{prefix}.attn_{one}.{kind}" for one in "qkv")
        wanted = architecture.block(config, index).mixer.weights(config, prefix)
        for spec in wanted:
            if spec.sources == names:  # not of Gated DeltaNet, whose q, k and v are one tensor
                sizes = (spec.shape[0] - 2 * kv, kv, kv)
                return list((_columns if kind == "bias" else _rows)(tensor, names, sizes))
    if part == "ssm_in.weight" and linear is not None:
        return list(_by_part(tensor, prefix, linear))
    return None


def _gate_and_up(tensor: GgufTensor, prefix: str, width: int) -> Iterator[GgufTensor]:
    """[experts, gate then up, columns] as two tensors [experts, width, columns]."""
    for offset, name in ((0, "gate"), (width, "up")):

        def source_row(rows: np.ndarray, offset: int = offset) -> np.ndarray:
            return rows // width * 2 * width + offset + rows % width

        name = f"{prefix}.ffn_{name}_exps.weight"
        yield replace(tensor, name=name, rows=tensor.rows // 2, source_row=source_row)


def _rows(tensor: GgufTensor, names: Sequence[str], sizes: Sequence[int]) -> Iterator[GgufTensor]:
    """Consecutive rows; whatever does not fit shows as misshapen."""
    first = 0
    for name, size in zip(names, sizes, strict=True):
        raw = tensor.raw[first : first + size]
        yield replace(tensor, name=name, rows=len(raw), raw=raw)
        first += size


def _columns(tensor: GgufTensor, names: Sequence[str], sizes: Sequence[int]) -> Iterator[GgufTensor]:
    """Consecutive values of a vector of one value a block (F32, F16 or BF16)."""
    each, first = GGML_QUANT_SIZES[tensor.type][1], 0
    for name, size in zip(names, sizes, strict=True):
        raw = tensor.raw[:, first * each : (first + size) * each]
        yield replace(tensor, name=name, columns=raw.shape[1] // each, raw=raw)
        first += size


def _by_part(tensor: GgufTensor, prefix: str, linear: LinearAttentionConfig) -> Iterator[GgufTensor]:
    """Rows q, k, v, z of key head 0, then of head 1 …, as q, k, v of all heads and z of all heads."""
    keys, values = linear.key_size, linear.value_heads // linear.key_heads * linear.value_size
    a_head = 2 * keys + 2 * values
    by_head = np.arange(tensor.rows // a_head * a_head, dtype=np.int32).reshape(-1, a_head)
    q, k, v, z = np.split(by_head, np.cumsum([keys, keys, values]), axis=1)
    for name, parts in ((f"{prefix}.attn_qkv.weight", (q, k, v)), (f"{prefix}.attn_gate.weight", (z,))):
        order = np.concatenate([part.reshape(-1) for part in parts])
        yield replace(tensor, name=name, rows=len(order), source_row=order.__getitem__)
