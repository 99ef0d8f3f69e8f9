"""A Hugging Face folder as a `Checkpoint`: sharded safetensors under GGUF's tensor names and layouts.

What differs from GGUF is undone here, so that the rest of the engine knows one convention: the matrices of experts
are stacked, norms that are stored less one get it back, the decay of Gated DeltaNet is `-exp(A_log)`, and its packed
projection, which Hugging Face orders by key head (q, k, v, z of head 0, then of head 1 …), is sorted by part.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

from lsp_agent.engine.architecture import ModelConfig
from lsp_agent.engine.architectures import ARCHITECTURES, architecture
from lsp_agent.engine.architectures.config import hf_config
from lsp_agent.engine.checkpoints import tokenizer_import
from lsp_agent.engine.checkpoints.matching import listed
from lsp_agent.engine.checkpoints.safetensors_file import FLOAT8, SafeTensor, read_safetensors
from lsp_agent.errors import UserError

NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")
IGNORED = re.compile(r"mtp\.|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")
"""The draft head of multi-token prediction, and tables that old checkpoints carry."""

_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_EXPERT = re.compile(r"mlp\.experts\.(0|[1-9]\d{0,8})\.(gate|up|down)_proj$")
_DECAY = re.compile(r"model\.layers\.(\d+)\.linear_attn\.(A_log|dt_bias)$")


@dataclass(frozen=True)
class HfTensor:
    """Rows of one or more safetensors under a GGUF name; `runs` (first row, end) picks rows of the only piece."""

    name: str
    pieces: tuple[SafeTensor, ...]
    runs: tuple[tuple[int, int], ...] | None = None
    transform: Callable[[np.ndarray], np.ndarray] | None = None

    @cached_property
    def type(self) -> Type:
        """See `CheckpointTensor.type`; pieces of several types are read as fp32."""
        kinds = {piece.type for piece in self.pieces}
        return Type.F32 if self.transform or len(kinds) > 1 else kinds.pop()

    @cached_property
    def _sources(self) -> list[tuple[SafeTensor, int]]:
        """The piece of each run of rows, and its first row there."""
        if self.runs is not None:
            return [(self.pieces[0], start) for start, _ in self.runs]
        return [(piece, 0) for piece in self.pieces]

    @cached_property
    def _starts(self) -> list[int]:
        """Where each source begins among our rows, and the end."""
        lengths = (piece.rows for piece in self.pieces)
        if self.runs is not None:
            lengths = (stop - start for start, stop in self.runs)
        return [0, *accumulate(lengths)]

    @property
    def rows(self) -> int:
        """See `CheckpointTensor.rows`."""
        return self._starts[-1]

    @property
    def columns(self) -> int:
        """See `CheckpointTensor.columns`; 0, which fits nothing, where the shapes of the pieces differ."""
        return self.pieces[0].columns if len({piece.shape for piece in self.pieces}) == 1 else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `CheckpointTensor.read`."""
        chunks = []
        for index in range(bisect_right(self._starts, start) - 1, bisect_left(self._starts, stop)):
            (piece, offset), first = self._sources[index], self._starts[index]
            low, high = max(start, first), min(stop, self._starts[index + 1])
            chunks.append(self._as_type(piece, piece.read(offset + low - first, offset + high - first)))
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)

    def _as_type(self, piece: SafeTensor, raw: np.ndarray) -> np.ndarray:
        if self.transform is None and piece.type == self.type:
            return raw
        values = quants.dequantize(raw, piece.type).astype(np.float32)
        return (values if self.transform is None else self.transform(values).astype(np.float32)).view(np.uint8)


