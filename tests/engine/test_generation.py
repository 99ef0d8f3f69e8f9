"""Streams, stops, batches, cancellation and the prefix cache, on a tiny model."""

import threading
import time

import numpy as np
import pytest
from tiny_checkpoint import MIXED

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.engine.answers import collect, total_usage
from lsp_agent.engine.drafting.drafter import CopyDrafter
from lsp_agent.engine.drafting.run_costs import RunCosts
from lsp_agent.engine.engine import Engine
from lsp_agent.errors import Cancelled, UserError

PROMPT = "def add(a, b):\n    return a + b\n"


def greedy(engine, ids, tokens=16, **options):
    sampling = Sampling(max_tokens=tokens, **options)
    return list(engine.generate(ids, sampling, CancelToken(), stop_ids=()))


def test_the_stream_joins_to_the_decoded_text(tiny_engine):
    engine = tiny_engine()
    steps = greedy(engine, engine.tokenizer.encode(PROMPT), 40)
    assert "".join(step.text for step in steps) == engine.tokenizer.decode([step.token for step in steps])
    assert [step.finish_reason for step in steps] == [None] * 39 + ["length"]


def test_a_stop_token_ends_the_answer_without_text(tiny_engine):
    engine = tiny_engine()
    ids = engine.tokenizer.encode(PROMPT)
    third = greedy(engine, ids)[2].token
    steps = list(engine.generate(ids, Sampling(max_tokens=16), CancelToken(), stop_ids=[third]))
    tokens = [step.token for step in steps]
    assert tokens.index(third) == len(tokens) - 1 and steps[-1].finish_reason == "stop"
    assert "".join(step.text for step in steps) == engine.tokenizer.decode(tokens[:-1])


def test_a_stop_string_cuts_the_text_before_it(tiny_engine):
    engine = tiny_engine()
    ids = engine.tokenizer.encode(PROMPT)
    whole = "".join(step.text for step in greedy(engine, ids, 40))
    stop = whole[5:8]
    steps = greedy(engine, ids, 40, stop=(stop,))
    assert "".join(step.text for step in steps) == whole[: whole.index(stop)]
    assert steps[-1].finish_reason == "stop" and len(steps) < 40


def test_logprobs_are_the_scores_of_the_whole_text(tiny_engine):
    engine = tiny_engine()
    ids = engine.tokenizer.encode(PROMPT)
    steps = greedy(engine, ids)
    scores = engine.score(ids + [step.token for step in steps], CancelToken())
    assert len(scores) == len(ids) + len(steps) - 1
    np.testing.assert_allclose([step.logprob for step in steps], scores[len(ids) - 1 :], atol=1e-4)


def test_answers_that_nobody_waits_for_are_in_nobody_s_way(tiny_package):
    engine = Engine.load(tiny_package(MIXED), threads=1)
    kept = [engine.generate([number] * 9, Sampling(max_tokens=9), CancelToken()) for number in range(5)]
    for generation in kept:
        next(generation)
    assert engine.prefixes.stats().taken > 1
    expected = engine.score([5, 6, 7], CancelToken())  # who decodes in a row can do without a state
    del kept, generation
    assert engine.score([5, 6, 7], CancelToken()) == pytest.approx(expected)
    assert engine.prefixes.stats().taken == 0


def test_scored_text_is_located(tiny_engine):
    text = "def f(é):\n    return é\n"
    scores = tiny_engine().score_text(text, CancelToken())
    assert scores[-1].end == len(text) and all(score.logprob < 0 for score in scores)


def test_the_same_seed_gives_the_same_answers_and_a_batch_equals_single_runs(tiny_engine):
    engine = tiny_engine()
    ids = engine.tokenizer.encode(PROMPT)
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=5)
    batch = collect(engine, ids, sampling, CancelToken(), n=3)
    again = collect(engine, ids, sampling, CancelToken(), n=3)
    assert [answer.text for answer in batch] == [answer.text for answer in again]
    single = collect(engine, ids, sampling, CancelToken())
    assert single[0].text == batch[0].text
    assert len({answer.text for answer in batch}) == 3
    assert total_usage(batch).prompt_tokens == len(ids)
    assert total_usage(batch).completion_tokens == sum(answer.usage.completion_tokens for answer in batch)


def test_a_batch_goes_on_when_some_of_its_sequences_have_ended(tiny_engine):
    engine = tiny_engine()
    ids = engine.tokenizer.encode(PROMPT)
    sampling = Sampling(max_tokens=30, temperature=1.0, seed=11)
    free = {i: [] for i in range(4)}
    for step in engine.generate(ids, sampling, CancelToken(), n=4, stop_ids=()):
        free[step.index].append(step.token)
    stop = free[1][3]  # ends sequence 1 at its fourth token at the latest; the others must not notice
    stopped = {i: [] for i in range(4)}
    for step in engine.generate(ids, sampling, CancelToken(), n=4, stop_ids=[stop]):
        stopped[step.index].append(step.token)
    assert len({len(tokens) for tokens in stopped.values()}) > 1
    for index, tokens in free.items():
        end = tokens.index(stop) + 1 if stop in tokens else len(tokens)
        assert stopped[index] == tokens[:end]


