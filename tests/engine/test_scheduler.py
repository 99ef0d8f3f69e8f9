"""Requests together: every answer is what it is alone, whoever joins, leaves, is cancelled or has to make room."""

import random

import numpy as np
import pytest

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.engine.request import INTERACTIVE, ORDINARY, Request, Step
from lsp_agent.engine.scheduling.costs import PromptCosts, StepCosts
from lsp_agent.engine.scheduling.scheduler import Scheduler
from lsp_agent.errors import Cancelled, PromptTooLong, UserError

HYBRID = "qwen3-next"
KINDS = ["tiny", HYBRID]


@pytest.fixture(params=KINDS)
def engine(request, tiny_engine, hf_engine):
    engine = tiny_engine() if request.param == "tiny" else hf_engine(request.param)
    engine.prefixes.clear()
    yield engine
    assert engine.scheduler.status() == {"running": 0, "waiting": 0, "clients": {}}
    assert engine.prefixes.stats().taken == 0


class Asked:
    """A request's steps as they come."""

    def __init__(self, engine, prompt, tokens=8, **fields):
        sampling = fields.pop("sampling", None) or Sampling(max_tokens=tokens)
        self.cancel = CancelToken()
        self.request = Request(prompt, sampling, self.cancel, **fields)
        self.steps, self.end = [], "running"
        self.generation = engine.submit(self.request, self._on_step)

    def _on_step(self, result):
        assert self.end == "running"
        if isinstance(result, Step):
            self.steps.append(result)
        else:
            self.end = result

    def tokens(self, index=0):
        return [step.token for step in self.steps if step.index == index]


def run(engine, until=lambda: False):
    while not until() and engine.scheduler.advance():
        pass


def prompt(seed, length):
    return np.random.default_rng(seed).integers(0, 250, length).tolist()


def alone(engine, ids, tokens=8, **fields):
    asked = Asked(engine, ids, tokens, **fields)
    run(engine)
    assert asked.end is None
    return asked


def test_answers_of_prompts_of_different_lengths_are_those_alone(engine):
    prompts = [prompt(seed, length) for seed, length in enumerate((5, 40, 90, 17))]
    expected = [alone(engine, ids, 20) for ids in prompts]
    engine.prefixes.clear()
    asked = [Asked(engine, ids, 20) for ids in prompts]
    run(engine)
    for one, wanted in zip(asked, expected, strict=True):
        assert one.end is None and one.tokens() == wanted.tokens()
        np.testing.assert_allclose(
            [step.logprob for step in one.steps], [step.logprob for step in wanted.steps], atol=1e-3
        )


def test_who_joins_and_who_leaves_changes_nothing_for_the_others(engine):
    long = alone(engine, prompt(1, 30), 40).tokens()
    short = alone(engine, prompt(2, 42), 5).tokens()
    first = Asked(engine, prompt(1, 30), 40)
    run(engine, lambda: len(first.steps) > 10)
    second = Asked(engine, prompt(2, 42), 5)
    run(engine, lambda: second.end is None)
    assert first.end == "running"
    third = Asked(engine, prompt(2, 42), 5)
    run(engine)
    assert (first.tokens(), second.tokens(), third.tokens()) == (long, short, short)
    assert third.generation.timings.cached_tokens == 41


def test_a_step_carries_everybody(engine, monkeypatch):
    monkeypatch.setattr(StepCosts, "together", lambda self, sequences, tokens: True)  # whatever this machine measures
    sizes = []
    step = engine._decoder.step
    monkeypatch.setattr(engine._decoder, "step", lambda tokens, state: sizes.append(len(tokens)) or step(tokens, state))
    asked = [Asked(engine, prompt(seed, 10), 12, drafting=False) for seed in range(3)]
    run(engine, lambda: all(len(one.steps) > 4 for one in asked))
    assert 3 in sizes
    run(engine)
    assert all(len(one.steps) == 12 for one in asked)


def test_cancelling_ends_one_request_within_a_step_and_no_other(engine):
    expected = alone(engine, prompt(1, 30), 30).tokens()
    kept, gone = Asked(engine, prompt(1, 30), 30), Asked(engine, prompt(2, 30), 30)
    run(engine, lambda: len(gone.steps) > 3 and len(kept.steps) > 3)
    gone.cancel.cancel()
    steps = len(gone.steps)
    engine.scheduler.advance()
    assert isinstance(gone.end, Cancelled) and len(gone.steps) == steps
    run(engine)
    assert kept.tokens() == expected
    again = Asked(engine, prompt(2, 30) + gone.tokens(), 2)
    run(engine)
    assert again.generation.timings.cached_tokens == 30 + steps - 1  # what a cancelled answer read is known


