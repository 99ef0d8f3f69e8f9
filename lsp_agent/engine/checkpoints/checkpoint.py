"""What an import reads: a checkpoint of either container, presented under GGUF's tensor names and layouts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lsp_agent.engine.architecture import ModelConfig
from lsp_agent.errors import UserError


class CheckpointTensor(Protocol):
    """One tensor: `rows` x `columns` values (a vector has one row) of `type`."""

    @property
    def name(self) -> str:
        """GGUF's name."""

    @property
    def type(self) -> GGMLQuantizationType:
        """How the values are stored."""

    @property
    def rows(self) -> int:
        """Rows, all dimensions but the innermost taken together."""

    @property
    def columns(self) -> int:
        """Values a row."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """The bytes [stop - start, bytes a row] of some rows."""


class Checkpoint(Protocol):
    """A checkpoint on disk, opened: nothing but its headers has been read."""

    path: Path

    @property
    def tensors(self) -> Mapping[str, CheckpointTensor]:
        """The tensors by GGUF's names."""

    @property
    def architecture(self) -> str:
        """GGUF's name of the architecture; raises `UserError` for one that the engine does not run."""

    def config(self) -> ModelConfig:
        """The model's numbers; raises `UserError` when one is missing or a feature is not supported."""

    def files(self) -> list[Path]:
        """Every file that holds weights."""

    def release(self) -> None:
        """Give back the memory of what was read: pages of mapped files."""

    def write_tokenizer(self, folder: Path) -> dict[str, Any]:
        """Write tokenizer.json and tokenizer_config.json; returns the ids of the special tokens."""


def nbytes(tensor: CheckpointTensor) -> int:
    """Size of a tensor in the checkpoint."""
    per_block, block_bytes = GGML_QUANT_SIZES[tensor.type]
    return tensor.rows * (tensor.columns // per_block) * block_bytes


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file or a Hugging Face folder; raises `UserError` for anything else and for damaged files."""
    from lsp_agent.engine.checkpoints.gguf_file import GgufFile
    from lsp_agent.engine.checkpoints.hf_checkpoint import HfCheckpoint

    if path.is_dir():
        return HfCheckpoint(path)
    if path.suffix == ".safetensors":
        raise UserError(f"{path} is one file of a checkpoint; give the folder that holds it and its config.json.")
    return GgufFile(path)
