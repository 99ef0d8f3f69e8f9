"""What a package takes when it runs on a CPU: main memory, and disk beside the package."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lsp_agent.engine.package import Experts, Extent, Linear, LinearPart, Rows, Weight

RUNTIME_BYTES = 500_000_000
"""Python, the runtime, and a cache of a few thousand tokens."""
PACKED = 1.5
"""What was measured of dense models, over the size of the package: packed weights and pages of the mapped file."""
_SUMS = 8
"""Bytes of a block's scale and sum of codes, as the kernels of `QMoE` keep them beside the codes."""


@dataclass(frozen=True)
class Footprint:
    """Bytes; `memory` is an estimate and the most: experts that come from the prepacked file page in and out.

    `prepacked` is the size of that file (`prepacked.py`), which the first load on a CPU makes; 0 if there is none.
    """

    memory: int
    prepacked: int


def footprint(weights: Iterable[Weight]) -> Footprint:
    """The footprint of a package with these weights."""
    memory, prepacked = float(RUNTIME_BYTES), 0
    for weight in weights:
        if isinstance(weight, Experts):
            memory += _experts(weight.part)
            prepacked += _prepacked(weight.part)
        elif isinstance(weight, Linear):
            memory += sum(map(_linear, weight.parts))
        else:
            memory += PACKED * (weight.blocks if isinstance(weight, Rows) else weight).nbytes
    return Footprint(int(memory), prepacked)


def _linear(part: LinearPart) -> float:
    if part.values is not None:
        return max(PACKED * part.values.nbytes, _as_fp32(part.values))
    return PACKED * sum(extent.nbytes for extent in part.extents().values())


def _experts(part: LinearPart) -> int:
    if part.values is not None:
        return _as_fp32(part.values)
    assert part.format is not None and part.codes is not None and part.scales is not None
    widened = 2 if part.format.element == "e2m1" else 1  # no CPU kernel reads MXFP4: 8-bit codes stand for it
    return widened * part.codes.nbytes + _SUMS * _count(part.scales)


def _prepacked(part: LinearPart) -> int:
    """As `expert_packing.packed_bytes` counts it; 16-bit scales are widened into the file as well."""
    if part.format is None or part.format.element == "e2m1":
        return 0
    assert part.codes is not None and part.scales is not None
    return part.codes.nbytes + (_SUMS + (4 if part.format.half_scales else 0)) * _count(part.scales)


def _as_fp32(values: Extent) -> int:
    return 4 * _count(values)


def _count(extent: Extent) -> int:
    count = 1
    for size in extent.shape:
        count *= size
    return count
