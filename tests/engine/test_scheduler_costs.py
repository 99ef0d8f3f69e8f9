"""What is decided by measured costs: how long a piece of a prompt is, and whether sequences step together."""

import math

import pytest

from lsp_agent.engine.scheduling.costs import LATEST, RETRY, PromptCosts, StepCosts


def test_a_piece_takes_the_time_that_it_may():
    costs = PromptCosts()
    assert costs.tokens_for(0.25, 32, 256) == 32  # nothing is known
    for tokens in (32, 64, 48, 100):
        costs.note(tokens, 0.01 + 0.002 * tokens)
    assert costs.tokens_for(0.25, 32, 256) == pytest.approx(120, abs=1)
    assert costs.tokens_for(0.25, 32, 100) == 100
    assert costs.tokens_for(0.01, 32, 256) == 32


def test_pieces_of_one_length_tell_their_time_too():
    costs = PromptCosts()
    for _ in range(5):
        costs.note(64, 0.5)
    assert costs.tokens_for(0.25, 8, 256) == 32


def test_where_every_run_takes_long_pieces_do_not_shrink_to_nothing():
    costs = PromptCosts()  # experts in main memory cross the bus in every run, however short it is
    for tokens in (8192, 4096, 2048, 1024):
        costs.note(tokens, 3.0 + 0.0005 * tokens)
    assert costs.tokens_for(0.25, 1024, 8192) == pytest.approx(6000, rel=0.01)  # half of the time goes to tokens


def test_a_prompt_that_became_slower_is_read_in_shorter_pieces():
    costs = PromptCosts()
    for _ in range(3):
        for tokens in (100, 120):
            costs.note(tokens, 0.002 * tokens)
    for _ in range(20):
        for tokens in (100, 120):
            costs.note(tokens, 0.004 * tokens)
    assert 60 < costs.tokens_for(0.25, 8, 256) < 75


def measured(**seconds):
    """Costs of `one`, `two` sequences, … that were measured."""
    costs = StepCosts()
    for count, name in enumerate(("one", "two"), 1):
        for _ in range(2 if name in seconds else 0):
            costs.note(count, seconds[name])
    return costs


def test_sequences_step_together_where_that_was_faster():
    assert not StepCosts().together(2, 0)  # what one alone costs must be known
    assert measured(one=0.03).together(2, 0)
    costs = measured(one=0.03, two=0.04)
    assert costs.together(2, 0) and costs.speed(2) == pytest.approx(1.5)
    for _ in range(LATEST):
        costs.note(2, 0.07)
    decisions = [costs.together(2, 0) for _ in range(RETRY)]
    assert decisions.count(True) == 1  # tried again now and then
    assert costs.speed(2) == 1


def test_copies_wait_until_they_pay():
    costs = measured(one=0.03, two=0.04)  # saves 0.02 s a round
    costs.note_copy(1000, 0.09)
    assert [costs.together(2, 1000) for _ in range(6)] == [False] * 4 + [True] * 2
    costs.note_copy(1000, 0.09)
    assert not costs.together(2, 1000)
    assert costs.together(2, 100)


def test_first_and_single_slow_steps_change_nothing():
    costs = StepCosts()
    for sequences, seconds in ((1, 3.0), (1, 0.03), (2, 5.0), (2, 0.04), (2, 0.5)):
        costs.note(sequences, seconds)
    assert costs.speed(2) == pytest.approx(1.5)


def test_what_failed_is_not_tried_at_once():
    costs = measured(one=0.03)
    costs.forbid(3)
    assert not costs.together(3, 0) and costs.together(2, 0)
    costs.note(3, 0.05)
    assert costs.together(3, 0) and math.isfinite(costs.speed(3))
