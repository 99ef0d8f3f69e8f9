"""The kernels of the mixture of experts, emulated, against NumPy in fp64."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import pytest
from emulator import EmulatedKernels, thinned
from expert_references import Mixture, choose

from lsp_agent.engine.gpu.expert_kernels import (
    ExpertForm,
    ExpertSizes,
    ExpertTuning,
    Routing,
    SharedExpert,
    experts_down,
    experts_up,
    route,
)
from lsp_agent.engine.gpu.projection import Segment

SIZES = ExpertSizes(count=12, used=4, hidden=256, width=128)
STRIDE = 12 + 3 + 256 + 1
"""Of r: 12 logits, the shared expert's gate up to three places further, its gates and ups, and one more."""
ROUTED = [(32, 4), (512, 10), (60, 6), (8, 8)]
"""Experts, and how many of them a token uses."""
FORMS = {
    "int4": ExpertForm("int"),
    "int4-64": ExpertForm("int", block=64),
    "int4-128": ExpertForm("int", block=128),
    "int4-zero-points": ExpertForm("int", zero_points=True),
    "int4-128-zero-points": ExpertForm("int", block=128, zero_points=True),
    "int8": ExpertForm("int", bits=8),
    "int8-zero-points": ExpertForm("int", bits=8, block=64, zero_points=True),
    "mxfp4": ExpertForm("e2m1"),
    "mxfp4-by-block": ExpertForm("e2m1", scales_by_block=True),
}
SHARED = {
    "none": None,
    "4-bit": SharedExpert(Segment(256, 4), 128, offset=14, gate=13),
    "4-bit-zero-points": SharedExpert(Segment(256, 4, 64, half_scales=True, zero_points=True), 128, offset=14, gate=12),
    "8-bit": SharedExpert(Segment(256, 8, 16), 128, offset=14, gate=13),
    "8-bit-zero-points": SharedExpert(Segment(256, 8, 32, zero_points=True), 128, offset=15, gate=14),
    "dense": SharedExpert(Segment(256, 16), 128, offset=14, gate=13),
}


@pytest.fixture(scope="module", params=[False, True], ids=["forwards", "backwards"])
def kernels(request: pytest.FixtureRequest) -> EmulatedKernels:
    return EmulatedKernels(backwards=request.param)


def distinct(random: np.random.Generator, batch: int, sizes: ExpertSizes) -> np.ndarray:
    return np.array([random.permutation(sizes.count)[: sizes.used] for _ in range(batch)], np.int32)


def poison_others(mixture: Mixture, experts: np.ndarray) -> None:
    for expert in set(range(mixture.sizes.count)) - set(experts.reshape(-1).tolist()):
        mixture.up[expert].poison()
        mixture.down[expert].poison()


def run_up(kernels, mixture, normed, experts, tuning=None):
    kernel = experts_up(len(normed), mixture.sizes, mixture.form, tuning=tuning)
    act = np.full((*experts.shape, mixture.sizes.width), np.nan, np.float16)
    kernels.run(kernel.launch, normed, experts, act, mixture.table)
    return act


def run_down(kernels, mixture, act, experts, weights, r, tuning=None, times=1):
    kernel = experts_down(len(act), mixture.sizes, mixture.form, STRIDE, mixture.shared, tuning)
    out = np.full((len(act), mixture.sizes.hidden), np.nan, np.float16)
    scratch = [np.full(kernel.scratch, np.nan, np.float32)] if kernel.scratch else []
    counters = [np.zeros(kernel.counters, np.int32)] if kernel.counters else []
    for _ in range(times):
        out.fill(np.nan)
        kernels.run(
            kernel.launch,
            *(act, experts, weights, r if mixture.shared else None, out, *scratch),
            *(mixture.table, *counters, *mixture.shared_arrays),
        )
    assert not any(array.any() for array in counters)
    return out


def assert_close(actual, expected):
    """Sums of 8 or 16 products are rounded to fp16, and so is the result."""
    errors = (actual.astype(float) - expected) / np.sqrt(np.mean(expected**2))
    assert np.sqrt(np.mean(errors**2)) < 1.2e-3
    assert np.abs(errors).max() < 1.5e-2


