"""A GGUF file as a `Checkpoint`: validated tensors of raw quantised blocks plus metadata, read by PyPI `gguf`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

from lsp_agent.engine.architecture import ModelConfig
from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.architectures.config import gguf_config
from lsp_agent.engine.checkpoints import tokenizer_import
from lsp_agent.errors import UserError

MAGIC = b"GGUF"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `rows` x `columns` values (a vector has one row) of `type`, as bytes [rows, bytes a row]."""

    name: str
    type: GGMLQuantizationType
    rows: int
    columns: int
    raw: np.ndarray

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `CheckpointTensor.read`."""
        return self.raw[start:stop]


class GgufFile:
    """Opens `path`; raises `UserError` for a file that is not GGUF, is truncated, or is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise UserError(f"Cannot read {path}: {error.strerror}; check the path.") from error
        if magic != MAGIC:
            raise UserError(f"{path} is not a GGUF file (it does not start with 'GGUF'); give a GGUF checkpoint.")
        try:
            reader = GGUFReader(path)
        except Exception as error:  # gguf raises whatever numpy stumbles over when bytes are missing or wrong
            raise UserError(f"{path} is truncated or damaged ({error}); download it again.") from error
        self._fields = reader.fields
        self.tensors: Mapping[str, GgufTensor] = {t.name: self._tensor(t) for t in reader.tensors}

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
        _ = self.architecture  # says so when it is unknown, before any number is missed
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None:
            raise UserError(f"{self.path} lacks the tensor token_embd.weight; use a complete checkpoint of the model.")
        return gguf_config(self, vocabulary=embedding.rows)

    def files(self) -> list[Path]:
        """See `Checkpoint.files`."""
        return [self.path]

    def write_tokenizer(self, folder: Path) -> dict[str, Any]:
        """See `Checkpoint.write_tokenizer`."""
        return tokenizer_import.write_gguf_tokenizer(self, folder)
