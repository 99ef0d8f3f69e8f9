"""Who is served when: on a model whose runs take simulated time, so that every figure is exact."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.engine.device import CpuDevice
from lsp_agent.engine.gpu.errors import GpuLost
from lsp_agent.engine.prefixes.cache import PrefixCache
from lsp_agent.engine.request import INTERACTIVE, Request, Step
from lsp_agent.engine.sampling import HostLogits
from lsp_agent.engine.scheduling.batch import Batch
from lsp_agent.engine.scheduling.scheduler import Scheduler
from lsp_agent.errors import Cancelled

A_TOKEN, A_RUN, A_STEP, A_ROW = 0.005, 0.01, 0.03, 0.01
"""Seconds: a token of a prompt and a run over some, a step and each further row of it."""


class SimulatedDecoder:
    """No model: time passes, and every token says that token 1 comes next."""

    states, device, prefill_chunk, most_verified = (), CpuDevice(), 256, 1
    config = SimpleNamespace(vocabulary=4)

    def __init__(self):
        self.now, self.read, self.rows = 0.0, [], []

    def run(self, ids, state, rows, cancel=None):
        self.now += A_RUN + A_TOKEN * ids.shape[1]
        self.read.append(ids.shape[1])
        return np.array([[0.0, 1.0, 0.0, 0.0]] * len(rows), np.float32)

    def step(self, tokens, state):
        self.now += A_STEP + A_ROW * (len(tokens) - 1)
        self.rows.append(len(tokens))
        return [HostLogits(np.array([0.0, 1.0, 0.0, 0.0], np.float32))] * len(tokens)


class Service:
    """A scheduler in simulated time, and who has asked it."""

    def __init__(self, slots=4, rows=4):
        self.decoder = SimulatedDecoder()
        self.prefixes = PrefixCache((), 100_000, slots)
        tokenizer = SimpleNamespace(token_bytes=lambda token: b"x")
        self.scheduler = Scheduler(self.decoder, self.prefixes, tokenizer, rows, 100_000, lambda: self.decoder.now)
        self.names = 0

    @property
    def now(self):
        return self.decoder.now

    def ask(self, client, prompt, tokens, **fields):
        self.names += 1
        ids = [2 + self.names] * prompt  # no two share a token
        return Asked(self, Request(ids, Sampling(max_tokens=tokens), CancelToken(), client=client, **fields))

    def run(self, until=lambda: False):
        while not until() and self.scheduler.advance():
            pass


class Asked:
    def __init__(self, service, request):
        self.service, self.asked, self.times, self.ended = service, service.now, [], None
        self.generation = service.scheduler.submit(request, self._on_step)

    def _on_step(self, result):
        if isinstance(result, Step):
            self.times.append(self.service.now)
        else:
            assert result is None
            self.ended = self.service.now

    @property
    def first(self):
        """Seconds to the first token."""
        return self.times[0] - self.asked

    @property
    def longest_gap(self):
        return max(np.diff(self.times))


def test_alone_a_prompt_is_read_in_the_longest_pieces_by_who_iterates():
    service = Service()
    generation = service.scheduler.submit(Request([5] * 600, Sampling(max_tokens=3)))
    assert len(list(generation)) == 3
    assert service.decoder.read == [256, 256, 88]
    assert generation.timings.prefill_s == pytest.approx(600 * A_TOKEN + 3 * A_RUN)
    assert generation.timings.decode_s == pytest.approx(2 * A_STEP)


def test_a_service_reads_pieces_of_a_quarter_second():
    service = Service()
    service.ask("agent", 2000, 1)
    service.run()
    seconds = [A_RUN + A_TOKEN * length for length in service.decoder.read[2:-1]]
    assert max(seconds) < 0.3 and np.mean(seconds) > 0.2


def test_a_completion_is_served_ahead_of_a_prompt_that_is_being_read_and_of_answers():
    service = Service()
    agents = [service.ask("agent", 4000, 50), service.ask("other", 100, 2000)]
    service.run(lambda: service.now > 3)
    cursor = service.ask("cursor", 200, 10, priority=INTERACTIVE)
    service.run(lambda: cursor.ended is not None)
    assert cursor.first < 0.3 + 200 * A_TOKEN + 0.2  # the piece that was under way, its own, runs between them
    assert cursor.ended - cursor.times[0] < 10 * (A_STEP + 2 * A_ROW) + 0.3 * 2
    assert not agents[0].ended
    service.run()
    assert agents[0].ended and agents[1].ended


def test_while_a_completion_decodes_prompts_wait_though_not_for_ever():
    service = Service()
    service.run()
    cursor = service.ask("cursor", 50, 400, priority=INTERACTIVE)
    service.run(lambda: len(cursor.times) > 5)
    agent = service.ask("agent", 3000, 5)
    service.run(lambda: cursor.ended is not None)
    assert cursor.longest_gap < 0.35
    gaps = np.diff(cursor.times)
    pieces = (gaps > 0.1).sum()
    seconds = cursor.times[-1] - agent.asked
    assert seconds / 3 < pieces < seconds / 1.5  # a piece about every two seconds
    service.run()
    assert len(agent.times) == 5


def test_a_long_prompt_and_those_who_decode_share_the_time():
    service = Service()
    writer = service.ask("writer", 50, 2000)
    service.run(lambda: len(writer.times) > 5)
    reader = service.ask("reader", 4000, 5)
    start = len(writer.times)
    service.run(lambda: reader.times)
    assert writer.longest_gap < 0.35
    steps = len(writer.times) - start
    assert 0.4 < steps * A_STEP / reader.first < 0.6
    assert reader.first < 2.5 * 4000 * A_TOKEN


def test_a_client_with_many_requests_does_not_keep_another_waiting():
    service = Service(slots=3)
    greedy = [service.ask("greedy", 2000, 5) for _ in range(6)]
    service.run(lambda: service.now > 2)
    modest = service.ask("modest", 1000, 5)
    service.run()
    alone = 1000 * A_TOKEN
    assert modest.first < 3.5 * alone
    assert sum(one.ended < modest.ended for one in greedy) <= 2


def test_requests_of_one_client_are_read_one_after_the_other():
    service = Service()
    asked = [service.ask("agent", 1000, 1) for _ in range(3)]
    service.run()
    assert [round(one.first / asked[0].first) for one in asked] == [1, 2, 3]


def test_where_there_is_one_state_two_long_answers_take_turns():
    service = Service(slots=1, rows=1)
    asked = [service.ask(name, 100, 2000) for name in ("one", "two")]
    service.run(lambda: service.now > 60)
    shares = [len(one.times) * A_STEP / 60 for one in asked]
    assert min(shares) > 0.4
    assert max(one.longest_gap for one in asked) < 10
    read = sum(service.decoder.read)
    service.run(lambda: service.now > 90)
    assert sum(service.decoder.read) == read  # nothing is read again when they take turns


def test_rows_let_more_decode_than_there_are_states():
    service = Service(slots=2, rows=4)
    asked = [service.ask(str(index), 100, 300) for index in range(4)]
    service.run(lambda: all(one.times for one in asked))
    service.decoder.rows.clear()
    service.run(lambda: any(one.ended for one in asked))
    assert service.decoder.rows.count(4) > 0.9 * len(service.decoder.rows)


def test_n_answers_step_together():
    service = Service(slots=1, rows=4)
    service.ask("agent", 100, 50, n=4)
    service.run()
    assert service.decoder.rows == [4] * 49


@pytest.mark.parametrize("seed", range(3))
def test_nobody_starves_whoever_asks(seed):
    """Two editors whose completions come all the time, four agents with long prompts and answers."""
    chance = random.Random(seed)
    service = Service(slots=3, rows=4)
    agents = [service.ask(f"agent {index}", 1500, 300) for index in range(4)]
    completions, next_at, stopped = [], 0.0, 0.0
    while not all(agent.ended for agent in agents):
        if service.now >= next_at:
            next_at = service.now + chance.uniform(0.5, 3)
            completions.append(service.ask(f"editor {chance.randint(1, 2)}", chance.randint(20, 150), 8, priority=-1))
        before = service.now
        assert service.scheduler.advance()
        assert service.now - before < 0.45
        stopped = max(stopped, service.now)
        assert service.now < 600, "an agent starved"
    service.run()
    firsts = sorted(one.first for one in completions)
    assert firsts[len(firsts) // 2] < 1.2
    assert firsts[-1] < 4
    assert max(agent.longest_gap for agent in agents) < 12


def test_a_lost_gpu_ends_all_requests_and_refuses_more():
    service = Service()
    ends = []
    for _ in range(3):
        service.scheduler.submit(Request([5] * 20, Sampling(max_tokens=9)), ends.append)
    service.run(lambda: service.decoder.rows.count(3) == 2)
    service.scheduler.submit(Request([5] * 20, Sampling(max_tokens=9)), ends.append)  # it is not taken on yet
    accept, service.scheduler._accept = service.scheduler._accept, lambda: None

    def lost(*_):
        raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")

    service.decoder.step = service.decoder.run = lost
    service.prefixes.release = service.prefixes.keep = lost  # nothing that it held can be touched
    service.run(lambda: service.scheduler.broken)
    service.scheduler._accept = accept
    service.run()
    assert [type(one) for one in ends if not isinstance(one, Step)] == [GpuLost] * 4
    with pytest.raises(GpuLost):
        service.ask("late", 5, 5)


def test_who_asks_while_the_gpu_is_lost_is_told():
    service, ends = Service(), []
    lost = GpuLost("The GPU stopped working in mid-run.")
    service.scheduler._submitted = SimpleNamespace(append=lambda job: setattr(service.scheduler, "broken", lost))
    service.scheduler.submit(Request([5] * 20, Sampling(max_tokens=9)), ends.append)
    assert ends == [lost]


@pytest.mark.parametrize(
    ("error", "end"), [(MemoryError(), Cancelled), (RuntimeError("CUDA failure 700: an illegal address"), GpuLost)]
)
def test_what_goes_wrong_where_an_answer_is_kept_is_no_other_request_s_fault(error, end):
    service = Service(slots=1, rows=4)
    kept, ends = [], []
    gone = CancelToken()
    service.scheduler.submit(Request([5] * 20, Sampling(max_tokens=40), gone), ends.append)
    service.scheduler.submit(Request([6] * 20, Sampling(max_tokens=40)), kept.append)
    service.run(lambda: len(kept) > 5 and len(ends) > 5)

    def fail(*_):
        raise error

    service.prefixes.release = service.prefixes.keep = fail
    gone.cancel()
    assert service.scheduler.advance() == (end is Cancelled)
    del service.prefixes.release, service.prefixes.keep
    service.run()
    assert isinstance(ends[-1], end)
    assert len(service.scheduler._stepper._batch.rows) == (0 if end is Cancelled else 1)
    assert (len(kept) == 41 and kept[-1] is None) if end is Cancelled else isinstance(kept[-1], GpuLost)


def test_who_cannot_be_given_a_state_again_fails_alone(monkeypatch):
    service = Service(slots=1, rows=4)
    in_row, in_state = [], []
    for number, ends in enumerate((in_row, in_state)):
        service.scheduler.submit(Request([5 + number] * 20, Sampling(max_tokens=200)), ends.append)
    service.run(lambda: len(in_state) > 3)

    def fail(*_):
        raise RuntimeError("no state today")

    monkeypatch.setattr(service.prefixes, "take", fail)
    service.run()
    assert str(in_row[-1]) == "no state today"
    assert len(in_state) == 201 and in_state[-1] is None


def test_a_state_that_other_work_gives_back_is_taken_at_once():
    service = Service(slots=2, rows=1)
    held = service.prefixes.empty()
    service.ask("first", 20, 400)
    second = service.ask("second", 20, 5)
    service.run(lambda: service.now > 2)
    assert not second.times
    service.prefixes.release(held)
    service.run(lambda: second.times)
    assert second.first < 2.5
    service.run()


def test_rows_survive_where_there_is_no_memory_for_another(monkeypatch):
    service = Service(slots=1, rows=3)
    asked = [service.ask(str(number), 20, 20) for number in range(2)]
    service.run(lambda: all(len(one.times) > 3 for one in asked))

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "join", fail)
        asked.append(service.ask("third", 20, 20))
        service.run(lambda: service.now > asked[-1].asked + 1)
    service.run()
    assert [len(one.times) for one in asked] == [20] * 3


def test_requests_that_cannot_be_copied_into_rows_fail_and_others_are_served(monkeypatch):
    service = Service()
    ends = []
    for _ in range(2):
        service.scheduler.submit(Request([5] * 20, Sampling(max_tokens=9)), ends.append)

    def fail(*_):
        raise RuntimeError("no copies today")

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "join", fail)
        service.run()
    assert [str(one) for one in ends if not isinstance(one, Step)] == ["no copies today"] * 2
    later = service.ask("later", 5, 5)
    service.run()
    assert len(later.times) == 5
