"""Prefixes move between the GPU's memory, main memory and disk bit for bit, and no token is read twice."""

import numpy as np
import pytest
from transcripts import Reader, Transcript, cold

from lsp_agent.engine.prefixes.cache import PrefixCache
from lsp_agent.engine.prefixes.disk import PrefixDisk
from lsp_agent.engine.prefixes.recurrent_copies import WORTH_MOVING

pytestmark = pytest.mark.gpu

MODELS = pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-next"])
CONTEXT = 2048


def bits(state):
    snapshot = state.snapshot()
    return snapshot.growing | snapshot.recurrent


def ask(reader, talk, slack):
    ids, boundaries = talk.prompt()
    expected = len(ids) - reader.branch_point(ids, boundaries)
    assert expected <= reader.ask(talk) <= expected + slack


@MODELS
@pytest.mark.parametrize("memory", [1 << 28, 0])
def test_conversations_branches_and_undone_turns(decoders, name, memory):
    gpu, _ = decoders(name, "int4", context=CONTEXT)
    reader = Reader(gpu, PrefixCache(gpu.states, CONTEXT, 4, gpu.device, memory), chunk=256)
    slack = WORTH_MOVING if gpu.recurrent else 0  # of what has left the GPU's memory
    talk = Transcript(1).add("system", 120).add("user", 50)
    for _ in range(8):
        ask(reader, talk, slack)
        talk.add("tool", 60)
    if memory:
        for messages in (14, 3, 9):
            ask(reader, talk.branch(messages, messages).add("user", 30), slack)
    ask(reader, talk, slack)


@MODELS
def test_what_comes_back_is_bit_for_bit_what_was_read(decoders, name, tmp_path):
    gpu, _ = decoders(name, "int4", context=CONTEXT)
    disk = PrefixDisk(tmp_path / "prefixes", gpu.states, 1 << 28)
    reader = Reader(gpu, PrefixCache(gpu.states, CONTEXT, 1, gpu.device, 1 << 28, disk), chunk=256)
    ids, other = Transcript(2).add("user", 700).ids, Transcript(3).add("user", 700).ids
    state, _ = reader.begin(ids)
    wanted, logits = bits(state), reader.go_on(state, [*ids, 5, 6])
    reader.end(state)
    for prompt in (other, ids):
        state, _ = reader.begin(prompt)
        reader.end(state)
    reader.begin(other)
    reader.cache.close()
    disk = PrefixDisk(tmp_path / "prefixes", gpu.states, 1 << 28)
    reader = Reader(gpu, PrefixCache(gpu.states, CONTEXT, 1, gpu.device, 1 << 28, disk), chunk=256)
    state = reader.cache.take([*ids, 5, 6])
    found = bits(state)
    assert state.length >= len(ids)
    for past, array in wanted.items():
        if array.ndim == 4 and past in state._growing:
            np.testing.assert_array_equal(found[past][:, :, : len(ids)], array)
    again = reader.go_on(state, [*ids, 5, 6])
    np.testing.assert_allclose(again, logits, rtol=0, atol=0.03 * np.abs(logits).max())
    expected, _ = cold(gpu, [*ids, 5, 6], chunk=256)
    np.testing.assert_allclose(again, expected, rtol=0, atol=0.03 * np.abs(expected).max())


def test_old_checkpoints_leave_the_gpus_memory(decoders):
    gpu, _ = decoders("qwen3-next", "int4", context=CONTEXT)
    reader = Reader(gpu, PrefixCache(gpu.states, CONTEXT, 2, gpu.device, 1 << 28), chunk=256)
    talk = Transcript(4).add("system", 60)
    for _ in range(10):
        reader.ask(talk.add("user", 40))
    (state,) = reader.cache._states
    copies = [state.checkpoints.at(length) for length in state.checkpoints.lengths]
    on_gpu = [not isinstance(array, np.ndarray) for arrays in copies for array in list(arrays.values())[:1]]
    assert sum(on_gpu) == gpu.device.checkpoints and len(copies) > 2 * sum(on_gpu)
    assert on_gpu == sorted(on_gpu)  # the oldest are in main memory
