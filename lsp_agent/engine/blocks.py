"""Quantised matrices: codes in blocks of consecutive columns that share a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Array = np.ndarray

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of the 4-bit floats of MXFP4 by code (OCP Microscaling Formats 1.0)."""
E8M0_BIAS = 127
"""MXFP4's scales are powers of two: a byte `b` stands for 2^(b - 127)."""


@dataclass(frozen=True)
class BlockFormat:
    """How a matrix is carried: code width, columns a block, and what blocks have besides codes and a scale.

    `corrected`: integer zero points and a float added to every value of the block. `asymmetric`: integer zero points
    only. `element`: codes are integers less a zero point, or MXFP4's floats, whose scales are powers of two.
    `half_scales`: scales are stored in 16 bits.
    """

    bits: int
    block: int
    corrected: bool = False
    asymmetric: bool = False
    element: Literal["int", "e2m1"] = "int"
    half_scales: bool = False

    @property
    def zero_point(self) -> int:
        """The code that stands for zero: the default of `MatMulNBits`."""
        return 1 << (self.bits - 1)

    @property
    def scale_dtype(self) -> str:
        """The type of the stored scales; uint8 are exponents, see `E8M0_BIAS`."""
        if self.element == "e2m1":
            return "uint8"
        return "float16" if self.half_scales else "float32"

    @property
    def bits_a_weight(self) -> float:
        """Stored bits for each value, scales, zero points and corrections included."""
        beside = 8 * np.dtype(self.scale_dtype).itemsize
        if self.corrected or self.asymmetric:
            beside += self.bits
        return self.bits + (beside + (32 + 8.5 if self.corrected else 0)) / self.block


@dataclass(frozen=True)
class Blocks:
    """Rows of one matrix: packed codes [rows, blocks, block * bits / 8], the first column in the low bits; scales,
    corrections and zero points (one uint8 each, not packed) [rows, blocks]. Without zero points, all are
    `format.zero_point`. Scales are floats of any width, MXFP4's the bytes of `E8M0_BIAS`."""

    format: BlockFormat
    codes: Array
    scales: Array
    corrections: Array | None = None
    zero_points: Array | None = None

    def dequantise(self) -> Array:
        """The fp32 matrix [rows, blocks * block] that these blocks stand for."""
        codes = self.codes
        if self.format.bits == 4:
            codes = unpack_nibbles(codes)
        if self.format.element == "e2m1":
            return (E2M1[codes] * exponents_to_scales(self.scales)[..., None]).reshape(len(codes), -1)
        zero = self.format.zero_point if self.zero_points is None else self.zero_points[..., None].astype(np.float32)
        values = (codes.astype(np.float32) - zero) * self.scales.astype(np.float32)[..., None]
        if self.corrections is not None:
            values += self.corrections[..., None]
        return values.reshape(len(values), -1)

    def widen(self) -> Blocks:
        """The same values exactly as symmetric 8-bit blocks with fp32 scales: of symmetric 4-bit blocks and of MXFP4,
        whose values are multiples of half its scale."""
        form = BlockFormat(8, self.format.block)
        codes = unpack_nibbles(self.codes)
        if self.format.element == "e2m1":
            return Blocks(form, (128 + 2 * E2M1[codes]).astype(np.uint8), exponents_to_scales(self.scales) / 2)
        assert self.format.bits == 4 and self.zero_points is None and self.corrections is None
        return Blocks(form, codes + np.uint8(form.zero_point - self.format.zero_point), self.scales.astype(np.float32))


def exponents_to_scales(exponents: Array) -> Array:
    """fp32 powers of two of MXFP4's scale bytes."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - E8M0_BIAS).astype(np.float32)


def pack_nibbles(codes: Array) -> Array:
    """[..., 2n] codes below 16 to [..., n] bytes, the first of each two in the low half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Array) -> Array:
    """The inverse of `pack_nibbles`."""
    return np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def transpose_codes(packed: Array) -> Array:
    """4-bit codes [matrices, rows, columns / 2] as those of the transposed matrices, [matrices, columns, rows / 2]."""
    return pack_nibbles(unpack_nibbles(packed).swapaxes(1, 2))


def pack_zero_points(zero_points: Array, bits: int) -> Array:
    """[rows, blocks] to the layout of `MatMulNBits`: [rows, ceil(blocks * bits / 8)], low bits first."""
    if bits == 8:
        return zero_points
    return pack_nibbles(np.pad(zero_points, ((0, 0), (0, zero_points.shape[1] % 2))))


def unpack_zero_points(packed: Array, bits: int, blocks: int) -> Array:
    """The inverse of `pack_zero_points`."""
    return packed if bits == 8 else unpack_nibbles(packed)[:, :blocks]
