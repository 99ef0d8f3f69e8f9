"""What the model answered, token for token, so that the next prompt of a conversation begins with what was read.

A prompt is written anew for each turn. Re-tokenising an earlier answer need not give the tokens that the model drew,
and chat templates write tool calls their own way; either would end the prefix that prompt and cache share.
"""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from lsp_agent.chat_model import Completion, Message
from lsp_agent.engine.tool_calls import template_messages

if TYPE_CHECKING:
    from lsp_agent.engine.tokens import Tokenizer

MAX_ANSWERS = 4096
MAX_TOKENS = 1 << 22
"""Of all remembered answers and of their turns' openings; 4 bytes each."""


class Prefix:
    """A conversation that is being written as tokens, with a running hash of what is before the present turn."""

    def __init__(self, control_ids: frozenset[int]) -> None:
        self.ids: list[int] = []
        self._control_ids = control_ids
        self._hash = hashlib.blake2b(digest_size=16)
        self._hashed = 0

    def turn(self) -> int:
        """Where the present turn begins: at the last control token."""
        places = range(len(self.ids) - 1, self._hashed - 1, -1)
        return next((place for place in places if self.ids[place] in self._control_ids), self._hashed)

    def digest(self, turn: int) -> bytes:
        """A hash of all tokens before `turn`, which may only grow."""
        self._hash.update(array("i", self.ids[self._hashed : turn]).tobytes())
        self._hashed = turn
        return self._hash.digest()


class AnswerMemory:
    """Exact tokens of answers, by the conversation before them and by what was given out. Bounded and thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._answers: OrderedDict[tuple[bytes, bytes], tuple[array[int], array[int]]] = OrderedDict()
        self._messages: Counter[bytes] = Counter()
        self._tokens = 0

    def remember(self, prompt: Sequence[int], completion: Completion, tokens: Sequence[int]) -> None:
        """Take note that `prompt` was answered by `tokens` (with or without an end token), given out as `completion`.

        What was said beyond that, such as a stop string, is left out; where a token is in part of it, so is the answer.
        """
        said = self._given_out(completion, tokens)
        if said is None:
            return
        message: Message = {"role": "assistant", "content": completion.text, "tool_calls": completion.tool_calls}
        prefix = Prefix(self._tokenizer.control_ids)
        prefix.ids = list(prompt)
        turn = prefix.turn()
        key = prefix.digest(turn), _digest(message)
        with self._lock:
            self._forget(key)
            self._answers[key] = array("i", prompt[turn:]), array("i", said)
            self._messages[key[1]] += 1
            self._tokens += len(prompt) - turn + len(said)
            while len(self._answers) > MAX_ANSWERS or self._tokens > MAX_TOKENS:
                self._forget(next(iter(self._answers)))

    def _given_out(self, completion: Completion, tokens: Sequence[int]) -> list[int] | None:
        """The first tokens that say exactly what was given out, if any do, and if none is a control token."""
        said = list(tokens[:-1] if tokens and tokens[-1] in self._tokenizer.end_ids else tokens)
        if not self._tokenizer.control_ids.isdisjoint(said):
            return None  # only a template may write those
        text = self._tokenizer.decode(said)
        given_out = text[: len(completion.text) + sum(len(call.raw) for call in completion.tool_calls)]
        rest = given_out
        for call in completion.tool_calls:
            rest = rest.replace(call.raw, "", 1)
        if rest != completion.text:
            return None
        if given_out == text:
            return said
        sizes = list(accumulate(len(self._tokenizer.token_bytes(token)) for token in said))
        size = len(given_out.encode())
        return said[: sizes.index(size) + 1] if size in sizes else None

    def knows(self, message: Mapping[str, Any]) -> bool:
        """Whether a message may be an answer that is remembered; what was before it decides."""
        return message["role"] == "assistant" and self._messages[_digest(message)] > 0

    def recall(self, prefix: Prefix, message: Mapping[str, Any]) -> bool:
        """Put the tokens of `message` behind a prefix that ends where its content begins; False: they are not known.

        The turn's opening becomes what it was in the prompt: some templates open a turn that is being answered with
        more than they write of it afterwards.
        """
        turn = prefix.turn()
        key = prefix.digest(turn), _digest(message)
        with self._lock:
            found = self._answers.get(key)
            if found is None or found[0][: len(prefix.ids) - turn].tolist() != prefix.ids[turn:]:
                return False
            self._answers.move_to_end(key)
        prefix.ids[turn:] = [*found[0], *found[1]]
        return True

    def _forget(self, key: tuple[bytes, bytes]) -> None:
        if found := self._answers.pop(key, None):
            self._tokens -= len(found[0]) + len(found[1])
            self._messages[key[1]] -= 1
            if not self._messages[key[1]]:
                del self._messages[key[1]]


def _digest(message: Mapping[str, Any]) -> bytes:
    """A hash of what a chat template is told of an answer. Ids of calls are left out: clients may change them."""
    (turn,) = template_messages([message])  # type: ignore[list-item]
    calls = [call["function"] for call in turn.get("tool_calls") or ()]
    text = json.dumps([turn["content"], calls], ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
