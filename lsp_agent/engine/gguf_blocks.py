"""GGUF's quantised blocks as `MatMulNBits` blocks.

`MatMulNBits` computes `A @ W.T` with `W = scale * (code - zero_point)` per block of consecutive columns, where the
zero point is an integer code. A GGUF type whose blocks have a minimum, `W = S * q - m`, is carried exactly as

    W = S * (q - z) + c,   z = round(m / S),   c = S * z - m

and `A @ W.T = MatMulNBits(A) + blocksum(A) @ c.T`. (A float zero point would say the same, but has no fast kernel.)
Since `|c| <= S / 2`, rounding `c` itself to 8 bits costs less than a thousandth of a code's step. Layouts of the GGUF
types follow ggml's `block_*` structures, the same that `gguf.quants.dequantize` reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

from lsp_agent.engine.blocks import Array, BlockFormat, Blocks


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
