"""Writes one weight after another into a package, a few rows at a time: carried exactly, or rounded by a scheme."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from gguf import quants

from lsp_agent.engine import quantisation
from lsp_agent.engine.architecture import WeightSpec
from lsp_agent.engine.checkpoints.checkpoint import CheckpointTensor, nbytes
from lsp_agent.engine.package import (
    CORRECTION_BLOCK,
    Experts,
    Extent,
    Linear,
    LinearPart,
    Rows,
    Weight,
    WeightsWriter,
)
from lsp_agent.engine.quantisation import BlockFormat, Scheme

CHUNK_VALUES = 1 << 22
"""Values converted at a time: bounds the memory of an import to some hundred megabytes."""

Tensors = Sequence[CheckpointTensor]


@dataclass(frozen=True)
class TensorReport:
    """How one tensor is carried; the errors compare with the checkpoint's own (dequantised) values."""

    name: str
    source_type: str
    bits: int
    block: int
    exact: bool
    relative_rms_error: float
    max_error: float


class WeightImporter:
    """Writes weights with `writer`; `reports` grows by one a tensor, `progress(bytes)` is told of source bytes."""

    def __init__(
        self,
        writer: WeightsWriter,
        scheme: Scheme,
        matched: Sequence[tuple[WeightSpec, Tensors]],
        progress: Callable[[int], None],
    ) -> None:
        self._writer, self._scheme, self._progress = writer, scheme, progress
        self._experts_of_block: dict[str, list[CheckpointTensor]] = {}
        for spec, tensors in matched:
            if spec.kind == "experts":
                self._experts_of_block.setdefault(_block_of(spec), []).extend(tensors)
        self.reports: list[TensorReport] = []

    def write(self, spec: WeightSpec, tensors: Tensors) -> Weight:
        """Write one weight and say where it lies."""
        if spec.kind == "vector":
            return self._vector(spec, tensors)
        if spec.kind == "rows":
            return self._rows(spec, tensors[0])
        if spec.kind == "experts":
            return self._experts(spec, tensors)
        return self._linear(spec, tensors)

    def _exact(self, name: str, tensor: CheckpointTensor, bits: int = 32, block: int = 1) -> None:
        self.reports.append(TensorReport(name, tensor.type.name, bits, block, True, 0.0, 0.0))

    def _vector(self, spec: WeightSpec, tensors: Tensors) -> Extent:
        values = np.concatenate([_values(t, 0, t.rows).reshape(-1) for t in tensors])
        extent = self._writer.reserve(spec.shape, "float32")
        self._writer.write_rows(extent, 0, values)
        self._progress(sum(nbytes(t) for t in tensors))
        self._exact(spec.name, tensors[0])
        return extent

    def _rows(self, spec: WeightSpec, tensor: CheckpointTensor) -> Rows:
        per_block, block_bytes = quants.GGML_QUANT_SIZES[tensor.type]
        extent = self._writer.reserve((tensor.rows, tensor.columns // per_block * block_bytes), "uint8")
        for start, stop in _chunks(tensor.rows, tensor.columns):
            raw = tensor.read(start, stop)
            self._writer.write_rows(extent, start, raw)
            self._progress(raw.nbytes)
        self._exact(spec.name, tensor, block_bytes * 8 // per_block, per_block)
        return Rows(tensor.type.name, extent)

    def _linear(self, spec: WeightSpec, tensors: Tensors) -> Linear:
        groups: list[tuple[BlockFormat | None, list[CheckpointTensor]]] = []
        for tensor in tensors:
            # Matrices of one format become one `MatMulNBits`, whatever their types (Q5_0 and Q8_0 are alike).
            form = self._scheme.format_of(tensor.type, tensor.columns, sensitive=spec.sensitive)
            if groups and groups[-1][0] == form:
                groups[-1][1].append(tensor)
            else:
                groups.append((form, [tensor]))
        parts = [self._dense(group) if form is None else self._part(group, form) for form, group in groups]
        return Linear(tensors[0].columns, tuple(parts))

    def _part(self, tensors: Tensors, form: BlockFormat) -> LinearPart:
        part = self._reserve(sum(t.rows for t in tensors), tensors[0].columns, form)
        first, roundable = 0, True
        for tensor in tensors:
            for start, stop in _chunks(tensor.rows, tensor.columns):
                arrays = _arrays(tensor, start, stop, form)
                self._write_arrays(part, first + start, arrays)
                roundable &= _roundable(arrays)
                self._progress(nbytes(tensor) * (stop - start) // tensor.rows)
            first += tensor.rows
            self.reports.append(_compare(tensor, form))
        return part if roundable else replace(part, correction_codes=None, correction_scales=None)

    def _reserve(self, rows: int, columns: int, form: BlockFormat) -> LinearPart:
        blocks = columns // form.block
        shapes = {
            "codes": ((rows, blocks, form.block * form.bits // 8), "uint8"),
            "scales": ((rows, blocks), "float32"),
        }
        if form.corrected:
            groups = -(-blocks // CORRECTION_BLOCK)
            shapes["zero_points"] = (rows, -(-blocks * form.bits // 8)), "uint8"
            shapes["corrections"] = (rows, blocks), "float32"
            shapes["correction_codes"] = (rows, groups, CORRECTION_BLOCK), "uint8"
            shapes["correction_scales"] = (rows, groups), "float32"
        return LinearPart(rows, form, **{name: self._writer.reserve(*shape) for name, shape in shapes.items()})

    def _write_arrays(self, part: LinearPart, start: int, arrays: dict[str, np.ndarray]) -> None:
        for name, extent in part.extents().items():
            self._writer.write_rows(extent, start, arrays[name])

    def _dense(self, tensors: Tensors) -> LinearPart:
        values = np.concatenate([_values(t, 0, t.rows) for t in tensors])
        extent = self._writer.reserve((values.shape[1], values.shape[0]), "float32")
        self._writer.write_rows(extent, 0, values.T)
        for tensor in tensors:
            self._exact(tensor.name, tensor)
            self._progress(nbytes(tensor))
        return LinearPart(len(values), None, values=extent)

    def _experts(self, spec: WeightSpec, tensors: Tensors) -> Experts:
        count, rows, columns = spec.shape
        alike = self._experts_of_block[_block_of(spec)]
        form = self._scheme.experts_format({t.type for t in alike}, {t.columns for t in alike})
        if form is None:
            part = LinearPart(count * rows, None, values=self._writer.reserve((count * rows, columns), "float32"))
        else:
            part = self._reserve(count * rows, columns, form)
        each = rows // len(tensors)  # rows of one expert in each source
        step = max(1, CHUNK_VALUES // (rows * columns))
        for first in range(0, count, step):
            last = min(first + step, count)
            sources = [_arrays(t, first * each, last * each, form) for t in tensors]
            arrays = {name: _interleave([source[name] for source in sources]) for name in sources[0]}
            self._write_arrays(part, first * rows, arrays)
            self._progress(sum(nbytes(t) for t in tensors) * (last - first) // count)
        for tensor in tensors:
            if form is None:
                self._exact(tensor.name, tensor)
            else:
                self.reports.append(_compare(tensor, form))
        return Experts(count, columns, part)


def _block_of(spec: WeightSpec) -> str:
    return spec.name.rpartition(".")[0]


def _chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK_VALUES // columns)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _values(tensor: CheckpointTensor, start: int, stop: int) -> np.ndarray:
    """Rows as fp32 [stop - start, columns]."""
    raw = np.ascontiguousarray(tensor.read(start, stop))
    return quants.dequantize(raw, tensor.type).astype(np.float32).reshape(stop - start, tensor.columns)


def _interleave(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Rows a0 b0 a1 b1 … of two arrays of equal shape; one array as it is."""
    if len(arrays) == 1:
        return arrays[0]
    return np.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])


def _carry(tensor: CheckpointTensor, start: int, stop: int, form: BlockFormat) -> quantisation.Blocks:
    carrier = quantisation.CARRIERS.get(tensor.type)
    if carrier is not None and carrier.format == form:
        return quantisation.reblock(tensor.read(start, stop), tensor.type)
    if carrier is not None and carrier.format == BlockFormat(4, form.block, False):
        return quantisation.widen(quantisation.reblock(tensor.read(start, stop), tensor.type))
    return quantisation.quantise(_values(tensor, start, stop), form)


def _arrays(tensor: CheckpointTensor, start: int, stop: int, form: BlockFormat | None) -> dict[str, np.ndarray]:
    """Some rows as the arrays of a `LinearPart`, by field name."""
    if form is None:
        return {"values": _values(tensor, start, stop)}
    carried = _carry(tensor, start, stop, form)
    arrays = {"codes": carried.codes, "scales": carried.scales}
    if carried.corrections is not None and carried.zero_points is not None:
        rounded = quantisation.quantise_8bit(carried.corrections, CORRECTION_BLOCK)
        arrays["zero_points"] = quantisation.pack_zero_points(carried.zero_points, carried.format.bits)
        arrays["corrections"] = carried.corrections
        arrays["correction_codes"], arrays["correction_scales"] = rounded.codes, rounded.scales
    return arrays


def _roundable(arrays: dict[str, np.ndarray]) -> bool:
    """Whether 8-bit corrections are as good as fp32 ones: they are unless a block's zero point had to be clipped."""
    return "corrections" not in arrays or bool((np.abs(arrays["corrections"]) <= np.abs(arrays["scales"])).all())


def _compare(tensor: CheckpointTensor, form: BlockFormat) -> TensorReport:
    """The error of a carried tensor, on rows spread over it: GGUF's formats are exact but for fp32 rounding."""
    count = min(tensor.rows, 16)
    starts = np.unique(np.linspace(0, tensor.rows - 1, count).astype(int)).tolist()
    reference = np.concatenate([_values(tensor, start, start + 1) for start in starts])
    carried = np.concatenate([_carry(tensor, start, start + 1, form).dequantise() for start in starts])
    error = carried - reference
    relative = float(np.linalg.norm(error) / max(float(np.linalg.norm(reference)), 1e-30))
    largest = float(np.abs(error).max())
    return TensorReport(tensor.name, tensor.type.name, form.bits, form.block, relative < 1e-6, relative, largest)