def test_a_shared_prefix_is_not_read_again_and_changes_nothing(tiny_engine, tiny_package):
    engine = tiny_engine()
    first = engine.tokenizer.encode(PROMPT * 3 + "x = 1\n")
    second = engine.tokenizer.encode(PROMPT * 3 + "y = 22\n")
    greedy(engine, first)
    warm = engine.generate(second, Sampling(max_tokens=8), CancelToken(), stop_ids=())
    tokens = [step.token for step in warm]
    assert warm.timings.cached_tokens >= len(engine.tokenizer.encode(PROMPT * 3)) - 1
    fresh = Engine.load(tiny_package(MIXED), threads=1, accuracy="exact")
    cold = fresh.generate(second, Sampling(max_tokens=8), CancelToken(), stop_ids=())
    assert [step.token for step in cold] == tokens
    assert cold.timings.cached_tokens == 0


def test_an_older_prompt_survives_a_few_others(tiny_package):
    engine = Engine.load(tiny_package(MIXED), threads=1, accuracy="exact")
    prompts = [list(range(i, i + 90)) for i in range(0, 80, 20)]
    for ids in prompts:
        greedy(engine, ids, 4)
    for ids in prompts:
        generation = engine.generate(ids, Sampling(max_tokens=1), CancelToken())
        list(generation)
        assert generation.timings.cached_tokens == len(ids) - 1


def test_cancelling_between_steps(tiny_engine):
    engine = tiny_engine()
    cancel = CancelToken()
    generation = engine.generate(engine.tokenizer.encode(PROMPT), Sampling(max_tokens=100), cancel, stop_ids=())
    next(generation)
    cancel.cancel()
    with pytest.raises(Cancelled):
        next(generation)


def test_cancelling_during_prefill_leaves_a_usable_engine(tiny_engine):
    engine = tiny_engine()
    expected = [step.token for step in greedy(engine, [5] * 400, 4)]
    for delay in (0.0, 0.002, 0.01):
        engine.prefixes.release(engine.prefixes.empty())
        cancel = CancelToken()
        threading.Timer(delay, cancel.cancel).start()
        started = time.monotonic()
        with pytest.raises(Cancelled):
            for _ in range(1000):
                list(engine.generate([6] * 400, Sampling(max_tokens=4), cancel, stop_ids=()))
                engine.prefixes.release(engine.prefixes.empty())
        assert time.monotonic() - started < 2
    assert [step.token for step in greedy(engine, [5] * 400, 4)] == expected


def test_cancelling_at_the_last_moment_is_heeded(tiny_engine, monkeypatch):
    engine, cancel = tiny_engine(), CancelToken()
    monkeypatch.setattr(
        engine.scheduler, "_accept", lambda accept=engine.scheduler._accept: (accept(), cancel.cancel())
    )
    with pytest.raises(Cancelled):
        next(engine.generate([5] * 9, Sampling(), cancel))


def test_prompts_that_do_not_fit_are_refused_and_answers_end_at_the_context(tiny_package):
    engine = Engine.load(tiny_package(MIXED), threads=1, context=64)
    with pytest.raises(UserError, match="context holds 64"):
        engine.generate([1] * 64, Sampling(), CancelToken())
    with pytest.raises(UserError, match="empty"):
        engine.generate([], Sampling(), CancelToken())
    steps = list(engine.generate([1] * 60, Sampling(max_tokens=50), CancelToken(), stop_ids=()))
    assert len(steps) == 4 and steps[-1].finish_reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0])
def test_drafting_changes_nothing_but_the_number_of_runs(tiny_engine, monkeypatch, temperature):
    monkeypatch.setattr(RunCosts, "of", lambda self, tokens: 1.0)  # whatever this machine does, guessing pays
    engine = tiny_engine()
    ids = [5, 6, 7, 8, 9, 10, 11] * 12
    sampling = Sampling(max_tokens=60, temperature=temperature, seed=4, repetition_penalty=1.0)
    plain = list(engine.generate(ids, sampling, CancelToken(), stop_ids=(), drafting=False))
    drafted = engine.generate(ids, sampling, CancelToken(), stop_ids=())
    steps = list(drafted)
    assert [step.token for step in steps] == [step.token for step in plain]
    np.testing.assert_allclose([step.logprob for step in steps], [step.logprob for step in plain], atol=1e-4)
    if temperature == 0:
        assert 0 < drafted.timings.accepted_tokens <= drafted.timings.drafted_tokens


def test_what_a_rejected_draft_left_in_the_cache_is_not_used(tiny_engine, monkeypatch):
    engine = tiny_engine()
    ids = engine.tokenizer.encode(PROMPT)
    plain = [step.token for step in engine.generate(ids, Sampling(max_tokens=20), CancelToken(), stop_ids=())]
    monkeypatch.setattr(CopyDrafter, "propose", lambda self, limit, least: [plain[0], 3, 4][:limit])
    drafted = engine.generate(ids, Sampling(max_tokens=20), CancelToken(), stop_ids=())
    assert [step.token for step in drafted] == plain
    assert drafted.timings.accepted_tokens < drafted.timings.drafted_tokens
    again = engine.generate(ids + plain, Sampling(max_tokens=8), CancelToken(), stop_ids=(), drafting=False)
    tokens = [step.token for step in again]
    assert again.timings.cached_tokens >= len(ids) + len(plain) - 1
    engine.prefixes.clear()
    fresh = engine.generate(ids + plain, Sampling(max_tokens=8), CancelToken(), stop_ids=(), drafting=False)
    assert [step.token for step in fresh] == tokens
