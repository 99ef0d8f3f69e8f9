"""The cache of experts, emulated, against a model of it in Python; what the experts compute stays the same."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import EmulatedKernels
from expert_references import Mixture, choose

from lsp_agent.engine.gpu.expert_cache import (
    CacheTuning,
    cache_fetch,
    cache_route,
    expert_bytes,
    initial_state,
    initial_table,
)
from lsp_agent.engine.gpu.expert_kernels import ExpertForm, ExpertSizes, Routing, experts_up

SIZES = ExpertSizes(count=48, used=4, hidden=128, width=64)
FORMS = {
    "int4": ExpertForm("int"),
    "int4-zero-points": ExpertForm("int", zero_points=True),
    "mxfp4": ExpertForm("e2m1"),
}


@pytest.fixture(scope="module", params=[False, True], ids=["forwards", "backwards"])
def kernels(request: pytest.FixtureRequest) -> EmulatedKernels:
    return EmulatedKernels(backwards=request.param)


class Cache:
    """A layer's experts and cache, and a model of what the cache should hold."""

    def __init__(self, kernels, batch, slots, form=FORMS["int4"], sizes=SIZES, kept=(), least_age=1):
        random = np.random.default_rng(slots)
        self.kernels, self.batch, self.sizes, self.form, self.least_age = kernels, batch, sizes, form, least_age
        self.mixture = Mixture(random, sizes, form, None)
        self.home = self.mixture.table
        self.memory = [np.zeros((slots, size), np.uint8) for size in expert_bytes(sizes, form)]
        self.slots = np.stack([array.ctypes.data + np.arange(slots) * array.shape[1] for array in self.memory], axis=1)
        self.state = initial_state(sizes.count, slots, kept)
        self.table = initial_table(self.state, self.home, self.slots)
        for slot, expert in enumerate(kept[:slots]):
            for array, stored in zip(self.memory, self.arrays(expert), strict=True):
                array[slot] = stored
        self.held = {expert: -place for place, expert in enumerate(kept[:slots])}  # when each was last used
        self.empty, self.step, self.hits, self.misses = slots - len(self.held), 0, 0, 0
        self.uses = np.zeros(sizes.count, int)

    def arrays(self, expert):
        up, down = self.mixture.up[expert].arrays, self.mixture.down[expert].arrays
        arrays = [*up[:2], *down[:2], up[2], down[2]]
        return [array.reshape(-1).view(np.uint8) for array in arrays if array is not None]

    def run(self, logits):
        """One step; returns what the kernels say the experts are, and the copies."""
        used, self.places = self.sizes.used, self.state["slot_of"][0].copy()
        experts = np.full((self.batch, used), -1, np.int32)
        weights = np.full((self.batch, used), np.nan, np.float32)
        copies = np.full(1 + 2 * self.batch * used, -1, np.int32)
        routing = Routing(logits.shape[1], normalise=True)
        route = cache_route(self.batch, self.sizes, self.form, routing, len(self.slots), self.least_age)
        self.kernels.run(route, logits, experts, weights, copies, self.state, self.home, self.slots, self.table)
        fetch = cache_fetch(self.sizes, self.form, CacheTuning(blocks=3, threads=64, pieces=2))
        self.kernels.run(fetch, copies, np.zeros(1, np.int32), self.home, self.slots)
        expected = choose(logits[:, : self.sizes.count], used, True)
        np.testing.assert_array_equal(experts, expected[0])
        np.testing.assert_allclose(weights, expected[1], rtol=1e-5)
        return experts, copies

    def expect(self, experts):
        """What the step should have done: the experts that came, and how many were read at home."""
        self.step += 1
        self.hits += sum(expert in self.held for expert in experts.reshape(-1))
        self.misses += sum(expert not in self.held for expert in experts.reshape(-1))
        np.add.at(self.uses, experts.reshape(-1), 1)
        new = [expert for expert in dict.fromkeys(experts.reshape(-1).tolist()) if expert not in self.held]
        self.held |= {expert: self.step for expert in experts.reshape(-1).tolist() if expert in self.held}
        came = []
        for expert in new:
            if self.empty:
                self.empty -= 1
            else:
                oldest = min(self.held, key=lambda held: (self.held[held], self.places[held]))
                if self.step - self.held[oldest] < self.least_age:
                    break
                del self.held[oldest]
            self.held[expert] = self.step
            came.append(expert)
        return came

    def check(self):
        """The state is that of the model, the table leads to each expert's own bytes."""
        state = self.state[0]
        assert set(np.flatnonzero(state["slot_of"] >= 0).tolist()) == set(self.held)
        for slot, expert in enumerate(state["expert_in"]):
            assert expert < 0 or state["slot_of"][expert] == slot
        assert (state["hits"], state["misses"]) == (self.hits, self.misses)
        np.testing.assert_array_equal(state["uses"], self.uses)
        for expert in range(self.sizes.count):
            slot = state["slot_of"][expert]
            np.testing.assert_array_equal(self.table[expert], self.slots[slot] if slot >= 0 else self.home[expert])
            if slot >= 0:
                for array, stored in zip(self.memory, self.arrays(expert), strict=True):
                    np.testing.assert_array_equal(array[slot], stored)


