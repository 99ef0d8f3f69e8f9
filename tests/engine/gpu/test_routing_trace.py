"""Synthetic routing has the reuse it claims, and its logits route as it says."""

from __future__ import annotations

import numpy as np
import pytest

from lsp_agent.engine.gpu.routing_trace import WINDOW, Reuse, hit_rate, make_trace, reused, router_logits


@pytest.fixture(scope="module")
def trace() -> np.ndarray:
    return make_trace(256, 4, 512, 10, seed=3)


def test_as_many_experts_come_back_as_are_asked_for(trace):
    assert abs(reused(trace, 1) - 0.45) < 0.015
    assert abs(reused(trace, WINDOW) - 0.80) < 0.015
    little = make_trace(128, 4, 512, 10, reuse=Reuse(0.1, 0.3))
    assert abs(reused(little, 1) - 0.1) < 0.03 and abs(reused(little, WINDOW) - 0.3) < 0.03


def test_a_token_uses_different_experts_and_layers_differ(trace):
    assert trace.shape == (256, 4, 10) and trace.min() >= 0 and trace.max() < 512
    assert all(len(set(row)) == 10 for row in trace.reshape(-1, 10).tolist())
    assert not np.array_equal(trace[:, 0], trace[:, 1])
    assert np.array_equal(trace, make_trace(256, 4, 512, 10, seed=3))
    assert not np.array_equal(trace, make_trace(256, 4, 512, 10, seed=4))


def test_the_logits_best_experts_are_the_traces(trace):
    logits = router_logits(trace, 512)
    assert logits.dtype == np.float32 and logits.shape == (256, 4, 512)
    best = np.argsort(-logits, axis=2, kind="stable")[:, :, :10]
    assert np.array_equal(best, trace)


def test_more_slots_hit_more_often(trace):
    rates = [hit_rate(trace, slots) for slots in (10, 64, 256, 512)]
    assert rates == sorted(rates) and rates[-1] > 0.9, "experts that come for the first time miss"
    assert 0.2 < rates[0] < 0.5, "ten slots remember one token"
    assert rates[1] > 0.8 - 0.02, "64 slots hold what eight tokens use"
    assert hit_rate(trace, 0) == 0


def test_too_few_experts_are_refused():
    with pytest.raises(ValueError, match="64 experts are too few"):
        make_trace(4, 1, 64, 10)
