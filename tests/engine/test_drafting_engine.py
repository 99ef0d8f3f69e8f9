"""Drafting in the engine: another number of runs, and nothing else; hybrid models included."""

import numpy as np
import pytest
from test_golden_hf import PROMPT

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.engine.drafting.drafter import CopyDrafter
from lsp_agent.engine.drafting.run_costs import RunCosts
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.request import Request
from lsp_agent.errors import Cancelled

MODELS = ["qwen3-next", "qwen3-next-other", "qwen3-moe"]
IDS = PROMPT.tolist()


@pytest.fixture(autouse=True)
def free_runs(monkeypatch):
    """Runs of tiny models take as long as the machine pleases: let every guess be worth a try."""
    monkeypatch.setattr(RunCosts, "of", lambda self, tokens: 1 + 0.01 * (tokens - 1))


def answer(engine, prompt=IDS, **options):
    sampling = options.pop("sampling", Sampling(max_tokens=40))
    generation = engine.submit(Request(prompt, sampling, **options))
    return list(generation), generation.timings


def tokens_of(steps):
    return [step.token for step in steps]


def spoiled(plain, seed):
    """A drafter that knows the answer and spoils some of it."""
    random = np.random.default_rng(seed)

    def propose(self, limit, least=0.0):
        done = len(self._history.tokens) - len(IDS)
        draft = plain[done : done + random.integers(0, 9)]
        return [token if random.random() < 0.8 else int(random.integers(256)) for token in draft][:limit]

    return propose


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.5])
def test_right_and_wrong_guesses_change_no_draw(hf_engine, monkeypatch, name, temperature):
    engine = hf_engine(name)
    sampling = Sampling(max_tokens=60, temperature=temperature, seed=5, repetition_penalty=1.1)
    plain, _ = answer(engine, sampling=sampling, drafting=False)
    for seed in (1, 2):
        engine.prefixes.clear()
        monkeypatch.setattr(CopyDrafter, "propose", spoiled(tokens_of(plain), seed))
        drafted, timings = answer(engine, sampling=sampling)
        assert tokens_of(drafted) == tokens_of(plain)
        np.testing.assert_allclose([a.logprob for a in drafted], [b.logprob for b in plain], atol=1e-4)
        assert 20 < timings.accepted_tokens < timings.drafted_tokens


@pytest.mark.parametrize("name", MODELS)
def test_a_prediction_that_is_right_is_accepted_from_the_first_token(hf_engine, name):
    engine = hf_engine(name)
    plain, without = answer(engine, drafting=False, sampling=Sampling(max_tokens=60))
    assert without.drafted_tokens == 0
    steps, timings = answer(engine, sampling=Sampling(max_tokens=60), prediction=tokens_of(plain))
    assert tokens_of(steps) == tokens_of(plain)
    assert timings.accepted_tokens > 45


@pytest.mark.parametrize("name", MODELS)
def test_what_wrong_guesses_left_is_not_used_by_the_next_turn(hf_package, monkeypatch, name):
    engine = Engine.load(hf_package(name), threads=1, accuracy="exact")
    plain = tokens_of(answer(engine, drafting=False)[0])
    engine.prefixes.clear()
    monkeypatch.setattr(CopyDrafter, "propose", spoiled(plain, 3))
    assert tokens_of(answer(engine)[0]) == plain
    following = [*IDS, *plain, 9, 10, 11]
    steps, timings = answer(engine, following, drafting=False)
    assert timings.cached_tokens >= len(IDS) + len(plain) - 1
    engine.prefixes.clear()
    cold, timings = answer(engine, following, drafting=False)
    assert tokens_of(steps) == tokens_of(cold) and timings.cached_tokens == 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("taken", [2, 5, 9])
def test_a_cancelled_draft_leaves_a_true_prefix(hf_package, monkeypatch, name, taken):
    engine = Engine.load(hf_package(name), threads=1, accuracy="exact")
    plain = tokens_of(answer(engine, drafting=False)[0])
    engine.prefixes.clear()
    monkeypatch.setattr(CopyDrafter, "propose", spoiled(plain, 4))
    cancel = CancelToken()
    generation = engine.submit(Request(IDS, Sampling(max_tokens=40), cancel=cancel))
    assert [next(generation).token for _ in range(taken)] == plain[:taken]
    cancel.cancel()
    with pytest.raises(Cancelled):
        list(generation)
    following = [*IDS, *plain[:taken], 12]
    steps, timings = answer(engine, following, drafting=False)
    assert timings.cached_tokens >= len(IDS)
    engine.prefixes.clear()
    assert tokens_of(steps) == tokens_of(answer(engine, following, drafting=False)[0])


@pytest.mark.parametrize("name", MODELS)
def test_an_answer_ends_within_a_draft_where_it_would_end_without(hf_engine, name):
    engine = hf_engine(name)
    plain = tokens_of(answer(engine, drafting=False)[0])
    stop = next(token for index, token in enumerate(plain) if index > 3 and token not in plain[:index])
    for drafting in (False, True):
        steps, _ = answer(engine, stop_ids=frozenset({stop}), prediction=plain, drafting=drafting)
        assert tokens_of(steps) == plain[: plain.index(stop) + 1] and steps[-1].finish_reason == "stop"
        steps, _ = answer(engine, sampling=Sampling(max_tokens=7), prediction=plain, drafting=drafting)
        assert tokens_of(steps) == plain[:7] and steps[-1].finish_reason == "length"
