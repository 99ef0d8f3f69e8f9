"""Rows of a checkpoint's tensors as the arrays of a package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from gguf import quants

from lsp_agent.engine.architecture import WeightSpec
from lsp_agent.engine.blocks import BlockFormat, Blocks, pack_zero_points
from lsp_agent.engine.checkpoints.checkpoint import CheckpointTensor
from lsp_agent.engine.gguf_blocks import CARRIERS, reblock
from lsp_agent.engine.package import CORRECTION_BLOCK
from lsp_agent.engine.rounding import LARGEST_HALF, quantise, quantise_8bit
from lsp_agent.errors import UserError


def values_of(tensor: CheckpointTensor, start: int, stop: int) -> np.ndarray:
    """Rows as fp32 [stop - start, columns]; raises `UserError` where a value is infinite or no number."""
    raw = np.ascontiguousarray(tensor.read(start, stop))
    values = quants.dequantize(raw, tensor.type).astype(np.float32).reshape(stop - start, tensor.columns)
    if not np.isfinite(values).all():
        raise UserError(f"Tensor {tensor.name} has values that are no finite numbers; download the checkpoint again.")
    return values


def interleave(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Rows a0 b0 a1 b1 … of two arrays of equal shape; one array as it is."""
    if len(arrays) == 1:
        return arrays[0]
    return np.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])


def carry(tensor: CheckpointTensor, start: int, stop: int, form: BlockFormat) -> Blocks:
    """Rows in a format: exactly where it holds their codes, else rounded."""
    carrier = CARRIERS.get(tensor.type)
    if carrier is not None and carrier.format == replace(form, half_scales=False):
        carried = reblock(tensor.read(start, stop), tensor.type)
        # Where scales are kept in 16 bits, GGUF's symmetric types have them in 16 bits, too.
        return replace(carried, format=form, scales=carried.scales.astype(form.scale_dtype))
    if carrier is not None and carrier.format == BlockFormat(4, form.block) and form == BlockFormat(8, form.block):
        return reblock(tensor.read(start, stop), tensor.type).widen()
    return quantise(values_of(tensor, start, stop), form)


def vector_of(spec: WeightSpec, tensors: Sequence[CheckpointTensor]) -> np.ndarray:
    """The values of a weight of kind `vector`."""
    return np.concatenate([values_of(t, 0, t.rows).reshape(-1) for t in tensors]).reshape(spec.shape)


def floats_of(tensor: CheckpointTensor, start: int, stop: int, dtype: str) -> np.ndarray:
    """Rows as float32 or float16 [stop - start, columns]; raises `UserError` where 16 bits do not reach."""
    values = values_of(tensor, start, stop)
    if dtype == "float16" and np.abs(values).max(initial=0) > LARGEST_HALF:
        raise UserError(
            f"Tensor {tensor.name} has values beyond {LARGEST_HALF:.0f}, as no weight should; use another checkpoint."
        )
    return values.astype(dtype, copy=False)


def arrays_of(tensor: CheckpointTensor, form: BlockFormat, start: int, stop: int) -> dict[str, np.ndarray]:
    """Some rows as the arrays of a `LinearPart`, by field name."""
    carried = carry(tensor, start, stop, form)
    arrays = {"codes": carried.codes, "scales": carried.scales}
    if carried.zero_points is not None:
        arrays["zero_points"] = pack_zero_points(carried.zero_points, carried.format.bits)
    if carried.corrections is not None:
        rounded = quantise_8bit(carried.corrections, BlockFormat(8, CORRECTION_BLOCK))
        arrays["corrections"] = carried.corrections
        arrays["correction_codes"], arrays["correction_scales"] = rounded.codes, rounded.scales
    return arrays


def corrections_roundable(arrays: dict[str, np.ndarray]) -> bool:
    """Whether 8-bit corrections are as good as fp32 ones: they are unless a block's zero point had to be clipped."""
    return "corrections" not in arrays or bool((np.abs(arrays["corrections"]) <= np.abs(arrays["scales"])).all())
