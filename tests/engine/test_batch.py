"""Rows of a batch: sequences of different lengths in one run, joining and leaving, against the same alone."""

import numpy as np
import pytest

from lsp_agent.engine.scheduling.batch import Batch

HYBRID, MIXTURE = "qwen3-next", "qwen3-moe"
TOKENS = np.random.default_rng(3).integers(0, 250, (4, 60)).tolist()
LENGTHS = (3, 21, 40, 9)
CLOSE = 5e-4
"""Logits are of order 1; kernels for several rows add up in another order."""


def read(decoder, ids):
    state = decoder.new_state(64)
    decoder.run(np.array([ids], np.int64), state, [])
    state.extend(ids)
    return state


def alone(decoder, ids, length):
    """Logits of each token from `length` on, one at a time."""
    state, logits = read(decoder, ids[:length]), []
    for token in ids[length:]:
        logits.append(decoder.step([token], state)[0].all())
        state.extend([token])
    return logits


class Together:
    """Steps rows of a batch and compares each with its sequence alone."""

    def __init__(self, decoder, most=4, capacity=64):
        self.decoder, self.compared = decoder, 0
        self.batch = Batch(decoder.states, capacity, most, decoder.device)
        self.expected = [alone(decoder, ids, length) for ids, length in zip(TOKENS, LENGTHS, strict=True)]

    def join(self, owner, state=None):
        ids, length = TOKENS[owner], LENGTHS[owner]
        self.batch.join(owner, state or read(self.decoder, ids[:length]))

    def step(self, *owners):
        rows = [self.batch.find(owner) for owner in owners]
        taken = self.batch.prepare(rows)
        said = self.decoder.step([TOKENS[row.owner][row.length] for row in taken], self.batch)
        for row, logits in zip(taken, said, strict=True):
            if row in rows:
                expected = self.expected[row.owner][row.length - LENGTHS[row.owner]]
                np.testing.assert_allclose(logits.all(), expected, atol=CLOSE)
                row.length += 1
                self.compared += 1


@pytest.fixture(params=["tiny", HYBRID, MIXTURE])
def decoder(request, tiny_engine, hf_engine):
    return (tiny_engine() if request.param == "tiny" else hf_engine(request.param))._decoder


def test_rows_of_different_lengths_say_what_each_says_alone(decoder):
    together = Together(decoder)
    for owner in range(4):
        together.join(owner)
    for _ in range(12):
        together.step(0, 1, 2, 3)
    assert together.compared == 48


def test_rows_join_leave_and_move_between_steps(decoder):
    together = Together(decoder)
    together.join(0)
    together.join(1)
    together.step(0, 1)
    together.join(2)
    together.step(0, 1, 2)
    together.step(0, 1, 2)
    together.batch.leave(together.batch.find(0))  # the last row takes its place
    assert [row.owner for row in together.batch.rows] == [2, 1]
    together.step(2, 1)
    together.join(3)
    together.step(1, 2, 3)
    together.batch.leave(together.batch.find(3))
    together.step(1, 2)


def test_a_row_that_only_fills_a_gap_is_as_before_once_it_joins_again(decoder):
    together = Together(decoder)
    states = {owner: read(decoder, TOKENS[owner][: LENGTHS[owner]]) for owner in range(3)}
    for owner, state in states.items():
        together.join(owner, state)
    together.step(0, 1, 2)
    row = together.batch.find(1)
    together.batch.copy_back(row, TOKENS[1], states[1])
    together.step(0, 2)  # row 1 lies between them
    together.step(0)
    decoder.step([TOKENS[1][states[1].length]], states[1])  # meanwhile it goes on in its own state
    states[1].extend([TOKENS[1][states[1].length]])
    together.join(1, states[1])
    assert row.length == LENGTHS[1] + 2
    together.step(0, 1, 2)
    together.step(1)


def test_what_rows_added_is_copied_back_to_their_states(decoder):
    together = Together(decoder)
    states = [read(decoder, TOKENS[owner][: LENGTHS[owner]]) for owner in range(2)]
    for owner, state in enumerate(states):
        together.join(owner, state)
    for _ in range(5):
        together.step(0, 1)
    for owner, state in enumerate(states):
        together.batch.copy_back(together.batch.find(owner), TOKENS[owner], state)
        length = LENGTHS[owner] + 5
        assert state.ids == TOKENS[owner][:length]
        logits = decoder.step([TOKENS[owner][length]], state)[0].all()
        np.testing.assert_allclose(logits, together.expected[owner][5], atol=CLOSE)


def test_a_row_as_a_state_can_be_read_from(decoder):
    together = Together(decoder)
    together.join(0)
    together.join(1)
    together.step(0, 1)
    view = together.batch.view(together.batch.find(1), TOKENS[1])
    copy = decoder.new_state(64)
    copy.copy_prefix(view, view.length)
    assert copy.ids == TOKENS[1][: LENGTHS[1] + 1]
    logits = decoder.step([TOKENS[1][copy.length]], copy)[0].all()
    np.testing.assert_allclose(logits, together.expected[1][1], atol=CLOSE)


def test_rows_keep_their_addresses(decoder):
    together = Together(decoder)
    together.join(0)
    together.join(1)
    growing = {spec.past for spec in decoder.states if spec.growing}
    before = {name: array.ctypes.data for name, array in together.batch.buffers.items() if name in growing}
    together.step(0, 1)
    together.join(2)
    together.step(0, 1, 2)
    assert before == {name: array.ctypes.data for name, array in together.batch.buffers.items() if name in growing}
    assert together.batch.lengths == [LENGTHS[0] + 2, LENGTHS[1] + 2, LENGTHS[2] + 1]
