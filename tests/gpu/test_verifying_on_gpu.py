"""Several tokens of a sequence in one run, and sequences of different lengths, on the GPU: as single steps say it."""

import numpy as np
import pytest
from test_cuda_graph import PLACEMENTS, PROMPT, TOLERANCE, read, step

from lsp_agent.engine.scheduling.batch import Batch

pytestmark = pytest.mark.gpu

CLOSE = TOLERANCE / 3
"""Of the largest logit: only how sums are split differs from single steps."""


def assert_close(found, wanted):
    assert np.isfinite(found).all()
    errors = np.abs(found - wanted).max(axis=-1) / np.abs(wanted).max()
    print("errors", np.round(errors, 4))
    assert np.quantile(errors, 0.8) < CLOSE  # a token may be routed between two near experts


def verify(decoder, ids, state, accepted):
    """Logits of a verification of which so many ids are kept."""
    verified = decoder.verify([int(one) for one in ids], state)
    found = np.array([row.all() for row in verified.logits])
    verified.accept(accepted)
    return found


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: placement.kind)
@pytest.mark.parametrize(
    ("name", "scheme"), [("qwen3-next", "int4"), ("qwen3-next-top10", "mxfp4"), ("qwen3-moe", "int8")]
)
def test_every_row_says_what_a_single_step_says(decoders, name, scheme, placement):
    gpu, _ = decoders(name, scheme, placement)
    assert gpu.most_verified == 8
    state, single = gpu.new_state(128), gpu.new_state(128)
    for one in (state, single):
        read(gpu, PROMPT[:10], one)
    found, position = [], 10
    for count in (8, 2, 5, 4, 3, 8):
        found.append(verify(gpu, PROMPT[position : position + count], state, count))
        position += count
    assert_close(np.concatenate(found), step(gpu, PROMPT[10:position], single))


@pytest.mark.parametrize("accepted", [1, 3, 8])
@pytest.mark.parametrize("name", ["qwen3-next", "qwen3-moe"])
def test_what_is_not_accepted_leaves_no_trace(decoders, name, accepted, monkeypatch):
    gpu, _ = decoders(name, "int4")
    state, other = gpu.new_state(128), gpu.new_state(128)
    for one in (state, other):
        read(gpu, PROMPT[:12], one)
    monkeypatch.setattr(gpu, "run", lambda *_: pytest.fail("tokens were read again"))
    right, wrong = PROMPT[12 : 12 + accepted], list(range(200, 208 - accepted))
    verify(gpu, [*right, *wrong], state, accepted)
    verify(gpu, [*right, *wrong[::-1]], other, accepted)
    np.testing.assert_array_equal(step(gpu, [7, 8, 9], state), step(gpu, [7, 8, 9], other))
    plain = gpu.new_state(128)
    monkeypatch.undo()
    read(gpu, PROMPT[:12], plain)
    step(gpu, right, plain)
    gpu.rollback(state, 3)
    assert_close(step(gpu, [7, 8, 9], state), step(gpu, [7, 8, 9], plain))


@pytest.mark.parametrize("batch", [2, 4, 8])
@pytest.mark.parametrize("name", ["qwen3-next", "qwen3-moe"])
def test_rows_of_different_lengths_step_as_single_sequences_do(decoders, name, batch):
    """Also after one has left and another has joined, without another capture."""
    gpu, _ = decoders(name, "int4")
    ids = np.random.RandomState(9).randint(0, 256, (batch, 60)).tolist()
    rows = Batch(gpu.states, 64, batch, gpu.device)
    found, wanted = [], []
    for owner in range(batch):
        state = gpu.new_state(64)
        read(gpu, ids[owner][: 5 + 5 * owner], state)
        rows.join(owner, state)

    def take():
        taken = rows.prepare(list(rows.rows))
        logits = gpu.step([ids[row.owner][row.length] for row in taken], rows)
        for row, one in zip(taken, logits, strict=True):
            found.append((row.owner, row.length, one.all()))
            row.length += 1

    take()
    take()
    before = dict(rows.captured)
    rows.leave(rows.rows[0])
    state = gpu.new_state(64)
    read(gpu, ids[0][:11], state)
    rows.join(0, state)
    take()
    assert rows.captured == before and len(before) == 1
    singles = [step(gpu, one, gpu.new_state(64)) for one in ids]
    wanted = np.array([singles[owner][length] for owner, length, _ in found])
    assert_close(np.array([logits for *_, logits in found]), wanted)
