"""Expert codes in the layout that ONNX Runtime's CUDA kernels read in place."""

import hashlib

import numpy as np
import pytest
from emulator import EmulatedKernels

from lsp_agent.engine.blocks import unpack_nibbles
from lsp_agent.engine.gpu.packing import pack_expert_codes, pack_launch

PACKED_BY_ONNX_RUNTIME = {
    # SHA-256 of what onnxruntime.quantization.cuda_quantizer._pack_weights_for_cuda_mixed_gemm of 1.31.1 (torch 2.13)
    # makes of each of the two matrices of `codes_of`, for architecture 80.
    4: "092b01792b8928bfef6dc5061752de43581edb262afff0461522559ed5e73800",
    8: "53ba7eb6b50910f041d9baafa071e217e5f69a7e6ec5318e3cb285f859a696ff",
}


def codes_of(bits, matrices=2, rows=48, columns=192):
    count = matrices * rows * columns * bits // 8
    mixed = np.arange(count, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(24)
    return mixed.astype(np.uint8).reshape(matrices, rows, columns * bits // 8)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_packed_as_onnx_runtime_packs_them(bits):
    packed = pack_expert_codes(codes_of(bits), bits)
    assert hashlib.sha256(packed.tobytes()).hexdigest() == PACKED_BY_ONNX_RUNTIME[bits]


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_may_be_packed_in_pieces(bits):
    codes = codes_of(bits)
    whole = pack_expert_codes(codes, bits)
    out = np.zeros_like(codes).reshape(-1, codes.shape[2])
    for start in range(0, len(out), 4):
        pack_expert_codes(codes.reshape(out.shape)[None, start : start + 4], bits, out[None, start : start + 4])
    np.testing.assert_array_equal(out.reshape(codes.shape), whole)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("bits", "columns"), [(4, 64), (4, 192), (4, 2048), (8, 64), (8, 192), (8, 1088)])
def test_the_kernel_packs_the_same(bits, columns, backwards):
    codes = codes_of(bits, rows=8, columns=columns)
    packed = np.zeros_like(codes)
    EmulatedKernels(backwards).run(pack_launch(16, columns, bits), codes, packed)
    np.testing.assert_array_equal(packed, pack_expert_codes(codes, bits))


def test_no_code_is_lost():
    codes = codes_of(4)
    before, after = (np.bincount(unpack_nibbles(x).reshape(-1)) for x in (codes, pack_expert_codes(codes, 4)))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(("rows", "columns"), [(6, 64), (4, 96)])
def test_sizes_that_cannot_be_interleaved_are_refused(rows, columns):
    with pytest.raises(ValueError, match="cannot be interleaved"):
        pack_expert_codes(np.zeros((1, rows, columns // 2), np.uint8), 4)
