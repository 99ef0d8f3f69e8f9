"""Rounding to each format: errors, scales no worse than the plain ones, layouts against straightforward code."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_agent.engine.blocks import E2M1, BlockFormat
from lsp_agent.engine.quantisation import FOUR_ASYMMETRIC, MXFP4, SCHEMES
from lsp_agent.engine.rounding import quantise

FORMATS = {
    "8-32": BlockFormat(8, 32),
    "4-32": BlockFormat(4, 32),
    "4-64": BlockFormat(4, 64),
    "4-128": BlockFormat(4, 128),
    "asymmetric": FOUR_ASYMMETRIC,
    "mxfp4": MXFP4,
    "half": replace(FOUR_ASYMMETRIC, half_scales=True),
}
"""With the most and least relative RMS error of normally distributed weights."""
ERRORS = {"8-32": 0.007, "4-32": 0.085, "4-64": 0.095, "4-128": 0.11, "asymmetric": 0.08, "mxfp4": 0.12, "half": 0.08}

matrices = st.builds(
    lambda seed, scale, shift, heavy: (
        (np.random.RandomState(seed).standard_t(2, (6, 256)) if heavy else np.random.RandomState(seed).randn(6, 256))
        * scale
        + shift * scale
    ).astype(np.float32),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(1e-4, 1e3),
    shift=st.floats(-2, 2),
    heavy=st.booleans(),
)


def importance(grouped):
    squares = grouped.astype(np.float64) ** 2
    return squares + squares.mean(-1, keepdims=True)


def block_errors(values, rounded, block):
    grouped, other = (a.reshape(len(a), -1, block).astype(np.float64) for a in (values, rounded))
    return (importance(grouped) * (other - grouped) ** 2).sum(-1)


def plain(values, form):
    """The textbook rounding: the scale from the largest value alone."""
    grouped = values.reshape(len(values), -1, form.block).astype(np.float64)
    if form.element == "e2m1":
        largest = np.abs(grouped).max(-1, keepdims=True)
        scale = 2.0 ** (np.floor(np.log2(np.where(largest > 0, largest, 1))) - 2)
        rounded = (grouped / scale).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale
    elif form.asymmetric:
        low, high = np.minimum(grouped.min(-1, keepdims=True), 0), np.maximum(grouped.max(-1, keepdims=True), 0)
        scale = np.where(high > low, high - low, 1) / 15
        zero = np.rint(-low / scale)
        rounded = (np.clip(np.rint(grouped / scale + zero), 0, 15) - zero) * scale
    else:
        index = np.abs(grouped).argmax(-1)[..., None]
        scale = np.take_along_axis(grouped, index, -1) / -(2 ** (form.bits - 1))
        scale = np.where(scale == 0, 1, scale)
        rounded = np.clip(np.rint(grouped / scale), -(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1) * scale
    return rounded.reshape(values.shape)


def unpacked(blocks):
    """The codes one by one, by definition: the even column in the low half of each byte."""
    codes = np.empty((*blocks.codes.shape[:2], blocks.format.block), int)
    for index in np.ndindex(codes.shape):
        row, block, column = index
        byte = int(blocks.codes[row, block, column * blocks.format.bits // 8])
        codes[index] = byte if blocks.format.bits == 8 else (byte >> 4 if column % 2 else byte & 15)
    return codes


@pytest.mark.parametrize("name", FORMATS)
def test_the_error_of_normal_weights_is_small_and_not_zero(name):
    values = np.random.default_rng(0).standard_normal((32, 512)).astype(np.float32)
    values[0] = 0
    rounded = quantise(values, FORMATS[name]).dequantise()
    assert not rounded[0].any()
    assert ERRORS[name] / 2 < np.linalg.norm(rounded - values) / np.linalg.norm(values) < ERRORS[name]


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("8-32", "half")])
@settings(max_examples=30, deadline=None)
@given(values=matrices)
def test_no_block_s_scale_is_worse_than_the_plain_one(name, values):
    form = FORMATS[name]
    values[0, :100] = 0
    chosen = block_errors(values, quantise(values, form).dequantise(), form.block)
    textbook = block_errors(values, plain(values, form), form.block)
    assert np.isfinite(chosen).all()
    assert (chosen <= textbook * 1.001 + 1e-9 * (values.astype(np.float64) ** 2).max()).all()
    assert chosen.sum() < textbook.sum()


@settings(max_examples=30, deadline=None)
@given(values=matrices)
def test_zero_points_never_cost(values):
    symmetric, asymmetric = (
        block_errors(values, quantise(values, form).dequantise(), 32) for form in (BlockFormat(4, 32), FOUR_ASYMMETRIC)
    )
    assert (asymmetric <= symmetric * 1.001 + 1e-12 * (values.astype(np.float64) ** 2).max()).all()


def test_zero_points_pay_where_blocks_are_lopsided():
    values = np.random.default_rng(2).random((6, 256)).astype(np.float32)
    symmetric, asymmetric = (
        block_errors(values, quantise(values, form).dequantise(), 32).sum()
        for form in (BlockFormat(4, 32), FOUR_ASYMMETRIC)
    )
    assert asymmetric < 0.5 * symmetric


@settings(max_examples=30, deadline=None)
@given(values=matrices)
def test_8_bits_are_within_half_a_step(values):
    blocks = quantise(values, BlockFormat(8, 32))
    error = np.abs(blocks.dequantise() - values).reshape(len(values), -1, 32)
    assert (error <= blocks.scales[..., None] * 0.5 * 1.0001).all()


@pytest.mark.parametrize("name", FORMATS)
def test_packed_layouts_mean_what_they_say(name):
    values = np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32) + np.float32(0.3)
    form = FORMATS[name]
    blocks = quantise(values, form)
    count = 256 // form.block
    assert blocks.codes.shape == (3, count, form.block * form.bits // 8) and blocks.codes.dtype == np.uint8
    assert blocks.scales.shape == (3, count) and blocks.scales.dtype == form.scale_dtype
    codes = unpacked(blocks)
    if name == "mxfp4":
        expected = E2M1[codes] * 2.0 ** (blocks.scales.astype(int) - 127)[..., None]
    else:
        zero = 1 << (form.bits - 1) if blocks.zero_points is None else blocks.zero_points[..., None].astype(int)
        expected = (codes - zero) * blocks.scales[..., None].astype(np.float64)
    assert (blocks.zero_points is not None) == form.asymmetric
    np.testing.assert_allclose(blocks.dequantise(), expected.reshape(3, -1), rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_mxfp4_rounds_as_ml_dtypes_does(seed):
    random = np.random.RandomState(seed)
    # Values whose block's best exponent is 0: a 6 and a -6, and multiples of 1/8, ties included.
    values = random.randint(-48, 49, (4, 64)).astype(np.float32) / 8
    values[:, ::16] = np.where(random.rand(4, 4) < 0.5, 6, -6)
    blocks = quantise(values, MXFP4)
    scale = 2.0 ** (blocks.scales.astype(int) - 127).repeat(32, axis=1).reshape(4, 64)
    expected = (values / scale).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(E2M1[unpacked(blocks)].reshape(4, 64), expected.astype(np.float32))
    assert (unpacked(blocks).reshape(4, 64)[expected != 0] == expected.view(np.uint8)[expected != 0]).all()
    assert (np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32) == E2M1).all()


@pytest.mark.parametrize("form", [BlockFormat(4, 32), MXFP4, BlockFormat(4, 64, half_scales=True)])
@settings(max_examples=20, deadline=None)
@given(values=matrices)
def test_widening_to_8_bits_changes_no_value(form, values):
    blocks = quantise(values, form)
    wide = blocks.widen()
    assert wide.format == BlockFormat(8, form.block) and wide.codes.shape[-1] == form.block
    np.testing.assert_array_equal(wide.dequantise(), blocks.dequantise())


def test_what_cannot_be_scaled_is_zero_and_not_nonsense():
    values = np.full((2, 128), 1e-42, np.float32)
    values[1] = 1e18
    for form in FORMATS.values():
        rounded = quantise(values, form).dequantise()
        assert np.abs(rounded[0]).max() < 1e-30
        if not form.half_scales:
            assert np.isfinite(rounded).all() and (rounded[1] > 0.8e18).all()


@pytest.mark.parametrize(
    ("form", "bits"),
    [
        (BlockFormat(4, 32), 5.0),
        (BlockFormat(4, 128), 4.25),
        (BlockFormat(8, 32), 9.0),
        (FOUR_ASYMMETRIC, 5.125),
        (MXFP4, 4.25),
        (replace(FOUR_ASYMMETRIC, half_scales=True), 4.625),
    ],
)
def test_bits_a_weight_count_what_is_stored(form, bits):
    blocks = quantise(np.ones((4, 4096), np.float32), form)
    stored = blocks.codes.nbytes + blocks.scales.nbytes
    if blocks.zero_points is not None:
        stored += blocks.zero_points.size * form.bits / 8
    assert form.bits_a_weight == bits == stored * 8 / (4 * 4096)


def test_schemes_keep_8_bits_where_it_matters():
    for name, scheme in SCHEMES.items():
        if name != "keep":
            assert scheme.sensitive.bits == 8
    assert SCHEMES["mxfp4"].experts == MXFP4 and SCHEMES["mxfp4"].ordinary.element == "int"


@pytest.mark.parametrize("name", FORMATS)
def test_many_rows_are_rounded_like_each_of_them(name):
    values = np.random.default_rng(3).standard_normal((300, 1024)).astype(np.float32)
    rows = [0, 127, 128, 299]  # on either side of where large matrices are cut
    np.testing.assert_array_equal(
        quantise(values, FORMATS[name]).dequantise()[rows], quantise(values[rows], FORMATS[name]).dequantise()
    )
