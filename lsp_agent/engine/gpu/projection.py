"""Launches of the kernels that read embeddings, multiply quantised matrices with one token, and pick candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lsp_agent.engine.gpu.launch import Launch

WARP = 32
GROUP = 8
"""Activations are handled in groups of so many columns."""
MOST_SEGMENTS = 4
MOST_SHARED = 96 * 1024
"""Bytes of shared memory for activations that every GPU since compute capability 8.0 gives a block."""
CANDIDATES_THREADS = 256
MOST_WARPS = 24
"""A block of so many still has 80 registers a thread."""
MOST_PASSES = 2
"""Items of a warp of a large block."""
MULTIPROCESSORS = 132
"""Of an H100; other cards lose little by a grid that was sized for it."""


@dataclass(frozen=True)
class Segment:
    """A matrix of `rows`, one of those that `project` multiplies with the same activations.

    `bits` 4 or 8: codes in blocks of `block` columns as `MatMulNBits` takes them, with scales in fp16 (`half_scales`)
    or fp32 and, if `zero_points`, integer zero points packed like the codes; if `corrections`, floats [rows, blocks] of
    the scales' type, added to every value of their block. 16: fp16 values [columns, rows].
    """

    rows: int
    bits: Literal[4, 8, 16]
    block: int = 32
    half_scales: bool = False
    zero_points: bool = False
    corrections: bool = False


@dataclass(frozen=True)
class Norm:
    """RMS norm of `residual` (fp16 [batch, columns]), to which `delta` (the same) is added first if there is one.

    Inputs: residual, and delta. Further outputs: their sum (fp16) if there is a delta, and the normed activations
    (fp16) if `normed`.
    """

    epsilon: float
    delta: bool = False
    normed: bool = False


@dataclass(frozen=True)
class GatedNorm:
    """`rmsnorm(y) * weight * silu(z)` per head of `head` columns, a power of two up to 256.

    Inputs: y (fp32 [batch, columns]) and p (fp32 [batch, stride]), in which z begins at `offset`.
    """

    epsilon: float
    head: int
    stride: int
    offset: int


@dataclass(frozen=True)
class Gate:
    """`y * sigmoid(gate)`. Inputs: y (fp32 [batch, columns]) and p (fp32 [batch, stride]), which begins with each
    head's query and gate, `head` wide each."""

    head: int
    stride: int


@dataclass(frozen=True)
class Plain:
    """The activations as they are. Input: y (fp32 [batch, columns])."""


@dataclass(frozen=True)
class Swiglu:
    """`silu(gate) * up`. Input: p (fp32 [batch, 2 * columns]), the gates first."""


Prologue = Norm | GatedNorm | Gate | Plain | Swiglu


@dataclass(frozen=True)
class Tuning:
    """How `project` spreads its work; every choice gives the same sums up to rounding.

    A warp holds `buffer` pieces of 16 bytes for each lane, from as many rows as fit. `warps` a block at most, `blocks`
    in the grid at most (0: as many as multiprocessors). `terms`: how many products are summed in fp16.
    """

    buffer: int = 4
    warps: int = MOST_WARPS
    blocks: int = 0
    terms: Literal[4, 8, 16] = 8


