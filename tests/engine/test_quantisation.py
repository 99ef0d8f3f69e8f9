"""Every supported GGUF type is carried without loss."""

import numpy as np
import pytest
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoint import QUANTISED, Type, random_blocks

from lsp_agent.engine.blocks import pack_zero_points, unpack_zero_points
from lsp_agent.engine.gguf_blocks import CARRIERS, reblock


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), super_blocks=st.integers(1, 3))
def test_reblocking_equals_gguf_s_dequantisation(kind, seed, rows, super_blocks):
    raw = random_blocks(kind, rows, 256 * super_blocks, np.random.RandomState(seed))
    expected = quants.dequantize(raw, kind)
    carried = reblock(raw, kind)
    np.testing.assert_allclose(carried.dequantise(), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert carried.codes.shape[1] * carried.format.block == 256 * super_blocks
    assert (carried.corrections is not None) == (carried.zero_points is not None) == carried.format.corrected
    if kind in (Type.Q4_K, Type.Q5_K):
        assert (np.abs(carried.corrections) <= 0.5001 * carried.scales).all()


def test_every_quantised_type_is_tested():
    assert set(QUANTISED) == set(CARRIERS)


@given(st.sampled_from([4, 8]), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_zero_points_survive_packing(bits, rows, blocks, seed):
    values = np.random.RandomState(seed).randint(0, 2**bits, (rows, blocks)).astype(np.uint8)
    packed = pack_zero_points(values, bits)
    assert packed.shape == (rows, -(-blocks * bits // 8))
    np.testing.assert_array_equal(unpack_zero_points(packed, bits, blocks), values)
