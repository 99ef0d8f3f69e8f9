"""Random conversations, and whoever reads them through a prefix cache and counts every token that the decoder runs."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np

from lsp_agent.engine.prefixes.cache import PrefixCache
from lsp_agent.engine.prefixes.tree import shared_prefix

END, START = 1, 2
ROLES = {"system": 3, "user": 4, "assistant": 5, "tool": 6}
WORDS = range(10, 288)


class Transcript:
    """Messages as tokens: the start of a turn, its role, a text, its end."""

    def __init__(self, seed: int = 0, other: Transcript | None = None) -> None:
        self.random = random.Random(seed)
        self.ids: list[int] = list(other.ids) if other else []
        self.boundaries: list[int] = list(other.boundaries) if other else []

    def add(self, role: str, length: int | None = None, text: list[int] | None = None) -> Transcript:
        text = text or self.random.choices(WORDS, k=length or self.random.randint(5, 60))
        self.ids += [START, ROLES[role]]
        self.boundaries.append(len(self.ids))
        self.ids += [*text, END]
        self.boundaries.append(len(self.ids))
        return self

    def branch(self, messages: int, seed: int) -> Transcript:
        """The first messages of this one, to go on otherwise."""
        other = Transcript(seed)
        other.boundaries = self.boundaries[: 2 * messages]
        other.ids = self.ids[: other.boundaries[-1]]
        return other

    @property
    def messages(self) -> int:
        return len(self.boundaries) // 2

    def prompt(self) -> tuple[list[int], list[int]]:
        """What asks for the assistant's next message, and the boundaries in it."""
        ids = [*self.ids, START, ROLES["assistant"]]
        return ids, [*self.boundaries, len(ids)]


class Reader:
    """Answers prompts through `cache`. `ran`: tokens that the decoder has run; `read`: all that it ever read."""

    def __init__(self, decoder, cache: PrefixCache, chunk: int = 64) -> None:
        self.decoder, self.cache, self.chunk = decoder, cache, chunk
        self.ran = 0
        self.read: list[list[int]] = []

    def branch_point(self, ids: list[int], boundaries: list[int]) -> int:
        """Tokens of a prompt that were read before; its last one always has to be read.

        Of a recurrent model up to a boundary, or up to where a state was given back.
        """
        shared = max((shared_prefix(one, ids[:-1]) for one in self.read), default=0)
        if not self.decoder.recurrent:
            return shared
        ends = [len(one) for one in self.read if len(one) < len(ids) and one == ids[: len(one)]]
        return max([0, *ends, *(length for length in boundaries if length <= shared)])

    def begin(self, ids, boundaries=(), seconds=float("inf")):
        """A state that has read `ids`, and the logits [vocabulary] after them."""
        state = self.cache.take(ids, boundaries, seconds)
        while state is None and seconds < float("inf"):
            state = self.cache.take(ids, boundaries, seconds)
        assert state is not None and state.length < len(ids)
        assert state.ids == ids[: state.length]
        return state, self.go_on(state, ids)

    def go_on(self, state, ids, most=None):
        """Read the rest of `ids`, at most `most` tokens of it, as the scheduler does."""
        logits = None
        end = len(ids) if most is None else min(len(ids), state.length + most)
        while state.length < end:
            part = ids[state.length : state.length + state.until_stop(min(self.chunk, end - state.length))]
            logits = self.decoder.run(np.array([part]), state, [len(part) - 1])[0]
            state.extend(part)
            self.ran += len(part)
            self.note(state)
        return logits

    def note(self, state) -> None:
        """Called after each run."""

    def end(self, state):
        """Give a state back."""
        self.read.append(list(state.ids))
        self.cache.release(state)

    def ask(self, transcript: Transcript, answer: int = 12, seconds=float("inf")) -> int:
        """Read a transcript, answer it, and add the answer; returns how many tokens of the prompt were run."""
        ids, boundaries = transcript.prompt()
        before = self.ran
        state, _ = self.begin(ids, boundaries, seconds)
        ran = self.ran - before
        text = transcript.random.choices(WORDS, k=answer)
        self.go_on(state, [*ids, *text])  # the end of the turn is drawn and not read
        self.end(state)
        transcript.add("assistant", text=text)
        return ran


class Witness(Reader):
    """Remembers the bits of every key and value and of every recurrent state that was read, by the tokens before."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.bits = defaultdict(set)

    def go_on(self, state, ids, most=None):
        self.start = state.length
        return super().go_on(state, ids, most)

    def note(self, state):
        for key, digest in self.digests(state, self.start):
            self.bits[key].add(digest)
        self.start = state.length

    def digests(self, state, start=0):
        arrays = [array[0, :, : state.length] for array in state._growing.values()]
        key = 0
        for place, token in enumerate(state.ids):
            key = hash((key, token))
            if place >= start:
                yield key, hash(b"".join(array[:, place].tobytes() for array in arrays))
        if self.decoder.recurrent:
            yield (key, "recurrent"), hash(b"".join(array.tobytes() for array in state.recurrent.values()))

    def unread(self, state):
        """What of a state was never read."""
        return [key for key, digest in self.digests(state) if digest not in self.bits[key]]


def cold(decoder, ids, chunk=64):
    """The logits after `ids` and the state, without any cache."""
    state = decoder.new_state(len(ids) + 1)
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        logits = decoder.run(np.array([part]), state, [len(part) - 1])
        state.extend(part)
    return logits[0], state
