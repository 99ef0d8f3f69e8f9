"""Tool calls in the shape of OpenAI's chat API, and as chat templates want them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lsp_agent.chat_model import Message, Problem, Repair, ToolCall, ToolCallError, ToolSchema
from lsp_agent.engine.tool_calls.schema import Argument, check_arguments
from lsp_agent.engine.tool_calls.values import decode_json

OURS = "lsp_agent"
"""Key of what OpenAI's shape has no room for (the raw span, errors and repairs); other clients ignore it."""

_BAD_ARGUMENTS = ToolCallError(Problem.MALFORMED, "The call's arguments were not a JSON object; the call was not run.")


def tool_from_openai(tool: Mapping[str, Any]) -> ToolSchema:
    """Read one entry of a request's `tools`; the bare function without its wrapper is taken too."""
    function = tool.get("function", tool)
    parameters, strict = function.get("parameters") or {}, bool(function.get("strict"))
    return ToolSchema(function["name"], function.get("description") or "", parameters, strict)


def tool_to_openai(tool: ToolSchema) -> dict[str, Any]:
    """Write a tool as an entry of `tools`, which is also what `apply_chat_template(tools=…)` takes."""
    function: dict[str, Any] = {"name": tool.name, "description": tool.description}
    function["parameters"] = dict(tool.parameters)
    return {"type": "function", "function": function | ({"strict": True} if tool.strict else {})}


def problem_to_openai(error: ToolCallError) -> dict[str, Any]:
    """Write what was wrong with a call, as it stands under `OURS`."""
    return {"problem": error.problem.value, "message": error.message, "parameter": error.parameter}


def problem_from_openai(entry: Mapping[str, Any]) -> ToolCallError:
    """Read what `problem_to_openai` wrote."""
    return ToolCallError(Problem(entry["problem"]), entry["message"], entry["parameter"])


def call_to_openai(call: ToolCall) -> dict[str, Any]:
    """Write a call as an entry of an answer's `tool_calls`; nothing of it is lost (see `OURS`)."""
    entry: dict[str, Any] = {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
    }
    errors = [problem_to_openai(error) for error in call.errors]
    ours = {"raw": call.raw, "errors": errors, "repairs": [repair.value for repair in call.repairs]}
    return {**entry, OURS: ours} if any(ours.values()) else entry


def call_from_openai(entry: Mapping[str, Any], tools: Iterable[ToolSchema] | None = None) -> ToolCall:
    """Read an entry of `tool_calls`, from our engine or any other server.

    With `tools`, arguments are checked and typed anew, as those of other servers need. Arguments that are no JSON
    object make a call with an error, never an exception.
    """
    function = entry["function"]
    ours = entry.get(OURS) or {}
    errors = [problem_from_openai(error) for error in ours.get("errors", ())]
    repairs = tuple(Repair(repair) for repair in ours.get("repairs", ()))
    arguments = _arguments(function.get("arguments"))
    if arguments is None:
        arguments, errors = {}, [*errors, _BAD_ARGUMENTS]
    elif tools is not None and not errors:
        given = [Argument(name, value, is_json=True) for name, value in arguments.items()]
        arguments, errors = check_arguments(function["name"], given, {tool.name: tool for tool in tools})
    return ToolCall(entry.get("id") or "", function["name"], arguments, ours.get("raw", ""), tuple(errors), repairs)


def message_to_openai(message: Message) -> dict[str, Any]:
    """Write a message in OpenAI's shape."""
    entry: dict[str, Any] = dict(message)
    if calls := message.get("tool_calls"):
        entry["tool_calls"] = [call_to_openai(call) for call in calls]
    return entry


def message_from_openai(entry: Mapping[str, Any]) -> Message:
    """Read a message of a request: its content may be missing or a list of text parts."""
    content = entry.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content)
    message: Message = {"role": entry["role"], "content": content}
    if calls := entry.get("tool_calls"):
        message["tool_calls"] = [call_from_openai(call) for call in calls]
    if call_id := entry.get("tool_call_id"):
        message["tool_call_id"] = call_id
    return message


def template_messages(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Make messages fit for `apply_chat_template`, whose templates want the arguments of tool calls as mappings.

    What stands between text and calls is the template's to write, so the text's last line breaks are left out there.
    """
    return [_template_message(message) for message in messages]


def _template_message(message: Message) -> dict[str, Any]:
    entry: dict[str, Any] = dict(message)
    if calls := message.get("tool_calls"):
        entry["content"] = message["content"].rstrip()
        entry["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in calls
        ]
    return entry


def _arguments(arguments: Any) -> dict[str, Any] | None:
    if isinstance(arguments, str):
        try:
            arguments = decode_json(arguments) if arguments.strip() else {}
        except ValueError:
            return None
    if arguments is None:
        return {}
    return dict(arguments) if isinstance(arguments, Mapping) else None
