"""No token is read twice: what is counted is what the decoder runs, on conversations as agents have them."""

import pytest
from transcripts import WORDS, Reader, Transcript

from lsp_agent.engine.package import Package
from lsp_agent.engine.prefixes.cache import PrefixCache
from lsp_agent.engine.session import Decoder

HYBRID, ATTENTION = "qwen3-next", "qwen3"
MODELS = pytest.mark.parametrize("name", [HYBRID, ATTENTION])
CONTEXT = 4096
PLENTY = 256 << 20


@pytest.fixture(scope="module")
def decoder_of(hf_package):
    made = {}

    def make(name: str) -> Decoder:
        if name not in made:
            made[name] = Decoder(Package(hf_package(name)), 1, CONTEXT, "exact")
        return made[name]

    return make


@pytest.fixture
def reader(decoder_of):
    """`reader(name, slots=4, memory=PLENTY)`."""

    def make(name: str, slots: int = 4, memory: int = PLENTY) -> Reader:
        decoder = decoder_of(name)
        return Reader(decoder, PrefixCache(decoder.states, CONTEXT, slots, decoder.device, memory))

    return make


def ask(reader: Reader, transcript: Transcript, answer: int = 12) -> None:
    """Ask, and let nothing before the branch point be read again."""
    ids, boundaries = transcript.prompt()
    expected = len(ids) - reader.branch_point(ids, boundaries)
    assert reader.ask(transcript, answer) == expected


@MODELS
@pytest.mark.parametrize("slots", [1, 4])
def test_a_long_conversation_with_tool_results_reads_every_token_once(reader, name, slots):
    reader = reader(name, slots)
    talk = Transcript(1).add("system", 300).add("user")
    for turn in range(12):
        ask(reader, talk, answer=5 + turn)
        talk.add("tool" if turn % 3 else "user", 10 + 40 * (turn % 4))
    ask(reader, talk)
    assert reader.ran == len(talk.ids) - 1  # the last turn's end is drawn and not read


@MODELS
@pytest.mark.parametrize("slots", [1, 4])
def test_undone_turns_and_what_was_undone_are_still_known(reader, name, slots):
    reader = reader(name, slots)
    talk = Transcript(2).add("system", 100).add("user", 40)
    for _ in range(6):
        ask(reader, talk)
        talk.add("tool", 70)
    whole = talk.branch(talk.messages, 0)
    ask(reader, talk)
    for messages in (11, 3, 7, 2, 9):
        other = talk.branch(messages, 100 + messages).add("user", 30)
        ask(reader, other)
        ask(reader, other.add("tool", 20))
    ask(reader, whole.add("user", 30))
    ask(reader, talk.add("user", 30))


@MODELS
@pytest.mark.parametrize("stage", ["prompt", "answer"])
def test_a_cancelled_turn_loses_nothing(reader, name, stage):
    reader = reader(name)
    talk = Transcript(3).add("system", 200).add("user", 150)
    ask(reader, talk)
    talk.add("tool", 200)
    ids, boundaries = talk.prompt()
    state = reader.cache.take(ids, boundaries)
    if stage == "prompt":
        reader.go_on(state, ids, most=100)
        assert state.length < len(ids)
    else:
        reader.go_on(state, [*ids, *talk.random.choices(WORDS, k=30)])
    reader.end(state)
    ask(reader, talk.branch(talk.messages, 7).add("user", 40))  # said after the turn was cancelled
    ask(reader, talk.branch(talk.messages - 1, 8).add("tool", 60))  # or instead of what the tool said


@MODELS
@pytest.mark.parametrize("answers", [2, 4])
def test_parallel_branches_read_their_prompt_once(reader, name, answers):
    reader = reader(name, slots=answers)
    talk = Transcript(4).add("system", 120).add("user", 300)
    ids, boundaries = talk.prompt()
    states = [reader.begin(ids, boundaries)[0]]
    ran = reader.ran
    for number in range(1, answers):
        state, _ = reader.begin(ids, boundaries)
        states.append(state)
        assert reader.ran - ran <= number * (1 if name == ATTENTION else 3)  # after the message that was the last
    assert len({id(state) for state in states}) == answers and reader.cache.take([1, 2, 3]) is None
    texts = [talk.random.choices(WORDS, k=20 + number) for number in range(answers)]
    for state, text in zip(states, texts, strict=True):
        reader.go_on(state, [*ids, *text])
    for state in states:
        reader.end(state)
    for text in texts:
        ask(reader, talk.branch(2, 1).add("assistant", text=text).add("user", 20))


@MODELS
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("talks", [2, 7])
def test_conversations_take_turns_in_fewer_states(reader, name, slots, talks):
    reader = reader(name, slots)
    system = Transcript(5).add("system", 150)
    every = [system.branch(1, 50 + number).add("user", 60) for number in range(talks)]
    for _ in range(4):
        for talk in every:
            ask(reader, talk)
            talk.add("tool", 30)
    stats = reader.cache.stats()
    assert stats.evictions == 0 and (stats.found_in_memory > 0) == (talks > slots)
    assert stats.asked - stats.found_in_states - stats.found_in_memory < sum(len(talk.ids) for talk in every)
