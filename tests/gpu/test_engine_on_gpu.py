"""Engines on the GPU: drafts, answers decoded together and states that come back change no answer."""

import numpy as np
import pytest

from lsp_agent.chat_model import Sampling
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.gpu.placement import Placement
from lsp_agent.engine.request import Request

pytestmark = pytest.mark.gpu

GREEDY = Sampling(temperature=0, max_tokens=40)
NEAR = 0.4
"""Natural-log probabilities so close that rounding may decide: it may also route a token between two near experts."""
TOP = 10


@pytest.fixture(scope="module", params=["qwen3-next", "qwen3-moe"])
def engine(request, cuda, gpu_package):
    return Engine(gpu_package(request.param, "int4"), 1, 256, "fast", cuda, placement=Placement("resident"))


def assert_same(found, wanted):
    """The same tokens, up to where the other one is nearly as likely."""
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if one.token != other.token:
            likely = dict(other.top)
            assert one.token in likely and likely[one.token] > other.logprob - NEAR
            return


def ask(engine, prompt, drafting=False):
    return engine.submit(Request(prompt, GREEDY, drafting=drafting, top=TOP))


def alone(engine, prompt, drafting=False):
    generation = ask(engine, prompt, drafting)
    return list(generation), generation.timings


def prompts(count):
    random = np.random.RandomState(8)
    return [random.randint(0, 256, 20 + 15 * index).tolist() for index in range(count)]


def test_drafts_change_no_answer(engine):
    drafted = accepted = 0
    for prompt in prompts(4):
        repeated = [*prompt, *[step.token for step in alone(engine, prompt)[0]], *prompt]
        wanted, _ = alone(engine, repeated)
        found, timings = alone(engine, repeated, drafting=True)
        assert_same(found, wanted)
        drafted += timings.drafted_tokens
        accepted += timings.accepted_tokens
    print(f"{accepted} of {drafted} drafted tokens accepted")
    assert drafted > 0


def test_answers_that_are_decoded_together_are_those_of_each_alone(engine):
    wanted = [alone(engine, prompt)[0] for prompt in prompts(4)]
    engine.prefixes.clear()
    together = [ask(engine, one) for one in prompts(4)]
    found = [[next(generation)] for generation in together]  # all are under way
    for steps, generation in zip(found, together, strict=True):
        steps += generation
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other)


def test_the_next_turn_reads_only_what_is_new(engine):
    (prompt,) = prompts(1)
    steps, _ = alone(engine, prompt)
    answer = [step.token for step in steps]
    following = [*prompt, *answer, 5, 6, 7]
    found, timings = alone(engine, following)
    assert timings.cached_tokens >= len(prompt) + len(answer) - 1
    engine.prefixes.clear()
    wanted, timings = alone(engine, following)
    assert timings.cached_tokens == 0
    assert_same(found, wanted)
