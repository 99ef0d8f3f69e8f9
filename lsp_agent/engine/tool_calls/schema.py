"""What a tool offers, what a model asked of it, and what was wrong with the asking."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from lsp_agent.engine.tool_calls.values import InvalidValueError, from_json, from_text


@dataclass(frozen=True)
class ToolSchema:
    """One tool. `parameters` is the JSON schema (an object schema) of its arguments.

    Names outside `properties` are refused unless the schema allows them: it has no `properties`, or it says
    `additionalProperties`.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def properties(self) -> Mapping[str, Any]:
        """The schema of each declared parameter."""
        return self.parameters.get("properties") or {}

    @property
    def required(self) -> Sequence[str]:
        """The parameters that a call must give."""
        return self.parameters.get("required") or ()

    def schema_of(self, parameter: str) -> Mapping[str, Any] | None:
        """Give the schema of one parameter, or None when the tool has no such parameter."""
        if parameter in self.properties:
            declared = self.properties[parameter]
            return declared if isinstance(declared, Mapping) else {}
        additional = self.parameters.get("additionalProperties", not self.properties)
        if isinstance(additional, Mapping):
            return additional
        return {} if additional else None


class Problem(StrEnum):
    """Why a call cannot be run as it stands."""

    UNKNOWN_TOOL = "unknown_tool"
    UNKNOWN_PARAMETER = "unknown_parameter"
    MISSING_PARAMETER = "missing_parameter"
    DUPLICATE_PARAMETER = "duplicate_parameter"
    INVALID_VALUE = "invalid_value"
    MALFORMED = "malformed"
    CUT_OFF = "cut_off"


class Repair(StrEnum):
    """A slip of form that the parser mended without asking the model again; counted apart in evaluations."""

    MISSING_OPENER = "missing_opener"
    DOUBLED_OPENER = "doubled_opener"
    MISSING_CLOSER = "missing_closer"
    DOUBLED_CLOSER = "doubled_closer"
    STRAY_TEXT = "stray_text"
    LENIENT_JSON = "lenient_json"


@dataclass(frozen=True)
class ToolCallError:
    """One thing wrong with a call; `message` is a sentence to show to the model."""

    problem: Problem
    message: str
    parameter: str | None = None


@dataclass(frozen=True)
class ToolCall:
    """One call as the model made it. Run it only when `errors` is empty.

    `raw` is the exact span of the answer that it came from (empty when it came from elsewhere); `arguments` holds
    JSON values. After errors `arguments` holds what could be read, and `name` is empty when not even that could.
    """

    id: str
    name: str
    arguments: dict[str, Any]
    raw: str = ""
    errors: tuple[ToolCallError, ...] = ()
    repairs: tuple[Repair, ...] = ()

    @property
    def error_text(self) -> str:
        """All errors, one sentence a line: the tool's answer to the model. Empty when the call can be run."""
        return "\n".join(error.message for error in self.errors)


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