def test_cancelling_in_the_middle_of_a_prompt_leaves_the_others_alone(engine, monkeypatch):
    expected = alone(engine, prompt(1, 30), 30).tokens()
    kept = Asked(engine, prompt(1, 30), 30)
    run(engine, lambda: len(kept.steps) > 3)
    gone = Asked(engine, prompt(2, 200), 30)
    run_ = engine._decoder.run

    def cancelled_in_the_run(ids, state, rows, cancel=None):
        if cancel is gone.cancel:
            gone.cancel.cancel()
        return run_(ids, state, rows, cancel)

    monkeypatch.setattr(engine._decoder, "run", cancelled_in_the_run)
    run(engine)
    assert isinstance(gone.end, Cancelled) and not gone.steps
    assert kept.tokens() == expected


def test_several_answers_of_one_prompt_are_read_once_and_are_those_alone(engine):
    sampling = Sampling(max_tokens=15, temperature=1.0, seed=3)
    both = Asked(engine, prompt(4, 50), sampling=sampling, n=4), Asked(engine, prompt(5, 20), 30)
    run(engine)
    assert both[0].generation.timings.cached_tokens == 0
    expected = Asked(engine, prompt(4, 50), sampling=sampling)
    run(engine)
    assert expected.tokens() == both[0].tokens(0)
    assert len({tuple(both[0].tokens(index)) for index in range(4)}) == 4
    for index in range(4):  # each branch is known: nothing of it is read again
        again = Asked(engine, prompt(4, 50) + both[0].tokens(index), 1)
        run(engine)
        assert again.generation.timings.cached_tokens == 50 + 14


def test_an_answer_can_be_ended_before_its_time(engine):
    two = Asked(engine, prompt(4, 50), sampling=Sampling(max_tokens=30, temperature=1.0, seed=3), n=2)
    run(engine, lambda: len(two.tokens(1)) == 5)
    two.generation.finish(1)
    run(engine)
    assert two.end is None
    assert len(two.tokens(0)) == 30 and len(two.tokens(1)) == 5


@pytest.mark.parametrize("finished", [(0,), (1,), (0, 1), (0, 1, 2)])
def test_answers_can_be_ended_before_the_prompt_is_read(engine, monkeypatch, finished):
    monkeypatch.setattr(PromptCosts, "tokens_for", lambda *_: 64)
    sampling = Sampling(max_tokens=6, temperature=1.0, seed=3)
    expected = alone(engine, prompt(4, 200), sampling=sampling, n=3)
    engine.prefixes.clear()
    three = Asked(engine, prompt(4, 200), sampling=sampling, n=3)
    engine.scheduler.advance()
    for index in finished:
        three.generation.finish(index)
    run(engine)
    assert three.end is None
    for index in range(3):
        assert three.tokens(index) == ([] if index in finished else expected.tokens(index))


def test_one_request_s_error_is_its_own(engine):
    class Broken:
        def __init__(self):
            self.left = 3

        def allowed(self):
            self.left -= 1
            if not self.left:
                raise UserError("This format is too complex.")
            return np.ones(engine.config.vocabulary, bool)

        def accept(self, token):
            pass

        def forced(self):
            return []

        def ended(self):
            return False

        def left_out(self):
            return False

    expected = alone(engine, prompt(1, 30), 10).tokens()
    kept, failed = Asked(engine, prompt(1, 30), 10), Asked(engine, prompt(2, 30), 10, constraint=Broken)
    run(engine)
    assert str(failed.end) == "This format is too complex." and len(failed.steps) == 2
    assert kept.end is None and kept.tokens() == expected


def test_an_answer_s_error_ends_all_of_its_request(engine, monkeypatch):
    expected = alone(engine, prompt(1, 30), 12).tokens()
    kept = Asked(engine, prompt(1, 30), 12, drafting=False)
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=1)
    failed = Asked(engine, prompt(2, 30), sampling=sampling, n=3, prediction=[5] * 9)
    run(engine, lambda: len(failed.steps) >= 6)
    first = failed.generation._job.decodings[0]
    monkeypatch.setattr(first, "propose", lambda *_: [5, 5])  # it is verified alone, before the others step

    def fail(*_):
        raise RuntimeError("that went wrong")

    monkeypatch.setattr(engine._decoder, "verify", fail)
    run(engine)
    assert str(failed.end) == "that went wrong" and kept.end is None
    assert kept.tokens() == expected