@pytest.mark.parametrize(
    ("count", "used", "normalise"),
    thinned(
        [(*sizes, normalise) for sizes in ROUTED for normalise in (True, False)],
        [(*sizes, index % 2 == 0) for index, sizes in enumerate(ROUTED)],
    ),
)
def test_the_experts_of_the_largest_logits_are_chosen(kernels, count, used, normalise):
    random = np.random.default_rng(count)
    r = random.normal(size=(3, count + 5)).astype(np.float32) * 3
    r[:, count:] = 100  # these are no logits
    r[2, np.argsort(np.arange(count) % 32, kind="stable")] = np.sort(r[2, :count])  # a lane has the best
    experts, weights = np.full((3, used), -1, np.int32), np.full((3, used), np.nan, np.float32)
    kernels.run(route(3, ExpertSizes(count, used, 64, 64), Routing(count + 5, normalise)), r, experts, weights)
    expected = choose(r[:, :count], used, normalise)
    np.testing.assert_array_equal(experts, expected[0])
    np.testing.assert_allclose(weights, expected[1], rtol=1e-5)


def test_ties_go_to_the_lower_index(kernels):
    r = np.zeros((4, 64), np.float32)
    r[0, [3, 40, 35, 8]] = 1
    r[1, [63, 62]] = -0.0  # equal to 0
    r[1, :5] = -np.inf
    r[3, 5] = -1
    experts, weights = np.zeros((4, 6), np.int32), np.zeros((4, 6), np.float32)
    kernels.run(route(4, ExpertSizes(64, 6, 64, 64), Routing(64, True)), r, experts, weights)
    expected = [[3, 8, 35, 40, 0, 1], [5, 6, 7, 8, 9, 10], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 6]]
    np.testing.assert_array_equal(experts, expected)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gate_and_up(kernels, form):
    batch = 3
    random = np.random.default_rng(batch)
    mixture = Mixture(random, SIZES, form, None)
    normed = random.normal(size=(batch, SIZES.hidden)).astype(np.float16) * 4
    experts = distinct(random, batch, SIZES)
    expected = mixture.activations(normed, experts)
    poison_others(mixture, experts)
    assert_close(run_up(kernels, mixture, normed, experts), expected)


@pytest.mark.parametrize("form", ["int4", "mxfp4"])
def test_gate_and_up_choose_themselves(kernels, form):
    random = np.random.default_rng(6)
    mixture = Mixture(random, SIZES, FORMS[form], None)
    normed = random.normal(size=(2, SIZES.hidden)).astype(np.float16)
    r = random.normal(size=(2, STRIDE)).astype(np.float32)
    expected = choose(r[:, : SIZES.count], SIZES.used, True)
    act = np.full((2, SIZES.used, SIZES.width), np.nan, np.float16)
    experts, weights = np.full((2, SIZES.used), -1, np.int32), np.full((2, SIZES.used), np.nan, np.float32)
    kernel = experts_up(2, SIZES, FORMS[form], Routing(STRIDE, True))
    kernels.run(kernel.launch, normed, r, act, experts, weights, mixture.table)
    np.testing.assert_array_equal(experts, expected[0])
    np.testing.assert_allclose(weights, expected[1], rtol=1e-5)
    assert_close(act, mixture.activations(normed, experts))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_down(kernels, form):
    random = np.random.default_rng(7)
    mixture = Mixture(random, SIZES, form, SHARED["8-bit"])
    check_down(kernels, mixture, random, batch=2)


@pytest.mark.parametrize(
    ("form", "shared"),
    thinned(
        product(["int4", "mxfp4"], SHARED),
        [*product(["int4"], SHARED), *product(["mxfp4"], ["none", "4-bit-zero-points", "dense"])],
    ),
)
def test_shared_experts(kernels, form, shared):
    random = np.random.default_rng(8)
    mixture = Mixture(random, dataclasses.replace(SIZES, count=4), FORMS[form], SHARED[shared])
    check_down(kernels, mixture, random, batch=1)


