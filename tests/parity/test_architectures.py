"""Random configurations of every architecture against transformers in fp32, through checkpoints that it wrote itself.

Needs torch: `make test-parity` installs it. `LSP_AGENT_PARITY_EXAMPLES` sets how many configurations are tried.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configs import configs
from hypothesis import HealthCheck, assume, event, given, note, settings
from hypothesis import strategies as st
from reading import read
from reference import make_reference, reference_logits, sensitivity

from lsp_agent.engine.architectures import ARCHITECTURES
from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.package import Package
from lsp_agent.engine.scheduling.batch import Batch
from lsp_agent.engine.session import Decoder

pytestmark = [pytest.mark.parity, pytest.mark.timeout(7200)]
EXAMPLES = int(os.environ.get("LSP_AGENT_PARITY_EXAMPLES", "100"))
MODEL_TYPES = [architecture.hf_name for architecture in ARCHITECTURES.values()]
TOLERANCE = 1e-4
NEAR_TIE = 1e-5
"""Router probabilities closer than this may be ordered differently by two correct programs."""
tried = settings(deadline=None, suppress_health_check=list(HealthCheck))


class Pair:
    """A random model in transformers, and its import in the engine."""

    def __init__(self, model_type: str, values: dict[str, Any], seed: int, folder: Path) -> None:
        self.model = make_reference(model_type, values, seed, folder / "checkpoint")
        self._folder = folder
        self._moved = 0.0
        note(f"{values}, seed {seed}")

    def expect(self, ids: np.ndarray) -> np.ndarray:
        """The reference's logits of all positions; the example is given up where routing is nearly a tie."""
        logits, margin = reference_logits(self.model, ids.tolist())
        assume(margin > NEAR_TIE)
        self._moved = max(self._moved, sensitivity(self.model, ids.tolist(), logits))
        return logits

    def decoder(self) -> Decoder:
        import_checkpoint(self._folder / "checkpoint", self._folder / "package")
        return Decoder(Package(self._folder / "package"), threads=1, context=128, accuracy="exact")

    def check(self, logits: np.ndarray, expected: np.ndarray, what: str) -> None:
        error = np.abs(logits - expected).max() / np.abs(expected).max()
        event(f"error below {10 ** np.ceil(np.log10(error + 1e-9)):.0e}")
        # More than the tolerance only where the reference itself is that sensitive to rounding.
        assert error < max(TOLERANCE, 10 * self._moved), f"{what}: {error:.1e} (rounding alone {self._moved:.1e})"


@contextmanager
def drawn(model_type: str, data: st.DataObject) -> Iterator[tuple[Pair, np.random.RandomState]]:
    values, seed = data.draw(configs(model_type)), data.draw(st.integers(0, 2**31))
    folder = Path(tempfile.mkdtemp())
    try:
        yield Pair(model_type, values, seed, folder), np.random.RandomState(seed)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@settings(tried, max_examples=EXAMPLES)
@given(data=st.data())
def test_any_configuration(model_type, data):
    """One-shot prefill, prefill at random splits and step-by-step decoding, all within 1e-4 of the reference."""
    length = data.draw(st.integers(2, 90))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=6)))
    with drawn(model_type, data) as (pair, random):
        ids = random.randint(0, 288, length)
        expected = pair.expect(ids)
        decoder = pair.decoder()
        for pieces in ([ids], np.split(ids, cuts), [[token] for token in ids]):
            pair.check(read(decoder, pieces, decoder.new_state(128)), expected, f"{len(pieces)} pieces")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@settings(tried, max_examples=max(1, EXAMPLES // 20))
@given(data=st.data())
def test_every_split(model_type, data):
    """Prefill cut in two at each place there is."""
    with drawn(model_type, data) as (pair, random):
        ids = random.randint(0, 288, 40)
        expected = pair.expect(ids)
        decoder = pair.decoder()
        for cut in range(1, len(ids)):
            pair.check(read(decoder, np.split(ids, [cut]), decoder.new_state(64)), expected, f"cut at {cut}")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@settings(tried, max_examples=max(1, EXAMPLES // 4))
@given(data=st.data())
def test_batches(model_type, data):
    """Continuations of one prefix decoded as a batch; one sequence leaves it half-way."""
    batch, prefix, steps = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 40)), data.draw(st.integers(2, 12))
    leaving, leaves = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(1, steps - 1))
    with drawn(model_type, data) as (pair, random):
        shared = random.randint(0, 288, prefix)
        ids = [np.concatenate([shared, random.randint(0, 288, steps)]) for _ in range(batch)]
        expected = [pair.expect(sequence)[prefix:] for sequence in ids]
        decoder = pair.decoder()
        before, together = decoder.new_state(64), Batch(decoder.states, 64, batch, decoder.device)
        read(decoder, [shared], before)
        for owner in range(batch):
            together.join(owner, before)
        for step in range(steps):
            if step == leaves:
                together.leave(together.find(leaving))
            rows = together.prepare(together.rows)
            tokens = np.array([[ids[row.owner][prefix + step]] for row in rows])
            logits = decoder.run(tokens, together, range(len(rows)))
            for row, found in zip(rows, logits, strict=True):
                row.length += 1
                pair.check(found, expected[row.owner][step], f"row {row.owner}, step {step}")