@pytest.mark.parametrize("index", range(3))
def test_an_answer_that_fails_in_a_common_step_takes_nothing_from_the_others(engine, monkeypatch, index):
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=1)
    expected = [alone(engine, prompt(seed, 30), 20).tokens() for seed in (1, 2)]
    engine.prefixes.clear()
    before = Asked(engine, prompt(1, 30), 20)
    run(engine, lambda: len(before.steps) > 2)
    failed = Asked(engine, prompt(3, 20), sampling=sampling, n=3)  # rows between those of the others
    run(engine, lambda: failed.steps)
    after = Asked(engine, prompt(2, 30), 20)
    run(engine, lambda: len(after.steps) > 2)

    def fail(logits):
        raise UserError("This format is too complex.")

    monkeypatch.setattr(failed.generation._job.decodings[index], "draw", fail)
    run(engine)
    assert isinstance(failed.end, UserError)
    assert before.tokens() == expected[0] and after.tokens() == expected[1]


def test_a_consumer_s_error_is_its_own(engine):
    expected = alone(engine, prompt(1, 30), 10).tokens()
    kept = Asked(engine, prompt(1, 30), 10)

    def fail(result):
        raise RuntimeError("the loop is closed")

    engine.submit(Request(prompt(2, 30), Sampling(max_tokens=10)), fail)
    run(engine)
    assert kept.tokens() == expected


def test_a_run_of_several_that_fails_is_repeated_one_by_one(engine, monkeypatch):
    prompts = [prompt(seed, 10) for seed in range(3)]
    expected = [alone(engine, ids, 12).tokens() for ids in prompts]
    step = engine._decoder.step

    def no_batches(tokens, state):
        if len(tokens) > 1:
            raise RuntimeError("no memory for that")
        return step(tokens, state)

    monkeypatch.setattr(engine._decoder, "step", no_batches)
    asked = [Asked(engine, ids, 12) for ids in prompts]
    run(engine)
    assert [one.tokens() for one in asked] == expected


def test_what_cannot_be_served_is_refused_at_once(engine):
    with pytest.raises(PromptTooLong, match="the context holds"):
        engine.submit(Request([1] * engine.context_length))
    with pytest.raises(UserError, match="empty"):
        engine.submit(Request([]))
    nothing = Asked(engine, [1, 2], 0)
    assert nothing.end is None and not nothing.steps


def test_an_answer_obeys_its_constraint_and_what_must_follow_is_read_in_one_run(engine, monkeypatch):
    allowed = [7, 8, 9, 10, 11, 12]

    class OnlyThese:
        """The tokens of `allowed`, in turn."""

        def __init__(self):
            self.taken = 0

        def allowed(self):
            mask = np.zeros(engine.config.vocabulary, bool)
            mask[allowed[self.taken]] = True
            return mask

        def accept(self, token):
            assert token == allowed[self.taken]
            self.taken += 1

        def forced(self):
            return allowed[self.taken :]

        def ended(self):
            return self.taken == len(allowed)

        def left_out(self):
            return False

    runs = []
    verify = engine._decoder.verify
    monkeypatch.setattr(engine._decoder, "verify", lambda ids, *rest: runs.append(len(ids)) or verify(ids, *rest))
    asked = Asked(engine, prompt(3, 20), 20, constraint=OnlyThese)
    run(engine)
    assert asked.tokens() == allowed and asked.steps[-1].finish_reason == "stop"
    assert runs == [6]  # the first was drawn from what the prompt says; it and the five after it make one run
    expected = alone(engine, prompt(4, 20), 20).tokens()
    asked, other = Asked(engine, prompt(3, 20), 20, constraint=OnlyThese), Asked(engine, prompt(4, 20), 20)
    run(engine)
    assert asked.tokens() == allowed and other.tokens() == expected


def scheduler_of_few(engine, slots, rows, row_capacity=64):
    """A scheduler of the engine's decoder with few states and rows."""
    from lsp_agent.engine.prefixes.cache import PrefixCache

    prefixes = PrefixCache(engine._decoder.states, engine.context_length, slots, engine._decoder.device)
    return Scheduler(engine._decoder, prefixes, engine.tokenizer, rows, row_capacity), prefixes


