"""Drawing the next token from logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lsp_agent.chat_model import Sampling

KNOWN_BEST = 64
"""So many of the best tokens are cheap to ask for, also where a GPU holds the logits."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural-log probabilities over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def penalise_repetition(logits: np.ndarray, seen: Sequence[int], penalty: float) -> np.ndarray:
    """Divide positive and multiply negative logits of `seen` tokens by `penalty` (Keskar et al., 2019)."""
    tokens = np.unique(np.asarray(seen, np.int64))
    result = logits.copy()
    values = result[tokens]
    result[tokens] = np.where(values > 0, values / penalty, values * penalty)
    return result


class Logits(Protocol):
    """One position's logits over the vocabulary, of which a GPU need not hand over all."""

    def top(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and logits of the `count` best tokens, best first; of all tokens when `count` is 0."""

    def log_probability(self, token: int) -> float:
        """Natural-log probability of `token`."""

    def all(self) -> np.ndarray:
        """Every logit, fp32 [vocabulary]."""


class HostLogits:
    """Logits [vocabulary] in main memory."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self._log_sum_exp: float | None = None

    def top(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Logits.top`."""
        values = self._values
        if count == 1:
            tokens = np.array([values.argmax()])
        elif 0 < count < len(values):
            tokens = np.argpartition(-values, count - 1)[:count]
        else:
            tokens = np.arange(len(values))
        tokens = tokens[np.argsort(-values[tokens], kind="stable")]
        return tokens, values[tokens]

    def log_probability(self, token: int) -> float:
        """See `Logits.log_probability`."""
        if self._log_sum_exp is None:
            largest = self._values.max()
            self._log_sum_exp = float(largest) + float(np.log(np.exp(self._values - largest).sum()))
        return float(self._values[token]) - self._log_sum_exp

    def all(self) -> np.ndarray:
        """See `Logits.all`."""
        return self._values


def best_log_probabilities(logits: Logits, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` best tokens and their natural-log probabilities under the model, before any filter, best first."""
    if count <= 0:
        return ()
    return tuple((int(token), logits.log_probability(int(token))) for token in logits.top(count)[0])


def best_allowed(logits: Logits, count: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Like `Logits.top`, of the tokens that `allowed` (bool [vocabulary]) lets through; None: of all.

    The best of all tokens are tried first, which mostly are enough: fetching all logits from a GPU takes longer.
    """
    if allowed is None:
        return logits.top(count)
    for tried in (count, KNOWN_BEST) if 0 < count < KNOWN_BEST else ():
        tokens, values = logits.top(tried)
        through = allowed[tokens]
        if through.sum() >= count:
            return tokens[through][:count], values[through][:count]
    through = np.flatnonzero(allowed)
    places, values = HostLogits(logits.all()[through]).top(count)
    return through[places], values


def filtered_probabilities(
    logits: Logits, sampling: Sampling, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Candidate tokens, most probable first, and their probabilities after temperature, top-k, top-p and min-p.

    Filters see only tokens that are `allowed` (bool [vocabulary]).
    """
    tokens, values = best_allowed(logits, max(sampling.top_k, 0), allowed)
    scaled = values.astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled[0])
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        kept = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
        tokens, probabilities = tokens[:kept], probabilities[:kept]
    if sampling.min_p > 0:
        kept = int((probabilities >= sampling.min_p * probabilities[0]).sum())
        tokens, probabilities = tokens[:kept], probabilities[:kept]
    return tokens, probabilities / probabilities.sum()


class Sampler:
    """Draws one sequence's tokens. The same seed and index give the same draws; without a seed they differ."""

    def __init__(self, sampling: Sampling, index: int = 0) -> None:
        self._sampling = sampling
        entropy = None if sampling.seed is None else [sampling.seed & (2**64 - 1), index]
        self._random = np.random.default_rng(entropy)
        self._drawn: Counter[int] = Counter()

    def draw(self, logits: Logits, seen: Sequence[int], allowed: np.ndarray | None = None) -> int:
        """The next token, given the prompt's and answer's tokens so far.

        `allowed`: the tokens that a constraint lets through, bool [vocabulary], at least one; filters come after it.
        """
        logits = self._adjusted(logits, seen)
        if self._sampling.temperature <= 0:
            token = int(best_allowed(logits, 1, allowed)[0][0])
        else:
            tokens, probabilities = filtered_probabilities(logits, self._sampling, allowed)
            chosen = np.searchsorted(np.cumsum(probabilities), self._random.random(), side="right")
            token = int(tokens[min(int(chosen), len(tokens) - 1)])
        self._drawn[token] += 1
        return token

    def _adjusted(self, logits: Logits, seen: Sequence[int]) -> Logits:
        """Logits after penalties and biases; the same object where there are none.

        Frequency and presence penalty and bias as OpenAI's API defines them: over the answer's tokens, which this
        sampler drew.
        """
        sampling = self._sampling
        if sampling.repetition_penalty != 1 and len(seen):
            logits = HostLogits(penalise_repetition(logits.all(), seen, sampling.repetition_penalty))
        if self._drawn and (sampling.frequency_penalty or sampling.presence_penalty):
            values = logits.all().copy()
            tokens = np.fromiter(self._drawn.keys(), np.int64, len(self._drawn))
            counts = np.fromiter(self._drawn.values(), np.float32, len(self._drawn))
            values[tokens] -= counts * sampling.frequency_penalty + sampling.presence_penalty
            logits = HostLogits(values)
        if sampling.logit_bias:
            values = logits.all().copy()
            for token, bias in sampling.logit_bias:
                values[token] += bias
            logits = HostLogits(values)
        return logits
