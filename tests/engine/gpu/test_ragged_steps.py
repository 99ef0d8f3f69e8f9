"""Sequences of different lengths in one run, on emulated kernels, while some join and others leave."""

import numpy as np
import pytest
from emulated_decoder import EmulatedDecoder, assert_close
from emulator import EmulatedKernels

from lsp_agent.engine.scheduling.batch import Batch

TOKENS = np.random.RandomState(11).randint(0, 256, (3, 40)).tolist()
CLOSE = 2e-3
"""Of the largest logit: only how sums are split differs from single steps."""


@pytest.fixture(scope="module")
def decoder(gpu_package):
    return EmulatedDecoder(gpu_package("small", "int4"), EmulatedKernels())


def step(decoder, batch, rows):
    """The logits that each row of a common step says, by its owner."""
    assert batch.prepare(rows) == rows
    tokens = [TOKENS[row.owner][row.length] for row in rows]
    found = decoder.steps.run(tokens, batch)
    for row in rows:
        row.length += 1
    return {row.owner: logits.all() for row, logits in zip(rows, found, strict=True)}


def test_rows_of_different_lengths_step_as_single_sequences_do(decoder, monkeypatch):
    """Two, then three, then two again, of which one has moved, and no run is captured twice."""
    wanted = [decoder.read(tokens[:19], decoder.new_state()) for tokens in TOKENS]
    states = [decoder.new_state() for _ in TOKENS]
    for tokens, state, length in zip(TOKENS, states, (2, 9, 5), strict=True):
        decoder.read(tokens[:length], state)
    captures = []
    captured = decoder.device.captured
    monkeypatch.setattr(decoder.device, "captured", lambda *run: captures.append(run) or captured(*run))
    batch = Batch(decoder.states, 20, 3, decoder.device)
    found = {owner: {} for owner in range(3)}

    def take(steps):
        for _ in range(steps):
            positions = {row.owner: row.length for row in batch.rows}
            for owner, logits in step(decoder, batch, list(batch.rows)).items():
                found[owner][positions[owner]] = logits

    batch.join(0, states[0])
    batch.join(1, states[1])
    take(3)
    batch.join(2, states[2])
    take(2)
    batch.leave(batch.find(0))  # the last takes its place
    take(3)
    states[0].truncate(0)
    decoder.read(TOKENS[0][:7], states[0])
    batch.join(0, states[0])
    take(2)
    for owner, rows in found.items():
        assert len(rows) == (7 if owner == 0 else 10 if owner == 1 else 7)
        for position, logits in rows.items():
            assert_close(logits[None], wanted[owner][position][None], CLOSE)
    assert len(captures) == 2
