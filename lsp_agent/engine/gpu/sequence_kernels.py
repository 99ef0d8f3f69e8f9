"""The kernels of a decode step that read what a sequence left behind: Gated DeltaNet's states, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lsp_agent.engine.architecture import LinearAttentionConfig
from lsp_agent.engine.gpu.launch import Launch

PROCESSORS = 132
"""Blocks that keep a large GPU busy (the H100's number of multiprocessors)."""
WARP = 32
TOKENS = 8
"""Tokens that a warp of `attention_step` takes at a time."""
MOST_PART = 8
"""Query heads that a block takes: columns of a product of the tensor cores."""


@dataclass(frozen=True)
class SequenceKernel:
    """A launch with the memory that its kernel wants besides its tensors.

    `counters`: int32, zeroed once; every launch leaves them at zero. `scratch`: fp32 elements of the last output, 0
    where there is none.
    """

    launch: Launch
    counters: int
    scratch: int = 0


def delta_step(
    batch: int, linear: LinearAttentionConfig, stride: int, splits: int | None = None, threads: int | None = None
) -> SequenceKernel:
    """One token of Gated DeltaNet for each of `batch` sequences, before its norm and output projection.

    Arguments of the kernel: p f32 [batch, stride] (q, k, v | z | per key head b, then a, of its value heads), the
    convolution's ring h [ring, batch, kernel - 1, channels], the states' ring f32 [ring, batch, value heads, value
    size, key size], control i32 [4] (turn, capacity, ring size, 0); y f32 [batch, value heads * value size]; the
    convolution's weights f32 [channels, 1, kernel], a f32 and dt f32 [value heads], counters. Slot `turn` of the rings
    is read, the next one written; a ring of one is updated in place.

    `splits` of each value head's rows, `threads` of a block: for tuning. `ValueError` for sizes that it does not cover.
    """
    if linear.key_size % 4 or linear.value_heads % linear.key_heads or linear.kernel < 2:
        raise ValueError(f"delta_step does not cover {linear}")
    lanes = _largest_power(linear.key_size // 4, WARP)
    # As was fastest on an H100.
    few = batch < 4
    splits = splits or _splits(linear.value_size, 4 if few else 2)
    rows = linear.value_size // splits
    threads = threads or min(512 if few else 256, -(-rows * lanes // WARP) * WARP)
    width = linear.value_heads * linear.value_size
    channels = 2 * linear.key_heads * linear.key_size + width
    macros = {
        "BATCH": batch,
        "KEY_HEADS": linear.key_heads,
        "VALUE_HEADS": linear.value_heads,
        "KEY_SIZE": linear.key_size,
        "VALUE_SIZE": linear.value_size,
        "CONV": linear.kernel,
        "P_STRIDE": stride,
        "GATES": channels + width,
        "SPLITS": splits,
        "ROW_LANES": lanes,
        "THREADS": threads,
    }
    launch = Launch("delta_step", _macros(macros), (splits, linear.value_heads, batch), (threads, 1, 1))
    return SequenceKernel(launch, batch * linear.key_heads)


def attention_step(
    batch: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    rotary: int,
    stride: int,
    gate: bool = False,
    norm_epsilon: float | None = None,
    splits: int | None = None,
    threads: int | None = None,
    least: int | None = None,
) -> SequenceKernel:
    """Attention of one new token for each of `batch` sequences; appends its key and value to the caches.

    Arguments of the kernel: p f32 [batch, stride] (each query head, followed by its gate if `gate`; keys; values), key
    cache and value cache h [batch, kv heads, capacity, head size], lengths i32 [batch] (the new token's index),
    control i32 [4] (turn, capacity, ring size, 0); y f32 [batch, heads * head size], scratch f32; weights f32 of the
    norms over each head of q and k (null without `norm_epsilon`), cosines and sines h [context, rotary / 2], counters.
    The gate is not applied here.

    `splits` of each sequence, at `least` so many tokens each, `threads` of a block: for tuning. `ValueError` for sizes
    that it does not cover.
    """
    if head_size not in (64, 128, 192, 256) or heads % kv_heads or rotary % 2 or rotary > head_size:
        raise ValueError(f"attention_step does not cover {heads} / {kv_heads} heads of {head_size}, {rotary} rotated")
    group = heads // kv_heads
    parts = -(-group // MOST_PART)
    part = -(-group // parts)
    threads = threads or 256
    tile = threads // WARP * TOKENS
    least = -(-(least or 16384 // head_size) // tile) * tile
    # A block of small heads has fewer bytes on their way, and room beside it.
    splits = splits or max(1, PROCESSORS * max(1, 128 // head_size) // (kv_heads * parts * batch))
    macros = {
        "BATCH": batch,
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD": head_size,
        "ROTARY": rotary,
        "GATE": int(gate),
        "QK_NORM": int(norm_epsilon is not None),
        "EPSILON": f"{norm_epsilon or 0.0:.9e}f",
        "P_STRIDE": stride,
        "PARTS": parts,
        "SPLITS": splits,
        "LEAST": least,
        "THREADS": threads,
    }
    launch = Launch("attention_step", _macros(macros), (splits, kv_heads * parts, batch), (threads, 1, 1))
    blocks = batch * kv_heads * parts
    # A split's results in fp16, with the highest score and the sum of the weights in fp32.
    return SequenceKernel(launch, blocks, blocks * splits * part * (head_size // 2 + 2))


def _macros(values: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in values.items())


def _largest_power(number: int, most: int) -> int:
    """The largest power of two up to `most` that divides `number`."""
    return min(number & -number, most)


def _splits(number: int, most: int) -> int:
    """The largest number up to `most` that divides `number`."""
    return next(parts for parts in range(most, 0, -1) if number % parts == 0)
