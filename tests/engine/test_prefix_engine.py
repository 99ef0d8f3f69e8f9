"""The engine reads no token twice, whatever the scheduler does with the states: counted where prompts are read."""

import pytest
from transcripts import Transcript

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.package import Package
from lsp_agent.engine.prefixes.tree import shared_prefix
from lsp_agent.engine.request import Request
from lsp_agent.engine.scheduling import scheduler
from lsp_agent.errors import Cancelled

MODELS = pytest.mark.parametrize("name", ["qwen3-next", "qwen3"])


class Client:
    """Asks many requests at once. `known`: what was read so far; `read`: tokens of prompts that were run."""

    def __init__(self, package, monkeypatch) -> None:
        monkeypatch.setenv("LSP_AGENT_CACHE_MEMORY", "64MiB")
        self.engine = Engine(Package(package), 1, 2048, "exact")
        self.known: list[list[int]] = []
        self.read = 0
        original = scheduler.read_piece

        def counted(decoder, state, ids, *arguments, **others):
            before = state.length
            logits = original(decoder, state, ids, *arguments, **others)
            self.read += state.length - before
            return logits

        monkeypatch.setattr(scheduler, "read_piece", counted)

    def unread(self, talk: Transcript) -> int:
        """Tokens of a prompt that have to be read."""
        ids, boundaries = talk.prompt()
        shared = max((shared_prefix(one, ids[:-1]) for one in self.known), default=0)
        if self.engine._decoder.recurrent:
            ends = [len(one) for one in self.known if len(one) < len(ids) and one == ids[: len(one)]]
            shared = max([0, *ends, *(length for length in boundaries if length <= shared)])
        return len(ids) - shared

    def ask(self, *talks: Transcript, n=1, cancel_after=None, tokens=12) -> list[list[list[int]]]:
        """All at once; returns the tokens of each one's answers, of which the first is added to the transcript."""
        expected, before = sum(map(self.unread, talks)), self.read
        answers: list[list[list[int]]] = [[[] for _ in range(n)] for _ in talks]
        ends = []

        def taker(index, cancel):
            def take(step):
                if step is None or isinstance(step, Exception):
                    assert step is None or (cancel_after and isinstance(step, Cancelled))
                    ends.append(step)
                    return
                answers[index][step.index].append(step.token)
                if len(answers[index][0]) == cancel_after:
                    cancel.cancel()

            return take

        for index, talk in enumerate(talks):
            ids, boundaries = talk.prompt()
            cancel = CancelToken()
            sampling = Sampling(max_tokens=tokens + index, temperature=5.0, seed=len(ids) + index)
            request = Request(ids, sampling, cancel, n, boundaries=boundaries, drafting=False, client=str(index))
            self.engine.submit(request, taker(index, cancel))
        while self.engine.scheduler.advance():
            pass
        assert len(ends) == len(talks)
        assert self.read - before == expected
        for talk, texts in zip(talks, answers, strict=True):
            ids, _ = talk.prompt()
            self.known += [[*ids, *text[:-1]] for text in texts]
            talk.add("assistant", text=texts[0])
        return answers


def conversations(count: int) -> list[Transcript]:
    """Without a token in common at the beginning."""
    talks = [Transcript(number).add("system", 60 + 5 * number).add("user", 50) for number in range(count)]
    for number, talk in enumerate(talks):
        talk.ids[0] = 20 + number
    return talks


@pytest.fixture
def client(hf_package, monkeypatch):
    return lambda name: Client(hf_package(name), monkeypatch)


@MODELS
def test_interleaved_conversations_with_tool_results(client, name):
    client = client(name)
    talks = conversations(2)
    for turn in range(6):
        client.ask(*talks)
        for talk in talks:
            talk.add("tool" if turn % 2 else "user", 30 + 20 * turn)


@MODELS
def test_more_conversations_at_once_than_states(client, name):
    client = client(name)
    talks = conversations(7)
    for _ in range(3):
        client.ask(*talks)
        for talk in talks:
            talk.add("tool", 40)
    assert client.engine.prefixes.stats().found_in_memory > 0


@MODELS
def test_parallel_branches_each_go_on(client, name):
    client = client(name)
    talk = Transcript(3).add("system", 100).add("user", 150)
    asked = talk.messages
    (texts,) = client.ask(talk, n=4)
    assert len({tuple(text) for text in texts}) == 4
    branches = [talk.branch(asked, number).add("assistant", text=text[:-1]) for number, text in enumerate(texts)]
    for branch in branches:
        client.ask(branch.add("user", 20))


@MODELS
def test_cancelled_and_undone_turns(client, name):
    client = client(name)
    talk = Transcript(4).add("system", 100).add("user", 60)
    for _ in range(4):
        client.ask(talk)
        talk.add("tool", 80)
    client.ask(talk.branch(talk.messages, 9), cancel_after=5, tokens=40)
    client.ask(talk.branch(talk.messages, 10).add("user", 30))
    for messages in (7, 3, 5, 1):
        client.ask(talk.branch(messages, messages).add("user", 25))
    client.ask(talk)


@MODELS
def test_an_engine_that_is_loaded_again_goes_on_from_disk(hf_package, monkeypatch, tmp_path, name):
    monkeypatch.setenv("LSP_AGENT_CACHE_DISK", "64MiB")
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(tmp_path))
    client = Client(hf_package(name), monkeypatch)
    talk = Transcript(5).add("system", 100).add("user", 60)
    client.ask(talk)
    talk.add("tool", 50)
    client.engine.close()
    again = Client(hf_package(name), monkeypatch)
    again.known = client.known
    again.ask(talk)
    assert again.engine.prefixes.stats().found_on_disk > 160
    (folder,) = (tmp_path / "prefixes").iterdir()
    assert any(path.suffix == ".prefix" for path in folder.iterdir())
