"""Filters, penalty and seeds of the sampler."""

import numpy as np
import pytest

from lsp_agent.chat_model import Sampling
from lsp_agent.engine.sampling import (
    HostLogits,
    Sampler,
    best_log_probabilities,
    filtered_probabilities,
    penalise_repetition,
)

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
    assert HostLogits(np.array([1000.0, 0.0], np.float32)).log_probability(0) == pytest.approx(0)


def test_the_best_tokens_come_first():
    tokens, values = LOGITS.top(3)
    assert tokens.tolist() == [0, 2, 3] and values.tolist() == np.log(PROBABILITIES)[[0, 2, 3]].tolist()
    assert [LOGITS.top(count)[0].tolist() for count in (1, 0, 9)] == [[0], [0, 2, 3, 1], [0, 2, 3, 1]]


class GpuLike:
    """Knows its best tokens only, as logits of a GPU do; the rest is fetched, which is counted."""

    def __init__(self, values, known=64):
        self._host, self._known, self.fetched = HostLogits(values), known, 0

    def top(self, count):
        if 0 < count <= self._known:
            return self._host.top(count)
        return HostLogits(self.all()).top(count)

    def log_probability(self, token):
        return self._host.log_probability(token)

    def all(self):
        self.fetched += 1
        return self._host.all()


VALUES = np.random.default_rng(5).normal(0, 3, 500).astype(np.float32)
ORDER = np.argsort(-VALUES)


def only(*tokens):
    allowed = np.zeros(len(VALUES), bool)
    allowed[list(tokens)] = True
    return allowed


def test_a_greedy_draw_takes_the_best_that_is_allowed_and_fetches_all_logits_only_where_it_must():
    logits = GpuLike(VALUES)
    sampler = Sampler(Sampling())
    assert sampler.draw(logits, []) == ORDER[0]
    assert sampler.draw(logits, [], ~only(ORDER[0])) == ORDER[1]
    assert sampler.draw(logits, [], only(ORDER[60], ORDER[63])) == ORDER[60]
    assert logits.fetched == 0
    assert sampler.draw(logits, [], only(ORDER[70], ORDER[400])) == ORDER[70]
    assert logits.fetched == 1


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.7), Sampling(temperature=1, top_k=5, top_p=0.9)])
@pytest.mark.parametrize("allowed", [only(*ORDER[3:40]), only(*ORDER[50:90]), only(ORDER[499])])
def test_filters_come_after_the_constraint(sampling, allowed):
    masked = np.where(allowed, VALUES, -np.inf).astype(np.float32)
    with np.errstate(invalid="ignore"):
        expected, weights = filtered_probabilities(HostLogits(masked), sampling)
    got, probabilities = filtered_probabilities(GpuLike(VALUES), sampling, allowed)
    expected, weights = expected[weights > 0], weights[weights > 0]
    assert got.tolist() == expected.tolist()
    np.testing.assert_allclose(probabilities, weights, rtol=1e-6)


def test_constrained_draws_follow_the_renormalised_distribution():
    sampler = Sampler(Sampling(temperature=1, seed=4))
    allowed = np.array([False, True, True, False])
    counts = np.bincount([sampler.draw(LOGITS, [], allowed) for _ in range(3000)], minlength=4) / 3000
    np.testing.assert_allclose(counts, [0, 0.05 / 0.35, 0.3 / 0.35, 0], atol=0.03)


def test_frequency_and_presence_penalties_are_over_the_answer_alone():
    logits = HostLogits(np.array([2.0, 1.5, 0.0], np.float32))
    prompt = [0, 0, 0]
    frequency = Sampler(Sampling(frequency_penalty=0.3))
    assert [frequency.draw(logits, prompt) for _ in range(6)] == [0, 0, 1, 0, 1, 0]  # 2, 1.7, 1.4 < 1.5, 1.4, 1.1 …
    presence = Sampler(Sampling(presence_penalty=0.6))
    assert [presence.draw(logits, prompt) for _ in range(4)] == [0, 1, 0, 0]  # both have lost 0.6, once


def test_logit_bias():
    assert Sampler(Sampling(logit_bias=((0, -100.0), (1, 1.5)))).draw(LOGITS, []) == 2
    assert Sampler(Sampling(logit_bias=((1, 100.0),), temperature=1, seed=1)).draw(LOGITS, []) == 1


def test_log_probabilities_of_the_best_are_those_before_any_filter():
    best = best_log_probabilities(LOGITS, 2)
    assert [token for token, _ in best] == [0, 2]
    np.testing.assert_allclose([value for _, value in best], np.log([0.5, 0.3]), rtol=1e-5)
    assert best_log_probabilities(LOGITS, 0) == ()
