"""GGUF checkpoints in, model packages out: tensor by tensor, a few rows at a time, atomically."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import quants

from lsp_agent.engine import quantisation, tokenizer_import
from lsp_agent.engine.architecture import WeightSpec
from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.decoder import decoder_weights
from lsp_agent.engine.gguf_file import GgufFile, GgufTensor
from lsp_agent.engine.package import (
    CORRECTION_BLOCK,
    WEIGHTS,
    Linear,
    LinearPart,
    Rows,
    Weight,
    WeightsWriter,
    write_index,
)
from lsp_agent.errors import UserError

CHUNK_VALUES = 1 << 22
"""Values converted at a time: bounds the memory of an import to some hundred megabytes."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TensorReport:
    """How one tensor is carried; the errors compare with GGUF's own dequantised values."""

    name: str
    source_type: str
    bits: int
    block: int
    exact: bool
    relative_rms_error: float
    max_error: float


@dataclass(frozen=True)
class ImportReport:
    """What an import did; `sha256` is the source file's."""

    sha256: str
    package_bytes: int
    tensors: tuple[TensorReport, ...]


def import_checkpoint(source: Path, package: Path, *, on_progress: Progress | None = None) -> ImportReport:
    """Convert the GGUF file `source` into the folder `package`, which must not exist yet or is replaced.

    The folder appears only when it is complete. `on_progress(done, total)` counts source bytes. Raises `UserError`
    for a damaged file, an unsupported architecture or tensor type, and a full disk.
    """
    file = GgufFile(source)
    kind = architecture(str(file.require("general.architecture")))
    config = kind.read_config(file)
    specs = decoder_weights(kind, config)
    tensors = {spec.name: _sources(file, spec) for spec in specs}
    package.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{package.name}-", dir=package.parent))
    try:
        tokens = tokenizer_import.write_tokenizer(file, folder)
        progress = _Meter(on_progress, 2 * source.stat().st_size)
        digest = _sha256(source, progress)
        weights: dict[str, Weight] = {}
        reports: list[TensorReport] = []
        with (folder / WEIGHTS).open("wb") as handle:
            writer = WeightsWriter(handle)
            for spec in specs:
                weights[spec.name] = _WRITERS[spec.kind](writer, spec, tensors[spec.name], reports, progress)
            writer.finish()
        about = {"source": {"file": source.name, "sha256": digest}, "tokens": tokens}
        write_index(folder, config, about, weights)
        size = sum(path.stat().st_size for path in folder.iterdir())
        if package.exists():
            shutil.rmtree(package)
        folder.chmod(0o755)
        folder.rename(package)
    except OSError as error:
        raise UserError(
            f"Cannot write {package}: {error.strerror}; free some space or choose another place."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    progress.finish()
    return ImportReport(digest, size, tuple(reports))


class _Meter:
    def __init__(self, report: Progress | None, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def add(self, count: int) -> None:
        self._done = min(self._done + count, self._total)
        if self._report:
            self._report(self._done, self._total)

    def finish(self) -> None:
        self.add(self._total)


def _sha256(path: Path, progress: _Meter) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
            progress.add(len(chunk))
    return digest.hexdigest()


def _sources(file: GgufFile, spec: WeightSpec) -> list[GgufTensor]:
    names = spec.sources
    if spec.fallback and not any(name in file.tensors for name in names):
        names = (spec.fallback,)
    missing = [name for name in names if name not in file.tensors]
    if missing:
        raise UserError(f"{file.path} lacks the tensor {missing[0]}; use a complete checkpoint of the model.")
    tensors = [file.tensors[name] for name in names]
    for tensor in tensors:
        if tensor.type not in quantisation.SUPPORTED:
            raise UserError(
                f"Tensor {tensor.name} has the type {tensor.type.name}, which is not supported; "
                f"use a checkpoint quantised to one of {', '.join(t.name for t in quantisation.SUPPORTED)}."
            )
    if spec.kind == "vector":
        shape: tuple[int, ...] = (sum(t.rows * t.columns for t in tensors),)
    else:
        shape = (sum(t.rows for t in tensors), tensors[0].columns)
    if shape != spec.shape or any(t.columns != tensors[0].columns for t in tensors if spec.kind != "vector"):
        raise UserError(f"{file.path} is damaged: {names[0]} has shape {shape}, not {spec.shape} as its config says.")
    return tensors


def _row_chunks(tensor: GgufTensor) -> Iterator[tuple[int, np.ndarray]]:
    step = max(1, CHUNK_VALUES // tensor.columns)
    for start in range(0, tensor.rows, step):
        yield start, tensor.raw[start : start + step]


def _write_vector(
    writer: WeightsWriter, spec: WeightSpec, tensors: list[GgufTensor], reports: list[TensorReport], progress: _Meter
) -> Weight:
    values = np.concatenate([quants.dequantize(t.raw, t.type).reshape(-1) for t in tensors]).astype(np.float32)
    extent = writer.reserve(spec.shape, "float32")
    writer.write_rows(extent, 0, values)
    progress.add(sum(t.raw.nbytes for t in tensors))
    reports.append(TensorReport(spec.name, tensors[0].type.name, 32, 1, True, 0.0, 0.0))
    return extent


def _write_rows(
    writer: WeightsWriter, spec: WeightSpec, tensors: list[GgufTensor], reports: list[TensorReport], progress: _Meter
) -> Weight:
    (tensor,) = tensors
    extent = writer.reserve(tensor.raw.shape, "uint8")
    for start, raw in _row_chunks(tensor):
        writer.write_rows(extent, start, raw)
        progress.add(raw.nbytes)
    per_block, block_bytes = quants.GGML_QUANT_SIZES[tensor.type]
    reports.append(TensorReport(spec.name, tensor.type.name, block_bytes * 8 // per_block, per_block, True, 0.0, 0.0))
    return Rows(tensor.type.name, extent)


def _write_linear(
    writer: WeightsWriter, _: WeightSpec, tensors: list[GgufTensor], reports: list[TensorReport], progress: _Meter
) -> Weight:
    groups: list[list[GgufTensor]] = []
    for tensor in tensors:
        # Matrices of one format become one `MatMulNBits`, whatever their types (Q5_0 and Q8_0 are alike).
        if groups and _format(groups[-1][0]) == _format(tensor):
            groups[-1].append(tensor)
        else:
            groups.append([tensor])
    parts = tuple(_write_part(writer, group, reports, progress) for group in groups)
    return Linear(tensors[0].columns, parts)


def _format(tensor: GgufTensor) -> quantisation.BlockFormat | None:
    carrier = quantisation.CARRIERS.get(tensor.type)
    return carrier.format if carrier else None


def _write_part(
    writer: WeightsWriter, tensors: list[GgufTensor], reports: list[TensorReport], progress: _Meter
) -> LinearPart:
    rows, columns = sum(t.rows for t in tensors), tensors[0].columns
    form = _format(tensors[0])
    if form is None:
        return _write_dense(writer, tensors, rows, columns, reports, progress)
    blocks = columns // form.block
    shapes = {"codes": ((rows, blocks, form.block * form.bits // 8), "uint8"), "scales": ((rows, blocks), "float32")}
    if form.corrected:
        groups = -(-blocks // CORRECTION_BLOCK)
        shapes["zero_points"] = (rows, -(-blocks * form.bits // 8)), "uint8"
        shapes["corrections"] = (rows, blocks), "float32"
        shapes["correction_codes"] = (rows, groups, CORRECTION_BLOCK), "uint8"
        shapes["correction_scales"] = (rows, groups), "float32"
    part = LinearPart(rows, form, **{name: writer.reserve(*shape) for name, shape in shapes.items()})
    first, roundable = 0, True
    for tensor in tensors:
        for start, raw in _row_chunks(tensor):
            arrays = _arrays(quantisation.reblock(raw, tensor.type))
            for name, extent in part.extents().items():
                writer.write_rows(extent, first + start, arrays[name])
            roundable &= _roundable(arrays)
            progress.add(raw.nbytes)
        first += tensor.rows
        reports.append(_compare(tensor, form))
    return part if roundable else replace(part, correction_codes=None, correction_scales=None)


def _roundable(arrays: dict[str, np.ndarray]) -> bool:
    """Whether 8-bit corrections are as good as fp32 ones: they are unless a block's zero point had to be clipped."""
    return "corrections" not in arrays or bool((np.abs(arrays["corrections"]) <= np.abs(arrays["scales"])).all())


def _arrays(carried: quantisation.Blocks) -> dict[str, np.ndarray]:
    arrays = {"codes": carried.codes, "scales": carried.scales}
    if carried.corrections is not None and carried.zero_points is not None:
        rounded = quantisation.quantise_8bit(carried.corrections, CORRECTION_BLOCK)
        arrays["zero_points"] = quantisation.pack_zero_points(carried.zero_points, carried.format.bits)
        arrays["corrections"] = carried.corrections
        arrays["correction_codes"], arrays["correction_scales"] = rounded.codes, rounded.scales
    return arrays


def _compare(tensor: GgufTensor, form: quantisation.BlockFormat) -> TensorReport:
    """The error of a carried tensor, on rows spread over it: the formats are exact but for fp32 rounding."""
    sample = np.ascontiguousarray(tensor.raw[:: max(1, tensor.rows // 16)])
    reference = quants.dequantize(sample, tensor.type)
    error = quantisation.reblock(sample, tensor.type).dequantise() - reference
    largest = float(np.abs(error).max())
    relative = float(np.linalg.norm(error) / max(float(np.linalg.norm(reference)), 1e-30))
    return TensorReport(tensor.name, tensor.type.name, form.bits, form.block, relative < 1e-6, relative, largest)


def _write_dense(
    writer: WeightsWriter,
    tensors: list[GgufTensor],
    rows: int,
    columns: int,
    reports: list[TensorReport],
    progress: _Meter,
) -> LinearPart:
    values = np.concatenate([quants.dequantize(t.raw, t.type).reshape(t.rows, columns) for t in tensors])
    extent = writer.reserve((columns, rows), "float32")
    writer.write_rows(extent, 0, values.T)
    for tensor in tensors:
        reports.append(TensorReport(tensor.name, tensor.type.name, 32, 1, True, 0.0, 0.0))
        progress.add(tensor.raw.nbytes)
    return LinearPart(rows, None, values=extent)


_WRITERS = {"vector": _write_vector, "rows": _write_rows, "linear": _write_linear}
