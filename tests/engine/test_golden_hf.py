"""Qwen3, mixtures of experts and Gated DeltaNet against logits that transformers computed (make_golden_hf.py)."""

from pathlib import Path

import numpy as np
import pytest
from tiny_hf import CONFIGS

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.engine.state import State

GOLDEN = np.load(Path(__file__).parent / "golden" / "golden_hf.npz")
PROMPT, POSITIONS = GOLDEN["prompt"], GOLDEN["positions"]


def read(engine, pieces, state=None):
    """Logits of every position of the pieces, read one after another, and the state after them."""
    state = state or State(engine._decoder.states, 128)
    logits = []
    for piece in pieces:
        logits.append(engine._decoder.run(np.array([piece], np.int64), state, range(len(piece))))
        state.extend(list(piece))
    return np.concatenate(logits), state


def assert_close(logits, expected):
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_one_shot_prefill(hf_engine, name):
    logits, _ = read(hf_engine(name), [PROMPT])
    assert_close(logits[POSITIONS], GOLDEN[f"{name}.logits"])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("splits", [(1,), (39,), (2, 3, 5), (7, 20), (13, 14, 15)], ids=str)
def test_chunked_prefill_at_any_split(hf_engine, name, splits):
    logits, _ = read(hf_engine(name), np.split(PROMPT, splits))
    assert_close(logits[POSITIONS], GOLDEN[f"{name}.logits"])


@pytest.mark.parametrize("name", CONFIGS)
def test_step_by_step_decode(hf_engine, name):
    logits, _ = read(hf_engine(name), [[token] for token in PROMPT])
    assert_close(logits[POSITIONS], GOLDEN[f"{name}.logits"])


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens(hf_engine, name):
    expected = GOLDEN[f"{name}.greedy"].tolist()
    sampling = Sampling(max_tokens=len(expected))
    steps = hf_engine(name).generate(PROMPT.tolist(), sampling, CancelToken(), stop_ids=())
    assert [step.token for step in steps] == expected