def project(
    prologue: Prologue,
    segments: Sequence[Segment],
    columns: int,
    batch: int,
    out_half: bool = False,
    tuning: Tuning | None = None,
    multiprocessors: int = MULTIPROCESSORS,
) -> Launch:
    """`y = W x + bias` for all rows of 1 to 4 segments, one after another.

    Inputs are the prologue's. Outputs: y [batch, rows of all segments] in fp32 (fp16 if `out_half`), then the
    prologue's. Pointers: the norm's weight (fp32 [columns], of `GatedNorm` [head]; null for the others); of each
    segment codes, scales, zero points and corrections (null where it has none); the bias (fp32 [rows of all segments])
    or null.
    Raises `ValueError` for what the kernel does not cover, see `supports`.
    """
    reason = _unsupported(prologue, segments, columns, batch)
    if reason:
        raise ValueError(reason)
    tuning = tuning or _tuning(segments, columns, batch, multiprocessors)
    at_once = [_rows_at_once(segment, columns, batch, tuning.buffer) for segment in segments]
    items = _items(segments, columns, batch, tuning.buffer)
    most_blocks = tuning.blocks or multiprocessors
    warps = min(tuning.warps, max(2, -(-items // most_blocks)))
    blocks = min(most_blocks, -(-items // warps))
    macros = {
        "BATCH": batch,
        "COLUMNS": columns,
        "THREADS": WARP * warps,
        "BLOCKS": blocks,
        "BUFFER": tuning.buffer,
        "TERMS": tuning.terms,
        "OUT_HALF": int(out_half),
        "SEGMENTS": len(segments),
    }
    for i, (segment, rows) in enumerate(zip(segments, at_once, strict=True)):
        macros |= {
            f"ROWS_{i}": segment.rows,
            f"BITS_{i}": segment.bits,
            f"BLOCK_{i}": segment.block,
            f"SCALE_HALF_{i}": int(segment.half_scales),
            f"ZERO_{i}": int(segment.zero_points),
            f"CORRECTED_{i}": int(segment.corrections and segment.bits != 16),
            f"AT_ONCE_{i}": rows,
        }
    described = {name: str(value) for name, value in macros.items()} | _prologue_macros(prologue)
    shared = 16 * batch * (-(-columns // GROUP // 4) * 4)
    return Launch("project", tuple(described.items()), (blocks, 1, 1), (WARP * warps, 1, 1), shared)


def embed(hidden: int, batch: int, dtype: Literal["float16", "bfloat16", "float32"]) -> Launch:
    """Rows of the embedding. Input: ids (int64 [batch, 1]), which must lie in the table. Output: fp16 [batch, hidden].
    Pointer: the table of `dtype` [vocabulary, hidden], in the GPU's or in page-locked memory."""
    if hidden % GROUP:
        raise ValueError(f"{hidden} columns: they must be a multiple of {GROUP}")
    threads = min(256, -(-hidden // GROUP // WARP) * WARP)
    kinds = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
    macros = {"HIDDEN": str(hidden), "THREADS": str(threads), "TYPE": kinds[dtype]}
    return Launch("embed", tuple(macros.items()), (batch, 1, 1), (threads, 1, 1))


def candidates(vocabulary: int, batch: int, best: int, blocks: int = 32) -> Launch:
    """The `best` largest logits of each token, descending, ties to the lower id, and the log-sum-exp of all.

    Input: logits (fp32 [batch, vocabulary], no NaNs). Outputs: values (fp32 [batch, best]), ids (int32 [batch, best]),
    log_sum_exp (fp32 [batch, 1]), and scratch of `candidates_scratch`; where there are fewer tokens, -inf and -1.
    Pointer: counters (int32 [batch]), zero before the first launch; each launch leaves zeros.
    """
    blocks = _candidates_blocks(vocabulary, blocks)
    macros = {"BATCH": batch, "VOCABULARY": vocabulary, "BEST": best, "BLOCKS": blocks, "THREADS": CANDIDATES_THREADS}
    described = tuple((name, str(value)) for name, value in macros.items())
    return Launch("candidates", described, (blocks, batch, 1), (CANDIDATES_THREADS, 1, 1))


def candidates_scratch(vocabulary: int, batch: int, best: int, blocks: int = 32) -> tuple[int, int, int]:
    """The shape of the scratch (fp32) of `candidates`."""
    return batch, _candidates_blocks(vocabulary, blocks), 2 * best + 2


def _candidates_blocks(vocabulary: int, most: int) -> int:
    return min(most, -(-vocabulary // CANDIDATES_THREADS))


def supports(prologue: Prologue, segments: Sequence[Segment], columns: int, batch: int) -> bool:
    """Whether `project` covers this: rows of whole blocks and of whole pieces of 16 bytes, and activations of all
    tokens that fit in shared memory."""
    return _unsupported(prologue, segments, columns, batch) is None


def _unsupported(prologue: Prologue, segments: Sequence[Segment], columns: int, batch: int) -> str | None:
    if not 1 <= len(segments) <= MOST_SEGMENTS:
        return f"{len(segments)} segments: there may be 1 to {MOST_SEGMENTS}"
    if columns % GROUP or 2 * columns * batch > MOST_SHARED:
        return (
            f"{batch} x {columns} activations: columns must be a multiple of {GROUP}, all at most {MOST_SHARED} bytes"
        )
    for segment in segments:
        if segment.bits == 16:
            continue
        if segment.block < 16 or columns % segment.block or columns * segment.bits % 128:
            return f"rows of {columns} {segment.bits}-bit codes in blocks of {segment.block}"
    if isinstance(prologue, GatedNorm | Gate) and (columns % prologue.head or prologue.head % GROUP):
        return f"heads of {prologue.head} in {columns} columns"
    if isinstance(prologue, GatedNorm | Gate) and (prologue.stride % 4 or getattr(prologue, "offset", 0) % 4):
        return f"rows of {prologue.stride} floats, which do not begin at multiples of 16 bytes"
    if isinstance(prologue, GatedNorm) and (prologue.head & (prologue.head - 1) or prologue.head > GROUP * WARP):
        return f"gated norms over heads of {prologue.head}: they must be a power of two up to {GROUP * WARP}"
    return None


def _tuning(segments: Sequence[Segment], columns: int, batch: int, multiprocessors: int) -> Tuning:
    """What was fastest on an H100: few passes of one large block for each multiprocessor; where there is work for many
    passes, small blocks, of one token as many as there is work for."""
    large = Tuning()
    if _items(segments, columns, batch, large.buffer) <= MOST_PASSES * large.warps * multiprocessors:
        return large
    small = Tuning(8, 8, 2 * multiprocessors)
    if batch > 1:
        return small
    return replace(small, blocks=-(-_items(segments, columns, batch, small.buffer) // small.warps))


def _items(segments: Sequence[Segment], columns: int, batch: int, buffer: int) -> int:
    return sum(-(-segment.rows // _rows_at_once(segment, columns, batch, buffer)) for segment in segments)


def _rows_at_once(segment: Segment, columns: int, batch: int, buffer: int) -> int:
    """Rows of a warp: a power of two, such that their pieces fill the buffer; at most 32 sums."""
    most = 8 if batch <= 4 else 4
    if segment.bits == 16 and segment.rows > 1:
        return min(most, 4)
    each = -(-columns * segment.bits // 128 // WARP)
    rows = 1
    while 2 * rows * each <= buffer and 2 * rows <= most and 2 * rows <= segment.rows:
        rows *= 2
    return rows


def _prologue_macros(prologue: Prologue) -> dict[str, str]:
    match prologue:
        case Norm():
            return {
                "PROLOGUE": "NORM",
                "EPSILON": _literal(prologue.epsilon),
                "DELTA": str(int(prologue.delta)),
                "WRITE_NORMED": str(int(prologue.normed)),
            }
        case GatedNorm():
            return {
                "PROLOGUE": "GATED_NORM",
                "EPSILON": _literal(prologue.epsilon),
                "HEAD": str(prologue.head),
                "P_STRIDE": str(prologue.stride),
                "Z_OFFSET": str(prologue.offset),
            }
        case Gate():
            return {"PROLOGUE": "GATE", "HEAD": str(prologue.head), "P_STRIDE": str(prologue.stride)}
        case Plain():
            return {"PROLOGUE": "PLAIN"}
        case Swiglu():
            return {"PROLOGUE": "SWIGLU"}


def _literal(value: float) -> str:
    """A C++ literal of an fp32 number."""
    return f"{value!r}f"
