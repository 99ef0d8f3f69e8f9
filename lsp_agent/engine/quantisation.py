"""GGUF's quantised blocks as `MatMulNBits` blocks.

`MatMulNBits` computes `A @ W.T` with `W = scale * (code - zero_point)` per block of consecutive columns, where the
zero point is an integer code. A GGUF type whose blocks have a minimum, `W = S * q - m`, is carried exactly as

    W = S * (q - z) + c,   z = round(m / S),   c = S * z - m

and `A @ W.T = MatMulNBits(A) + blocksum(A) @ c.T`. (A float zero point would say the same, but has no fast kernel.)
Since `|c| <= S / 2`, rounding `c` itself to 8 bits costs less than a thousandth of a code's step. Layouts of the GGUF
types follow ggml's `block_*` structures, the same that `gguf.quants.dequantize` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

Array = np.ndarray


@dataclass(frozen=True)
class BlockFormat:
    """How a matrix is carried: code width, columns a block, and whether blocks have a correction term."""

    bits: int
    block: int
    corrected: bool

    @property
    def zero_point(self) -> int:
        """The code that stands for zero: the default of `MatMulNBits`."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class Blocks:
    """Rows of one matrix: packed codes [rows, blocks, block * bits / 8]; scales, corrections and zero points (one
    uint8 each, not packed) [rows, blocks]. Without zero points, all are `format.zero_point`."""

    format: BlockFormat
    codes: Array
    scales: Array
    corrections: Array | None = None
    zero_points: Array | None = None

    def dequantise(self) -> Array:
        """The fp32 matrix [rows, blocks * block] that these blocks stand for."""
        codes = self.codes
        if self.format.bits == 4:
            codes = np.stack([codes & 0xF, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
        zero = self.format.zero_point if self.zero_points is None else self.zero_points[..., None].astype(np.float32)
        values = (codes.astype(np.float32) - zero) * self.scales[..., None]
        if self.corrections is not None:
            values += self.corrections[..., None]
        return values.reshape(len(values), -1)


def _half(raw: Array) -> Array:
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _nibbles(raw: Array) -> Array:
    """[..., n] bytes to [..., 2n] codes: low nibbles first, then high ones (ggml's order inside a block)."""
    return np.concatenate([raw & 0xF, raw >> 4], axis=-1)


def _fifth_bits(raw: Array) -> Array:
    """[..., 4] bytes to [..., 32] fifth bits, already shifted to 16."""
    return np.unpackbits(raw, axis=-1, bitorder="little") << 4


def _q4_0(b: Array) -> tuple[Array, Array, Array | None]:
    return _nibbles(b[..., 2:]), _half(b[..., :2]), None


def _q4_1(b: Array) -> tuple[Array, Array, Array | None]:
    scale = _half(b[..., :2])
    return _nibbles(b[..., 4:]), scale, 8 * scale + _half(b[..., 2:4])


def _q5_0(b: Array) -> tuple[Array, Array, Array | None]:
    return (_nibbles(b[..., 6:]) | _fifth_bits(b[..., 2:6])) + np.uint8(112), _half(b[..., :2]), None


def _q5_1(b: Array) -> tuple[Array, Array, Array | None]:
    scale = _half(b[..., :2])
    codes = (_nibbles(b[..., 8:]) | _fifth_bits(b[..., 4:8])) + np.uint8(112)
    return codes, scale, 16 * scale + _half(b[..., 2:4])


def _q8_0(b: Array) -> tuple[Array, Array, Array | None]:
    return b[..., 2:] ^ np.uint8(0x80), _half(b[..., :2]), None


def _k_scales(b: Array) -> tuple[Array, Array]:
    """Scales and minima [..., 8] of a K-quant super-block whose header is `b[..., :16]`."""
    scale, minimum = quants.Q4_K.get_scale_min(np.ascontiguousarray(b[..., 4:16]).reshape(-1, 12))
    shape = (*b.shape[:-1], 8)
    return _half(b[..., :2]) * scale.reshape(shape), _half(b[..., 2:4]) * minimum.reshape(shape)


def _q4_k(b: Array) -> tuple[Array, Array, Array | None]:
    scale, minimum = _k_scales(b)
    codes = _nibbles(b[..., 16:].reshape(*b.shape[:-1], 4, 32))
    return codes.reshape(*b.shape[:-1], 256), scale, 8 * scale - minimum


def _q5_k(b: Array) -> tuple[Array, Array, Array | None]:
    scale, minimum = _k_scales(b)
    low = _nibbles(b[..., 48:].reshape(*b.shape[:-1], 4, 32)).reshape(*b.shape[:-1], 8, 32)
    high = (b[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    codes = (low | (high << 4)) + np.uint8(112)
    return codes.reshape(*b.shape[:-1], 256), scale, 16 * scale - minimum


def _q6_k(b: Array) -> tuple[Array, Array, Array | None]:
    shape = b.shape[:-1]
    low = _nibbles(b[..., :128].reshape(*shape, 2, 64)).reshape(*shape, 2, 4, 32)
    high = (b[..., 128:192].reshape(*shape, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    codes = (low | (high << 4)) + np.uint8(96)
    scale = b[..., 192:208].view(np.int8).astype(np.float32) * _half(b[..., 208:])
    return codes.reshape(*shape, 256), scale, None


@dataclass(frozen=True)
class _Carrier:
    format: BlockFormat
    super_block: int
    unpack: Callable[[Array], tuple[Array, Array, Array | None]]


CARRIERS = {
    Type.Q4_0: _Carrier(BlockFormat(4, 32, False), 32, _q4_0),
    Type.Q4_1: _Carrier(BlockFormat(4, 32, True), 32, _q4_1),
    Type.Q4_K: _Carrier(BlockFormat(4, 32, True), 256, _q4_k),
    Type.Q5_0: _Carrier(BlockFormat(8, 32, False), 32, _q5_0),
    Type.Q5_1: _Carrier(BlockFormat(8, 32, True), 32, _q5_1),
    Type.Q5_K: _Carrier(BlockFormat(8, 32, True), 256, _q5_k),
    Type.Q6_K: _Carrier(BlockFormat(8, 16, False), 256, _q6_k),
    Type.Q8_0: _Carrier(BlockFormat(8, 32, False), 32, _q8_0),
}
"""The types whose codes are carried without loss."""

FLOATS = (Type.F32, Type.F16, Type.BF16)
SUPPORTED = (*CARRIERS, *FLOATS)


def reblock(raw: Array, kind: Type) -> Blocks:
    """Carry GGUF rows exactly. `raw`: bytes [rows, bytes a row] of a type in `CARRIERS`."""
    carrier = CARRIERS[kind]
    rows = len(raw)
    bytes_a_block = quants.GGML_QUANT_SIZES[kind][1]
    codes, scales, corrections = carrier.unpack(np.asarray(raw).reshape(rows, -1, bytes_a_block))
    block = carrier.format.block
    codes = codes.reshape(rows, -1, block)
    blocks = codes.shape[1]
    if carrier.format.bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    codes = np.ascontiguousarray(codes)
    scales = np.ascontiguousarray(scales, np.float32).reshape(rows, blocks)
    if corrections is None:
        return Blocks(carrier.format, codes, scales)
    centre = carrier.format.zero_point
    whole = corrections.astype(np.float32).reshape(rows, blocks)
    steps = np.rint(np.divide(whole, scales, out=np.zeros_like(whole), where=scales != 0))
    zero_points = np.clip(centre - steps, 0, 2 * centre - 1).astype(np.float32)
    return Blocks(carrier.format, codes, scales, whole - scales * (centre - zero_points), zero_points.astype(np.uint8))


def pack_zero_points(zero_points: Array, bits: int) -> Array:
    """[rows, blocks] to the layout of `MatMulNBits`: [rows, ceil(blocks * bits / 8)], low bits first."""
    if bits == 8:
        return zero_points
    even = np.pad(zero_points, ((0, 0), (0, zero_points.shape[1] % 2)))
    return even[:, 0::2] | (even[:, 1::2] << 4)


def unpack_zero_points(packed: Array, bits: int, blocks: int) -> Array:
    """The inverse of `pack_zero_points`."""
    if bits == 8:
        return packed
    return np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(len(packed), -1)[:, :blocks]


def quantise_8bit(values: Array, block: int) -> Blocks:
    """Round fp32 rows [rows, columns] to symmetric 8-bit codes; the scale maps each block's largest value to 127.

    Columns are padded with zeros to a whole block.
    """
    rows, columns = values.shape
    grouped = np.pad(values, ((0, 0), (0, -columns % block))).reshape(rows, -1, block)
    scales = np.abs(grouped).max(axis=-1) / np.float32(127)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    codes = (np.rint(grouped * inverse[..., None]) + 128).astype(np.uint8)
    return Blocks(BlockFormat(8, block, False), codes, scales.astype(np.float32), None)


def quantise_4bit(values: Array, block: int) -> Blocks:
    """Round fp32 rows [rows, columns] to symmetric 4-bit codes of 0 to 15, zero point 8.

    Of several scales around the one that maps the largest value to -8, each refitted by least squares to the codes
    that it gives, the one with the least error is taken; errors of large values weigh more (as in ggml's
    `make_qx_quants`, weights x^2), since outputs depend on them most.
    """
    rows, columns = values.shape
    grouped = values.reshape(rows, columns // block, block)
    index = np.abs(grouped).argmax(axis=-1)[..., None]
    extreme = np.take_along_axis(grouped, index, axis=-1)[..., 0]
    weights = grouped**2 + (grouped**2).mean(axis=-1, keepdims=True)
    weighted = weights * grouped
    best_gain = np.full(extreme.shape, -1, np.float32)
    best_scale, best_inverse = np.zeros_like(extreme), np.zeros_like(extreme)
    for divisor in np.arange(-9.2, -6.9, 0.2, dtype=np.float32):
        inverse = np.divide(divisor, extreme, out=np.zeros_like(extreme), where=extreme != 0)
        codes = _codes_4bit(grouped, inverse)
        along = np.einsum("...i,...i", weighted, codes)
        norm = np.einsum("...i,...i,...i", weights, codes, codes)
        scale = np.divide(along, norm, out=np.zeros_like(norm), where=norm > 0)
        better = along * scale > best_gain  # the squared error is a constant less this
        best_gain = np.where(better, along * scale, best_gain)
        best_scale, best_inverse = np.where(better, scale, best_scale), np.where(better, inverse, best_inverse)
    codes = (_codes_4bit(grouped, best_inverse) + 8).astype(np.uint8)
    return Blocks(BlockFormat(4, block, False), codes[..., 0::2] | (codes[..., 1::2] << 4), best_scale)


def _codes_4bit(grouped: Array, inverse: Array) -> Array:
    codes = grouped * inverse[..., None]
    np.rint(codes, out=codes)
    return np.clip(codes, -8, 7, out=codes)


def widen(blocks: Blocks) -> Blocks:
    """Symmetric 4-bit blocks with 8-bit codes: the same values exactly."""
    low_high = np.stack([blocks.codes & 0xF, blocks.codes >> 4], axis=-1).reshape(*blocks.codes.shape[:2], -1)
    return Blocks(BlockFormat(8, blocks.format.block, False), low_high + np.uint8(120), blocks.scales)


def quantise(values: Array, form: BlockFormat) -> Blocks:
    """Round fp32 rows [rows, columns], whole blocks, to a symmetric format of 4 or 8 bits."""
    assert not form.corrected
    return (quantise_4bit if form.bits == 4 else quantise_8bit)(values, form.block)


@dataclass(frozen=True)
class Scheme:
    """How floating-point matrices are rounded: `ordinary` ones and `sensitive` ones (head, router); None keeps fp32."""

    ordinary: BlockFormat | None
    sensitive: BlockFormat | None

    def format_of(self, kind: Type, columns: int, sensitive: bool) -> BlockFormat | None:
        """The format of a matrix with rows of `columns` values of a GGUF type; None is dense fp32."""
        if kind in CARRIERS:
            return CARRIERS[kind].format
        form = self.sensitive if sensitive else self.ordinary
        return None if form is None or columns % form.block else form

    def experts_format(self, kinds: Collection[Type], columns: Collection[int]) -> BlockFormat | None:
        """The format of all the experts of a block, whose sources have these types and columns.

        The CPU's `QMoE` knows one width, one block size and no corrections: symmetric types in blocks of 32 are
        carried (4 bits in 8 where both occur), others rounded to 8 bits.
        """
        if not any(kind in CARRIERS for kind in kinds):
            form = self.ordinary
            return None if form is None or any(count % form.block for count in columns) else form
        formats = {CARRIERS[kind].format if kind in CARRIERS else EXPERTS_FALLBACK for kind in kinds}
        return BlockFormat(4, 32, False) if formats == {BlockFormat(4, 32, False)} else EXPERTS_FALLBACK


EXPERTS_FALLBACK = BlockFormat(8, 32, False)
SchemeName = Literal["keep", "int8", "int4"]
SCHEMES: dict[SchemeName, Scheme] = {
    "keep": Scheme(None, None),
    "int8": Scheme(BlockFormat(8, 32, False), BlockFormat(8, 32, False)),
    "int4": Scheme(BlockFormat(4, 32, False), BlockFormat(8, 32, False)),
}
