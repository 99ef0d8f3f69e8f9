"""Writes one weight after another into a package, a few rows at a time: carried exactly, or rounded by a scheme."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
from gguf import GGMLQuantizationType, quants

from lsp_agent.engine.architecture import WeightSpec
from lsp_agent.engine.blocks import BlockFormat, transpose_codes
from lsp_agent.engine.checkpoints.checkpoint import CheckpointTensor, nbytes
from lsp_agent.engine.checkpoints.conversion import (
    arrays_of,
    corrections_roundable,
    floats_of,
    interleave,
    vector_of,
)
from lsp_agent.engine.checkpoints.tensor_reports import TensorReport, compare
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
from lsp_agent.engine.quantisation import Scheme
from lsp_agent.machine import usable_cores

CHUNK_VALUES = 1 << 20
"""Values that a thread converts at a time, some 40 MB with what comes of them; smaller is not faster."""
MOST_THREADS = 16
MOST_DENSE_VALUES = 1 << 26
"""Values of a dense matrix that are turned at a time."""

Tensors = Sequence[CheckpointTensor]


class WeightImporter:
    """Writes weights with `writer`: `reserve` every one, then `fill` them; `progress(bytes)` counts source bytes.

    What is reserved does not depend on any value, so the layout is known before anything is read.
    """

    def __init__(
        self,
        writer: WeightsWriter,
        scheme: Scheme,
        matched: Sequence[tuple[WeightSpec, Tensors]],
        progress: Callable[[int], None],
    ) -> None:
        self._writer, self._scheme, self._progress = writer, scheme, progress
        self._threads = min(usable_cores(), MOST_THREADS)
        self._experts_of_block: dict[str, list[CheckpointTensor]] = {}
        for spec, tensors in matched:
            if spec.kind == "experts":
                self._experts_of_block.setdefault(_block_of(spec), []).extend(tensors)

    def reserve(self, spec: WeightSpec, tensors: Tensors) -> Weight:
        """Set aside room for one weight."""
        if spec.kind == "vector":
            return self._writer.reserve(spec.shape, "float32")
        if spec.kind == "rows":
            table = tensors[0]
            kind = self._rows_type(table)
            per_block, block_bytes = quants.GGML_QUANT_SIZES[kind]
            blocks = self._writer.reserve((table.rows, table.columns // per_block * block_bytes), "uint8")
            return Rows(kind.name, blocks)
        if spec.kind == "experts":
            count, rows, columns = spec.shape
            form = self._experts_format(spec)
            if form is None:
                dense = self._writer.reserve((count * rows, columns), self._float_dtype(tensors))
                return Experts(count, columns, LinearPart(count * rows, None, values=dense))
            return Experts(count, columns, self._reserve_part(count * rows, columns, form))
        columns = tensors[0].columns
        parts = []
        for form, of in self._groups(spec, tensors):
            rows = sum(t.rows for t in of)
            if form is None:
                dense = self._writer.reserve((columns, rows), self._float_dtype(of))
                parts.append(LinearPart(rows, None, values=dense))
            else:
                parts.append(self._reserve_part(rows, columns, form))
        return Linear(columns, tuple(parts))

    def _rows_type(self, table: CheckpointTensor) -> GGMLQuantizationType:
        """An embedding stays as it is, but for fp32 where the scheme halves it."""
        return self._scheme.float_type({table.type}) if table.type == GGMLQuantizationType.F32 else table.type

    def _float_dtype(self, tensors: Tensors) -> str:
        half = self._scheme.float_type({t.type for t in tensors}) == GGMLQuantizationType.F16
        return "float16" if half else "float32"

    def fill(self, spec: WeightSpec, tensors: Tensors, weight: Weight) -> Weight:
        """Write one weight where `reserve` said; returns it as the index should name it."""
        if isinstance(weight, Extent):
            self._writer.write_rows(weight, 0, vector_of(spec, tensors))
            self._progress(sum(nbytes(t) for t in tensors))
        elif isinstance(weight, Rows):
            for start, stop in _chunks(tensors[0].rows, tensors[0].columns):
                raw = tensors[0].read(start, stop)
                self._progress(raw.nbytes)
                if weight.type != tensors[0].type.name:
                    raw = floats_of(tensors[0], start, stop, "float16").view(np.uint8)
                self._writer.write_rows(weight.blocks, start, raw)
        elif isinstance(weight, Experts):
            self._fill_experts(tensors, weight)
        else:
            groups = self._groups(spec, tensors)
            parts = [self._fill_part(of, part) for (_, of), part in zip(groups, weight.parts, strict=True)]
            return replace(weight, parts=tuple(parts))
        return weight

    def reports(self, spec: WeightSpec, tensors: Tensors) -> list[TensorReport]:
        """How exactly each tensor of a weight is, or would be, carried."""
        if spec.kind == "vector":
            return [compare(spec.name, tensor, GGMLQuantizationType.F32) for tensor in tensors]
        if spec.kind == "rows":
            return [compare(spec.name, tensors[0], self._rows_type(tensors[0]))]
        if spec.kind == "experts":
            form = self._experts_format(spec) or self._scheme.float_type({t.type for t in tensors})
            return [compare(spec.name, tensor, form) for tensor in tensors]
        return [
            compare(spec.name, tensor, form or self._scheme.float_type({t.type for t in of}))
            for form, of in self._groups(spec, tensors)
            for tensor in of
        ]

    def _experts_format(self, spec: WeightSpec) -> BlockFormat | None:
        alike = self._experts_of_block[_block_of(spec)]
        return self._scheme.experts_format({t.type for t in alike}, {t.columns for t in alike})

    def _groups(self, spec: WeightSpec, tensors: Tensors) -> list[tuple[BlockFormat | None, list[CheckpointTensor]]]:
        """Matrices of one format become one `MatMulNBits`, whatever their types (Q5_0 and Q8_0 are alike)."""
        groups: list[tuple[BlockFormat | None, list[CheckpointTensor]]] = []
        for tensor in tensors:
            form = self._scheme.format_of(tensor.type, tensor.columns, sensitive=spec.sensitive)
            if groups and groups[-1][0] == form:
                groups[-1][1].append(tensor)
            else:
                groups.append((form, [tensor]))
        return groups

    def _reserve_part(self, rows: int, columns: int, form: BlockFormat) -> LinearPart:
        blocks = columns // form.block
        shapes = {
            "codes": ((rows, blocks, form.block * form.bits // 8), "uint8"),
            "scales": ((rows, blocks), form.scale_dtype),
        }
        if form.corrected or form.asymmetric:
            shapes["zero_points"] = (rows, -(-blocks * form.bits // 8)), "uint8"
        if form.corrected:
            groups = -(-blocks // CORRECTION_BLOCK)
            shapes["corrections"] = (rows, blocks), "float32"
            shapes["correction_codes"] = (rows, groups, CORRECTION_BLOCK), "uint8"
            shapes["correction_scales"] = (rows, groups), "float32"
        return LinearPart(rows, form, **{name: self._writer.reserve(*shape) for name, shape in shapes.items()})

    def _fill_part(self, tensors: Tensors, part: LinearPart) -> LinearPart:
        if part.format is None:
            self._fill_dense(tensors, part)
            return part
        form, first, roundable = part.format, 0, True
        for tensor in tensors:
            pieces = _chunks(tensor.rows, tensor.columns)
            for (start, stop), arrays in self._converted(pieces, partial(arrays_of, tensor, form)):
                self._write_arrays(part, first + start, arrays)
                roundable &= corrections_roundable(arrays)
                self._progress(nbytes(tensor) * stop // tensor.rows - nbytes(tensor) * start // tensor.rows)
            first += tensor.rows
        return part if roundable else replace(part, correction_codes=None, correction_scales=None)

    def _fill_dense(self, tensors: Tensors, part: LinearPart) -> None:
        """Dense values are transposed, some columns at a time: the sources are read once for each such group."""
        assert part.values is not None
        columns = part.values.shape[0]
        step = max(1, MOST_DENSE_VALUES // part.rows)
        for left in range(0, columns, step):
            right, first = min(left + step, columns), 0
            turned = np.empty((right - left, part.rows), part.values.dtype)
            for tensor in tensors:
                for start, stop in _chunks(tensor.rows, tensor.columns):
                    values = floats_of(tensor, start, stop, part.values.dtype)
                    turned[:, first + start : first + stop] = values[:, left:right].T
                first += tensor.rows
            self._writer.write_rows(part.values, left, turned)
            done = sum(nbytes(t) for t in tensors)
            self._progress(done * right // columns - done * left // columns)

    def _fill_experts(self, tensors: Tensors, weight: Experts) -> None:
        rows, columns = tensors[0].rows, tensors[0].columns

        part, each = weight.part, rows // weight.count
        by_column = part.format is not None and part.format.element == "e2m1"

        def convert(start: int, stop: int) -> dict[str, np.ndarray]:
            if part.format is not None:
                sources = [arrays_of(t, part.format, start, stop) for t in tensors]
            else:
                assert part.values is not None
                sources = [{"values": floats_of(t, start, stop, part.values.dtype)} for t in tensors]
            arrays = {name: interleave([source[name] for source in sources]) for name in sources[0]}
            if by_column:
                codes = arrays["codes"]
                matrices = codes.reshape((stop - start) // each, each * len(tensors), -1)
                arrays["codes"] = transpose_codes(matrices).reshape(codes.shape)
            return arrays

        total = sum(nbytes(t) for t in tensors)
        for (start, stop), arrays in self._converted(
            _chunks(rows, columns * len(tensors), each if by_column else 1), convert
        ):
            self._write_arrays(part, start * len(tensors), arrays)
            self._progress(total * stop // rows - total * start // rows)

    def _converted(
        self, pieces: Iterable[tuple[int, int]], convert: Callable[[int, int], dict[str, np.ndarray]]
    ) -> Iterator[tuple[tuple[int, int], dict[str, np.ndarray]]]:
        """Convert pieces on all cores (NumPy releases the interpreter), in order and only a few ahead."""
        with ThreadPoolExecutor(self._threads) as pool:
            waiting: deque[tuple[tuple[int, int], Future[dict[str, np.ndarray]]]] = deque()
            for piece in pieces:
                waiting.append((piece, pool.submit(convert, *piece)))
                if len(waiting) > self._threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()

    def _write_arrays(self, part: LinearPart, start: int, arrays: dict[str, np.ndarray]) -> None:
        for name, extent in part.extents().items():
            self._writer.write_rows(extent, start, arrays[name])


def _block_of(spec: WeightSpec) -> str:
    return spec.name.rpartition(".")[0]


def _chunks(rows: int, columns: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows, of whole `unit`s."""
    step = max(1, CHUNK_VALUES // columns // unit) * unit
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
