"""The state of a decoder: any split gives the same; save, restore and roll back continue bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden_hf import PROMPT, read

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.engine.device import CpuDevice
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.generation import prefill
from lsp_agent.engine.state import PrefixCache, State
from lsp_agent.errors import Cancelled

HYBRID, ATTENTION = "qwen3-next", "qwen3-moe"
HISTORY = CpuDevice.history


def arrays(state: State) -> dict[str, np.ndarray]:
    snapshot = state.snapshot()
    return snapshot.growing | snapshot.recurrent


def assert_same_state(state, expected, close: float | None = None):
    found, wanted = arrays(state), arrays(expected)
    assert found.keys() == wanted.keys() and state.ids == expected.ids
    for name, array in wanted.items():
        if close:
            np.testing.assert_allclose(found[name], array, rtol=0, atol=close * np.abs(array).max(), err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_hybrid_has_both_kinds_of_state(hf_engine):
    specs = hf_engine(HYBRID)._decoder.states
    assert [spec.growing for spec in specs] == [False] * 6 + [True] * 2


@pytest.mark.parametrize("name", [HYBRID, "qwen3-next-other", ATTENTION])
@settings(max_examples=12, deadline=None)
@given(cuts=st.sets(st.integers(1, len(PROMPT) - 1), max_size=8))
def test_any_split_gives_the_same_state(hf_engine, name, cuts):
    engine = hf_engine(name)
    _, whole = read(engine, [PROMPT])
    _, pieces = read(engine, np.split(PROMPT, sorted(cuts)))
    assert_same_state(pieces, whole, close=1e-5)


@pytest.mark.parametrize("name", [HYBRID, ATTENTION])
def test_a_restored_snapshot_continues_bit_for_bit(hf_engine, name):
    engine = hf_engine(name)
    _, state = read(engine, [PROMPT[:20]])
    snapshot = state.snapshot()
    expected, end = read(engine, [[token] for token in PROMPT[20:]], state)
    read(engine, [[7], [8]], state)
    for target in (state, State(engine._decoder.states, 64)):  # the same buffers, and others of another capacity
        target.restore(snapshot)
        logits, _ = read(engine, [[token] for token in PROMPT[20:]], target)
        np.testing.assert_array_equal(logits, expected)
    assert_same_state(state, target)
    assert end is state


@pytest.mark.parametrize("name", [HYBRID, ATTENTION])
@pytest.mark.parametrize("back", [1, 3, 10])
def test_rolling_back_to_a_checkpoint_continues_bit_for_bit(hf_engine, name, back):
    engine = hf_engine(name)
    _, state = read(engine, [PROMPT[:20]])
    state.checkpoint()
    expected, _ = read(engine, [[token] for token in PROMPT[20:]], state)
    wanted = state.snapshot()
    state.truncate(20)
    read(engine, [[token] for token in range(back)], state)
    state.truncate(20)
    logits, _ = read(engine, [[token] for token in PROMPT[20:]], state)
    np.testing.assert_array_equal(logits, expected)
    for name_, array in arrays(state).items():
        np.testing.assert_array_equal(array, (wanted.growing | wanted.recurrent)[name_])


@pytest.mark.parametrize("name", [HYBRID, "qwen3-next-other", ATTENTION])
@settings(max_examples=15, deadline=None)
@given(
    cuts=st.sets(st.integers(1, len(PROMPT) - 1), max_size=8),
    marks=st.sets(st.integers(0, 8)),
    back=st.integers(0, len(PROMPT) - 1),
)
def test_rolling_back_by_any_number_of_tokens_gives_the_same(hf_engine, name, cuts, marks, back):
    engine = hf_engine(name)
    state = State(engine._decoder.states, 128)
    for index, piece in enumerate(np.split(PROMPT, sorted(cuts))):
        read(engine, [piece], state)
        if index in marks:
            state.checkpoint()
    expected, wanted = read(engine, [PROMPT[: len(PROMPT) - back], [5], [6]])
    engine._decoder.rollback(state, back)
    assert state.ids == list(PROMPT[: len(PROMPT) - back])
    logits, _ = read(engine, [[5], [6]], state)
    np.testing.assert_allclose(logits, expected[-2:], rtol=0, atol=1e-4 * np.abs(expected).max())
    assert_same_state(state, wanted, close=1e-4)


@pytest.mark.parametrize("back", range(1, HISTORY + 1))
def test_rolling_back_decoded_tokens_gives_the_same_bits(hf_engine, back):
    engine = hf_engine(HYBRID)
    _, state = read(engine, [PROMPT[:20]])
    state.checkpoint()
    read(engine, [[token] for token in PROMPT[20:]], state)
    wanted = state.snapshot()
    expected, _ = read(engine, [[1], [2]], state)
    state.restore(wanted)
    read(engine, [[token] for token in range(back)], state)
    engine._decoder.rollback(state, back)
    for name, array in state.snapshot().recurrent.items():
        np.testing.assert_array_equal(array, wanted.recurrent[name], err_msg=name)
    np.testing.assert_array_equal(read(engine, [[1], [2]], state)[0], expected)


def test_a_state_goes_back_a_few_runs_without_a_checkpoint(hf_engine):
    engine = hf_engine(HYBRID)
    _, state = read(engine, [PROMPT[:20], [3]])
    before = state.snapshot()
    read(engine, [[1, 2, 3, 4], [5]], state)
    assert [state.reachable(n) for n in (25, 24, 20, 19)] == [25, 21, 20, 0]
    state.truncate(21)
    for name, array in state.snapshot().recurrent.items():
        np.testing.assert_array_equal(array, before.recurrent[name])
    assert [state.reachable(n) for n in (20, 19)] == [20, 0]
    read(engine, [[token] for token in range(12)], state)
    assert [state.reachable(33 - n) for n in (1, HISTORY, HISTORY + 1)] == [32, 33 - HISTORY, 0]
    state.trim()
    assert [state.reachable(n) for n in (33, 32)] == [33, 0]


def test_a_cancelled_run_loses_only_what_it_may_have_overwritten(hf_engine):
    engine = hf_engine(HYBRID)
    _, state = read(engine, [[token] for token in PROMPT[: HISTORY + 4]])
    assert state.reachable(4) == 4
    state.binding(engine._decoder._session)  # what a run does first; a cancelled one does no more
    assert [state.reachable(n) for n in (4, 5)] == [0, 5]


def test_a_recurrent_state_goes_back_to_checkpoints_and_before_the_last_run(hf_engine):
    _, state = read(hf_engine(HYBRID), [PROMPT[:10]])
    state.checkpoint()
    read(hf_engine(HYBRID), [PROMPT[10:15], PROMPT[15:30]], state)
    assert [state.reachable(n) for n in (0, 9, 10, 29, 30, 99)] == [0, 0, 10, 15, 30, 30]
    with pytest.raises(ValueError, match="no checkpoint at 29"):
        state.truncate(29)
    state.truncate(0)
    assert state.reachable(10) == 0 and not any(array.any() for array in state.snapshot().recurrent.values())
    _, dense = read(hf_engine(ATTENTION), [PROMPT])
    assert [dense.reachable(n) for n in (0, 9, 99)] == [0, 9, 40]


def test_checkpoints_are_thinned_evenly(hf_engine):
    engine = hf_engine(HYBRID)
    state = State(engine._decoder.states, 128)
    for token in [*PROMPT, *PROMPT]:
        read(engine, [[token]], state)
        state.checkpoint()
    state.trim()
    kept = sorted({state.reachable(n) for n in range(80)} - {0})
    assert len(kept) <= CpuDevice.checkpoints and kept[0] <= 10
    assert max(np.diff(kept)) <= 16


def test_a_shrunken_batch_continues_as_single_sequences_do(hf_engine):
    engine = hf_engine(HYBRID)
    decoder = engine._decoder
    _, prompt = read(engine, [PROMPT])
    batch = State(decoder.states, 64, batch=3)
    batch.copy_prefix(prompt, len(PROMPT))
    decoder.run(np.array([[1], [2], [3]]), batch, range(3))
    batch.length += 1
    batch.keep([0, 2])
    logits = decoder.run(np.array([[4], [5]]), batch, range(2))
    for row, tokens in enumerate(([1, 4], [3, 5])):
        single = State(decoder.states, 64)
        single.copy_prefix(prompt, len(PROMPT))
        expected, _ = read(engine, [[token] for token in tokens], single)
        np.testing.assert_allclose(logits[row], expected[-1], atol=1e-5)


def test_prompts_resume_at_checkpoints(hf_package):
    engine = Engine.load(hf_package(HYBRID), threads=1, accuracy="exact")
    cache = engine._prefixes
    ids = [int(token) for token in PROMPT] * 2
    state = cache.take(ids)
    prefill(engine._decoder, state, ids, CancelToken(), chunk=16)
    assert cache.take([*ids, 5]).length == len(ids)
    resumed = cache.take([*ids[:50], 1, 2])
    assert resumed.length == 48
    fresh = State(engine._decoder.states, 128)
    logits = prefill(engine._decoder, resumed, [*ids[48:50], 1, 2], CancelToken())
    prefill(engine._decoder, fresh, ids[:48], CancelToken(), chunk=16)
    np.testing.assert_array_equal(logits, prefill(engine._decoder, fresh, [*ids[48:50], 1, 2], CancelToken()))
    assert cache.take(ids[:20]).length == 16


def test_a_conversation_goes_on_from_its_own_answer(hf_package):
    engine = Engine.load(hf_package(HYBRID), threads=1, accuracy="exact")
    ids = PROMPT.tolist()
    answer = [step.token for step in engine.generate(ids, Sampling(max_tokens=8), CancelToken(), stop_ids=())]
    following = [*ids, *answer, 3, 4]
    warm = engine.generate(following, Sampling(max_tokens=8), CancelToken(), stop_ids=())
    tokens = [step.token for step in warm]
    assert warm.timings.cached_tokens == len(ids) + len(answer) - 1
    engine._prefixes.clear()
    cold = engine.generate(following, Sampling(max_tokens=8), CancelToken(), stop_ids=())
    assert [step.token for step in cold] == tokens and cold.timings.cached_tokens == 0


def test_a_cancelled_run_leaves_the_state_as_it_was(hf_engine):
    engine = hf_engine(HYBRID)
    _, state = read(engine, [PROMPT[:10]])
    before = state.snapshot()
    cancel = CancelToken()
    cancel.cancel()
    with pytest.raises(Cancelled):
        for _ in range(50):  # a run this short may finish before it is stopped
            engine._decoder.run(np.array([PROMPT[10:]]), state, [0], cancel)
            state.restore(before)
    expected, _ = read(engine, [PROMPT])
    logits, _ = read(engine, [PROMPT[10:]], state)
    np.testing.assert_allclose(logits, expected[10:], atol=1e-4)


def test_the_prefix_cache_recycles_hybrid_states(hf_engine):
    engine = hf_engine(HYBRID)
    cache = PrefixCache(engine._decoder.states, 128, slots=2)
    for start in range(4):
        ids = [(start + n) % 250 for n in range(30)]
        logits = prefill(engine._decoder, cache.take(ids), ids, CancelToken())
        expected, _ = read(engine, [ids])
        np.testing.assert_allclose(logits, expected[-1], atol=1e-5)


@pytest.mark.parametrize("name", [HYBRID, ATTENTION])
def test_only_states_that_can_drop_guesses_are_drafted_on(hf_package, name):
    engine = Engine.load(hf_package(name), threads=1, accuracy="exact")
    ids = [5, 6, 7, 8] * 10
    answers = []
    for drafting in (True, False):
        generation = engine.generate(ids, Sampling(max_tokens=24), CancelToken(), stop_ids=(), drafting=drafting)
        answers.append([step.token for step in generation])
        assert (generation.timings.drafted_tokens > 0) == (drafting and name == ATTENTION)
        engine._prefixes.clear()
    assert answers[0] == answers[1]
