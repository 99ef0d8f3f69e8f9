"""A call's arguments against the tool's schema: typed, or refused in sentences for the model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lsp_agent.chat_model import Problem, ToolCallError, ToolSchema
from lsp_agent.engine.tool_calls.values import InvalidValueError, from_json, from_text


@dataclass(frozen=True)
class Argument:
    """One argument before typing: `value` is text as the model wrote it, or decoded JSON when `is_json`."""

    name: str
    value: Any
    is_json: bool = False


def check_arguments(
    name: str, given: Sequence[Argument], tools: Mapping[str, ToolSchema], complete: bool = True
) -> tuple[dict[str, Any], list[ToolCallError]]:
    """Type the arguments of a call to tool `name` by its schema.

    Returns the typed arguments and what is wrong with them. Arguments that cannot be typed stay as they were written.
    `complete` is False for calls that were cut off: what they lack is then no error of its own.
    """
    tool = tools.get(name)
    errors: list[ToolCallError] = []
    arguments: dict[str, Any] = {}
    if tool is None:
        message = f"There is no tool `{name}`{_suggest(name, tools)}; the tools are: {_listed(tools)}."
        errors.append(ToolCallError(Problem.UNKNOWN_TOOL, message))
    for argument in given:
        value, error = _typed(argument, tool)
        if error:
            errors.append(error)
        if argument.name in arguments and arguments[argument.name] != value:
            message = f"`{name}` was given `{argument.name}` more than once; give it once."
            errors.append(ToolCallError(Problem.DUPLICATE_PARAMETER, message, argument.name))
        arguments.setdefault(argument.name, value)
    if tool and complete:
        for parameter in tool.required:
            if parameter not in arguments:
                message = f"`{name}` needs the parameter `{parameter}`, which the call did not give."
                errors.append(ToolCallError(Problem.MISSING_PARAMETER, message, parameter))
    return arguments, errors


def _typed(argument: Argument, tool: ToolSchema | None) -> tuple[Any, ToolCallError | None]:
    if tool is None:
        return argument.value, None
    schema = tool.schema_of(argument.name)
    if schema is None:
        known = tool.properties
        message = (
            f"`{tool.name}` has no parameter `{argument.name}`{_suggest(argument.name, known)}; "
            f"its parameters are: {_listed(known)}."
        )
        return argument.value, ToolCallError(Problem.UNKNOWN_PARAMETER, message, argument.name)
    read = from_json if argument.is_json else from_text
    try:
        return read(argument.value, schema, tool.parameters), None
    except InvalidValueError as error:
        message = f"The parameter `{argument.name}` of `{tool.name}` {error}."
        return argument.value, ToolCallError(Problem.INVALID_VALUE, message, argument.name)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _suggest(name: str, names: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name[:100], names, n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""