@pytest.mark.parametrize(
    ("batch", "slots", "least_age"), [(1, 4, 1), (1, 9, 1), (1, 40, 1), (3, 7, 1), (8, 20, 1), (1, 10, 3), (2, 48, 1)]
)
def test_the_least_recently_used_leave(kernels, batch, slots, least_age):
    cache = Cache(kernels, batch, slots, least_age=least_age)
    random = np.random.default_rng(batch)
    popular = random.normal(size=SIZES.count)
    for _ in range(30):
        logits = (popular + random.normal(size=(batch, SIZES.count + 3))[:, : SIZES.count]).astype(np.float32)
        experts, copies = cache.run(np.ascontiguousarray(logits))
        came = cache.expect(experts)
        assert copies[0] == len(came)
        assert copies[1 : 1 + 2 * len(came) : 2].tolist() == came
        cache.check()
    assert cache.hits and cache.misses


def test_the_hottest_are_there_from_the_start(kernels):
    random = np.random.default_rng(3)
    order = random.permutation(SIZES.count).tolist()
    cache = Cache(kernels, 1, 6, kept=order)
    logits = np.zeros((1, SIZES.count), np.float32)
    logits[0, order[:3]] = 2
    logits[0, order[-1]] = 1
    experts, copies = cache.run(logits)
    assert cache.expect(experts) == [order[-1]] and copies[1] == order[-1]
    assert order[5] not in cache.held  # of those that were not used the one that was used least
    cache.check()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_experts_compute_the_same_wherever_they_lie(kernels, form):
    batch, slots = 3, 5  # fewer than a step may use: some are read at home
    cache = Cache(kernels, batch, slots, form)
    random = np.random.default_rng(4)
    up = experts_up(batch, SIZES, form, cached=True).launch
    for _ in range(4):
        experts, copies = cache.run(random.normal(size=(batch, SIZES.count)).astype(np.float32))
        assert copies[0] <= slots
        normed = random.normal(size=(batch, SIZES.hidden)).astype(np.float16)
        acts = np.full((2, batch, SIZES.used, SIZES.width), np.nan, np.float16)
        for act, table in zip(acts, (cache.home, cache.table), strict=True):
            kernels.run(up, normed, experts, copies, np.zeros(1, np.int32), act, table)
        np.testing.assert_array_equal(*acts)
    assert (cache.state["slot_of"] >= 0).sum() == slots


def test_caches_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="slots"):
        cache_route(1, SIZES, FORMS["int4"], Routing(48, True), 49)
    with pytest.raises(ValueError, match="steps"):
        cache_route(1, SIZES, FORMS["int4"], Routing(48, True), 8, least_age=0)
