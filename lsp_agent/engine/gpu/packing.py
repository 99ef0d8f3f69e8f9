"""The layout in which ONNX Runtime's CUDA kernels read integer experts in place (`QMoE` with `weights_prepacked=1`).

It is a permutation of the codes, CUTLASS's column-major tile interleave for compute capability 8.0, which ONNX Runtime
uses on later GPUs too. Of each matrix [rows, columns], `8 * 4 / bits / 2` rows (4 of 4-bit codes, 2 of 8-bit ones) are
interleaved in tiles of 64 columns. Inside a tile each 16 bytes of a row are transposed so that a thread of a tensor
core instruction finds its codes next to each other:

4 bits: word g holds the low nibbles of bytes g, g + 4, g + 8, g + 12, then their high nibbles.
8 bits: word g holds bytes 2g, 2g + 8, 2g + 1, 2g + 9.

It agrees byte for byte with `pack_weights_for_cuda_mixed_gemm` of `onnxruntime.quantization.cuda_quantizer`.
"""

from __future__ import annotations

import numpy as np

from lsp_agent.engine.gpu.launch import Launch

TILE = 64
"""Columns of a tile; matrices must be whole tiles wide."""
INTERLEAVED_ROWS = {4: 4, 8: 2}
"""Rows whose tiles alternate, by the bits of a code."""
MOST_THREADS = 256
"""Of a block of the kernel that packs."""


def pack_expert_codes(codes: np.ndarray, bits: int, out: np.ndarray | None = None) -> np.ndarray:
    """Codes [matrices, rows, columns * bits / 8] as in packages (low nibble first) in the layout above, same shape.

    `out`: where to write, an array of that shape, C-ordered. The work is done matrix by matrix: what it needs besides
    is small. Raises `ValueError` for sizes that cannot be interleaved.
    """
    matrices, rows, row_bytes = codes.shape
    interleaved = INTERLEAVED_ROWS[bits]
    if rows % interleaved or row_bytes * 8 // bits % TILE:
        raise ValueError(f"matrices of {rows} x {row_bytes * 8 // bits} {bits}-bit codes cannot be interleaved")
    out = np.empty_like(codes, order="C") if out is None else out
    pack = _pack_4bit if bits == 4 else _pack_8bit
    tiles = row_bytes * 8 // bits // TILE
    for matrix in range(matrices):
        source = codes[matrix].reshape(rows // interleaved, interleaved, tiles, -1)
        target = out[matrix].reshape(rows // interleaved, tiles, interleaved, -1)
        pack(source.swapaxes(1, 2), target)
    return out


def _pack_4bit(source: np.ndarray, target: np.ndarray) -> None:
    """Tiles [..., 32 bytes]."""
    words = source.reshape(*source.shape[:-1], 2, 4, 4)  # ..., 16 bytes, word, byte
    grouped = target.reshape(*target.shape[:-1], 2, 4, 4)
    for half, (first, second) in enumerate(((0, 1), (2, 3))):
        one, other = words[..., first, :], words[..., second, :]
        grouped[..., half] = (one & 0xF) | (other << 4)
        grouped[..., 2 + half] = (one >> 4) | (other & 0xF0)


def _pack_8bit(source: np.ndarray, target: np.ndarray) -> None:
    """Tiles [..., 64 bytes]."""
    parts = source.reshape(*source.shape[:-1], 4, 2, 4, 2)  # ..., 16 bytes, half, word, byte
    target.reshape(*target.shape[:-1], 4, 4, 2, 2)[...] = np.moveaxis(parts, -3, -1)


def pack_launch(rows: int, columns: int, bits: int) -> Launch:
    """The kernel that packs `rows` rows, of any number of matrices: arguments are the codes and where they go."""
    chunks = INTERLEAVED_ROWS[bits] * columns * bits // 128
    macros = (("CODE_BITS", str(bits)), ("COLUMNS", str(columns)))
    threads = min(MOST_THREADS, -(-chunks // 32) * 32)
    return Launch("pack_experts", macros, (rows // INTERLEAVED_ROWS[bits], 1, 1), (threads, 1, 1))
