"""Random experts as the GPU's kernels want them, each in arrays of its own, and what they compute in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lsp_agent.engine.gpu.expert_kernels import ExpertForm, ExpertSizes, SharedExpert
from lsp_agent.engine.gpu.packing import pack_expert_codes

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass
class Matrix:
    """`arrays`: codes, scales and zero points (or None) as a kernel reads them; `values` in fp64."""

    arrays: list[np.ndarray | None]
    values: np.ndarray

    def poison(self) -> None:
        """Make the result of whoever uses the matrix a NaN."""
        scales = self.arrays[1]
        assert scales is not None
        scales[...] = 255 if scales.dtype == np.uint8 else np.nan


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Pairs of codes of the last axis in bytes, the first one low."""
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    packed: np.ndarray = (padded[..., 0::2] | padded[..., 1::2] << 4).astype(np.uint8)
    return packed


def integer_matrix(
    random: np.random.Generator, rows: int, columns: int, bits: int, block: int, zeros: bool, half: bool = True
) -> Matrix:
    """Codes in rows, as `MatMulNBits` takes them."""
    codes = random.integers(0, 1 << bits, (rows, columns // block, block), np.uint8)
    scales = random.uniform(0.5, 1.5, (rows, columns // block)) / (1 << bits) / np.sqrt(columns)
    scales = scales.astype(np.float16 if half else np.float32)
    points = random.integers(0, 1 << bits, scales.shape, np.uint8) if zeros else np.full(scales.shape, 1 << (bits - 1))
    values = (codes.astype(float) - points[..., None]) * scales[..., None].astype(float)
    packed = _nibbles(codes) if bits == 4 else codes
    stored = (_nibbles(points) if bits == 4 else points) if zeros else None
    return Matrix([packed.reshape(rows, -1), scales, stored], values.reshape(rows, columns))


def expert_matrix(random: np.random.Generator, rows: int, columns: int, form: ExpertForm) -> Matrix:
    """One expert's, in the layout of `form`."""
    if form.element == "int":
        matrix = integer_matrix(random, rows, columns, form.bits, form.block, form.zero_points)
        codes = matrix.arrays[0]
        assert codes is not None
        matrix.arrays[0] = pack_expert_codes(codes[None], form.bits)[0]
        return matrix
    codes = random.integers(0, 16, (columns, rows), np.uint8)
    scales = random.integers(118, 124, (rows, columns // 32), np.uint8)
    values = E2M1[codes.T] * np.repeat(2.0 ** (scales.astype(float) - 127), 32, axis=1)
    return Matrix([_nibbles(codes), np.ascontiguousarray(scales.T if form.scales_by_block else scales), None], values)


class Mixture:
    """Experts, and perhaps a shared one, of a layer; `table` and `shared_arrays` are the kernels' arguments."""

    def __init__(
        self, random: np.random.Generator, sizes: ExpertSizes, form: ExpertForm, shared: SharedExpert | None
    ) -> None:
        self.sizes, self.form, self.shared = sizes, form, shared
        self.up = [expert_matrix(random, 2 * sizes.width, sizes.hidden, form) for _ in range(sizes.count)]
        self.down = [expert_matrix(random, sizes.hidden, sizes.width, form) for _ in range(sizes.count)]
        pairs = zip(self.up, self.down, strict=True)
        rows = [[*up.arrays[:2], *down.arrays[:2], up.arrays[2], down.arrays[2]] for up, down in pairs]
        self.table = np.array(
            [[array.ctypes.data for array in row if array is not None] for row in rows], dtype=np.int64
        )
        self.shared_arrays: list[np.ndarray | None] = [None] * 3
        if shared is not None:
            part = shared.down
            if part.bits == 16:
                dense = (random.normal(size=(shared.width, sizes.hidden)) / np.sqrt(shared.width)).astype(np.float16)
                self.shared_arrays[0], self._shared_values = dense, dense.T.astype(float)
            else:
                matrix = integer_matrix(
                    random, sizes.hidden, shared.width, part.bits, part.block, part.zero_points, part.half_scales
                )
                self.shared_arrays, self._shared_values = matrix.arrays, matrix.values

    def activations(self, normed: np.ndarray, experts: np.ndarray) -> np.ndarray:
        """`silu(gate) * up` [batch, used, width] of normed activations [batch, hidden]."""
        found = np.empty((*experts.shape, self.sizes.width))
        for token, used in np.ndindex(experts.shape):
            both = self.up[experts[token, used]].values @ normed[token].astype(float)
            found[token, used] = silu(both[0::2]) * both[1::2]
        return found

    def combine(self, act: np.ndarray, experts: np.ndarray, weights: np.ndarray, r: np.ndarray | None) -> np.ndarray:
        """The layer's output [batch, hidden] from the experts' activations and the router's rows."""
        out = np.zeros((len(experts), self.sizes.hidden))
        for token, used in np.ndindex(experts.shape):
            product = self.down[experts[token, used]].values @ act[token, used].astype(float)
            out[token] += weights[token, used] * product
        if self.shared is not None:
            assert r is not None
            width, offset = self.shared.width, self.shared.offset
            row = r.astype(float)
            inner = silu(row[:, offset : offset + width]) * row[:, offset + width : offset + 2 * width]
            out += (inner @ self._shared_values.T) / (1 + np.exp(-row[:, self.shared.gate, None]))
        return out


def silu(x: np.ndarray) -> np.ndarray:
    """`x * sigmoid(x)`."""
    found: np.ndarray = x / (1 + np.exp(-x))
    return found


def choose(logits: np.ndarray, used: int, normalise: bool) -> tuple[np.ndarray, np.ndarray]:
    """Experts [batch, used], the largest logit first, and their weights."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :used]
    powers = np.exp(logits.astype(float) - logits.max(1, keepdims=True))
    shares = np.take_along_axis(powers, order, 1)
    return order, shares / (shares if normalise else powers).sum(1, keepdims=True)
