"""Steps on emulated kernels: going back, batches, the best tokens, routing, and that only routed experts are read."""

from dataclasses import replace

import numpy as np
import pytest
from emulated_decoder import EmulatedDecoder, assert_close, exact
from emulator import EmulatedKernels
from poisoned_experts import poison

from lsp_agent.engine.device import CpuDevice
from lsp_agent.engine.gpu import step_graph
from lsp_agent.engine.gpu.placement import Placement
from lsp_agent.engine.gpu.routing_trace import router_logits
from lsp_agent.engine.gpu.step_builder import CANDIDATES, NoKernel
from lsp_agent.engine.gpu.steps import StepRunner
from lsp_agent.engine.package import Package
from lsp_agent.engine.scheduling.batch import Batch

TOKENS = np.random.RandomState(3).randint(0, 256, 16).tolist()
LONG = 512
PLACEMENTS = [Placement("resident"), Placement("host"), Placement("hybrid", 6)]


@pytest.fixture(scope="module")
def kernels():
    return EmulatedKernels()


@pytest.fixture(scope="module")
def package(gpu_package):
    return gpu_package("small", "int4")


@pytest.fixture(scope="module")
def decoder(package, kernels):
    return EmulatedDecoder(package, kernels, context=LONG)


def test_hundreds_of_steps_over_all_places_of_the_rings_are_right(decoder, package):
    tokens = np.random.RandomState(5).randint(0, 256, 300).tolist()
    found, wanted = decoder.read(tokens, decoder.new_state()), exact(package, tokens, LONG)
    assert_close(found, wanted)
    assert_close(found[-50:], wanted[-50:])


@pytest.mark.parametrize("back", [1, 3, 8])
def test_rolled_back_steps_continue_bit_for_bit(decoder, back):
    state = decoder.new_state()
    decoder.read(TOKENS[:11], state)
    expected = decoder.read([7, 8], state)
    state.truncate(11)
    other = decoder.read(range(20, 20 + back), state)
    assert (other[0] != expected[0]).any()
    assert state.reachable(11) == 11
    state.truncate(11)
    np.testing.assert_array_equal(decoder.read([7, 8], state), expected)


def test_a_checkpoint_is_come_back_to_from_further_than_the_rings_reach(decoder):
    state = decoder.new_state()
    decoder.read(TOKENS[:3], state)
    state.checkpoint()
    expected = decoder.read(TOKENS[3:], state)
    assert state.reachable(4) == 3
    state.truncate(3)
    np.testing.assert_array_equal(decoder.read(TOKENS[3:], state), expected)


def test_a_snapshot_is_restored_anywhere(decoder):
    state, other = decoder.new_state(), decoder.new_state()
    decoder.read(TOKENS[:5], state)
    snapshot = state.snapshot()
    expected = decoder.read(TOKENS[5:8], state)
    decoder.read(TOKENS[::-1], other)
    other.restore(snapshot)
    np.testing.assert_array_equal(decoder.read(TOKENS[5:8], other), expected)


def test_a_batch_decodes_as_single_sequences_do(decoder):
    """Also what is left of it; only how sums are split differs."""
    prompt, together = decoder.new_state(), Batch(decoder.states, 64, 3, decoder.device)
    decoder.read(TOKENS[:6], prompt)
    for owner in range(3):
        together.join(owner, prompt)
    sequences = np.array([[10, 11, 12, 13], [50, 40, 30, 20], [7, 200, 7, 200]])
    singles = []
    for tokens in sequences:
        single = decoder.new_state()
        single.copy_prefix(prompt, 6)
        singles.append(decoder.read(tokens.tolist(), single))
    assert np.abs(singles[0] - singles[1]).max() > 1
    for step in range(2):
        taken = together.prepare(together.rows)
        found = decoder.steps.run(sequences[:, step].tolist(), together)
        for row in taken:
            row.length += 1
        for row, single in zip(found, singles, strict=True):
            assert_close(row.all()[None], single[step][None], 1e-3)
    for owner in range(2):
        together.leave(together.find(owner))
    for step in range(2, 4):
        (left,) = together.prepare(together.rows)
        (row,) = decoder.steps.run([int(sequences[2, step])], together)
        left.length += 1
        assert_close(row.all()[None], singles[2][step][None], 1e-3)


