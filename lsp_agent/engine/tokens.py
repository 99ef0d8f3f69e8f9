"""Text to tokens and back: encoding, chat template, fill-in-the-middle, and streams that never split a character."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.pre_tokenizers import ByteLevel

from lsp_agent.chat_model import Message, ToolSchema
from lsp_agent.engine.answer_memory import AnswerMemory, Prefix
from lsp_agent.engine.chat_template import render
from lsp_agent.engine.package import Package
from lsp_agent.engine.tool_calls import ToolCallFormat, format_of_template, template_messages, tool_to_openai
from lsp_agent.errors import UserError

FILE_SEPARATOR = "<|file_sep|>"
_SEPARATOR = re.compile(r"^(<\|repo_name\|>|<\|file_sep\|>).*\n", re.MULTILINE)


MAX_ROLE_TOKENS = 8


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation as tokens. `boundaries`: lengths at which a message ends, or the next one's content begins."""

    ids: list[int]
    boundaries: tuple[int, ...]


class Tokenizer:
    """The checkpoint's own tokenizer.

    `end_ids` end an answer; `fim` maps prefix, suffix, middle, … to token ids; `vocabulary` is how many tokens the
    model's logits are of, some of which the tokenizer may not know.
    """

    def __init__(self, package: Package) -> None:
        try:
            self._fast = FastTokenizer.from_file(str(package.path / "tokenizer.json"))
            config = json.loads((package.path / "tokenizer_config.json").read_text(encoding="utf-8"))
            self._chat_template: str | None = config.get("chat_template")
        except Exception as error:  # tokenizers raises bare exceptions
            raise UserError(
                f"{package.path} lacks a readable tokenizer.json; remove it with `lsp-agent model rm` and install it "
                "again."
            ) from error
        self.vocabulary = package.config.vocabulary
        tokens: dict[str, Any] = package.header["tokens"]
        self.end_ids = frozenset(tokens["end"])
        self.fim: dict[str, int] = tokens["fim"]
        self.answers = AnswerMemory(self)
        added = self._fast.get_added_tokens_decoder()
        self._added = {index: "" if token.special else token.content for index, token in added.items()}

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written out in `text` are recognised."""
        # `encode` would hold the interpreter's lock for all of a long text.
        return list(self._fast.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the characters [start, end) of `text` that each covers."""
        (encoding,) = self._fast.encode_batch([text], add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without control tokens."""
        stream = TextStream(self)
        return "".join(stream.push(token) for token in ids) + stream.finish()

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one token: possibly a part of a character; nothing for a control token."""
        if token in self._added:
            return self._added[token].encode()
        return bytes(self._byte_of[c] for c in self.token_name(token))

    def spelled(self, token: int) -> bytes:
        """What stands for a token in a list of tokens: its bytes, or the name of a control token."""
        return self.token_bytes(token) or (self._fast.id_to_token(token) or "").encode()

    def token_name(self, token: int) -> str:
        """How the vocabulary spells one token; empty where it ends before."""
        return self._fast.id_to_token(token) or ""

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Tokens that mean something to the model and are no text."""
        return frozenset(self._control_ids.values())

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """GPT-2's byte alphabet: printable bytes stand for themselves, the others follow from U+0100."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        table = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
        assert set(table) == set(ByteLevel.alphabet())
        return table

    @cached_property
    def tool_calls(self) -> ToolCallFormat:
        """How the model writes tool calls."""
        return format_of_template(self._chat_template or "")

    def chat(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> ChatPrompt:
        """A conversation under the checkpoint's chat template, ending where the assistant answers.

        Only the template writes control tokens; those spelled out in messages are text. Hybrid models are asked not to
        think first. Where an assistant's message is one of `answers` to the conversation before it, it has the tokens
        that the model drew, so that the prompt begins with what the model has read. Raises `UserError` when the
        template takes no such conversation.
        """
        if not self._chat_template:
            raise UserError("This model has no chat template; use fill-in-the-middle or a plain prompt.")
        if tools and self.tool_calls == "none":
            raise UserError("This model's chat template knows no tools; ask without tools, or use another model.")
        turns, offered = template_messages(messages), [tool_to_openai(replace(tool, strict=False)) for tool in tools]
        mark, place = _unused_characters(2, self._chat_template, turns, offered)
        parts = self._rendered(turns, offered, mark)
        known = self._known_answers(messages, parts, lambda stand_ins: self._rendered(stand_ins, offered, mark), place)
        prompt, boundaries = Prefix(self.control_ids), []
        for number, part in enumerate(parts):
            begin = len(prompt.ids)
            if part in self._control_ids:
                prompt.ids.append(self._control_ids[part])
                boundaries += [] if prompt.ids[-1] in self.end_ids else [begin]
                continue
            if number not in known or not self._spliced(prompt, *known[number]):
                prompt.ids[begin:] = self.encode_text(part.replace(mark, ""))
            if boundaries and boundaries[-1] == begin - 1:
                boundaries += self._header(prompt.ids, begin)
        return ChatPrompt(prompt.ids, tuple(length for length in boundaries if length))

    def _spliced(self, prompt: Prefix, before: str, message: Message, after: str) -> bool:
        """Write `before`, the tokens that `message` was drawn as, and `after`; False: they are not known here."""
        prompt.ids += self.encode_text(before)
        if not self.answers.recall(prompt, message):
            return False
        prompt.ids += self.encode_text(after)
        return True

    def _rendered(self, turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], mark: str) -> list[str]:
        """What the template writes: text and control tokens in turn; `mark` is within those that messages spell out."""
        assert self._chat_template is not None
        turns, tools = self._defused([list(turns), list(tools)], mark)
        text = render(self._chat_template, turns, tools, {"enable_thinking": False})
        return self._controls.split(text)

    def _known_answers(
        self,
        messages: Sequence[Message],
        parts: Sequence[str],
        rendered: Callable[[list[dict[str, Any]]], list[str]],
        place: str,
    ) -> dict[int, tuple[str, Message, str]]:
        """Which `parts` of a rendering may be a known answer, with the text before and after it.

        Found by rendering the conversation once more with such messages replaced by their index between two `place`s.
        Where a template does something else with those than with the messages, nothing is known.
        """
        turns = template_messages(messages)
        known = [index for index, message in enumerate(messages) if self.answers.knows(message)]
        for index in known:
            turns[index] = {"role": turns[index]["role"], "content": f"{place}{index}{place}"}
        try:
            stand_ins = rendered(turns) if known else []
        except UserError:
            return {}
        if stand_ins[1::2] != list(parts[1::2]):
            return {}
        stand_in = re.compile(f"([^{place}]*){place}([0-9]{{1,9}}){place}([^{place}]*)")
        found = {number: stand_in.fullmatch(part) for number, part in enumerate(stand_ins)}
        indices = {number: (match[1], int(match[2]), match[3]) for number, match in found.items() if match}
        return {
            number: (before, messages[index], after)
            for number, (before, index, after) in indices.items()
            if index in known
        }

    def _header(self, ids: Sequence[int], begin: int) -> list[int]:
        """Where a turn's content begins whose text begins at `begin`: after the line that names the role."""
        for place in range(begin, min(begin + MAX_ROLE_TOKENS, len(ids))):
            if b"\n" in (text := self.token_bytes(ids[place])):
                return [place + 1 if text == b"\n" else place]
        return []

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is a control token: one that is spelled out is cut in two."""
        ids: list[int] = []
        start = 0
        for control in self._controls.finditer(text):
            ids += self.encode(text[start : control.start() + 1])
            start = control.start() + 1
        return ids + self.encode(text[start:])

    @cached_property
    def _control_ids(self) -> dict[str, int]:
        """Tokens that mean something to the model: special ones, and some that files do not mark as such."""
        meant = {*self.end_ids, *self.fim.values()}
        tokens = self._fast.get_added_tokens_decoder()
        return {token.content: index for index, token in tokens.items() if token.special or index in meant}

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        """Matches a control token; the longer of two where one begins the other."""
        spelled = sorted(self._control_ids, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, spelled)) or '(?!)'})")

    def _defused(self, value: Any, mark: str) -> Any:
        """Put `mark` inside of control tokens that are spelled out in JSON values."""
        if isinstance(value, str):
            return self._controls.sub(lambda found: found[0][:1] + mark + found[0][1:], value)
        if isinstance(value, list):
            return [self._defused(item, mark) for item in value]
        if isinstance(value, dict):
            return {self._defused(key, mark): self._defused(item, mark) for key, item in value.items()}
        return value

    def infill(self, prefix: str, suffix: str) -> list[int]:
        """Prefix, suffix, middle: the order that the Qwen2.5-Coder report (arXiv 2409.12186, section 3.1) gives.

        Files in front of the last line `<|file_sep|>PATH` of `prefix` are the repository's, and precede the prefix
        itself. All else in both texts is text, even where it spells out control tokens. Qwen3-Coder takes the same
        prompt raw: inside a chat turn, as its README shows it, it answers with prose and code fences.
        """
        if not {"prefix", "suffix", "middle"} <= self.fim.keys():
            raise UserError("This model was not trained to fill in the middle; use a chat or a plain prompt.")
        files, code = self._split_files(prefix)
        middle = [self.fim["suffix"], *self.encode_text(suffix), self.fim["middle"]]
        return [*files, self.fim["prefix"], *self.encode_text(code), *middle]

    def _split_files(self, prefix: str) -> tuple[list[int], str]:
        """Token ids of the context files in front of a prefix, and the prefix alone."""
        separators = [found for found in _SEPARATOR.finditer(prefix) if found[1] in self._control_ids]
        end = max((found.end() for found in separators if found[1] == FILE_SEPARATOR), default=0)
        ids: list[int] = []
        start = 0
        for found in separators:
            if found.end() <= end:
                ids += [*self.encode_text(prefix[start : found.start()]), self._control_ids[found[1]]]
                start = found.end(1)
        return [*ids, *self.encode_text(prefix[start:end])], prefix[end:]


def _unused_characters(count: int, *values: Any) -> list[str]:
    """Characters of Unicode's private use that occur in none of the JSON values."""
    used = set(json.dumps(values, ensure_ascii=False))
    return list(islice((chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used), count))


class TextStream:
    """Turns tokens into text as they come, holding back bytes of unfinished characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """A replacement character if the stream ends inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Cuts a stream of text at the first stop string, also one that spans tokens."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Text that can be shown: all before a stop string, and never a beginning of one."""
        if self.found:
            return ""
        self._held += text
        cuts = [cut for stop in self._stops if (cut := self._held.find(stop)) >= 0]
        if cuts:
            self.found = True
            shown, self._held = self._held[: min(cuts)], ""
            return shown
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def _overlap(self, stop: str) -> int:
        """How many last characters of the held text begin `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)

    def finish(self) -> str:
        """What was held back, when the stream ends without a stop string."""
        shown, self._held = self._held, ""
        return shown
