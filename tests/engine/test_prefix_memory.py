"""Hundreds of conversations against a small budget: it holds, and what is found is bit for bit what was read."""

import gc
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transcripts import Reader, Transcript, Witness, cold

from lsp_agent.engine.package import Package
from lsp_agent.engine.prefixes.cache import PrefixCache
from lsp_agent.engine.prefixes.host_memory import HostMemory, bytes_of, carve
from lsp_agent.engine.prefixes.limits import memory_limit, size_of
from lsp_agent.engine.prefixes.tree import LONGEST
from lsp_agent.engine.session import Decoder
from lsp_agent.engine.state import recurrent_shapes, segment_shapes
from lsp_agent.errors import UserError

HYBRID, ATTENTION = "qwen3-next", "qwen3"
CONTEXT = 2048


@pytest.fixture(scope="module")
def decoder_of(hf_package):
    return lambda name: Decoder(Package(hf_package(name)), 1, CONTEXT, "exact")


@pytest.mark.parametrize("name", [HYBRID, ATTENTION])
@pytest.mark.parametrize("budget", [600, 3000])
def test_a_budget_of_a_few_thousand_tokens_holds(decoder_of, name, budget):
    decoder = decoder_of(name)
    a_token = bytes_of(segment_shapes(decoder.states, 64)) // 64
    one = bytes_of(recurrent_shapes(decoder.states))
    limit = budget * a_token + budget // 100 * one
    reader = Witness(decoder, PrefixCache(decoder.states, CONTEXT, 2, decoder.device, limit))
    choose = random.Random(budget)
    system = Transcript(1).add("system", 90)
    talks = [system.branch(1, 0).add("user", 30)]
    checked = asked = 0
    for turn in range(150):
        talk = choose.choice(talks[-6:])
        action = choose.randrange(4)
        if action == 0:
            talk = system.branch(1, turn + 7).add("user", choose.randint(20, 120))
            talks.append(talk)
        elif action == 1 and talk.messages > 2:
            talk = talk.branch(choose.randrange(1, talk.messages), turn + 7).add("user", 30)
            talks.append(talk)
        elif len(talk.ids) < 800:
            talk.add("tool", choose.randint(5, 150))
        ids, boundaries = talk.prompt()
        state = reader.cache.take(ids, boundaries)
        asked += len(ids)
        assert reader.unread(state) == [] or state.length == 0
        logits = reader.go_on(state, ids)
        if turn % 10 == 0:
            expected, _ = cold(decoder, ids)
            np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
            checked += 1
        text = choose.choices(range(10, 288), k=10)
        reader.go_on(state, [*ids, *text])
        reader.end(state)
        talk.add("assistant", text=text)
        memory = reader.cache._memory
        assert memory.used <= memory.limit
    stats = reader.cache.stats()
    # A node that is split is there twice for a moment.
    assert memory.most_used <= limit + LONGEST * a_token and memory.used == stats.memory_bytes
    assert checked == 15 and stats.evictions > 0 and reader.ran < asked / 2
    del state
    reader.cache.clear()
    assert reader.cache.stats().memory_bytes == 0 and reader.cache.stats().states == 0


def test_without_a_budget_states_alone_are_used(decoder_of):
    for name in (HYBRID, ATTENTION):
        decoder = decoder_of(name)
        reader = Witness(decoder, PrefixCache(decoder.states, CONTEXT, 2, decoder.device, 0))
        talk = Transcript(2).add("system", 60).add("user")
        for _ in range(3):
            ids, _ = talk.prompt()
            before = len(reader.read[-1]) if reader.read else 0
            assert reader.ask(talk) == len(ids) - before
            talk.add("tool", 30)
        reader.ask(Transcript(3).add("user", 200))
        reader.ask(Transcript(4).add("user", 200))
        stats = reader.cache.stats()
        assert stats.memory_bytes == stats.memory_tokens == stats.found_in_memory == 0


@pytest.mark.parametrize("name", [HYBRID, ATTENTION])
def test_moving_tokens_stops_in_time_and_goes_on(decoder_of, name):
    decoder = decoder_of(name)
    reader = Witness(decoder, PrefixCache(decoder.states, CONTEXT, 1, decoder.device, 1 << 28))
    first = Transcript(5).add("system", 1700)
    second = Transcript(6).add("user", 1600)
    for talk in (first, second):
        reader.ask(talk)
    ids, boundaries = first.add("user", 20).prompt()
    unfinished = 0
    while (state := reader.cache.take(ids, boundaries, seconds=0)) is None:
        assert reader.cache.unfinished
        unfinished += 1
    assert not reader.cache.unfinished and unfinished >= 4  # nodes of `LONGEST` tokens
    assert state.length == len(reader.read[0]) and reader.unread(state) == []
    assert reader.cache.take(ids, boundaries) is None and not reader.cache.unfinished


@pytest.mark.parametrize("name", [HYBRID, ATTENTION])
def test_a_state_that_was_overwritten_in_part_is_not_taken_for_what_it_was(decoder_of, name, monkeypatch):
    decoder = decoder_of(name)
    reader = Witness(decoder, PrefixCache(decoder.states, CONTEXT, 1, decoder.device, 1 << 28))
    system = Transcript(1).add("system", 200)
    short, long = system.branch(1, 2).add("user", 10), system.branch(1, 3).add("user", 1200)
    for talk in (long, short):
        reader.ask(talk)
    read, parts = reader.cache._store.read, []

    def fails_at_last(part):
        parts.append(part)
        if part.stop > 1024:
            raise MemoryError
        return read(part)

    monkeypatch.setattr(reader.cache._store, "read", fails_at_last)
    with pytest.raises(MemoryError):
        reader.cache.take(*long.add("user", 5).prompt())
    assert len(parts) > 1
    monkeypatch.undo()
    state = reader.cache.take(*short.add("user", 5).prompt())
    assert state.length == 0 or reader.unread(state) == []


