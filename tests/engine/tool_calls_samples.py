"""Tools, writers of both formats and the laws of parsing, shared by the tests of tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lsp_agent.chat_model import ToolSchema
from lsp_agent.engine.tool_calls import CallEnd, CallStart, Event, TextDelta, ToolCallFormat, new_parser

READ = ToolSchema(
    "read_file",
    "Read a file",
    {
        "type": "object",
        "properties": {"path": {"type": "string"}, "start": {"type": "integer"}, "whole": {"type": "boolean"}},
        "required": ["path"],
    },
)
WRITE = ToolSchema(
    "write_file",
    "Write a file",
    {
        "type": "object",
        "properties": {"path": {"type": "string"}, "content": {"type": "string"}},
        "required": ["path", "content"],
    },
)
TESTS = ToolSchema("run_tests", "Run the tests", {"type": "object", "properties": {}})
ANY = ToolSchema("anything", "Takes every type")
TOOLS = (READ, WRITE, TESTS)


def write_qwen3_coder(name: str, arguments: Mapping[str, Any]) -> str:
    """Write a call as Qwen3-Coder's chat template does: containers as JSON, other values through Python's `str`."""
    lines = [f"<tool_call>\n<function={name}>\n"]
    for key, value in arguments.items():
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
        lines.append(f"<parameter={key}>\n{text}\n</parameter>\n")
    return "".join([*lines, "</function>\n</tool_call>"])


def write_hermes(name: str, arguments: Mapping[str, Any]) -> str:
    """Write a call as Qwen2.5's chat template does."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


WRITERS = {"qwen3_coder": write_qwen3_coder, "hermes": write_hermes}


def stream(
    pieces: Sequence[str],
    call_format: ToolCallFormat,
    tools: Sequence[ToolSchema] = TOOLS,
    cut_off: bool = False,
) -> list[Event]:
    """Parse a streamed answer; neighbouring text events become one and ids become `call`, so that runs compare."""
    parser = new_parser(call_format, tools)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.close(cut_off)
    merged: list[Event] = []
    for event in events:
        if isinstance(event, TextDelta) and merged and isinstance(merged[-1], TextDelta):
            merged[-1] = TextDelta(merged[-1].text + event.text)
        elif isinstance(event, CallStart):
            merged.append(replace(event, id="call"))
        elif isinstance(event, CallEnd):
            merged.append(replace(event, call=replace(event.call, id="call")))
        else:
            merged.append(event)
    return merged


def spelled_out(events: Sequence[Event]) -> str:
    """Join the text of the events and the raw spans of the calls."""
    parts = {TextDelta: lambda e: e.text, CallStart: lambda e: "", CallEnd: lambda e: e.call.raw}
    return "".join(parts[type(event)](event) for event in events)
