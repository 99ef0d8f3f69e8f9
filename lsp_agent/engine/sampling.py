"""Drawing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lsp_agent.chat_model import Sampling


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural-log probabilities over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def log_probability(logits: np.ndarray, token: int) -> float:
    """Natural-log probability of `token` under logits [vocabulary]."""
    top = logits.max()
    return float(logits[token] - top - np.log(np.exp(logits - top).sum()))


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
        return log_probability(self._values, token)

    def all(self) -> np.ndarray:
        """See `Logits.all`."""
        return self._values


def filtered_probabilities(logits: Logits, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Candidate tokens, most probable first, and their probabilities after temperature, top-k, top-p and min-p."""
    tokens, values = logits.top(max(sampling.top_k, 0))
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

    def draw(self, logits: Logits, seen: Sequence[int]) -> int:
        """The next token, given the prompt's and answer's tokens so far."""
        if self._sampling.repetition_penalty != 1 and len(seen):
            logits = HostLogits(penalise_repetition(logits.all(), seen, self._sampling.repetition_penalty))
        if self._sampling.temperature <= 0:
            return int(logits.top(1)[0][0])
        tokens, probabilities = filtered_probabilities(logits, self._sampling)
        chosen = np.searchsorted(np.cumsum(probabilities), self._random.random(), side="right")
        return int(tokens[min(int(chosen), len(tokens) - 1)])
