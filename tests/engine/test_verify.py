"""Verification: a state that accepts some of the ids of a run is as if it had read those alone."""

import numpy as np
import pytest
from test_golden_hf import PROMPT, read

from lsp_agent.cancel import CancelToken
from lsp_agent.engine.state import State
from lsp_agent.errors import Cancelled

HYBRIDS = ["qwen3-next", "qwen3-next-other"]
MODELS = [*HYBRIDS, "qwen3-moe"]
KNOWN, IDS = PROMPT[:20].tolist(), PROMPT[20:32].tolist()


def arrays(state: State) -> dict[str, np.ndarray]:
    snapshot = state.snapshot()
    return snapshot.growing | snapshot.recurrent


def assert_close(found: State, expected: State) -> None:
    assert found.ids == expected.ids and found.length == expected.length
    for name, array in arrays(expected).items():
        np.testing.assert_allclose(arrays(found)[name], array, rtol=0, atol=1e-5 * np.abs(array).max(), err_msg=name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("accepted", range(1, len(IDS) + 1))
def test_what_is_accepted_has_been_read_and_the_rest_has_not(hf_engine, name, accepted):
    engine = hf_engine(name)
    _, state = read(engine, [KNOWN])
    verified = engine._decoder.verify(IDS, state)
    assert state.ids == KNOWN
    verified.accept(accepted)
    expected, fresh = read(engine, [KNOWN, IDS[:accepted]])
    assert_close(state, fresh)
    logits = np.stack([one.all() for one in verified.logits[:accepted]])
    np.testing.assert_allclose(logits, expected[20:], rtol=0, atol=1e-5 * np.abs(expected).max())
    following, _ = read(engine, [[5], [6]], state)
    wanted, _ = read(engine, [[5], [6]], fresh)
    np.testing.assert_allclose(following, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_replay_writes_the_bits_that_the_run_wrote(hf_engine, name):
    decoder = hf_engine(name)._decoder
    _, state = read(hf_engine(name), [KNOWN])
    state.begin()
    binding = decoder._session.io_binding()
    state.bind(binding)
    kept = decoder._replay.bind(binding, len(IDS))
    decoder._run(binding, np.array([IDS]), state, [], kept=len(IDS))
    following = (state.turn + 1) % state.ring_size
    written = {spec.past: state.buffers[spec.past][following].copy() for spec in decoder.states if not spec.growing}
    for array in (state.buffers[name] for name in written):
        array[following] = np.nan
    decoder._replay.run(state, kept, len(IDS))
    for name_, array in written.items():
        np.testing.assert_array_equal(state.buffers[name_][following], array, err_msg=name_)


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("cut", [1, 2, 5, 11])
def test_a_replay_in_two_parts_writes_the_bits_of_one(hf_engine, name, cut):
    decoder = hf_engine(name)._decoder
    random = np.random.default_rng(1)
    kept = {
        output: random.standard_normal((1, len(IDS), width)).astype(np.float32)
        for output, width in decoder._replay._widths.items()
    }
    ends = []
    for parts in ([kept], [{k: a[:, :cut] for k, a in kept.items()}, {k: a[:, cut:] for k, a in kept.items()}]):
        _, state = read(hf_engine(name), [KNOWN])
        for part in parts:
            count = next(iter(part.values())).shape[1]
            state.begin()
            decoder._replay.run(state, part, count)
            state.commit()
        ends.append(state.snapshot().recurrent)
    for name_, array in ends[0].items():
        np.testing.assert_array_equal(ends[1][name_], array, err_msg=name_)


@pytest.mark.parametrize("name", MODELS)
def test_a_verification_of_which_nothing_is_accepted_changes_nothing(hf_engine, name):
    engine = hf_engine(name)
    _, state = read(engine, [KNOWN, [3]])
    before = arrays(state)
    first = [one.all().copy() for one in engine._decoder.verify(IDS, state).logits]
    for name_, array in arrays(state).items():
        np.testing.assert_array_equal(array, before[name_], err_msg=name_)
    again = engine._decoder.verify(IDS, state).logits
    np.testing.assert_array_equal([one.all() for one in again], first)


@pytest.mark.parametrize("name", MODELS)
def test_a_state_goes_back_over_what_was_accepted(hf_engine, name):
    engine = hf_engine(name)
    _, state = read(engine, [KNOWN])
    state.checkpoint()
    before = arrays(state)
    for accepted in (3, 12, 1):
        engine._decoder.verify(IDS, state).accept(accepted)
    assert state.ids == [*KNOWN, *IDS[:3], *IDS, *IDS[:1]]
    engine._decoder.rollback(state, 1)
    _, fresh = read(engine, [KNOWN, IDS[:3], IDS])
    assert_close(state, fresh)
    engine._decoder.rollback(state, 15)
    for name_, array in arrays(state).items():
        np.testing.assert_array_equal(array, before[name_], err_msg=name_)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [1, 2])
def test_guesses_right_and_wrong_give_the_tokens_of_single_steps(hf_engine, name, seed):
    decoder = hf_engine(name)._decoder
    _, state = read(hf_engine(name), [KNOWN])
    plain = [IDS[0]]
    for _ in range(40):
        (logits,) = decoder.step(plain[-1:], state)
        state.extend(plain[-1:])
        plain.append(int(logits.top(1)[0][0]))
    random = np.random.default_rng(seed)
    _, state = read(hf_engine(name), [KNOWN])
    tokens = [IDS[0]]
    while len(tokens) < len(plain):
        right = plain[len(tokens) : len(tokens) + random.integers(0, 6)]
        draft = [*right, *random.integers(0, 256, random.integers(0, 4)).tolist()][: len(plain) - len(tokens) - 1]
        verified = decoder.verify([tokens[-1], *draft], state)
        accepted = 0
        for logits, guess in zip(verified.logits, [*draft, None], strict=True):
            tokens.append(int(logits.top(1)[0][0]))
            accepted += 1
            if tokens[-1] != guess:
                break
        verified.accept(accepted)
    assert tokens == plain and state.ids == [*KNOWN, *plain[:-1]]


@pytest.mark.parametrize("name", MODELS)
def test_a_cancelled_verification_leaves_the_state_as_it_was(hf_engine, name):
    decoder = hf_engine(name)._decoder
    _, state = read(hf_engine(name), [KNOWN])
    before = arrays(state)
    cancel = CancelToken()
    cancel.cancel()
    with pytest.raises(Cancelled):
        for _ in range(200):  # a run this short may finish before it is stopped
            decoder.verify([1] * decoder.most_verified, state, cancel)
    for name_, array in arrays(state).items():
        np.testing.assert_array_equal(array, before[name_], err_msg=name_)


def test_plain_runs_put_nothing_out_for_replays(hf_engine):
    decoder = hf_engine("qwen3-next")._decoder
    _, state = read(hf_engine("qwen3-next"), [KNOWN])
    outputs = [output.name for output in decoder._session.get_outputs() if output.name in decoder._replay._widths]
    feeds = state.snapshot().recurrent
    feeds |= {spec.past: state.buffers[spec.past] for spec in decoder.states if spec.growing}
    feeds |= {
        "embeddings": decoder._embed(np.array([IDS])),
        "lengths": np.array([len(KNOWN) + len(IDS) - 1], np.int32),
        "total_length": np.array([len(KNOWN) + len(IDS)], np.int32),
        "rows": np.array([], np.int64),
    }
    for kept in (0, 4):
        found = decoder._session.run(outputs, feeds | {"kept": np.array([kept])})
        assert [array.shape[1] for array in found] == [kept] * len(outputs) and len(outputs) == 6


def test_counts_that_cannot_be(hf_engine):
    decoder = hf_engine("qwen3-next")._decoder
    _, state = read(hf_engine("qwen3-next"), [KNOWN])
    for ids in ([], [1] * (decoder.most_verified + 1)):
        with pytest.raises(ValueError, match="cannot verify"):
            decoder.verify(ids, state)
    verified = decoder.verify(IDS, state)
    for count in (0, len(IDS) + 1):
        with pytest.raises(ValueError, match="cannot accept"):
            verified.accept(count)
