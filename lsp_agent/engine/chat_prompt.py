"""Chat prompts: a conversation under the checkpoint's template, as tokens, with earlier answers as they were drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from lsp_agent.chat_model import Message, ToolSchema
from lsp_agent.engine.answer_memory import Prefix
from lsp_agent.engine.chat_template import render
from lsp_agent.engine.tool_calls import template_messages, tool_to_openai
from lsp_agent.errors import UserError

if TYPE_CHECKING:
    from lsp_agent.engine.tokens import Tokenizer

MAX_ROLE_TOKENS = 8


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as tokens. `boundaries`: lengths at which a message ends, or the next one's content begins."""

    ids: list[int]
    boundaries: tuple[int, ...]


class _Answer(NamedTuple):
    """A message that may be a known answer, and what the template writes around it within its turn."""

    before: str
    message: Message
    after: str


class ChatWriter:
    """Writes one conversation."""

    def __init__(
        self, tokenizer: Tokenizer, template: str, messages: Sequence[Message], tools: Sequence[ToolSchema]
    ) -> None:
        self._tokenizer, self._template, self._messages = tokenizer, template, messages
        self._tools = [tool_to_openai(replace(tool, strict=False)) for tool in tools]
        self._turns = template_messages(messages)
        self._mark, self._place = _unused_characters(2, template, self._turns, self._tools)

    def write(self) -> ChatPrompt:
        """The prompt; raises `UserError` when the template takes no such conversation."""
        parts = self._rendered(self._turns)
        known = dict(self._known_answers(parts))
        prompt, boundaries = Prefix(self._tokenizer.control_ids), []
        for number, part in enumerate(parts):
            begin = len(prompt.ids)
            if (control := self._tokenizer.control_tokens.get(part)) is not None:
                prompt.ids.append(control)
                boundaries += [] if control in self._tokenizer.end_ids else [begin]
                continue
            if number not in known or not self._spliced(prompt, known[number]):
                prompt.ids[begin:] = self._encoded(part)
            if boundaries and boundaries[-1] == begin - 1:
                boundaries += self._content(prompt.ids, begin)
        return ChatPrompt(prompt.ids, tuple(length for length in boundaries if length))

    def _rendered(self, turns: list[dict[str, Any]]) -> list[str]:
        """What the template writes, text and control tokens in turn; `mark` is within those that messages spell out."""
        turns, tools = self._defused([turns, self._tools])
        text = render(self._template, turns, tools, {"enable_thinking": False})
        return self._tokenizer.controls.split(text)

    def _defused(self, value: Any) -> Any:
        """Put `mark` inside of control tokens that are spelled out in JSON values."""
        if isinstance(value, str):
            return self._tokenizer.controls.sub(lambda found: found[0][:1] + self._mark + found[0][1:], value)
        if isinstance(value, list):
            return [self._defused(item) for item in value]
        if isinstance(value, dict):
            return {self._defused(key): self._defused(item) for key, item in value.items()}
        return value

    def _encoded(self, text: str) -> list[int]:
        return self._tokenizer.encode_text(text.replace(self._mark, ""))

    def _known_answers(self, parts: Sequence[str]) -> Iterator[tuple[int, _Answer]]:
        """Which of the rendered `parts` may be a known answer.

        Found by rendering the conversation once more, with such messages replaced by their index between two
        characters that occur nowhere else. Where a template does something else with those than with the messages,
        nothing is known.
        """
        known = [index for index, message in enumerate(self._messages) if self._tokenizer.answers.knows(message)]
        if not known:
            return
        turns = list(self._turns)
        for index in known:
            turns[index] = {"role": turns[index]["role"], "content": f"{self._place}{index}{self._place}"}
        try:
            stand_ins = self._rendered(turns)
        except UserError:
            return
        if stand_ins[1::2] != parts[1::2]:
            return
        pattern = re.compile(f"([^{self._place}]*){self._place}([0-9]{{1,9}}){self._place}([^{self._place}]*)")
        for number, part in enumerate(stand_ins):
            found = pattern.fullmatch(part)
            if found and int(found[2]) in known:
                yield number, _Answer(found[1], self._messages[int(found[2])], found[3])

    def _spliced(self, prompt: Prefix, answer: _Answer) -> bool:
        """Write an answer with the tokens that it was drawn as; False: they are not known, after this conversation."""
        prompt.ids += self._encoded(answer.before)
        if not self._tokenizer.answers.recall(prompt, answer.message):
            return False
        prompt.ids += self._encoded(answer.after)
        return True

    def _content(self, ids: Sequence[int], begin: int) -> list[int]:
        """Where a turn's content begins whose text begins at `begin`: after the line that names the role."""
        for place in range(begin, min(begin + MAX_ROLE_TOKENS, len(ids))):
            if b"\n" in (text := self._tokenizer.token_bytes(ids[place])):
                return [place + 1 if text == b"\n" else place]
        return []


def _unused_characters(count: int, *values: Any) -> list[str]:
    """Characters of Unicode's private use that occur in none of the JSON values."""
    used = set(json.dumps(values, ensure_ascii=False))
    return list(islice((chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used), count))