class Few:
    """Like an engine, with few states and rows."""

    def __init__(self, engine, slots, rows, row_capacity=64):
        self.scheduler, self.prefixes = scheduler_of_few(engine, slots, rows, row_capacity)
        self.submit = self.scheduler.submit


@pytest.mark.parametrize(("slots", "rows"), [(1, 1), (1, 4), (2, 1), (2, 3)])
def test_where_states_are_few_an_urgent_request_is_served_and_nothing_is_read_twice(engine, slots, rows):
    expected = [alone(engine, prompt(seed, 30), 20).tokens() for seed in range(3)]
    urgent_tokens = alone(engine, prompt(9, 25), 5).tokens()
    few = Few(engine, slots, rows)
    asked = [Asked(few, prompt(seed, 30), 20, client=str(seed)) for seed in range(3)]
    run(few, lambda: len(asked[0].steps) > 5)
    read = []
    decoder_run = engine._decoder.run
    engine._decoder.run = lambda ids, *rest: read.append(ids.shape[1]) or decoder_run(ids, *rest)
    try:
        urgent = Asked(few, prompt(9, 25), 5, priority=INTERACTIVE, client="cursor")
        run(few, lambda: urgent.end is None)
        assert any(one.end == "running" for one in asked)
        run(few)
    finally:
        del engine._decoder.run
    assert urgent.tokens() == urgent_tokens
    assert [one.tokens() for one in asked] == expected
    assert few.prefixes.stats().taken == 0
    # Prompts are read once each; a piece of one token is a step.
    assert sum(length for length in read if length > 1) <= 25 + 2 * 30


def test_room_can_be_made_for_other_work(engine):
    expected = alone(engine, prompt(1, 30), 20).tokens()
    few = Few(engine, 1, 4)
    asked = Asked(few, prompt(1, 30), 20)
    run(few, lambda: len(asked.steps) > 3)
    assert few.prefixes.empty() is None
    assert few.scheduler.make_room()
    state = few.prefixes.empty()
    assert state is not None and not few.scheduler.make_room()
    run(few)
    few.prefixes.release(state)
    assert asked.tokens() == expected


def test_an_answer_that_outgrows_its_row_goes_on(engine):
    expected = alone(engine, prompt(1, 30), 60).tokens()
    second = alone(engine, prompt(2, 20), 60).tokens()
    few = Few(engine, 1, 2, row_capacity=48)
    asked = Asked(few, prompt(1, 30), 60), Asked(few, prompt(2, 20), 60)
    run(few)
    assert asked[0].tokens() == expected and asked[1].tokens() == second


@pytest.mark.parametrize("seed", range(6))
def test_any_schedule_gives_every_answer_that_it_has_alone(engine, seed):
    chance = random.Random(seed)
    few = Few(engine, chance.randint(1, 4), chance.randint(1, 5), chance.choice([40, 200]))
    shared = prompt(99, 25)
    wanted = []
    for index in range(7):
        ids = shared[: chance.randint(0, 25)] + prompt(chance.randint(0, 3), chance.randint(1, 60))
        sampling = Sampling(max_tokens=chance.randint(1, 25), temperature=chance.choice([0, 1.0]), seed=index)
        fields = {"n": chance.choice([1, 1, 1, 3]), "priority": chance.choice([INTERACTIVE, ORDINARY])}
        fields |= {"client": str(chance.randint(0, 2)), "boundaries": (chance.randint(1, len(ids)),)}
        fields |= {"prediction": prompt(chance.randint(0, 3), 40), "drafting": chance.random() < 0.7}
        wanted.append((ids, sampling, fields))
    asked, cancelled = [], set()
    while wanted or any(one.end == "running" for one in asked):
        if wanted and chance.random() < 0.15:
            ids, sampling, fields = wanted.pop()
            asked.append(Asked(few, ids, sampling=sampling, **fields))
        if asked and chance.random() < 0.01:
            cancelled.add(len(asked) - 1)
            asked[-1].cancel.cancel()
        few.scheduler.advance()
    assert few.prefixes.stats().taken == 0
    engine.prefixes.clear()
    for place, one in enumerate(asked):
        sampling = one.request.sampling
        for index in range(one.request.n):
            tokens = one.tokens(index)
            if place not in cancelled:
                assert one.end is None and len(tokens) == sampling.max_tokens
            if index == 0 or sampling.temperature == 0:
                assert tokens == alone(engine, one.request.prompt, sampling=sampling).tokens()[: len(tokens)]
