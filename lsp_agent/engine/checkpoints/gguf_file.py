"""A GGUF file as a `Checkpoint`: validated tensors of raw quantised blocks plus metadata, read by PyPI `gguf`."""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

from lsp_agent.engine.architecture import ModelConfig
from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.architectures.config import gguf_config
from lsp_agent.engine.checkpoints import tokenizer_import
from lsp_agent.engine.checkpoints.gguf_layouts import GgufTensor, plain_tensors
from lsp_agent.engine.checkpoints.matching import listed
from lsp_agent.errors import UserError

MAGIC = b"GGUF"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
"""How llama.cpp names the files of a checkpoint that it has split; the first holds the metadata."""


class GgufFile:
    """Opens `path`, or all files of a split checkpoint, whichever of them is given.

    Raises `UserError` for a file that is not GGUF, is missing, truncated, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._files = _shards(path)
        self.path = self._files[0]
        readers = [_open(file) for file in self._files]
        self._fields = readers[0].fields
        self._maps = [reader.data.base for reader in readers]
        found = [self._tensor(t) for reader in readers for t in reader.tensors]
        self._stored = {tensor.name: tensor for tensor in found}
        expected = self.get("split.tensors.count")
        if len(self._files) > 1 and (int(expected or -1) != len(found) or len(self._stored) != len(found)):
            raise UserError(f"The {len(self._files)} files of {path} do not belong together; download them again.")

    @cached_property
    def tensors(self) -> Mapping[str, GgufTensor]:
        """See `Checkpoint.tensors`; raises `UserError` as `config` does."""
        return plain_tensors(self._stored, architecture(self.architecture), self.config())

    def _tensor(self, tensor: Any) -> GgufTensor:
        kind = GGMLQuantizationType(tensor.tensor_type)
        shape = [int(n) for n in tensor.shape]  # innermost dimension first
        columns, rows = shape[0], int(np.prod(shape[1:], dtype=np.int64))
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        expected = rows * (columns // per_block) * block_bytes
        if columns % per_block or tensor.data.nbytes != expected:
            raise UserError(f"{self.path} is damaged: tensor {tensor.name} has a wrong size; download it again.")
        return GgufTensor(tensor.name, kind, rows, columns, tensor.data.view(np.uint8).reshape(rows, -1))

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata value of `key`, converted to Python, or `default`."""
        field = self._fields.get(key)
        if field is None:
            return default
        try:
            return field.contents()
        except Exception as error:  # as above
            raise UserError(f"{self.path} is damaged: metadata {key} is unreadable; download it again.") from error

    def require(self, key: str) -> Any:
        """The metadata value of `key`; raises `UserError` when the file lacks it."""
        value = self.get(key)
        if value is None:
            raise UserError(f"{self.path} lacks the metadata {key}; use a complete GGUF checkpoint of the model.")
        return value

    @property
    def architecture(self) -> str:
        """See `Checkpoint.architecture`."""
        return architecture(str(self.require("general.architecture"))).name

    def config(self) -> ModelConfig:
        """See `Checkpoint.config`."""
        known = architecture(self.architecture)  # says so when it is unknown, before any number is missed
        embedding = self._stored.get("token_embd.weight")
        if embedding is None:
            raise UserError(f"{self.path} lacks the tensor token_embd.weight; use a complete checkpoint of the model.")
        biased = any(name.endswith((".attn_q.bias", ".attn_qkv.bias")) for name in self._stored)
        return gguf_config(self, known, vocabulary=embedding.rows, attention_bias=biased)

    def files(self) -> list[Path]:
        """See `Checkpoint.files`."""
        return list(self._files)

    def release(self) -> None:
        """See `Checkpoint.release`; the pages stay in the system's cache."""
        for mapped in self._maps:
            if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def write_tokenizer(self, folder: Path) -> dict[str, Any]:
        """See `Checkpoint.write_tokenizer`."""
        return tokenizer_import.write_gguf_tokenizer(self, folder)


def _open(path: Path) -> GGUFReader:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}; check the path.") from error
    if magic != MAGIC:
        raise UserError(f"{path} is not a GGUF file (it does not start with 'GGUF'); give a GGUF checkpoint.")
    try:
        return GGUFReader(path)
    except Exception as error:  # gguf raises whatever numpy stumbles over when bytes are missing or wrong
        raise UserError(f"{path} is truncated or damaged ({error}); download it again.") from error


def _shards(path: Path) -> list[Path]:
    name = _SHARD.match(path.name)
    if name is None:
        return [path]
    files = [path.with_name(f"{name['stem']}-{n:05}-of-{name['count']}.gguf") for n in range(1, int(name["count"]) + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{path.parent} lacks {listed(missing)}; download the rest of the checkpoint.")
    return files
