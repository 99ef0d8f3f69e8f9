"""How exactly an import carries each tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType, quants

from lsp_agent.engine.blocks import BlockFormat
from lsp_agent.engine.checkpoints.checkpoint import CheckpointTensor
from lsp_agent.engine.checkpoints.conversion import carry, floats_of, values_of

COMPARED_ROWS = 64
"""Rows of each tensor whose error is measured."""


@dataclass(frozen=True)
class TensorReport:
    """How one tensor of `weight` is carried.

    Errors compare with the checkpoint's own (dequantised) values, in rows spread over the tensor; `rms` is the root
    mean square of these. `values` counts the whole tensor's, `stored_bits` the bits of one with its share of scales.
    """

    weight: str
    name: str
    values: int
    source_type: str
    bits: int
    block: int
    stored_bits: float
    exact: bool
    rms: float
    relative_rms_error: float
    max_error: float
    carried_as: str
    """Code width and block in words."""


@dataclass(frozen=True)
class _Sample:
    """Some rows of a tensor, as a tensor."""

    name: str
    type: GGMLQuantizationType
    rows: int
    columns: int
    raw: np.ndarray

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.raw[start:stop]


def _sample(tensor: CheckpointTensor) -> _Sample:
    starts = np.unique(np.linspace(0, tensor.rows - 1, min(tensor.rows, COMPARED_ROWS)).astype(int)).tolist()
    raw = np.concatenate([tensor.read(start, start + 1) for start in starts])
    return _Sample(tensor.name, tensor.type, len(raw), tensor.columns, raw)


def compare(weight: str, tensor: CheckpointTensor, form: BlockFormat | GGMLQuantizationType) -> TensorReport:
    """The error of a carried tensor: GGUF's formats are exact but for fp32 rounding."""
    sample = _sample(tensor)
    reference = values_of(sample, 0, sample.rows)
    if isinstance(form, BlockFormat):
        carried = carry(sample, 0, sample.rows, form).dequantise()
        codes, block, stored = form.bits, form.block, form.bits_a_weight
    else:
        block, block_bytes = quants.GGML_QUANT_SIZES[form]
        stored = block_bytes * 8 / block
        codes = int(stored)
        halved = form == GGMLQuantizationType.F16
        carried = floats_of(sample, 0, sample.rows, "float16").astype(np.float32) if halved else reference
    error = carried - reference
    relative = float(np.linalg.norm(error) / max(float(np.linalg.norm(reference)), 1e-30))
    rms = float(np.sqrt(np.mean(np.square(reference, dtype=np.float64))))
    largest = float(np.abs(error).max(initial=0))
    about = (weight, tensor.name, tensor.rows * tensor.columns, tensor.type.name)
    return TensorReport(
        *about, codes, block, stored, relative < 1e-6, rms, relative, largest, _in_words(form, codes, block)
    )


def _in_words(form: BlockFormat | GGMLQuantizationType, bits: int, block: int) -> str:
    if block == 1:
        return f"{bits} bits"
    if isinstance(form, BlockFormat) and form.element == "e2m1":
        return f"MXFP4 / {block}"
    zero_points = isinstance(form, BlockFormat) and form.asymmetric
    return f"{bits} bits{' and zero points' if zero_points else ''} / {block}"
