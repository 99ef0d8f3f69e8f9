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
from lsp_agent.engine.prefixes.host_memory import HostMemory, bytes_of
from lsp_agent.engine.prefixes.recurrent_copies import RecurrentCopies
from lsp_agent.engine.state import State, recurrent_shapes
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


def test_checkpoints_are_thinned_evenly_where_memory_is_short(hf_engine):
    engine = hf_engine(HYBRID)
    specs = engine._decoder.states
    memory = HostMemory(16 * bytes_of(recurrent_shapes(specs)))
    state = State(specs, 128, memory=memory)
    memory.evict = state.checkpoints.thin
    for token in [*PROMPT, *PROMPT]:
        read(engine, [[token]], state)
        state.checkpoint()
    kept = state.checkpoints.lengths
    assert len(kept) == 16 and kept[-1] == 80 and kept[0] <= 10 and memory.most_used <= memory.limit
    assert max(np.diff(kept)) <= 16


def test_states_are_remembered_at_stops_and_every_few_thousand_tokens(hf_engine, monkeypatch):
    monkeypatch.setattr("lsp_agent.engine.state.CHECKPOINT_EVERY", 16)
    engine = hf_engine(HYBRID)
    state = State(engine._decoder.states, 128)
    state.stops = (3, 24, 90)
    ids = [*PROMPT, *PROMPT]
    while state.length < len(ids):
        read(engine, [ids[state.length : state.length + state.until_stop(7)]], state)
    assert state.checkpoints.lengths == [3, 24, 45, 66] and state.length == 80
    assert State(hf_engine(ATTENTION)._decoder.states, 128).until_stop(7) == 7


class Elsewhere:
    """An array of a device with a memory of its own."""

    def __init__(self, values):
        self.values = np.array(values)


class SmallDevice(CpuDevice):
    """Room for three checkpoints."""

    name = "cuda"
    checkpoints = 3

    def copy(self, array):
        return Elsewhere(array)

    def fetch(self, array, into):
        into[...] = array.values if isinstance(array, Elsewhere) else array


def test_the_oldest_checkpoints_move_to_main_memory():
    copies = RecurrentCopies({"a": ((1, 2), "float32")}, SmallDevice(), memory := HostMemory(1 << 20))
    for length in (100, 200, 210, 300, 400, 500):
        copies.add(length, {"a": np.full((1, 2), length, np.float32)})
    assert copies.lengths == [100, 200, 300, 400, 500]  # 210 lay close after 200
    assert [isinstance(copies.at(length)["a"], Elsewhere) for length in copies.lengths] == [False] * 2 + [True] * 3
    for length in (100, 200):
        np.testing.assert_array_equal(copies.at(length)["a"], [[length, length]])
    assert memory.used == 2 * 64
    assert copies.in_main_memory(100, memory) is copies.at(100)
    np.testing.assert_array_equal(copies.in_main_memory(500, memory)["a"], [[500, 500]])
    assert copies.worth_moving([400, 100, 115, 117, 405]) == [100, 117, 400]
    copies.forget_after(150)
    assert copies.lengths == [100] and memory.used == 64


def test_a_device_without_room_in_main_memory_keeps_the_latest_checkpoints():
    copies = RecurrentCopies({"a": ((1, 2), "float32")}, SmallDevice(), HostMemory(0))
    for length in (100, 200, 300, 400):
        copies.add(length, {"a": np.full((1, 2), length, np.float32)})
    assert copies.lengths == [200, 300, 400]


def test_what_could_not_be_taken_over_as_a_whole_has_read_nothing(hf_engine, monkeypatch):
    _, state = read(hf_engine(HYBRID), [PROMPT[:20]])
    state.checkpoint()
    other = {name: array.copy() for name, array in state.recurrent.items()}
    assigned = []

    def fail(target, values):
        assigned.append(target)
        if len(assigned) == 2:
            raise MemoryError

    monkeypatch.setattr(state._device, "assign", fail)
    with pytest.raises(MemoryError):
        state.resume([*PROMPT[:20].tolist(), 5], other)
    assert (state.ids, state.length, state.checkpoints.lengths) == ([], 0, [])


def test_what_another_state_has_read_can_be_taken_over(hf_engine):
    for name in (HYBRID, ATTENTION):
        engine = hf_engine(name)
        pieces = [PROMPT[:10], PROMPT[10:]]
        _, other = read(engine, pieces)
        _, state = read(engine, pieces[:1])
        view = State(engine._decoder.states, 128, arrays=other._growing | other.recurrent)
        growing = {past: array[0, :, 10:40] for past, array in view._growing.items()}
        state.append(PROMPT[10:].tolist(), growing, view.recurrent)
        read(engine, [[3], [4]], state)
        assert_same_state(state, read(engine, [*pieces, [3], [4]])[1])


def test_a_conversation_goes_on_from_its_own_answer(hf_package):
    engine = Engine.load(hf_package(HYBRID), threads=1, accuracy="exact")
    ids = PROMPT.tolist()
    answer = [step.token for step in engine.generate(ids, Sampling(max_tokens=8), CancelToken(), stop_ids=())]
    following = [*ids, *answer, 3, 4]
    warm = engine.generate(following, Sampling(max_tokens=8), CancelToken(), stop_ids=())
    tokens = [step.token for step in warm]
    assert warm.timings.cached_tokens == len(ids) + len(answer) - 1
    engine.prefixes.clear()
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