class HfCheckpoint:
    """Opens a folder with config.json and safetensors; raises `UserError` for anything incomplete or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").exists() and (files := sorted(path.glob("*.gguf"))):
            raise UserError(f"{path} is a folder of GGUF files; give one of them, such as {files[0].name}.")
        self._values = tokenizer_import.read_json(path / "config.json")
        kinds = {known.hf_name: known for known in ARCHITECTURES.values()}
        found = str(self._values.get("model_type"))
        self._architecture = kinds[found] if found in kinds else architecture(found)
        self._config = hf_config(self._values, path / "config.json", self._architecture.name)
        self._shards = self._find_shards()
        loaded: dict[str, SafeTensor] = {}
        for shard in self._shards:
            loaded |= read_safetensors(shard)
        self.tensors = {tensor.name: tensor for tensor in self._present(_with_scales(loaded, path))}

    def _find_shards(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if not index.exists():
            return self._shards_without_index()
        weight_map = tokenizer_import.read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} is damaged; download it again.")
        names = sorted(set(map(str, weight_map.values())))
        absent = [name for name in names if Path(name).name != name or not (self.path / name).is_file()]
        if absent:
            raise UserError(f"{self.path} lacks {listed(absent)}; download the rest of the checkpoint.")
        return [self.path / name for name in names]

    def _shards_without_index(self) -> list[Path]:
        if (self.path / "model.safetensors").is_file():
            return [self.path / "model.safetensors"]
        if any(self.path.glob("*.safetensors")):
            raise UserError(f"{self.path} lacks model.safetensors.index.json; download the rest of the checkpoint.")
        if any(file for pattern in PICKLES for file in self.path.glob(pattern)):
            raise UserError(
                f"{self.path} holds its weights as pickle files, which can run code and are never loaded; use a "
                "checkpoint in safetensors or GGUF format."
            )
        raise UserError(f"{self.path} holds no safetensors files; use a complete checkpoint of the model.")

    def _present(self, loaded: dict[str, SafeTensor]) -> Iterator[HfTensor]:
        experts: dict[str, dict[int, SafeTensor]] = {}
        count = self._config.experts.count if self._config.experts else 0
        for name, tensor in loaded.items():
            block, decay = _BLOCK.match(name), _DECAY.match(name)
            if IGNORED.match(name) or (name == "lm_head.weight" and self._values.get("tie_word_embeddings")):
                continue
            if decay:
                target = "ssm_a" if decay[2] == "A_log" else "ssm_dt.bias"
                transform = (lambda values: -np.exp(values)) if decay[2] == "A_log" else None
                yield HfTensor(f"blk.{decay[1]}.{target}", (tensor,), transform=transform)
            elif block and (expert := _EXPERT.match(block[2])) and int(expert[1]) < count:
                stack = experts.setdefault(f"blk.{block[1]}.ffn_{expert[2]}_exps.{block[3]}", {})
                stack[int(expert[1])] = tensor
            elif block and block[2] == "linear_attn.in_proj_qkvz":
                yield from self._split_qkvz(f"blk.{block[1]}", tensor)
            else:
                yield self._plain(name, tensor, block)
        for name, by_index in experts.items():
            yield HfTensor(name, tuple(by_index[index] for index in sorted(by_index)))

    def _plain(self, name: str, tensor: SafeTensor, block: re.Match[str] | None) -> HfTensor:
        stem, _, suffix = name.rpartition(".")
        target = NAMES.get(stem)
        if block:
            part = BLOCK_NAMES.get(block[2])
            if block[2] == "post_attention_layernorm":
                part = self._architecture.mlp_norm
            target = None if part is None else f"blk.{block[1]}.{part}"
        if target is None:
            return HfTensor(name, (tensor,))  # surplus: the import names it
        centred = self._architecture.zero_centred and target.endswith("_norm") and not target.endswith("ssm_norm")
        return HfTensor(f"{target}.{suffix}", (tensor,), transform=(lambda values: values + 1) if centred else None)

    def _split_qkvz(self, prefix: str, tensor: SafeTensor) -> Iterator[HfTensor]:
        linear = self._config.linear_attention
        if linear is None:
            raise UserError(f"{self.path} has the tensor {tensor.name}, which its config.json does not know of.")
        values = linear.value_heads // linear.key_heads * linear.value_size
        head = 2 * linear.key_size + 2 * values
        if tensor.rows != linear.key_heads * head:
            yield HfTensor(f"{prefix}.attn_qkv.weight", (tensor,))  # misshapen: the import names it
            return
        heads = range(0, tensor.rows, head)
        cuts = (0, linear.key_size, 2 * linear.key_size, 2 * linear.key_size + values, head)
        query, key, value, gate = ([(first + start, first + stop) for first in heads] for start, stop in pairwise(cuts))
        yield HfTensor(f"{prefix}.attn_qkv.weight", (tensor,), (*query, *key, *value))
        yield HfTensor(f"{prefix}.attn_gate.weight", (tensor,), tuple(gate))

    @property
    def architecture(self) -> str:
        """See `Checkpoint.architecture`."""
        return self._architecture.name

    def config(self) -> ModelConfig:
        """See `Checkpoint.config`."""
        return self._config

    def files(self) -> list[Path]:
        """See `Checkpoint.files`."""
        return self._shards

    def release(self) -> None:
        """See `Checkpoint.release`; nothing is mapped."""

    def write_tokenizer(self, folder: Path) -> dict[str, Any]:
        """See `Checkpoint.write_tokenizer`."""
        return tokenizer_import.copy_hf_tokenizer(self.path, folder)


def _with_scales(loaded: dict[str, SafeTensor], path: Path) -> dict[str, SafeTensor]:
    """Join FP8 tensors with the scales of their blocks of 128 x 128 (`weight_scale_inv`)."""
    result = {}
    for name, tensor in loaded.items():
        if name.endswith(".weight_scale_inv"):
            continue
        if tensor.dtype == FLOAT8:
            scale = loaded.get(f"{name}_scale_inv")
            blocks = (-(-tensor.rows // 128), -(-tensor.columns // 128))
            if scale is None or scale.dtype == FLOAT8 or scale.shape != blocks:
                raise UserError(f"{path} lacks the scales {blocks} of the FP8 tensor {name}; download it again.")
            values = quants.dequantize(scale.read(0, scale.rows), scale.type).astype(np.float32)
            tensor = replace(tensor, block_scales=values.reshape(blocks))
        result[name] = tensor
    return result
