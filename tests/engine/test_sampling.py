"""Filters, penalty and seeds of the sampler."""

import numpy as np
import pytest

from lsp_agent.chat_model import Sampling
from lsp_agent.engine.sampling import HostLogits, Sampler, filtered_probabilities, log_probability, penalise_repetition

PROBABILITIES = np.array([0.5, 0.05, 0.3, 0.15], np.float32)
LOGITS = HostLogits(np.log(PROBABILITIES))


def test_greedy_takes_the_best():
    assert Sampler(Sampling()).draw(LOGITS, []) == 0


@pytest.mark.parametrize(
    ("sampling", "tokens", "probabilities"),
    [
        (Sampling(temperature=1), [0, 2, 3, 1], [0.5, 0.3, 0.15, 0.05]),
        (Sampling(temperature=1, top_k=2), [0, 2], [0.625, 0.375]),
        (Sampling(temperature=1, top_p=0.75), [0, 2], [0.625, 0.375]),
        (Sampling(temperature=1, min_p=0.2), [0, 2, 3], [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95]),
        (Sampling(temperature=0.5, top_k=2), [0, 2], [0.25 / 0.34, 0.09 / 0.34]),
        (Sampling(temperature=1, top_k=3, top_p=0.6, min_p=0.9), [0], [1]),
    ],
)
def test_filters(sampling, tokens, probabilities):
    got, weights = filtered_probabilities(LOGITS, sampling)
    assert got.tolist() == tokens
    np.testing.assert_allclose(weights, probabilities, rtol=1e-5)


def test_draws_follow_the_distribution():
    sampler = Sampler(Sampling(temperature=1, seed=3))
    counts = np.bincount([sampler.draw(LOGITS, []) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, PROBABILITIES, atol=0.03)


def test_seeds():
    def draws(seed, index=0):
        sampler = Sampler(Sampling(temperature=1, seed=seed), index)
        return [sampler.draw(LOGITS, []) for _ in range(40)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(1, 0) != draws(1, 1)
    assert draws(None) != draws(None)
    assert draws(-1) == draws(-1)


def test_repetition_penalty():
    logits = np.array([2.0, -1.0, 1.5], np.float32)
    np.testing.assert_allclose(penalise_repetition(logits, [0, 1, 0], 2.0), [1.0, -2.0, 1.5])
    assert Sampler(Sampling(repetition_penalty=2.0)).draw(HostLogits(logits), [0]) == 2


def test_log_probability():
    assert LOGITS.log_probability(2) == pytest.approx(np.log(0.3), rel=1e-5)
    assert log_probability(np.array([1000.0, 0.0], np.float32), 0) == pytest.approx(0)


def test_the_best_tokens_come_first():
    tokens, values = LOGITS.top(3)
    assert tokens.tolist() == [0, 2, 3] and values.tolist() == np.log(PROBABILITIES)[[0, 2, 3]].tolist()
    assert [LOGITS.top(count)[0].tolist() for count in (1, 0, 9)] == [[0], [0, 2, 3, 1], [0, 2, 3, 1]]
