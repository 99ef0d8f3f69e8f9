"""One safetensors file: its header, and the rows of its tensors as bytes of the mapped file. Never runs code of it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from ml_dtypes import float8_e4m3fn

from lsp_agent.errors import UserError

MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""
TYPES = {"F32": Type.F32, "F16": Type.F16, "BF16": Type.BF16}
FLOAT8 = "F8_E4M3"
FLOAT8_BLOCK = 128
_WIDTH = {"F32": 4, "F16": 2, "BF16": 2, FLOAT8: 1}
_FLOAT8_VALUES = np.arange(256, dtype=np.uint8).view(float8_e4m3fn).astype(np.float32)


@dataclass(frozen=True)
class SafeTensor:
    """A tensor as `raw` bytes [rows, bytes a row]; rows are all dimensions but the last, one for a vector.

    Of FP8 tensors `block_scales` [rows / 128, columns / 128] multiply the blocks; such rows are read as fp32.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: np.ndarray
    block_scales: np.ndarray | None = None

    @property
    def rows(self) -> int:
        """Rows, all dimensions but the last taken together."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Values a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def type(self) -> Type:
        """The type that `read` returns."""
        return TYPES.get(self.dtype, Type.F32)

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """Bytes [n, bytes a row] of `type`."""
        raw = self.raw[rows]
        if self.dtype != FLOAT8:
            return raw
        assert self.block_scales is not None
        index = np.arange(self.rows)[rows] // FLOAT8_BLOCK
        scales = np.repeat(self.block_scales[index], FLOAT8_BLOCK, axis=1)[:, : self.columns]
        return (_FLOAT8_VALUES[raw] * scales).view(np.uint8)


def read_safetensors(path: Path) -> dict[str, SafeTensor]:
    """The tensors of a file by name; raises `UserError` when it is truncated, damaged or holds other types."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
                raise ValueError("no header")
            header = json.loads(file.read(length))
        data = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.empty(0, np.uint8)
        header.pop("__metadata__", None)
        return {name: _tensor(name, entry, data) for name, entry in header.items()}
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}; check the path.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); download it again.") from error


def _tensor(name: str, entry: dict[str, Any], data: np.ndarray) -> SafeTensor:
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _WIDTH:
        raise UserError(f"Tensor {name} has the type {dtype}, which is not supported; use a BF16 or FP8 checkpoint.")
    shape = tuple(int(n) for n in shape)
    if end - start != math.prod(shape) * _WIDTH[dtype] or not 0 <= start <= end <= data.size:
        raise ValueError(f"tensor {name} has a wrong size")
    rows = math.prod(shape[:-1])
    return SafeTensor(name, str(dtype), shape, data[start:end].reshape(rows, -1))
