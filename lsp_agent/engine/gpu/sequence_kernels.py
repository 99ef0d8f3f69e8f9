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
    batch: int,
    linear: LinearAttentionConfig,
    stride: int,
    rows: int = 1,
    splits: int | None = None,
    threads: int | None = None,
) -> SequenceKernel:
    """`rows` tokens of Gated DeltaNet for each of `batch` sequences, before its norm and output projection.

    Arguments of the kernel: p f32 [batch, rows, stride] (q, k, v | z | per key head b, then a, of its value heads), the
    convolution's ring h [ring, batch, kernel - 1, channels], the states' ring f32 [ring, batch, value heads, value
    size, key size], control i32 [4] (turn, capacity, ring size, count); y f32 [batch, rows, value heads * value size];
    the convolution's weights f32 [channels, 1, kernel], a f32 and dt f32 [value heads], counters. Slot `turn` of the
    rings is read, the next one written; a ring of one is updated in place. Of several rows the state after each of the
    first `count` is written to a slot of its own, and the ring has more slots than rows.

    `splits` of each value head's rows, `threads` of a block: for tuning. `ValueError` for sizes that it does not cover.
    """
    if linear.key_size % 4 or linear.value_heads % linear.key_heads or linear.kernel < 2:
        raise ValueError(f"delta_step does not cover {linear}")
    lanes = _largest_power(linear.key_size // 4, WARP)
    # As was fastest on an H100.
    few = batch < 4  # rows are computed one after another
    splits = splits or _splits(linear.value_size, 4 if few else 2)
    share = linear.value_size // splits  # of a value head's rows
    threads = threads or min(512 if few else 256, -(-share * lanes // WARP) * WARP)
    width = linear.value_heads * linear.value_size
    channels = 2 * linear.key_heads * linear.key_size + width
    macros = {
        "BATCH": batch,
        "ROWS": rows,
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
    rows: int = 1,
    splits: int | None = None,
    threads: int | None = None,
    least: int | None = None,
) -> SequenceKernel:
    """Attention of one new token for each of `batch` sequences, whose key and value it appends to the caches; or of
    `rows` of each, for which `append_tokens` does that before.

    Arguments of the kernel: p f32 [batch, rows, stride] (each query head, followed by its gate if `gate`; keys;
    values), key cache and value cache h [batch, kv heads, capacity, head size], lengths i32 [batch, rows] (the new
    token's index), control i32 [4] (turn, capacity, ring size, count), of several rows appended i32 [1]; y f32 [batch,
    rows, heads * head size], scratch f32; weights f32 of the norms over each head of q and k (null without
    `norm_epsilon`), cosines and sines h [context, rotary / 2], counters. The gate is not applied here.

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
    splits = splits or max(1, PROCESSORS * max(1, 128 // head_size) // (kv_heads * parts * batch * rows))
    macros = {
        "BATCH": batch,
        "ROWS": rows,
        "GROUP": group,
        "GATE": int(gate),
        **_head_macros(kv_heads, head_size, rotary, stride, norm_epsilon),
        "PARTS": parts,
        "SPLITS": splits,
        "LEAST": least,
        "THREADS": threads,
    }
    launch = Launch("attention_step", _macros(macros), (splits, kv_heads * parts, batch * rows), (threads, 1, 1))
    blocks = batch * rows * kv_heads * parts
    # A split's results in fp16, with the highest score and the sum of the weights in fp32.
    return SequenceKernel(launch, blocks, blocks * splits * part * (head_size // 2 + 2))


def append_tokens(
    batch: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    rotary: int,
    stride: int,
    gate: bool,
    norm_epsilon: float | None,
    rows: int,
) -> Launch:
    """Appends the keys and values of `rows` new tokens of each of `batch` sequences to the caches.

    Arguments of the kernel: p, key cache, value cache, lengths and control as of `attention_step`, of which the first
    `count` rows of each sequence are appended; appended i32 [1], which only says what comes after; the weights of the
    norm over each head of k, cosines and sines.
    """
    macros = {
        "ROWS": rows,
        "KEYS_AT": heads * head_size * (1 + gate),
        **_head_macros(kv_heads, head_size, rotary, stride, norm_epsilon),
    }
    return Launch("append_tokens", _macros(macros), (kv_heads, batch * rows, 1), (WARP, 1, 1))


def _head_macros(
    kv_heads: int, head_size: int, rotary: int, stride: int, norm_epsilon: float | None
) -> dict[str, object]:
    return {
        "KV_HEADS": kv_heads,
        "HEAD": head_size,
        "ROTARY": rotary,
        "QK_NORM": int(norm_epsilon is not None),
        "EPSILON": f"{norm_epsilon or 0.0:.9e}f",
        "P_STRIDE": stride,
    }


def _macros(values: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in values.items())


def _largest_power(number: int, most: int) -> int:
    """The largest power of two up to `most` that divides `number`."""
    return min(number & -number, most)


def _splits(number: int, most: int) -> int:
    """The largest number up to `most` that divides `number`."""
    return next(parts for parts in range(most, 0, -1) if number % parts == 0)
