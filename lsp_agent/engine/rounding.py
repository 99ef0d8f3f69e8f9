"""Rounds fp32 matrices to blocks of codes, with the scales that keep the weighted error least.

Errors of large values weigh more (weights x^2 plus their mean in the block, as in ggml's `make_qx_quants`), since
outputs depend on them most. A scale is refitted by weighted least squares to the codes that it gives; of several
candidates the one with the least error is kept, the plain one (the largest value to the last code) among them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lsp_agent.engine.blocks import E8M0_BIAS, Array, BlockFormat, Blocks, pack_nibbles

SYMMETRIC_DIVISORS = np.array([-8, *np.arange(-9.2, -6.9, 0.2)], np.float32)
"""Which code the value of largest magnitude is mapped to (the first is the plain choice)."""
ASYMMETRIC_STEPS = np.array([15, 16.2, 15.6, 14.4, 13.8], np.float32)
"""Into how many steps the range of a block's values is cut (the first is the plain choice)."""
LARGEST_HALF = np.float32(65504)
CACHED_VALUES = 1 << 17
"""Values rounded at a time: what they need fits a core's cache, which saves a quarter of the time, of 8 bits half."""


def quantise(values: Array, form: BlockFormat) -> Blocks:
    """Round fp32 rows [rows, columns], whole blocks, to a format without corrections."""
    assert not form.corrected
    step = max(1, CACHED_VALUES // values.shape[1])
    pieces = [_quantise(values[start : start + step], form) for start in range(0, len(values), step)]
    return pieces[0] if len(pieces) == 1 else _joined(pieces)


def _quantise(values: Array, form: BlockFormat) -> Blocks:
    if form.element == "e2m1":
        return quantise_mxfp4(values, form)
    return quantise_8bit(values, form) if form.bits == 8 else quantise_4bit(values, form)


def _joined(pieces: list[Blocks]) -> Blocks:
    codes, scales = (np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("codes", "scales"))
    zero_points = [piece.zero_points for piece in pieces if piece.zero_points is not None]
    return Blocks(pieces[0].format, codes, scales, zero_points=np.concatenate(zero_points) if zero_points else None)


def quantise_8bit(values: Array, form: BlockFormat) -> Blocks:
    """Symmetric 8-bit codes; the scale maps each block's largest value to 127.

    Columns are padded with zeros to a whole block.
    """
    rows, columns = values.shape
    grouped = np.pad(values, ((0, 0), (0, -columns % form.block))).reshape(rows, -1, form.block)
    scales = _stored(np.abs(grouped).max(axis=-1) / np.float32(127), form)
    scaled = np.rint(grouped * _inverse(scales.astype(np.float32))[..., None])
    return Blocks(form, (np.clip(scaled, -128, 127) + 128).astype(np.uint8), scales)


def quantise_4bit(values: Array, form: BlockFormat) -> Blocks:
    """4-bit codes of 0 to 15: about zero point 8, or an integer zero point for each block if `form.asymmetric`."""
    rows, columns = values.shape
    grouped = values.reshape(rows, columns // form.block, form.block)
    weights = _importance(grouped)
    weighted = weights * grouped
    best_gain = np.full(grouped.shape[:2], -1, np.float32)
    best_scale, best_inverse, best_zero = (np.zeros(grouped.shape[:2], np.float32) for _ in range(3))
    for inverse, zero in _candidates(grouped, form):
        codes = _codes_4bit(grouped, inverse, zero)
        along = np.einsum("...i,...i", weighted, codes)
        norm = np.einsum("...i,...i", weights * codes, codes)
        scale = along * _inverse(norm)
        better = along * scale > best_gain  # the squared error is a constant less this
        best_gain = np.where(better, along * scale, best_gain)
        best_scale, best_inverse = np.where(better, scale, best_scale), np.where(better, inverse, best_inverse)
        best_zero = np.where(better, zero, best_zero)
    codes = _codes_4bit(grouped, best_inverse, best_zero) + best_zero[..., None]
    zero_points = best_zero.astype(np.uint8) if form.asymmetric else None
    return Blocks(form, pack_nibbles(codes.astype(np.uint8)), _stored(best_scale, form), zero_points=zero_points)


def _candidates(grouped: Array, form: BlockFormat) -> Iterator[tuple[Array, Array]]:
    """Inverse scales and zero points [rows, blocks] to try."""
    index = np.abs(grouped).argmax(axis=-1)[..., None]
    extreme = np.take_along_axis(grouped, index, axis=-1)[..., 0]
    centre = np.full(extreme.shape, 8, np.float32)
    for divisor in SYMMETRIC_DIVISORS:
        yield divisor * _inverse(extreme), centre
    if form.asymmetric:
        low, high = np.minimum(grouped.min(axis=-1), 0), np.maximum(grouped.max(axis=-1), 0)
        for steps in ASYMMETRIC_STEPS:
            inverse = steps * _inverse(high - low)
            # Where the range is cut in more steps than there are codes, half of what is too much goes on either side.
            below = np.rint(-low * inverse - (steps - 15) / 2)
            for shift in (-1, 0, 1) if steps == ASYMMETRIC_STEPS[0] else (0,):
                yield inverse, np.clip(below + shift, 0, 15)


def _codes_4bit(grouped: Array, inverse: Array, zero: Array) -> Array:
    """Codes less the zero point."""
    codes = grouped * inverse[..., None]
    np.rint(codes, out=codes)
    # `np.clip` with arrays takes ten times as long.
    np.maximum(codes, -zero[..., None], out=codes)
    return np.minimum(codes, 15 - zero[..., None], out=codes)


def quantise_mxfp4(values: Array, form: BlockFormat) -> Blocks:
    """4-bit floats with a power of two for each block (OCP Microscaling Formats 1.0): codes E2M1, scales E8M0.

    The standard takes the exponent of the largest value; here its neighbours are tried too, and the error decides.
    """
    rows, columns = values.shape
    grouped = values.reshape(rows, columns // form.block, form.block)
    weights = _importance(grouped)
    _, exponent = np.frexp(np.abs(grouped).max(axis=-1))
    plain = exponent - 3  # E2M1's largest exponent is 2, and frexp's mantissa lies below 1
    best_error = np.full(plain.shape, np.inf, np.float32)
    best = plain
    for shift in (0, 1, -1):
        scaled = np.ldexp(grouped, -(plain + shift)[..., None])
        error = _e2m1(scaled) - scaled
        squared = np.ldexp(np.einsum("...i,...i,...i", weights, error, error), 2 * shift)
        best = np.where(squared < best_error, plain + shift, best)
        best_error = np.minimum(squared, best_error)
    best = np.clip(best, 2 - E8M0_BIAS, E8M0_BIAS)
    rounded = _e2m1(np.ldexp(grouped, -best[..., None]))
    codes = _E2M1_CODES[(np.abs(rounded) * 2).astype(np.uint8)] | (np.signbit(rounded).astype(np.uint8) << 3)
    return Blocks(form, pack_nibbles(codes), (best + E8M0_BIAS).astype(np.uint8))


_E2M1_CODES = np.array([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], np.uint8)
"""The code of a magnitude, by twice the magnitude."""


def _e2m1(values: Array) -> Array:
    """The nearest values of E2M1 (ties to even codes, beyond the largest to it)."""
    magnitude = np.abs(values)
    step = np.where(magnitude < 2, np.float32(0.5), np.where(magnitude < 4, np.float32(1), np.float32(2)))
    return np.copysign(np.minimum(np.rint(magnitude / step) * step, 6), values)


def _importance(grouped: Array) -> Array:
    """Weights of the squared errors, relative to the block's largest value so that none over- or underflows."""
    largest = np.abs(grouped).max(axis=-1, keepdims=True)
    relative = grouped * _inverse(largest)
    squares = relative * relative
    return squares + squares.mean(axis=-1, keepdims=True)


def _inverse(values: Array) -> Array:
    """1 / values, 0 where that is 0 or would overflow."""
    return np.divide(1, values, out=np.zeros_like(values), where=np.abs(values) > 1e-37)


def _stored(scales: Array, form: BlockFormat) -> Array:
    """Scales as they are stored."""
    if form.half_scales:
        scales = np.clip(scales, -LARGEST_HALF, LARGEST_HALF)
    return scales.astype(form.scale_dtype)
