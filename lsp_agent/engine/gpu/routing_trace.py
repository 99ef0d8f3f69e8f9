"""Synthetic routing: which experts each token of a sequence uses, with as much reuse as is asked for.

Random tokens through random routers hardly ever use an expert twice in a row, real text does. A trace stands in for the
router where a placement that keeps experts is to be measured without a trained model. It is synthetic: only how often
experts come back within eight tokens is given; what is new is drawn evenly from the others, so no expert is hot for
long, which is harder on a cache than real routing.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from lsp_agent.engine.gpu.launch import Launch

APART = 101
"""By how many tokens the sequences of a batch are apart in a trace."""
THREADS = 256
WINDOW = 8
"""Tokens within which an expert counts as reused."""


@dataclass(frozen=True)
class Reuse:
    """Shares of a token's experts that the token before used too, and any of the `WINDOW` tokens before."""

    following: float = 0.45
    window: float = 0.80


def make_trace(
    tokens: int, layers: int, experts: int, used: int, seed: int = 0, reuse: Reuse | None = None
) -> np.ndarray:
    """Experts by token and layer, int32 [tokens, layers, used], best first; layers are independent of each other.

    Raises `ValueError` when the experts are too few for tokens that share so little.
    """
    wanted = reuse or Reuse()
    if experts < used * (1 + WINDOW):
        raise ValueError(f"{experts} experts are too few for a trace with {used} a token")
    random = np.random.default_rng(seed)
    trace = np.empty((tokens, layers, used), np.int32)
    last = np.full((layers, experts), -2 * WINDOW)  # the token that used each expert last
    rows = np.arange(layers)[:, None]
    for token in range(tokens):
        again = random.binomial(used, wanted.following, layers)
        recent = random.binomial(used - again, (wanted.window - wanted.following) / (1 - wanted.following))
        age = token - last
        before, window = age == 1, (age > 1) & (age <= WINDOW)
        again = np.minimum(again, before.sum(1))
        recent = np.minimum(recent, window.sum(1))
        keys = random.random((layers, experts))
        chosen = _lowest(keys, before, again) | _lowest(keys, window, recent)
        fresh = used - again - recent
        chosen |= _lowest(keys, ~(before | window), fresh)
        picked = np.nonzero(chosen)[1].reshape(layers, used)
        trace[token] = np.take_along_axis(picked, random.random((layers, used)).argsort(1), 1)
        last[rows, picked] = token
    return trace


def follow_trace(batch: int, experts: int, stride: int, tokens: int, rows: int = 1) -> Launch:
    """Router logits of a trace in the place of the router's own. Arguments: r f32 [batch, rows, stride], the router's
    logits first, lengths i32 [batch, rows]; the same as r but for the logits; the trace's logits f32 [tokens,
    experts]."""
    macros = {
        "ROWS": rows,
        "EXPERTS": experts,
        "R_STRIDE": stride,
        "TOKENS": tokens,
        "APART": APART,
        "THREADS": THREADS,
    }
    described = tuple((name, str(value)) for name, value in macros.items())
    return Launch("follow_trace", described, (batch * rows, 1, 1), (THREADS, 1, 1))


def _lowest(keys: np.ndarray, of: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """In each row the `counts` entries with the lowest keys among those `of`, as booleans."""
    ranks = np.where(of, keys, np.inf).argsort(1).argsort(1)
    return of & (ranks < counts[:, None])


def router_logits(trace: np.ndarray, experts: int, seed: int = 0) -> np.ndarray:
    """Router logits, fp32 [tokens, layers, experts], whose best are the trace's experts in its order."""
    random = np.random.default_rng(seed)
    tokens, layers, used = trace.shape
    logits = random.standard_normal((tokens, layers, experts), np.float32) * 0.5 - 8
    best = np.sort(random.standard_normal((tokens, layers, used), np.float32), axis=2)[:, :, ::-1]
    best = best - 0.01 * np.arange(used, dtype=np.float32)  # no ties
    np.put_along_axis(logits, trace.astype(np.int64), np.ascontiguousarray(best), axis=2)
    return logits


def reused(trace: np.ndarray, within: int) -> float:
    """The share of experts that any of the `within` tokens before used in the same layer, from token `within` on."""
    tokens, layers, used = trace.shape
    count = 0
    for token in range(within, tokens):
        for layer in range(layers):
            count += int(np.isin(trace[token, layer], trace[token - within : token, layer]).sum())
    return count / max(1, (tokens - within) * layers * used)


def hit_rate(trace: np.ndarray, slots: int) -> float:
    """The share of experts found in a cache that keeps the `slots` most recently used of each layer.

    Counted over the second half of the trace, when the cache is full.
    """
    tokens, layers, used = trace.shape
    hits = 0
    for layer in range(layers):
        cache: OrderedDict[int, None] = OrderedDict()
        for token in range(tokens):
            for expert in trace[token, layer].tolist():
                if expert in cache:
                    cache.move_to_end(expert)
                    hits += 2 * token >= tokens
                    continue
                cache[expert] = None
                if len(cache) > slots:
                    cache.popitem(last=False)
    return hits / max(1, (tokens - (tokens + 1) // 2) * layers * used)
