"""The schemes by which an import quantises: which matrices get which format."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from gguf import GGMLQuantizationType as Type

from lsp_agent.engine.blocks import BlockFormat
from lsp_agent.engine.gguf_blocks import CARRIERS

BLOCKS = (128, 64, 32, 16)
"""Columns a block that the kernels know."""


@dataclass(frozen=True)
class Scheme:
    """How floating-point matrices are rounded; None leaves them floating point.

    `ordinary` matrices, `sensitive` ones (head, router, small projections), and routed `experts`. GGUF's quantised
    matrices are carried as they are, but for experts in types that the kernels do not take: those get `refitted`.
    `halve`: what stays floating point is kept in 16 bits, but for vectors. Values of 16 bits are anyway.
    """

    ordinary: BlockFormat | None
    sensitive: BlockFormat | None
    experts: BlockFormat | None
    refitted: BlockFormat
    halve: bool

    def format_of(self, kind: Type, columns: int, sensitive: bool) -> BlockFormat | None:
        """The format of a matrix with rows of `columns` values of a GGUF type; None is dense floating point."""
        if kind in CARRIERS:
            return CARRIERS[kind].format
        return _fitting(self.sensitive if sensitive else self.ordinary, {columns})

    def experts_format(self, kinds: Collection[Type], columns: Collection[int]) -> BlockFormat | None:
        """The format of all the experts of a block, whose sources have these types and columns.

        The CPU's `QMoE` knows one width, one block size and no corrections: symmetric types in blocks of 32 are
        carried (4 bits in 8 where both occur), others refitted.
        """
        if not any(kind in CARRIERS for kind in kinds):
            return _fitting(self.experts, columns)
        formats = {CARRIERS[kind].format if kind in CARRIERS else EIGHT for kind in kinds}
        if formats == {FOUR}:
            return HALF_FOUR
        return EIGHT if formats <= {FOUR, EIGHT} else _fitting(self.refitted, columns)

    def float_type(self, kinds: Collection[Type]) -> Type:
        """F16 or F32: how values of these floating-point types are stored."""
        return Type.F16 if self.halve or Type.F32 not in kinds else Type.F32


def _fitting(form: BlockFormat | None, columns: Collection[int]) -> BlockFormat | None:
    """The format with its block, or the largest smaller one that divides the columns."""
    if form is None:
        return None
    fitting = [b for b in BLOCKS if b <= form.block and not any(count % b for count in columns)]
    if not fitting or (form.element == "e2m1" and fitting[0] != form.block):
        return None
    return replace(form, block=fitting[0])


EIGHT = BlockFormat(8, 32)
FOUR, FOUR_64, FOUR_128 = (BlockFormat(4, block) for block in (32, 64, 128))
FOUR_ASYMMETRIC = BlockFormat(4, 32, asymmetric=True)
MXFP4 = BlockFormat(4, 32, element="e2m1")
# The kernels of 4-bit experts take scales in 16 bits at no cost, MatMulNBits of the CPU provider does not.
HALF_FOUR = replace(FOUR, half_scales=True)
HALF_FOUR_ASYMMETRIC = replace(FOUR_ASYMMETRIC, half_scales=True)

SchemeName = Literal["keep", "int8", "int4", "int4-64", "int4-128", "int4-asymmetric", "mxfp4"]
SCHEMES: dict[SchemeName, Scheme] = {
    "keep": Scheme(None, None, None, refitted=EIGHT, halve=False),
    "int8": Scheme(EIGHT, EIGHT, EIGHT, refitted=EIGHT, halve=True),
    "int4": Scheme(FOUR, EIGHT, HALF_FOUR, refitted=HALF_FOUR_ASYMMETRIC, halve=True),
    "int4-64": Scheme(FOUR_64, EIGHT, replace(FOUR_64, half_scales=True), refitted=HALF_FOUR_ASYMMETRIC, halve=True),
    "int4-128": Scheme(FOUR_128, EIGHT, replace(FOUR_128, half_scales=True), refitted=HALF_FOUR_ASYMMETRIC, halve=True),
    "int4-asymmetric": Scheme(FOUR_ASYMMETRIC, EIGHT, HALF_FOUR_ASYMMETRIC, refitted=HALF_FOUR_ASYMMETRIC, halve=True),
    "mxfp4": Scheme(FOUR, EIGHT, MXFP4, refitted=MXFP4, halve=True),
}
