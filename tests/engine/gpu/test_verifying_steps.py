"""Several tokens of a sequence in one run, on emulated kernels: as single steps say it; the rest leaves no trace."""

import numpy as np
import pytest
from emulated_decoder import EmulatedDecoder, assert_close
from emulator import EmulatedKernels

from lsp_agent.engine.device import CpuDevice
from lsp_agent.engine.gpu.placement import Placement
from lsp_agent.engine.gpu.routing_trace import router_logits
from lsp_agent.engine.gpu.step_builder import NoKernel
from lsp_agent.engine.gpu.steps import StepRunner

TOKENS = np.random.RandomState(7).randint(0, 256, 24).tolist()
CLOSE = 2e-3
"""Of the largest logit: only how sums are split differs from single steps."""


@pytest.fixture(scope="module")
def kernels():
    return EmulatedKernels()


@pytest.fixture(scope="module")
def package(gpu_package):
    return gpu_package("small", "int4")


@pytest.fixture(scope="module")
def decoder(package, kernels):
    return EmulatedDecoder(package, kernels)


def verify(decoder, ids, state, accepted):
    """Logits [ids, vocabulary] of a verification of which so many ids are kept."""
    verified = decoder.steps.verify(ids, state)
    found = np.array([row.all() for row in verified.logits])
    verified.accept(accepted)
    return found


@pytest.mark.parametrize("count", [3, 4])
def test_every_row_says_what_a_single_step_says(decoder, count):
    state, single = decoder.new_state(), decoder.new_state()
    for start in (0, count):  # from nothing, and from what the first ones left
        found = verify(decoder, TOKENS[start : start + count], state, count)
        assert found.shape == (count, 288)
        assert_close(found, decoder.read(TOKENS[start : start + count], single), CLOSE)
        assert state.ids == single.ids and state.length == start + count


@pytest.mark.parametrize("accepted", [1, 2, 3, 4])
def test_what_is_not_accepted_leaves_no_trace(decoder, accepted):
    wrong = [251, 252, 253][: 4 - accepted]
    state, other = decoder.new_state(), decoder.new_state()
    for one in (state, other):
        decoder.read(TOKENS[:5], one)
    verify(decoder, [*TOKENS[5 : 5 + accepted], *wrong], state, accepted)
    # Bit for bit that of a state which has read the accepted ones beside others.
    verify(decoder, [*TOKENS[5 : 5 + accepted], *([9] * (4 - accepted))], other, accepted)
    assert state.length == 5 + accepted and state.ids == TOKENS[: 5 + accepted]
    following = TOKENS[5 + accepted : 9 + accepted]
    found = verify(decoder, following, state, 4)
    np.testing.assert_array_equal(found, verify(decoder, following, other, 4))
    plain = decoder.new_state()
    decoder.read(TOKENS[: 5 + accepted], plain)
    assert_close(found, decoder.read(following, plain), CLOSE)


def test_steps_and_verifications_take_turns_around_the_rings(decoder):
    state, single = decoder.new_state(), decoder.new_state()
    found, position = [], 0
    for count, accepted in ((3, 2), (1, 1), (4, 4), (4, 1), (1, 1), (3, 3), (4, 2)):
        ids = TOKENS[position : position + accepted] + [255] * (count - accepted)
        found.append(verify(decoder, ids, state, accepted)[:accepted])
        position += accepted
        found.append(decoder.read(TOKENS[position : position + 1], state))
        position += 1
    assert position > 2 * state.ring_size
    assert_close(np.concatenate(found), decoder.read(TOKENS[:position], single), CLOSE)


def test_nothing_accepted_is_nothing_read(decoder):
    state = decoder.new_state()
    decoder.read(TOKENS[:6], state)
    decoder.steps.verify([1, 2, 3, 4], state)
    assert state.length == 6
    untouched = decoder.new_state()
    decoder.read(TOKENS[:6], untouched)
    np.testing.assert_array_equal(decoder.read(TOKENS[6:9], state), decoder.read(TOKENS[6:9], untouched))


def test_a_state_goes_back_to_between_accepted_ids(decoder):
    state = decoder.new_state()
    decoder.read(TOKENS[:6], state)
    verify(decoder, TOKENS[6:10], state, 3)
    assert [state.reachable(length) for length in range(6, 10)] == [6, 7, 8, 9]
    expected = decoder.read([77], state)
    for length in (8, 7, 6):
        state.truncate(length)
        decoder.read([1], state)
        state.truncate(length)
    decoder.read([1], state)
    state.truncate(6)
    verify(decoder, TOKENS[6:10], state, 3)
    np.testing.assert_array_equal(decoder.read([77], state), expected)


@pytest.mark.parametrize("placement", [Placement("host", 3), Placement("hybrid", 6)], ids=lambda one: one.kind)
def test_experts_outside_say_the_same(decoder, package, kernels, placement):
    outside = EmulatedDecoder(package, kernels, placement)
    state, resident = outside.new_state(), decoder.new_state()
    for start in (0, 4, 8):
        found = verify(outside, TOKENS[start : start + 4], state, 4)
        np.testing.assert_array_equal(found, verify(decoder, TOKENS[start : start + 4], resident, 4))


def test_verified_tokens_route_as_a_trace_says(package, kernels):
    decoder = EmulatedDecoder(package, kernels, Placement("hybrid", 6))
    sizes, blocks = package.config.experts, package.config.layers
    trace = np.random.RandomState(1).rand(9, blocks, sizes.count).argsort(axis=2)[:, :, : sizes.used]
    decoder.follow(router_logits(trace, sizes.count))
    verify(decoder, [5, 6, 7, 8], decoder.new_state(), 4)
    uses = decoder.weights.experts.counts().uses
    for block in range(blocks):
        wanted = np.bincount(trace[:4, block].ravel(), minlength=sizes.count)
        np.testing.assert_array_equal(uses[f"blk.{block}.experts_gate_up"], wanted)


def test_a_model_of_attention_alone_verifies_up_to_its_capacity(gpu_package, kernels):
    decoder = EmulatedDecoder(gpu_package("qwen3-moe", "int8"), kernels, context=16)
    state, single = decoder.new_state(), decoder.new_state()
    found = [verify(decoder, TOKENS[start : start + 4], state, 4) for start in (0, 4, 8)]
    found.append(verify(decoder, TOKENS[12:15], state, 3))  # the fourth row is filled up
    assert_close(np.concatenate(found), decoder.read(TOKENS[:15], single), CLOSE)
    np.testing.assert_array_equal(decoder.read([3], state).shape, (1, 288))


def test_as_many_as_there_are_kernels_for_are_verified_and_all_are_made_at_first():
    asked = []

    def make(batch, rows):
        asked.append((batch, rows))
        if rows > 4:
            raise NoKernel("too many")
        return object()

    steps = StepRunner(CpuDevice(), 100, 8, make)
    steps.prepare_all(3)
    assert asked == [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (3, 1)]
    assert steps.most_verified == 4 and steps.covers(3) and len(asked) == 6


def test_more_than_were_read_cannot_be_accepted(decoder):
    state = decoder.new_state()
    verified = decoder.steps.verify([1, 2, 3], state)
    for count in (0, 4):
        with pytest.raises(ValueError, match="cannot accept"):
            verified.accept(count)
    assert state.length == 0
