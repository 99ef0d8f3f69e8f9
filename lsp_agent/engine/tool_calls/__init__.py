"""Tool calls: what a model may call, reading its calls from the text it streams, and the API shapes of both.

Tools and calls are written into prompts by the checkpoint's own chat template; `docs/tool-calls.md` explains the
parsing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lsp_agent.chat_model import ToolCall, ToolSchema
from lsp_agent.engine.tool_calls.answer import AnswerReader, Piece
from lsp_agent.engine.tool_calls.hermes import HermesParser
from lsp_agent.engine.tool_calls.openai import (
    call_from_openai,
    call_to_openai,
    message_from_openai,
    message_to_openai,
    problem_from_openai,
    problem_to_openai,
    template_messages,
    tool_from_openai,
    tool_to_openai,
)
from lsp_agent.engine.tool_calls.parser import CallEnd, CallStart, Event, TextDelta, ToolCallParser
from lsp_agent.engine.tool_calls.plain import PlainParser
from lsp_agent.engine.tool_calls.qwen3_coder import Qwen3CoderParser

__all__ = [
    "AnswerReader",
    "CallEnd",
    "CallStart",
    "Event",
    "ParsedAnswer",
    "Piece",
    "TextDelta",
    "ToolCallFormat",
    "ToolCallParser",
    "call_from_openai",
    "call_to_openai",
    "format_of_template",
    "message_from_openai",
    "message_to_openai",
    "new_parser",
    "parse_answer",
    "problem_from_openai",
    "problem_to_openai",
    "template_messages",
    "tool_from_openai",
    "tool_to_openai",
]

ToolCallFormat = Literal["hermes", "qwen3_coder", "none"]
"""How a model writes calls."""

_PARSERS: dict[ToolCallFormat, type[ToolCallParser]] = {
    "hermes": HermesParser,
    "qwen3_coder": Qwen3CoderParser,
    "none": PlainParser,
}


def format_of_template(chat_template: str) -> ToolCallFormat:
    """Tell how a model writes calls: its chat template describes the format to it."""
    if "tools" not in chat_template:
        return "none"
    if "<function=" in chat_template:
        return "qwen3_coder"
    return "hermes" if "<tool_call>" in chat_template else "none"


@dataclass(frozen=True)
class ParsedAnswer:
    """A whole answer: its plain text, exactly, and its calls in order."""

    text: str
    calls: tuple[ToolCall, ...]


def new_parser(call_format: ToolCallFormat, tools: Iterable[ToolSchema]) -> ToolCallParser:
    """Make the parser of one answer of a model that writes calls in `call_format` and was offered `tools`."""
    return _PARSERS[call_format](tools)


def parse_answer(
    text: str, call_format: ToolCallFormat, tools: Iterable[ToolSchema], cut_off: bool = False
) -> ParsedAnswer:
    """Parse a whole answer. `cut_off`: it hit its length limit."""
    parser = new_parser(call_format, tools)
    events = [*parser.feed(text), *parser.close(cut_off)]
    plain = "".join(event.text for event in events if isinstance(event, TextDelta))
    return ParsedAnswer(plain, tuple(event.call for event in events if isinstance(event, CallEnd)))
