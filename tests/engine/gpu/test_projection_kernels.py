"""The kernels of `projection`, emulated, against NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal

import numpy as np
import pytest
from emulator import EmulatedKernels, thinned
from projection_references import activations, matrix

from lsp_agent.engine.gpu.projection import (
    Gate,
    GatedNorm,
    Norm,
    Plain,
    Prologue,
    Segment,
    Swiglu,
    Tuning,
    candidates,
    candidates_scratch,
    embed,
    project,
    supports,
)

EPSILON = 1e-6
FORMATS = [(4, 16), (4, 32), (4, 128), (8, 16), (8, 32)]
"""Bits and blocks."""
TUNINGS = [Tuning(buffer=2, terms=4), Tuning(buffer=4, warps=2), Tuning(terms=16, blocks=1)]
KERNELS = {"forwards": EmulatedKernels(), "backwards": EmulatedKernels(backwards=True)}


def check_project(
    prologue: Prologue,
    segments: Sequence[Segment],
    columns: int,
    batch: int,
    *,
    order: str = "forwards",
    bias: bool = False,
    out_half: bool = False,
    tuning: Tuning | None = None,
    multiprocessors: int = 3,
) -> None:
    """Every result within what fp16 activations and fp16 sums of 8 terms are good for, relative to the
    standard deviation that it has over random signs of the products."""
    random = np.random.default_rng(columns + batch)
    given = activations(prologue, columns, batch, random)
    matrices = [matrix(segment, columns, random) for segment in segments]
    rows = sum(segment.rows for segment in segments)
    offsets = random.standard_normal(rows).astype(np.float32) if bias else None
    y = np.full((batch, rows), np.nan, np.float16 if out_half else np.float32)
    further = [np.full_like(output, np.nan) for output in given.outputs]
    launch = project(prologue, segments, columns, batch, out_half, tuning, multiprocessors)
    weights = [array for m in matrices for array in m.pointers]
    KERNELS[order].run(launch, *given.inputs, y, *further, given.weight, *weights, offsets)
    expected = given.x @ np.concatenate([m.values for m in matrices]).T + (0 if offsets is None else offsets)
    values = np.concatenate([m.values for m in matrices])
    typical = np.linalg.norm(given.x, axis=1)[:, None] * np.linalg.norm(values, axis=1) / np.sqrt(columns)
    errors = np.abs(y - expected) / typical
    assert errors.max() < 4e-3 and np.sqrt(np.mean(errors**2)) < 1e-3
    for output, wanted in zip(further, given.outputs, strict=True):
        np.testing.assert_allclose(output.astype(np.float32), wanted.astype(np.float32), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "prologue",
    [
        Norm(EPSILON),
        Norm(EPSILON, delta=True, normed=True),
        GatedNorm(EPSILON, head=64, stride=700, offset=300),
        GatedNorm(EPSILON, head=128, stride=384, offset=0),
        Gate(head=96, stride=800),
        Plain(),
        Swiglu(),
    ],
    ids=str,
)
def test_every_prologue(prologue: Prologue) -> None:
    check_project(prologue, [Segment(40, 4), Segment(9, 8)], 384, 3)


@pytest.mark.parametrize(
    ("bits", "block", "batch"),
    thinned(
        [(bits, block, batch) for bits, block in FORMATS for batch in (1, 5)],
        [*((bits, block, 1) for bits, block in FORMATS), (4, 128, 2), (8, 16, 2)],
    ),
)
def test_every_format(bits: Literal[4, 8], block: int, batch: int) -> None:
    segments = [Segment(17, bits, block, half, zero) for half in (False, True) for zero in (False, True)]
    check_project(Plain(), segments, 384, batch)


@pytest.mark.parametrize("batch", thinned([1, 3, 8], [1, 3]))
def test_corrections(batch: int) -> None:
    segments = [Segment(17, 4, 32, half, zero, True) for half in (False, True) for zero in (False, True)]
    check_project(Plain(), segments, 384, batch)
    check_project(
        Plain(),
        [Segment(9, 8, 16, True, True, True), Segment(20, 8, 32), Segment(5, 4, 16, True, True, True)],
        416,
        batch,
    )


@pytest.mark.parametrize("batch", thinned([1, 2, 8], [1, 8]))
def test_segments_of_all_kinds_in_one_launch(batch: int) -> None:
    segments = [Segment(70, 4, 32), Segment(33, 8, 64, zero_points=True), Segment(1, 16), Segment(18, 16)]
    check_project(Norm(EPSILON, delta=True), segments, 256, batch, bias=True)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_any_number_of_rows(bits: Literal[4, 8, 16]) -> None:
    check_project(Plain(), [Segment(rows, bits) for rows in (1, 2, 3, 288)], 128, 1, bias=True)


@pytest.mark.parametrize(("columns", "batch"), [(32, 2), (96, 1), (160, 2), (1056, 1), (4640, 1), (4640, 2)])
def test_any_number_of_columns(columns: int, batch: int) -> None:
    """More columns than a warp holds are several tiles; lanes beyond the row have nothing."""
    check_project(Plain(), [Segment(7, 4), Segment(7, 8), Segment(1, 16)], columns, batch)


def test_floats_need_no_blocks() -> None:
    check_project(Plain(), [Segment(5, 16), Segment(1, 16)], 72, 3)


@pytest.mark.parametrize(
    ("tuning", "batch"),
    thinned(product(TUNINGS, (1, 4)), zip(TUNINGS, (4, 1, 1), strict=True)),
    ids=str,
)
def test_every_tuning(tuning: Tuning, batch: int) -> None:
    check_project(Norm(EPSILON, delta=True), [Segment(150, 4), Segment(35, 8)], 1024, batch, tuning=tuning)


@pytest.mark.parametrize("prologue", [Norm(EPSILON, True, True), GatedNorm(EPSILON, 128, 384, 0), Swiglu()], ids=str)
def test_no_order_of_threads_matters(prologue: Prologue) -> None:
    check_project(prologue, [Segment(40, 4), Segment(9, 8)], 384, 3, order="backwards")


def test_results_in_fp16() -> None:
    check_project(Swiglu(), [Segment(24, 4)], 256, 2, out_half=True)


def test_large_activations_do_not_overflow() -> None:
    """Sums in fp16 are of fractions: 16 products of 8-bit codes and activations of 2000 would be 4 million."""
    columns, segment = 256, Segment(8, 8)
    weights = matrix(segment, columns, np.random.default_rng(0))
    weights.codes[:] = 255
    x, y = np.full((1, columns), 2000, np.float32), np.zeros((1, 8), np.float32)
    KERNELS["forwards"].run(project(Plain(), [segment], columns, 1), x, y, None, *weights.pointers, None)
    assert weights.scales is not None
    expected = 127 * 2000 * weights.scales.sum(1) * segment.block
    np.testing.assert_allclose(y[0], expected, rtol=2e-3)


def test_what_is_not_covered_is_refused() -> None:
    assert supports(Plain(), [Segment(8, 4)], 4096, 8)
    assert not supports(Plain(), [Segment(8, 4)], 40, 1)
    assert not supports(Plain(), [Segment(8, 4, 16)], 48, 1)  # rows of 24 bytes
    assert not supports(Plain(), [Segment(8, 4)], 18944, 8)  # more activations than shared memory
    assert not supports(Plain(), [Segment(8, 4)] * 5, 256, 1)
    assert not supports(GatedNorm(EPSILON, 96, 400, 0), [Segment(8, 4)], 384, 1)
    assert not supports(Gate(128, 770), [Segment(8, 4)], 384, 1)
    with pytest.raises(ValueError, match="in blocks of"):
        project(Plain(), [Segment(8, 4)], 40, 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_embeddings(dtype: Literal["float16", "bfloat16", "float32"]) -> None:
    random = np.random.default_rng(0)
    table = random.standard_normal((50, 264)).astype(np.float32)
    if dtype == "bfloat16":
        stored = (table.view(np.uint32) >> 16).astype(np.uint16)
        table = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = table.astype(dtype)
    ids = np.array([[49], [0], [7]])
    out = np.full((3, 264), np.nan, np.float16)
    KERNELS["forwards"].run(embed(264, 3, dtype), ids, out, stored)
    np.testing.assert_array_equal(out, table[ids[:, 0]].astype(np.float16))


def logits_of(kind: str, vocabulary: int) -> np.ndarray:
    """Two tokens' logits."""
    random = np.random.default_rng(vocabulary)
    logits = random.standard_normal((2, vocabulary)).astype(np.float32) * 4
    match kind:
        case "ties":
            return np.round(logits) + np.float32(0) * logits
        case "equal":
            return np.full_like(logits, -3.5)
        case "ascending":
            return np.sort(logits)
        case "neighbours":  # the best ones in one block's first pieces
            return -np.sort(-logits)
        case "masked":
            return np.where(random.random(logits.shape) < 0.99, np.float32(-np.inf), logits)
        case _:
            return logits


@pytest.mark.parametrize("order", KERNELS)
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "ascending", "neighbours", "masked"])
@pytest.mark.parametrize("vocabulary", [40, 288, 5003])
def test_candidates_are_the_best_in_order(vocabulary: int, kind: str, order: str) -> None:
    logits, best, blocks = logits_of(kind, vocabulary), 64, 8
    values, ids = np.zeros((2, best), np.float32), np.zeros((2, best), np.int32)
    total, counters = np.zeros((2, 1), np.float32), np.zeros(2, np.int32)
    scratch = np.full(candidates_scratch(vocabulary, 2, best, blocks), np.nan, np.float32)
    for _ in range(2):  # the counters are zero again
        KERNELS[order].run(candidates(vocabulary, 2, best, blocks), logits, values, ids, total, scratch, counters)
    found = min(best, vocabulary)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :found]
    np.testing.assert_array_equal(ids[:, :found], expected)
    np.testing.assert_array_equal(values[:, :found], np.take_along_axis(logits, expected, 1))
    assert np.all(ids[:, found:] == -1) and np.all(values[:, found:] == -np.inf)
    np.testing.assert_allclose(total[:, 0], np.logaddexp.reduce(logits.astype(np.float64), axis=1), rtol=1e-6)
