"""The engine against logits and greedy tokens that transformers computed (golden/make_golden.py)."""

from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoint import MIXED, QUANTISED, Type

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling

GOLDEN = np.load(Path(__file__).parent / "golden" / "golden.npz")
CASES = [(kind, False) for kind in (*QUANTISED, Type.F16, Type.BF16, Type.F32, MIXED)] + [(Type.Q4_K, True)]


def name_of(case) -> str:
    kind, tied = case
    return f"{kind if kind == MIXED else Type(kind).name}{'-tied' if tied else ''}"


def run_prompt(engine, splits=()):
    """Logits of every position of the golden prompt, read in pieces."""
    prompt = GOLDEN["prompt"]
    state = engine.prefixes.empty()
    logits = []
    for piece in np.split(prompt, splits):
        logits.append(engine._decoder.run(piece[None], state, range(len(piece))))
        state.extend(piece.tolist())
    engine.prefixes.release(state)
    return np.concatenate(logits)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_exact_logits(tiny_engine, case):
    expected = GOLDEN[f"{name_of(case)}.logits"]
    logits = run_prompt(tiny_engine(*case))[-4:]
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_fast_logits_differ_by_int8_rounding_only(tiny_engine, case):
    expected = GOLDEN[f"{name_of(case)}.logits"]
    logits = run_prompt(tiny_engine(*case, accuracy="fast"))[-4:]
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert error < 0.03
    if case[0] in QUANTISED:
        assert error > 1e-6  # otherwise "fast" would silently be "exact"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_greedy_tokens(tiny_engine, case):
    expected = GOLDEN[f"{name_of(case)}.greedy"].tolist()
    engine = tiny_engine(*case)
    sampling = Sampling(max_tokens=len(expected))
    steps = engine.generate(GOLDEN["prompt"].tolist(), sampling, CancelToken(), stop_ids=())
    assert [step.token for step in steps] == expected


@pytest.mark.parametrize("splits", [(1,), (39,), (7, 20), (13, 14, 15), tuple(range(1, 40))], ids=str)
def test_any_split_of_the_prompt_gives_the_same_logits(tiny_engine, splits):
    whole, pieces = run_prompt(tiny_engine()), run_prompt(tiny_engine(), splits)
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-4 * np.abs(whole).max())
