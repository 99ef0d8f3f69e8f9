"""The graph for the GPU computes what the exact one on the CPU does, within fp16's rounding."""

import gpu_checkpoints
import numpy as np
import pytest

pytestmark = pytest.mark.gpu

PROMPT = np.random.RandomState(3).randint(0, 256, 48)
TOLERANCE = 0.03
"""Of the largest logit, at nine of ten positions: fp16 activations may route a token between two near experts."""


def read(decoder, pieces, state=None):
    state = state or decoder.new_state(128)
    logits = []
    for piece in pieces:
        logits.append(decoder.run(np.array([piece], np.int64), state, range(len(piece))))
        state.extend([int(token) for token in piece])
    return np.concatenate(logits), state


def assert_close(found, wanted):
    assert np.isfinite(found).all()
    errors = np.abs(found - wanted).reshape(-1, wanted.shape[-1]).max(axis=-1) / np.abs(wanted).max()
    error = np.quantile(errors, 0.9)
    correlation = np.corrcoef(found.reshape(-1), wanted.reshape(-1))[0, 1]
    print(f"error {error:.4f}, correlation {correlation:.6f}")
    assert error < TOLERANCE and correlation > 0.999


@pytest.mark.parametrize("scheme", ["keep", "int8", "int4", "int4-64", "int4-asymmetric", "mxfp4"])
@pytest.mark.parametrize("name", gpu_checkpoints.CONFIGS)
def test_the_gpu_gives_the_cpus_logits(decoders, name, scheme):
    gpu, cpu = decoders(name, scheme)
    wanted, _ = read(cpu, [PROMPT])
    assert_close(read(gpu, [PROMPT])[0], wanted)
    assert_close(read(gpu, [PROMPT[:30], PROMPT[30:31], PROMPT[31:]])[0], wanted)
    assert_close(read(gpu, [PROMPT[:8], *([token] for token in PROMPT[8:])])[0], wanted)


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-next"])
def test_restored_and_rolled_back_states_continue_bit_for_bit(decoders, name):
    gpu, _ = decoders(name, "int4")
    _, state = read(gpu, [PROMPT[:20]])
    snapshot = state.snapshot()
    expected, _ = read(gpu, [[token] for token in PROMPT[20:]], state)
    read(gpu, [[1]], state)
    gpu.rollback(state, 1)
    further, _ = read(gpu, [[7], [8]], state)
    other = gpu.new_state(128)
    other.restore(snapshot)
    again, _ = read(gpu, [[token] for token in PROMPT[20:]], other)
    np.testing.assert_array_equal(again, expected)
    np.testing.assert_array_equal(read(gpu, [[7], [8]], other)[0], further)


def test_rolling_back_further_reads_again(decoders):
    gpu, _ = decoders("qwen3-next", "int4")
    wanted, _ = read(gpu, [PROMPT[:20], [7], [8]])
    _, state = read(gpu, [PROMPT[:20], [1], [2], [3]])
    gpu.rollback(state, 3)
    assert_close(read(gpu, [[7], [8]], state)[0], wanted[-2:])


def test_a_batch_decodes_as_single_sequences_do(decoders):
    gpu, _ = decoders("qwen3-next", "int4")
    _, prompt = read(gpu, [PROMPT])
    batch = gpu.new_state(64, 3)
    batch.copy_prefix(prompt, len(PROMPT))
    gpu.run(np.array([[1], [2], [3]]), batch, range(3))
    batch.length += 1
    batch.keep([0, 2])
    logits = gpu.run(np.array([[4], [5]]), batch, range(2))
    for row, tokens in enumerate(([1, 4], [3, 5])):
        single = gpu.new_state(64)
        single.copy_prefix(prompt, len(PROMPT))
        expected, _ = read(gpu, [[token] for token in tokens], single)
        assert_close(logits[row], expected[-1])
