"""Text to tokens and back: encoding, chat template, fill-in-the-middle, and streams that never split a character."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.pre_tokenizers import ByteLevel

from lsp_agent.chat_model import Message, ToolSchema
from lsp_agent.engine.answer_memory import AnswerMemory
from lsp_agent.engine.chat_prompt import ChatPrompt, ChatWriter
from lsp_agent.engine.package import Package
from lsp_agent.engine.tool_calls import ToolCallFormat, format_of_template
from lsp_agent.errors import UserError

FILE_SEPARATOR = "<|file_sep|>"
_SEPARATOR = re.compile(r"^(<\|repo_name\|>|<\|file_sep\|>).*\n", re.MULTILINE)


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
        return frozenset(self.control_tokens.values())

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
        return ChatWriter(self, self._chat_template, messages, tools).write()

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is a control token: one that is spelled out is cut in two."""
        ids: list[int] = []
        start = 0
        for control in self.controls.finditer(text):
            ids += self.encode(text[start : control.start() + 1])
            start = control.start() + 1
        return ids + self.encode(text[start:])

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Tokens that mean something to the model, by name: special ones, and some that files do not mark as such."""
        meant = {*self.end_ids, *self.fim.values()}
        tokens = self._fast.get_added_tokens_decoder()
        return {token.content: index for index, token in tokens.items() if token.special or index in meant}

    @cached_property
    def controls(self) -> re.Pattern[str]:
        """Matches a control token; the longer of two where one begins the other."""
        spelled = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, spelled)) or '(?!)'})")

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
        separators = [found for found in _SEPARATOR.finditer(prefix) if found[1] in self.control_tokens]
        end = max((found.end() for found in separators if found[1] == FILE_SEPARATOR), default=0)
        ids: list[int] = []
        start = 0
        for found in separators:
            if found.end() <= end:
                ids += [*self.encode_text(prefix[start : found.start()]), self.control_tokens[found[1]]]
                start = found.end(1)
        return [*ids, *self.encode_text(prefix[start:end])], prefix[end:]


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
