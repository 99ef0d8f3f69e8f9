"""One safetensors file: its header, and the rows of its tensors as bytes. Never runs code of it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
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


class ShardFile:
    """A file that several threads read at once: by `pread`, so that no page of it stays mapped into the process."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("rb", buffering=0)
        self._lock = Lock()

    def read(self, offset: int, count: int) -> np.ndarray:
        """`count` bytes at `offset`; raises `UserError` when the file lacks them or cannot be read."""
        buffer, done = np.empty(count, np.uint8), 0
        try:
            while done < count:
                done += (got := self._read_some(buffer.data[done:], offset + done))
                if not got:
                    raise UserError(f"{self._path} is truncated; download it again.")
        except OSError as error:
            raise UserError(f"Cannot read {self._path}: {error.strerror}; check its disk.") from error
        return buffer

    def _read_some(self, into: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [into], offset)
        with self._lock:  # Windows
            self._file.seek(offset)
            return self._file.readinto(into) or 0


@dataclass(frozen=True)
class SafeTensor:
    """A tensor whose bytes begin at `offset` of `file`; rows are all dimensions but the last, one for a vector.

    Of FP8 tensors `block_scales` [rows / 128, columns / 128] multiply the blocks; such rows are read as fp32.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: ShardFile
    offset: int
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

    def read(self, start: int, stop: int) -> np.ndarray:
        """The bytes [stop - start, bytes a row] of some rows, of `type`."""
        each = self.columns * _WIDTH[self.dtype]
        raw = self.file.read(self.offset + start * each, (stop - start) * each).reshape(stop - start, each)
        if self.dtype != FLOAT8:
            return raw
        assert self.block_scales is not None
        values = _FLOAT8_VALUES[raw]
        scales = np.repeat(self.block_scales, FLOAT8_BLOCK, axis=1)[:, : self.columns]
        for block in range(start // FLOAT8_BLOCK, -(-stop // FLOAT8_BLOCK)):
            values[max(block * FLOAT8_BLOCK - start, 0) : (block + 1) * FLOAT8_BLOCK - start] *= scales[block]
        return values.view(np.uint8)


def read_safetensors(path: Path) -> dict[str, SafeTensor]:
    """The tensors of a file by name; raises `UserError` when it is truncated, damaged or holds other types."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
                raise ValueError("no header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        shard = ShardFile(path)
        return {name: _tensor(name, entry, shard, 8 + length, size) for name, entry in header.items()}
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}; check the path.") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); download it again.") from error


def _tensor(name: str, entry: dict[str, Any], shard: ShardFile, data: int, size: int) -> SafeTensor:
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _WIDTH:
        raise UserError(f"Tensor {name} has the type {dtype}, which is not supported; use a BF16 or FP8 checkpoint.")
    shape = tuple(int(n) for n in shape)
    start, end = int(start), int(end)
    if min(shape, default=1) < 1 or end - start != math.prod(shape) * _WIDTH[dtype]:
        raise ValueError(f"tensor {name} has a wrong size")
    if not 0 <= start <= end <= size - data:
        raise ValueError(f"tensor {name} lies outside the file")
    return SafeTensor(name, str(dtype), shape, shard, data + start)
