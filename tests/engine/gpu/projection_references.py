"""NumPy references and random data for the kernels of `projection`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lsp_agent.engine.gpu import projection
from lsp_agent.engine.gpu.projection import Prologue, Segment

Array = np.ndarray


@dataclass(frozen=True)
class Matrix:
    """A segment's arrays as the kernel takes them, and the fp32 matrix [rows, columns] that they stand for."""

    codes: Array
    scales: Array | None
    zero_points: Array | None
    corrections: Array | None
    values: Array

    @property
    def pointers(self) -> list[Array | None]:
        return [self.codes, self.scales, self.zero_points, self.corrections]


def matrix(segment: Segment, columns: int, random: np.random.Generator) -> Matrix:
    """A random matrix of the segment's format."""
    if segment.bits == 16:
        dense = (random.standard_normal((columns, segment.rows)) / 8).astype(np.float16)
        return Matrix(dense, None, None, None, dense.T.astype(np.float32))
    blocks, most = columns // segment.block, 1 << segment.bits
    codes = random.integers(0, most, (segment.rows, blocks, segment.block)).astype(np.uint8)
    dtype = np.float16 if segment.half_scales else np.float32
    scales = random.uniform(1 / most, 4 / most, (segment.rows, blocks)).astype(dtype)
    zeros = np.full((segment.rows, blocks), most // 2, np.uint8)
    if segment.zero_points:
        zeros = random.integers(0, most, zeros.shape).astype(np.uint8)
    values = (codes.astype(np.float32) - zeros[..., None]) * scales[..., None].astype(np.float32)
    corrections = None
    if segment.corrections:
        corrections = (scales.astype(np.float64) * random.uniform(-0.5, 0.5, scales.shape)).astype(dtype)
        values += corrections[..., None].astype(np.float32)
    packed = codes if segment.bits == 8 else _nibbles(codes)
    packed_zeros = zeros if segment.bits == 8 else _nibbles(np.pad(zeros, ((0, 0), (0, blocks % 2))))
    zero_points = packed_zeros if segment.zero_points else None
    return Matrix(packed, scales, zero_points, corrections, values.reshape(segment.rows, columns))


def _nibbles(codes: Array) -> Array:
    return np.ascontiguousarray(codes[..., 0::2] | codes[..., 1::2] << 4)


@dataclass(frozen=True)
class Activations:
    """A prologue's inputs and its norm's weight, what else it hands over, and x (fp32 [batch, columns]) before fp16."""

    inputs: list[Array]
    weight: Array | None
    outputs: list[Array]
    x: Array


def activations(prologue: Prologue, columns: int, batch: int, random: np.random.Generator) -> Activations:
    """Random inputs of a prologue and what it makes of them, in fp32."""
    y = random.standard_normal((batch, columns)).astype(np.float32)
    match prologue:
        case projection.Norm():
            residual, delta = (random.standard_normal((batch, columns)).astype(np.float16) for _ in range(2))
            weight = random.uniform(0.5, 1.5, columns).astype(np.float32)
            total = residual + delta if prologue.delta else residual
            x = _rms_norm(total.astype(np.float32), prologue.epsilon) * weight
            outputs = ([total] if prologue.delta else []) + ([x.astype(np.float16)] if prologue.normed else [])
            return Activations([residual, delta] if prologue.delta else [residual], weight, outputs, x)
        case projection.GatedNorm():
            p = random.standard_normal((batch, prologue.stride)).astype(np.float32)
            weight = random.uniform(0.5, 1.5, prologue.head).astype(np.float32)
            normed = _rms_norm(y.reshape(batch, -1, prologue.head), prologue.epsilon) * weight
            z = p[:, prologue.offset : prologue.offset + columns]
            return Activations([y, p], weight, [], normed.reshape(batch, columns) * z * _sigmoid(z))
        case projection.Gate():
            p = random.standard_normal((batch, prologue.stride)).astype(np.float32)
            gate = p[:, : 2 * columns].reshape(batch, -1, 2, prologue.head)[:, :, 1].reshape(batch, columns)
            return Activations([y, p], None, [], y * _sigmoid(gate))
        case projection.Plain():
            return Activations([y], None, [], y)
        case projection.Swiglu():
            p = random.standard_normal((batch, 2 * columns)).astype(np.float32)
            gate, up = p[:, :columns], p[:, columns:]
            return Activations([p], None, [], gate * _sigmoid(gate) * up)


def _rms_norm(values: Array, epsilon: float) -> Array:
    return values / np.sqrt(np.mean(values * values, axis=-1, keepdims=True) + np.float32(epsilon))


def _sigmoid(values: Array) -> Array:
    return 1 / (1 + np.exp(-values))
