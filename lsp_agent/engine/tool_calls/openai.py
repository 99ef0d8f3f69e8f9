"""Tool calls in the shape of OpenAI's chat API, and as chat templates want them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lsp_agent.engine.tool_calls.parser import CallEnd, CallStart, Event
from lsp_agent.engine.tool_calls.schema import (
    Argument,
    Problem,
    Repair,
    ToolCall,
    ToolCallError,
    ToolSchema,
    check_arguments,
)
from lsp_agent.engine.tool_calls.values import decode_json

OURS = "lsp_agent"
"""Key of what OpenAI's shape has no room for (the raw span, errors and repairs); other clients ignore it."""

_BAD_ARGUMENTS = ToolCallError(Problem.MALFORMED, "The call's arguments were not a JSON object; the call was not run.")


def tool_from_openai(tool: Mapping[str, Any]) -> ToolSchema:
    """Read one entry of a request's `tools`; the bare function without its wrapper is taken too."""
    function = tool.get("function", tool)
    return ToolSchema(function["name"], function.get("description") or "", function.get("parameters") or {})


def tool_to_openai(tool: ToolSchema) -> dict[str, Any]:
    """Write a tool as an entry of `tools`, which is also what `apply_chat_template(tools=…)` takes."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def call_to_openai(call: ToolCall) -> dict[str, Any]:
    """Write a call as an entry of an answer's `tool_calls`; nothing of it is lost (see `OURS`)."""
    entry: dict[str, Any] = {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
    }
    errors = [
        {"problem": error.problem.value, "message": error.message, "parameter": error.parameter}
        for error in call.errors
    ]
    ours = {"raw": call.raw, "errors": errors, "repairs": [repair.value for repair in call.repairs]}
    return {**entry, OURS: ours} if any(ours.values()) else entry


def call_from_openai(entry: Mapping[str, Any], tools: Iterable[ToolSchema] | None = None) -> ToolCall:
    """Read an entry of `tool_calls`, from our engine or any other server.

    With `tools`, arguments are checked and typed anew, as those of other servers need. Arguments that are no JSON
    object make a call with an error, never an exception.
    """
    function = entry["function"]
    ours = entry.get(OURS) or {}
    errors = [ToolCallError(Problem(e["problem"]), e["message"], e["parameter"]) for e in ours.get("errors", ())]
    repairs = tuple(Repair(repair) for repair in ours.get("repairs", ()))
    arguments = _arguments(function.get("arguments"))
    if arguments is None:
        arguments, errors = {}, [*errors, _BAD_ARGUMENTS]
    elif tools is not None and not errors:
        given = [Argument(name, value, is_json=True) for name, value in arguments.items()]
        arguments, errors = check_arguments(function["name"], given, {tool.name: tool for tool in tools})
    return ToolCall(entry.get("id") or "", function["name"], arguments, ours.get("raw", ""), tuple(errors), repairs)


def delta_to_openai(event: Event) -> dict[str, Any]:
    """Write one event as the `delta` of a streamed chunk: a call's head when it starts, its arguments when it ends."""
    if isinstance(event, CallStart):
        head = {"index": event.index, "id": event.id, "type": "function"}
        return {"tool_calls": [{**head, "function": {"name": event.name, "arguments": ""}}]}
    if isinstance(event, CallEnd):
        entry = call_to_openai(event.call)
        body = {"index": event.index, "function": {"arguments": entry["function"]["arguments"]}}
        if OURS in entry:
            body[OURS] = entry[OURS]
        return {"tool_calls": [body]}
    return {"content": event.text}


def assistant_message(content: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """Build the assistant's message of an answer in OpenAI's shape."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [call_to_openai(call) for call in calls]
    return message


def template_messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Make messages fit for `apply_chat_template`: contents are strings, arguments of tool calls are mappings.

    Arguments that are no JSON object are given as none, since a template can only write a mapping; other keys of a
    message stay as they are.
    """
    normal = []
    for message in messages:
        fit = {**message, "content": message.get("content") or ""}
        if calls := fit.pop("tool_calls", None):
            fit["tool_calls"] = [_template_call(call) for call in calls]
        normal.append(fit)
    return normal


def _template_call(call: Mapping[str, Any] | ToolCall) -> dict[str, Any]:
    if isinstance(call, ToolCall):
        call = call_to_openai(call)
    function = call["function"]
    body = {"name": function["name"], "arguments": _arguments(function.get("arguments")) or {}}
    return {"id": call.get("id") or "", "type": "function", "function": body}


def _arguments(arguments: Any) -> dict[str, Any] | None:
    if isinstance(arguments, str):
        try:
            arguments = decode_json(arguments) if arguments.strip() else {}
        except ValueError:
            return None
    if arguments is None:
        return {}
    return dict(arguments) if isinstance(arguments, Mapping) else None