def test_the_best_tokens_come_without_the_others(decoder):
    state = decoder.new_state()
    decoder.read(TOKENS[:4], state)
    (logits,) = decoder.steps.run([TOKENS[4]], state)
    whole = logits.all()
    order = np.argsort(-whole, kind="stable")
    for count in (1, 40, CANDIDATES, CANDIDATES + 1, 0):
        tokens, values = logits.top(count)
        np.testing.assert_array_equal(tokens, order[: count or len(whole)])
        np.testing.assert_array_equal(values, whole[tokens])
    log_sum = np.logaddexp.reduce(whole.astype(np.float64))
    for token in (order[0], order[CANDIDATES - 1], order[CANDIDATES], order[-1]):
        assert logits.log_probability(int(token)) == pytest.approx(whole[token] - log_sum, abs=1e-5)
    state.extend([TOKENS[4]])
    decoder.read(TOKENS[5:6], state)
    np.testing.assert_array_equal(logits.top(CANDIDATES)[1], whole[order[:CANDIDATES]])  # they are the caller's


def test_steps_route_as_a_trace_says(package, kernels):
    decoder = EmulatedDecoder(package, kernels, Placement("hybrid", 6))
    sizes, blocks = package.config.experts, package.config.layers
    trace = np.random.RandomState(1).rand(5, blocks, sizes.count).argsort(axis=2)[:, :, : sizes.used]
    decoder.follow(router_logits(trace, sizes.count))
    wanted = np.zeros((blocks, sizes.count), int)
    state = decoder.new_state()
    for position in range(7):  # the trace begins again
        decoder.read([TOKENS[0]], state)
        for block in range(blocks):
            wanted[block, trace[position % 5, block]] += 1
        uses = decoder.weights.experts.counts().uses
        np.testing.assert_array_equal(
            np.stack([uses[f"blk.{block}.experts_gate_up"] for block in range(blocks)]), wanted
        )


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: placement.kind)
def test_experts_that_are_not_routed_are_not_read(decoder, package, kernels, placement):
    counted = EmulatedDecoder(package, kernels, Placement("hybrid", 6), LONG)
    tokens = TOKENS[:2]
    expected = counted.read(tokens, counted.new_state())
    uses = counted.weights.experts.counts().uses
    assert all(0 < (count == 0).sum() < len(count) for count in uses.values())
    poisoned = EmulatedDecoder(package, kernels, placement, LONG)
    np.testing.assert_array_equal(poisoned.read(tokens, poisoned.new_state()), expected)  # wherever experts lie
    poison(poisoned.weights, {name: count == 0 for name, count in uses.items()})
    np.testing.assert_array_equal(poisoned.read(tokens, poisoned.new_state()), expected)
    poison(poisoned.weights, {name: count > 0 for name, count in uses.items()})
    assert np.isnan(poisoned.read(tokens, poisoned.new_state())).all()


def test_models_that_no_kernel_covers_are_told_apart(gpu_package, package, kernels):
    dense = EmulatedDecoder(gpu_package("small", "keep"), kernels)
    with pytest.raises(NoKernel, match="format that the kernels do not read"):
        dense.steps.prepare(1)
    package = Package(package.path)
    package.config = replace(package.config, heads=5, kv_heads=2)
    with pytest.raises(NoKernel, match="does not cover"):
        EmulatedDecoder(package, kernels).steps.prepare(1)
    with pytest.raises(NoKernel, match="object"):
        step_graph._layer(None, object(), "blk.0", "residual", "")


def test_batches_that_no_kernel_covers_are_said_once_and_left_to_others(caplog):
    asked = []

    def make(batch, _):
        asked.append(batch)
        raise NoKernel("too large")

    steps = StepRunner(CpuDevice(), 100, 8, make)
    with caplog.at_level("INFO"):
        assert not any(steps.covers(batch) for batch in (9, 8, 8))
    assert asked == [8] and caplog.text.count("too large") == 1
