"""A model package: a folder with the weights as `MatMulNBits` wants them, the config and the tokenizer.

config.json      format version, architecture, sizes, source file and its hash, special tokens
index.json       where each weight lies in weights.bin, and how it is carried
weights.bin      codes, scales and corrections; every tensor starts on a page, so that it can be mapped
tokenizer.json, tokenizer_config.json
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from lsp_agent.engine.architecture import ModelConfig
from lsp_agent.engine.blocks import BlockFormat, Blocks, transpose_codes, unpack_zero_points
from lsp_agent.errors import UserError

FORMAT_VERSION = 1
WEIGHTS = "weights.bin"
INDEX = "index.json"
PAGE = 4096
CORRECTION_BLOCK = 64


@dataclass(frozen=True)
class Extent:
    """A C-ordered array inside weights.bin: `offset` in bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class LinearPart:
    """Consecutive rows of a linear in one format; without one, `values` is dense [columns, rows], in 16 or 32 bits.

    Corrections are kept in fp32 and, for the fast graph, also as 8-bit codes in blocks of `CORRECTION_BLOCK`.
    """

    rows: int
    format: BlockFormat | None
    codes: Extent | None = None
    scales: Extent | None = None
    zero_points: Extent | None = None
    corrections: Extent | None = None
    correction_codes: Extent | None = None
    correction_scales: Extent | None = None
    values: Extent | None = None

    def extents(self) -> dict[str, Extent]:
        """The arrays that this part has, by field name."""
        present = {name: getattr(self, name) for name in _EXTENT_FIELDS}
        return {name: extent for name, extent in present.items() if extent is not None}


_EXTENT_FIELDS = tuple(field.name for field in fields(LinearPart) if field.name not in ("rows", "format"))


@dataclass(frozen=True)
class Linear:
    """A matrix [rows, columns] as parts stacked along its rows."""

    columns: int
    parts: tuple[LinearPart, ...]


@dataclass(frozen=True)
class Rows:
    """An embedding table as the checkpoint's own blocks; `type` is GGUF's name for them."""

    type: str
    blocks: Extent


@dataclass(frozen=True)
class Experts:
    """`count` matrices [rows, columns] stacked along their rows; dense values are not transposed here.

    MXFP4's codes lie column by column, [columns, rows / 2] for each matrix, as the GPU's kernels read them in place.
    """

    count: int
    columns: int
    part: LinearPart


Weight = Linear | Rows | Experts | Extent


class WeightsWriter:
    """Appends arrays to weights.bin; space is reserved first, so that a tensor can be written a few rows at a time."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._end = 0

    def reserve(self, shape: tuple[int, ...], dtype: str) -> Extent:
        """Set aside room for an array."""
        extent = Extent(-(-self._end // PAGE) * PAGE, shape, dtype)
        self._end = extent.offset + extent.nbytes
        return extent

    def write_rows(self, extent: Extent, start: int, rows: np.ndarray) -> None:
        """Write `rows` at index `start` of the first dimension."""
        row_bytes = extent.nbytes // extent.shape[0]
        self._file.seek(extent.offset + start * row_bytes)
        self._file.write(np.ascontiguousarray(rows, extent.dtype).data)

    @property
    def size(self) -> int:
        """Bytes of the file with all that was reserved: whole pages."""
        return -(-self._end // PAGE) * PAGE

    def finish(self) -> None:
        """Pad the file to a whole page."""
        self._file.truncate(self.size)


def encode_weight(weight: Weight) -> dict[str, Any]:
    """A weight as index.json has it."""
    return {"kind": type(weight).__name__.lower(), **asdict(weight)}


def _extent(entry: dict[str, Any] | None) -> Extent | None:
    return None if entry is None else Extent(entry["offset"], tuple(entry["shape"]), entry["dtype"])


def decode_weight(entry: dict[str, Any]) -> Weight:
    """Inverse of `encode_weight`."""
    if entry["kind"] == "extent":
        return Extent(entry["offset"], tuple(entry["shape"]), entry["dtype"])
    if entry["kind"] == "rows":
        blocks = _extent(entry["blocks"])
        assert blocks is not None
        return Rows(entry["type"], blocks)
    if entry["kind"] == "experts":
        return Experts(entry["count"], entry["columns"], _decode_part(entry["part"]))
    return Linear(entry["columns"], tuple(_decode_part(part) for part in entry["parts"]))


def _decode_part(part: dict[str, Any]) -> LinearPart:
    return LinearPart(
        rows=part["rows"],
        format=None if part["format"] is None else BlockFormat(**part["format"]),
        **{key: _extent(part.get(key)) for key in _EXTENT_FIELDS},
    )


def write_index(folder: Path, config: ModelConfig, about: dict[str, Any], weights: dict[str, Weight]) -> None:
    """Write config.json and index.json."""
    header = {"format": FORMAT_VERSION, "model": config.to_json(), **about}
    (folder / "config.json").write_text(json.dumps(header, indent=1), encoding="utf-8")
    index = {name: encode_weight(weight) for name, weight in weights.items()}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


class Package:
    """An imported model on disk; raises `UserError` when the folder is not a complete package of this version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            header = json.loads((path / "config.json").read_text(encoding="utf-8"))
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))
            if header["format"] != FORMAT_VERSION:
                raise UserError(
                    f"{path} was made by another version of lsp-agent; remove it with `lsp-agent model rm` and install "
                    "it again."
                )
            self.header: dict[str, Any] = header
            self.config = ModelConfig.from_json(header["model"])
            self.weights: dict[str, Weight] = {name: decode_weight(entry) for name, entry in index.items()}
            self._bytes = np.memmap(path / WEIGHTS, np.uint8, "r")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not a complete model package; remove it with `lsp-agent model rm` and install it again."
            ) from error
        if self._bytes.size < self._needed():
            raise UserError(f"{path / WEIGHTS} is truncated; remove it with `lsp-agent model rm` and install it again.")

    def _needed(self) -> int:
        extents: list[Extent] = []
        for weight in self.weights.values():
            if isinstance(weight, Linear | Experts):
                for part in weight.parts if isinstance(weight, Linear) else (weight.part,):
                    extents += part.extents().values()
            else:
                extents.append(weight.blocks if isinstance(weight, Rows) else weight)
        return max((e.offset + e.nbytes for e in extents), default=0)

    def array(self, extent: Extent) -> np.ndarray:
        """A read-only view of the mapped file."""
        return self._bytes[extent.offset : extent.offset + extent.nbytes].view(extent.dtype).reshape(extent.shape)

    def blocks(self, part: LinearPart, experts: int | None = None) -> Blocks:
        """The quantised blocks, row by row, of a part that has a format; `experts`: how many it stacks, if it does."""
        assert part.format is not None and part.codes is not None and part.scales is not None
        corrections = None if part.corrections is None else self.array(part.corrections)
        codes, zero_points = self.array(part.codes), None
        if part.format.element == "e2m1" and experts is not None:
            rows = part.rows // experts
            columns = codes.shape[1] * part.format.block
            codes = transpose_codes(codes.reshape(experts, columns, rows // 2)).reshape(codes.shape)
        if part.zero_points is not None:
            zero_points = unpack_zero_points(self.array(part.zero_points), part.format.bits, codes.shape[1])
        return Blocks(part.format, codes, self.array(part.scales), corrections, zero_points)
