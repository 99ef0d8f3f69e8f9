"""Drafting by copying, with simulated models: which guesses are made, and whether they pay."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_agent.engine.drafting.drafter import CopyDrafter
from lsp_agent.engine.drafting.run_costs import RunCosts

CHEAP = [1.0, *(1.1 + 0.2 * count for count in range(1, 32))]  # steps that a run of 1, 2, … ids takes: a CPU's


class Simulation:
    """Decodes `target` as a model that says it would; costs are in steps."""

    def __init__(self, prompt, target, prediction=(), costs=CHEAP, drafter=None):
        self.drafter = drafter or CopyDrafter(prompt, prediction, RunCosts())
        self.steps, self.runs, self.drafted, self.accepted = 0.0, [], 0, 0
        position = 0
        while position < len(target):
            draft = self.drafter.propose(min(len(costs) - 1, len(target) - position - 1))
            right = 0
            while right < len(draft) and draft[right] == target[position + right]:
                right += 1
            self.steps += costs[len(draft)]
            self.drafter._costs.note(1 + len(draft), costs[len(draft)])
            self.drafter.extend(target[position : position + right + 1])
            self.runs.append((position, len(draft), right))
            self.drafted, self.accepted = self.drafted + len(draft), self.accepted + right
            position += right + 1
        self.speed = len(target) / self.steps

    def drafts_after(self, position, tokens):
        """The runs that begin within `tokens` after `position`."""
        return [(draft, right) for start, draft, right in self.runs if position <= start < position + tokens]


def text(length, seed=1, vocabulary=1000):
    numbers = random.Random(seed)
    return [numbers.randrange(vocabulary) for _ in range(length)]


SOURCE = text(1000)


def test_what_follows_the_latest_tokens_is_proposed():
    drafter = CopyDrafter([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5])
    assert drafter.propose(8)[:2] == [6, 7]
    assert drafter.propose(1) == [6] and drafter.propose(0) == []
    drafter.extend([77])
    assert drafter.propose(8) == []


@pytest.mark.parametrize("given", [{"prompt": SOURCE}, {"prompt": [1, 2], "prediction": SOURCE}])
def test_a_whole_copy_is_drafted_in_long_pieces(given):
    copied = Simulation(target=SOURCE, **given)
    assert copied.speed > 3.5
    assert max(draft for _, draft, _ in copied.runs) >= 24


def test_a_prediction_is_copied_from_the_first_token():
    assert Simulation([1, 2], SOURCE[:20], SOURCE).runs[0][2] >= 1
    assert Simulation([*SOURCE, 1, 2], SOURCE[:20]).runs[0][1] == 0


EDITS = {
    "insertion": ([*SOURCE[:500], *text(12, 2), *SOURCE[500:]], 512),
    "deletion": ([*SOURCE[:500], *SOURCE[540:]], 500),
    "far deletion": ([*SOURCE[:200], *SOURCE[700:]], 200),
    "replacement of one token": ([*SOURCE[:500], 5000, *SOURCE[501:]], 501),
    "replacement of a piece": ([*SOURCE[:500], *text(7, 3), *SOURCE[520:]], 507),
    "move": ([*SOURCE[600:800], *SOURCE[:600], *SOURCE[800:]], 200),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("given", [{"prompt": [*SOURCE, 1, 2]}, {"prompt": [1, 2], "prediction": SOURCE}], ids=len)
def test_copying_resumes_after_an_edit(edit, given):
    target, resumed = EDITS[edit]
    copied = Simulation(target=target, **given)
    after = copied.drafts_after(resumed, 40)
    assert len(after) <= 10, "about as many runs as it takes to be sure again"
    assert sum(right for _, right in after) >= 28
    assert copied.speed > 3


def test_a_name_that_is_changed_throughout_is_expected_again():
    old, new = 2000, [3000, 3001]
    source, target = [], []
    for start in range(0, 1000, 10):
        source += [*SOURCE[start : start + 10], old]
        target += [*SOURCE[start : start + 10], *new]
    renamed = Simulation(source, target)
    assert renamed.speed > 3
    assert sum(right for _, right in renamed.drafts_after(600, 600)) > 520


def test_an_edit_that_was_made_once_is_not_insisted_on():
    source = [token for start in range(0, 1000, 10) for token in (*SOURCE[start : start + 10], 2000)]
    target = [*source[:120], 3000, *source[121:]]
    assert source[120] == 2000
    once = Simulation(source, target)
    assert once.speed > 3.3
    assert len(once.drafts_after(400, 600)) < 30


def test_the_prediction_goes_before_the_prompt_where_both_match():
    begin = text(10, 4)
    drafter = CopyDrafter([*begin, *text(50, 5)], [*begin, *text(50, 6)])
    drafter.extend(begin)
    assert drafter.propose(31)[:5] == text(50, 6)[:5]


def test_the_answer_itself_is_copied():
    block = text(60, 7)
    repeated = Simulation(text(100, 8), [*block, *text(20, 9), *block, *text(20, 10), *block])
    assert repeated.accepted > 90


@pytest.mark.parametrize("vocabulary", [4, 20, 1000])
@pytest.mark.parametrize("prediction", [(), text(2000, 11, 20)], ids=["alone", "predicted"])
def test_random_text_is_hardly_slowed_down(vocabulary, prediction):
    drawn = Simulation(text(2000, 12, vocabulary), text(2000, 13, vocabulary), prediction)
    assert drawn.speed > 0.97
    assert sum(draft for _, draft, _ in drawn.runs[-500:]) <= 200


def test_drafting_stops_where_guesses_fail_and_resumes_where_they_would_have_been_right():
    places = random.Random(14).sample(range(900), 250)
    misleading = [token for place in places for token in (*SOURCE[place : place + 3], 5000 + place)]
    failing = Simulation(SOURCE, misleading)
    assert failing.speed > 0.97
    assert sum(draft for draft, _ in failing.drafts_after(700, 300)) < 20
    again = Simulation([], text(1000), drafter=failing.drafter)
    assert again.speed > 3


def test_what_a_run_costs_decides():
    no_gain = [float(count) for count in range(1, 33)]
    assert Simulation(SOURCE, SOURCE, costs=no_gain).speed > 0.97
    nothing = [1.0] * 32
    assert Simulation(SOURCE, SOURCE, costs=nothing).speed > 15
    gpu = [1.0, 1.25, 1.75, 1.75, *[2.6] * 4]
    assert Simulation(SOURCE, SOURCE, costs=gpu).speed > 2.5


def test_a_guess_must_beat_what_else_could_be_done():
    drafter = CopyDrafter(SOURCE)
    drafter.extend(SOURCE[:40])
    assert drafter.propose(31, least=2.5) and not drafter.propose(31, least=10)


def test_costs_are_learnt_for_all_who_draft():
    costs = RunCosts()
    for _ in range(10):
        costs.note(1, 0.01)
        for tokens in (2, 4):
            costs.note(tokens, 0.012 * tokens)
    assert costs.of(1) == 1
    assert costs.of(4) == pytest.approx(4.8, abs=0.3) and 7 < costs.of(8) < 11
    drafter = CopyDrafter(SOURCE, (), costs)
    drafter.extend(SOURCE[:40])
    assert drafter.propose(7) == []


def test_padded_sizes_are_told_from_the_line():
    costs = RunCosts()
    for _ in range(50):
        for tokens, steps in ((1, 1.0), (2, 1.2), (3, 1.8), (4, 1.8), (5, 3.0), (8, 3.0)):
            costs.note(tokens, 0.005 * steps)
    assert costs.of(3) == pytest.approx(1.8, abs=0.1) and costs.of(5) == pytest.approx(3.0, abs=0.1)
    assert costs.of(8) == pytest.approx(3.0, abs=0.1)


def test_one_slow_run_or_step_changes_little():
    costs = RunCosts()
    before = costs.of(8)
    for _ in range(5):
        costs.note(1, 0.01)
    costs.note(8, 3.0)
    assert costs.of(8) < 1.6 * before
    costs = RunCosts()
    for seconds in (0.01, 5.0, 0.01, 0.01):
        costs.note(1, seconds)
    costs.note(4, 0.02)
    assert costs.of(4) == pytest.approx(RunCosts().of(4), abs=0.3)


def test_runs_without_a_step_beside_them_say_nothing():
    costs = RunCosts()
    costs.note(4, 9.0)
    assert costs.of(4) == RunCosts().of(4)
    costs.note(1, 0.01)
    for _ in range(100):
        costs.note(4, 0.017)
    known = costs.of(4)
    for _ in range(100):  # another program has begun, but which steps it slows down is not known
        costs.note(4, 0.17)
    assert costs.of(4) == known


tokens = st.integers(0, 4)


@settings(max_examples=60, deadline=None)
@given(st.lists(tokens, max_size=40), st.lists(tokens, max_size=40), st.lists(tokens, max_size=60), st.integers(0, 31))
def test_any_text_can_be_drafted(prompt, prediction, answer, limit):
    drafter = CopyDrafter(prompt, prediction)
    for token in answer:
        draft = drafter.propose(limit)
        assert len(draft) <= limit and draft == drafter.propose(limit)
        drafter.extend([token])
    whole = CopyDrafter(prompt, prediction)
    whole.extend(answer)
    assert whole.propose(limit) == drafter.propose(limit)