def test_what_a_row_of_a_batch_has_read_is_remembered(decoder_of):
    for name in (HYBRID, ATTENTION):
        decoder = decoder_of(name)
        reader = Witness(decoder, PrefixCache(decoder.states, CONTEXT, 2, decoder.device, 1 << 28))
        ids = Transcript(7).add("user", 700).ids
        state, _ = reader.begin(ids)
        row = decoder.new_state(1000)
        row.copy_prefix(state, len(ids))
        reader.go_on(row, [*ids, *range(20, 60)])
        reader.cache.keep(row)
        used = reader.cache.stats().memory_bytes
        assert reader.cache.stats().memory_tokens == 40  # the prompt is in the state, and not here besides
        reader.go_on(state, [*ids, 9, 9])
        found, _ = reader.begin([*ids, *range(20, 70)])
        assert found.length >= len(ids) + 40 and reader.unread(found) == []
        reader.cache.keep(row)
        assert reader.cache.stats().memory_tokens == 40 and reader.cache.stats().memory_bytes >= used


def test_bookkeeping_does_not_grow_with_use(decoder_of, monkeypatch):
    monkeypatch.setattr("lsp_agent.engine.prefixes.eviction.LEAST", 64)
    decoder = decoder_of(HYBRID)
    cache = PrefixCache(decoder.states, CONTEXT, 1, decoder.device, 1 << 28)
    reader = Reader(decoder, cache)
    prompts = [Transcript(seed).add("user", 100).prompt() for seed in range(2)]
    for turn in range(300):
        state, _ = reader.begin(*prompts[turn % 2])
        reader.end(state)
        reader.read.clear()
    nodes = sum(1 for _ in cache._store._tree)
    assert cache.stats().evictions == 0 and len(cache._store._queue) <= 64 + 3 * nodes + 16
    assert reader.ran == sum(len(ids) for ids, _ in prompts) + 298


def test_a_cache_that_nobody_has_gives_its_memory_back(decoder_of):
    decoder = decoder_of(HYBRID)
    reader = Reader(decoder, PrefixCache(decoder.states, CONTEXT, 1, decoder.device, 1 << 28))
    for seed in range(3):
        reader.ask(Transcript(seed).add("user", 100))
    memory = reader.cache._memory
    assert memory.used > 0
    gc.disable()
    try:
        del reader
        assert memory.used == 0
    finally:
        gc.enable()


def test_memory_counts_until_nothing_refers_to_it():
    memory = HostMemory(1000)
    first = memory.arrays({"a": ((10, 4), "float32"), "b": ((3,), "float16")})
    assert memory.used == 192 + 64 == bytes_of({"a": ((10, 4), "float32"), "b": ((3,), "float16")})
    first["a"][...], first["b"][...] = 1, 2
    part = first["a"][3:, 1]
    del first
    assert memory.used == 256 and part.sum() == 7
    assert memory.arrays({"a": ((1001,), "uint8")}) is None
    held = [memory.arrays({"a": ((300,), "uint8")})]
    memory.evict = lambda: bool(held) and held.pop() is not None
    assert memory.arrays({"a": ((700,), "uint8")}) is not None and not held
    del part
    assert memory.used == 0 and memory.most_used == 256 + 704


@given(st.lists(st.tuples(st.lists(st.integers(1, 4), max_size=3), st.sampled_from(["uint8", "float16", "float32"]))))
@settings(max_examples=50, deadline=None)
def test_arrays_in_a_buffer_do_not_overlap(shapes):
    named = {str(index): (tuple(shape), dtype) for index, (shape, dtype) in enumerate(shapes)}
    arrays = carve(np.zeros(bytes_of(named), np.uint8), named)
    for index, array in enumerate(arrays.values()):
        array[...] = index % 200
    assert all((array == index % 200).all() for index, array in enumerate(arrays.values()))
    assert [(array.shape, array.dtype.name) for array in arrays.values()] == list(named.values())


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("500 MB", 500 << 20), ("0", 0), ("123", 123), ("1.5g", 3 << 29), ("2K", 2048), ("7b", 7)],
)
def test_a_size_is_read_as_people_write_it(monkeypatch, text, size):
    monkeypatch.setenv("LSP_AGENT_CACHE_MEMORY", text)
    assert memory_limit() == size


@pytest.mark.parametrize("text", ["much", "-1", "4 GiB of it", "1,5G", "GiB"])
def test_what_is_no_size_is_said_to_be_none(text):
    with pytest.raises(UserError, match="is no size; set it to one such as 4GiB"):
        size_of(text, "LSP_AGENT_CACHE_MEMORY")


def test_a_share_of_the_usable_memory_is_the_default(monkeypatch):
    monkeypatch.delenv("LSP_AGENT_CACHE_MEMORY", raising=False)
    monkeypatch.setattr("lsp_agent.engine.prefixes.limits.usable_memory", lambda: 8 << 30)
    assert memory_limit() == 2 << 30
    monkeypatch.setattr("lsp_agent.engine.prefixes.limits.usable_memory", lambda: 512 << 30)
    assert memory_limit() == 32 << 30