def check_down(kernels, mixture, random, batch, tuning=None):
    act = random.normal(size=(batch, mixture.sizes.used, mixture.sizes.width)).astype(np.float16)
    weights = random.uniform(0.1, 1, act.shape[:2]).astype(np.float32)
    experts = distinct(random, batch, mixture.sizes)
    r = random.normal(size=(batch, STRIDE)).astype(np.float32) * 2
    expected = mixture.combine(act, experts, weights, r)
    poison_others(mixture, experts)
    assert_close(run_down(kernels, mixture, act, experts, weights, r, tuning, times=2), expected)


TUNINGS = {
    "fine": ExpertTuning(up_rows=4, up_warps=1, down_groups=1, shared_warps=1, up_block=32, down_block=32),
    "coarse": ExpertTuning(up_rows=16, up_warps=8, down_groups=8, shared_warps=4, up_block=128, down_block=256),
}


@pytest.mark.parametrize(
    ("form", "tuning"),
    thinned(
        product(["int4", "int8", "mxfp4"], TUNINGS),
        [("int4", "fine"), ("int8", "coarse"), ("mxfp4", "fine"), ("mxfp4", "coarse")],
    ),
)
def test_other_ways_to_spread_the_work(kernels, form, tuning):
    random = np.random.default_rng(9)
    mixture = Mixture(random, SIZES, FORMS[form], SHARED["8-bit"])
    normed = random.normal(size=(1, SIZES.hidden)).astype(np.float16)
    experts = distinct(random, 1, SIZES)
    assert_close(run_up(kernels, mixture, normed, experts, TUNINGS[tuning]), mixture.activations(normed, experts))
    check_down(kernels, mixture, random, 1, TUNINGS[tuning])


@pytest.mark.parametrize("form", ["int4", "int8", "mxfp4"])
def test_widths_that_fill_no_warp(kernels, form):
    sizes = ExpertSizes(count=6, used=5, hidden=320, width=192)
    random = np.random.default_rng(10)
    mixture = Mixture(random, sizes, FORMS[form], None)
    normed = random.normal(size=(1, sizes.hidden)).astype(np.float16)
    experts = distinct(random, 1, sizes)
    assert_close(run_up(kernels, mixture, normed, experts), mixture.activations(normed, experts))
    check_down(kernels, mixture, random, 1)


@pytest.mark.parametrize("form", ["int4", "int8", "mxfp4"])
def test_large_activations_do_not_overflow(kernels, form):
    random = np.random.default_rng(11)
    mixture = Mixture(random, SIZES, FORMS[form], None)
    act = np.full((1, SIZES.used, SIZES.width), 5000, np.float16)
    experts = distinct(random, 1, SIZES)
    weights = np.full((1, SIZES.used), 0.01, np.float32)
    out = run_down(kernels, mixture, act, experts, weights, None)
    assert_close(out, mixture.combine(act, experts, weights, None))


def test_sizes_that_the_kernels_do_not_cover_are_refused():
    with pytest.raises(ValueError, match="columns"):
        experts_up(1, dataclasses.replace(SIZES, hidden=96), FORMS["int4"])
    with pytest.raises(ValueError, match="multiples of 32"):
        experts_up(1, dataclasses.replace(SIZES, hidden=80), FORMS["mxfp4"])
    with pytest.raises(ValueError, match="at most 32"):
        route(1, ExpertSizes(128, 33, 64, 64), Routing(128, True))
    with pytest.raises(ValueError, match="shared memory"):
        experts_down(1, SIZES, FORMS["int8"], STRIDE, SharedExpert(Segment(256, 8), 1 << 15, offset=13, gate=12))


def test_blocks_fit_into_the_shared_memory_of_every_gpu():
    large, shared = ExpertSizes(64, 8, 4096, 1536), SharedExpert(Segment(4096, 8), 8192, offset=64, gate=0)
    for name, beside in (("int4", shared), ("int8", shared), ("mxfp4", None)):
        for kernel in (experts_up(1, large, FORMS[name]), experts_down(1, large, FORMS[name], STRIDE, beside)):
            assert kernel.launch.shared <= 94 * 1024
            assert kernel.launch.grid[0] > 1
