"""The emulator that the kernels' tests stand on, and what the kernels share."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from emulator import EmulatedKernels, KernelFailed

from lsp_agent.engine.gpu.launch import Launch

FOLDER = Path(__file__).parent / "kernels"
ORDERS = pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])


def barriers(case: int, x: np.ndarray, backwards: bool = False, threads: int = 64) -> np.ndarray:
    y = np.zeros((14, 64), np.float32)
    launch = Launch(str(FOLDER / "barriers"), (("CASE", str(case)),), (2, 1, 1), (threads, 1, 1), shared=256)
    EmulatedKernels(backwards).run(launch, x, y)
    return y


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(2).integers(-50, 50, 72).astype(np.float32)  # whose sums are exact


@ORDERS
def test_threads_exchange_values_as_on_a_gpu(x: np.ndarray, backwards: bool) -> None:
    y = barriers(0, x, backwards)
    values, warps = x[:64], x[:64].reshape(2, 32)
    expected = [
        np.full(64, values.sum()),
        np.full(64, values.max()),
        np.repeat(values.reshape(8, 8).sum(1), 8),
        np.roll(warps, -5, 1).ravel(),
        np.concatenate([warps[:, 3:], warps[:, 29:]], 1).ravel(),
        np.concatenate([warps[:, :3], warps[:, :29]], 1).ravel(),
        np.ones(64),
        np.full(64, (values > 0).sum()),
        np.repeat(warps.argmax(1) + np.array([0, 32]), 32),
        values[::-1],
    ]
    np.testing.assert_array_equal(y[:10], np.array(expected, np.float32))
    assert y[10, 0] == 2 * values.sum()
    np.testing.assert_allclose(y[11], 1 / (1 + np.exp(-values.astype(np.float64))), rtol=1e-6)
    np.testing.assert_allclose(y[12], values / (1 + np.exp(-values.astype(np.float64))), rtol=1e-6)
    np.testing.assert_array_equal(y[13], values.reshape(32, 2)[:, ::-1].ravel())


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (1, r"divergence in block 0 0 0: thread 0 waits for its block in line \d+, thread 40 has ended"),
        (2, r"divergence in block 0 0 0: thread 0 waits for its block in line \d+, thread 32 waits elsewhere"),
        (3, r"divergence in block 0 0 0: thread 0 waits for its warp in line \d+, thread 31 has ended"),
        (4, r"misaligned address is read or written \(block 0 0 0, thread 1 0 0\)"),
        (5, r"index lies outside of its array \(block 0 0 0, thread 32 0 0\)"),
        (6, "address without memory"),
        (9, "mask must be full"),
    ],
)
def test_what_a_gpu_forbids_is_found(case: int, reason: str, x: np.ndarray) -> None:
    with pytest.raises(KernelFailed, match=f"barriers: .*{reason}"):
        barriers(case, x)
    barriers(0, x)  # the next launch is not disturbed


def test_unwritten_shared_memory_shows(x: np.ndarray) -> None:
    assert np.isnan(barriers(7, x)[0]).all()


def test_a_missing_barrier_shows_in_one_of_both_orders(x: np.ndarray) -> None:
    expected = np.concatenate([x[:1], x[:63]])
    right = [np.array_equal(barriers(8, x, backwards)[0], expected) for backwards in (False, True)]
    assert right == [True, False]


@pytest.mark.parametrize(("threads", "reason"), [(48, "multiple of 32"), (2048, "at most 1024")])
def test_wrong_blocks_are_refused(threads: int, reason: str, x: np.ndarray) -> None:
    with pytest.raises(KernelFailed, match=reason):
        barriers(0, x, threads=threads)


def test_too_much_shared_memory_is_refused(x: np.ndarray) -> None:
    launch = Launch(str(FOLDER / "barriers"), (("CASE", "0"),), (1, 1, 1), (64, 1, 1), shared=227 * 1024)
    with pytest.raises(KernelFailed, match="of dynamic shared memory"):
        EmulatedKernels().run(launch, x, np.zeros((14, 64), np.float32))


def test_a_wrong_number_of_arguments_is_refused(x: np.ndarray) -> None:
    launch = Launch(str(FOLDER / "barriers"), (("CASE", "0"),), (1, 1, 1), (64, 1, 1), shared=256)
    with pytest.raises(KernelFailed, match="it has 2 arguments, not 1"):
        EmulatedKernels().run(launch, x)


def test_weights_of_few_bits_are_decoded_exactly() -> None:
    codes = np.concatenate([np.arange(256), np.random.default_rng(3).integers(0, 256, 256)]).astype(np.uint8)
    words = codes.view(np.uint32)
    shape = (len(words), 8)
    nibbles, e2m1, scaled = np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    bytes_ = np.zeros((len(words), 4), np.float32)
    launch = Launch(str(FOLDER / "decode"), (), (1, 1, 1), (len(words), 1, 1))
    EmulatedKernels().run(launch, words, nibbles, bytes_, e2m1, scaled)
    expected = np.stack([codes & 15, codes >> 4], -1).reshape(shape)
    np.testing.assert_array_equal(nibbles, expected)
    np.testing.assert_array_equal(bytes_, codes.reshape(-1, 4))
    numbers = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)[expected]
    np.testing.assert_array_equal(e2m1, numbers)
    np.testing.assert_array_equal(scaled, numbers * 2.0**-14)
