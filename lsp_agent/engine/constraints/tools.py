"""Tool calls that obey their schemas, in the format that the model was trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lsp_agent.chat_model import AnswerFormat, ToolSchema
from lsp_agent.engine.constraints import grammar
from lsp_agent.engine.constraints.schemas import for_arguments, part, read_schema
from lsp_agent.engine.tool_calls import ToolCallFormat
from lsp_agent.engine.tool_calls.qwen3_tags import FUNCTION_CLOSE, FUNCTION_OPEN, PARAMETER_CLOSE, PARAMETER_OPEN
from lsp_agent.engine.tool_calls.reader import CALL_CLOSE, CALL_OPEN
from lsp_agent.engine.tool_calls.values import InvalidValueError, alternatives, from_text
from lsp_agent.errors import UserError

if TYPE_CHECKING:
    from lsp_agent.engine.constraints import Constraint
    from lsp_agent.engine.tokens import Tokenizer

_TAGS = (CALL_OPEN, CALL_CLOSE, FUNCTION_OPEN, FUNCTION_CLOSE, PARAMETER_OPEN, PARAMETER_CLOSE)
TEXT = AnswerFormat()
_NAME = re.compile(r"[^<>\s\"']([^<>\n\r]{0,120}[^<>\s\"'])?")
"""Names that the parser reads back."""
_COMBINED = ("$ref", "anyOf", "oneOf", "allOf")


def constraint_for_tools(
    tools: Sequence[ToolSchema],
    choice: str,
    call_format: ToolCallFormat,
    tokenizer: Tokenizer,
    parallel: bool = True,
    answer_format: AnswerFormat = TEXT,
) -> Callable[[], Constraint] | None:
    """Compile what an answer must look like whose calls obey the tools' schemas.

    `choice`: `required` (one call or, if `parallel`, more, and nothing else), the name of a tool (one call of it),
    `auto` (text, then perhaps calls; None, no constraint, unless a tool is strict) or `none` (None). Calls of tools
    that are not strict obey what of their schema can be enforced. With an `answer_format`, JSON or a regular
    expression, `auto` is an answer in that form, or else calls. Raises `UserError`.
    """
    if choice == "none":
        return None
    if choice == "auto" and answer_format == TEXT and not any(tool.strict for tool in tools):
        return None
    if call_format == "none":
        raise UserError("This model's chat template knows no tools; ask without tools, or use another model.")
    offered = [tool for tool in tools if choice in ("auto", "required", tool.name)]
    if not offered:
        what = "no tools were offered" if choice == "required" else f"there is no tool `{choice}` among those offered"
        raise UserError(f"The answer must call a tool, but {what}; offer it.")
    lines = [line for index, tool in enumerate(offered) for line in _call(index, tool, call_format)]
    lines.append(f"body: {' | '.join(f'call_{index}' for index in range(len(offered)))}")
    opener, closer = _quoted(f"{CALL_OPEN}\n"), _quoted(f"\n{CALL_CLOSE}")
    many = parallel and choice in ("auto", "required")
    more = f'("\\n" {opener} body {closer})*' if many else ""
    if choice == "auto" and answer_format != TEXT:
        lines += [_form(answer_format), f"start: form | {opener} body {closer} {more}"]
    elif choice == "auto":
        # In the XML format a function's tag begins a call even where the opener is missing.
        begins = CALL_OPEN if call_format == "hermes" else f"{CALL_OPEN}|{FUNCTION_OPEN}"
        lines += [f"TEXT: /(?s:.*)/ & ~/(?s:.*)({begins})(?s:.*)/", f"opener[suffix={_quoted(CALL_OPEN)}]: TEXT"]
        lines.append(f'start: TEXT | opener "\\n" body {closer} {more}')
    else:
        lines.append(f"start: {opener} body {closer} {more}")
    what = "The tools' parameters" if len(offered) > 1 else f"The parameters of the tool `{offered[0].name}`"
    return grammar.compile_grammar(grammar.lark("\n".join(lines)), tokenizer, what)


def _form(answer_format: AnswerFormat) -> str:
    """The rule of an answer in a form of its own."""
    match answer_format.kind:
        case "json":
            return f"form: {_json({'type': 'object'}, strict=True)}"
        case "json_schema":
            return f"form: {_json(read_schema(answer_format.value), strict=True)}"
        case "regex":
            return f"form: FORM\nFORM: {grammar.terminal(answer_format.value)}"
        case _:
            raise UserError(
                f"The answer format {answer_format.kind} cannot be combined with tools; leave one of them out."
            )


def _quoted(text: str) -> str:
    """A Lark string."""
    return json.dumps(text, ensure_ascii=False)


def _json(schema: Mapping[str, Any], strict: bool, kinds: Sequence[str] = ()) -> str:
    return f"%json {json.dumps(for_arguments(schema, strict, kinds), ensure_ascii=False)}"


def _call(index: int, tool: ToolSchema, call_format: ToolCallFormat) -> list[str]:
    """The rules of a call, `call_INDEX` and what it needs."""
    try:
        return (_hermes_call if call_format == "hermes" else _qwen3_coder_call)(index, tool)
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"The parameters of the tool `{tool.name}` are no valid JSON schema; correct them.") from error


def _hermes_call(index: int, tool: ToolSchema) -> list[str]:
    schema = {"type": "object", **tool.parameters}
    if schema["type"] != "object":
        raise UserError(f"The parameters of the tool `{tool.name}` must be an object schema.")
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    begin = _quoted(f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "arguments": ')
    return [f'call_{index}: {begin} arguments_{index} "}}"', f"arguments_{index}: {_json(schema, tool.strict)}"]


def _qwen3_coder_call(index: int, tool: ToolSchema) -> list[str]:
    """Parameters in the schema's order, those not required perhaps; names that it does not declare cannot be given."""
    combined = not tool.properties and any(key in tool.parameters for key in _COMBINED)
    if combined or tool.parameters.get("type", "object") != "object":
        raise UserError(f"The parameters of the tool `{tool.name}` must be an object schema with `properties`.")
    if not _NAME.fullmatch(tool.name):
        raise UserError(f"The tool `{tool.name}` cannot be called by that name in this model's format; rename it.")
    rules, parts = [], []
    for place, name in enumerate(dict.fromkeys([*tool.properties, *tool.required])):
        rule = f"value_{index}_{place}"
        if not _NAME.fullmatch(name):
            if name in tool.required:
                raise UserError(
                    f"The tool `{tool.name}` requires `{name}`, which no parameter can be called; rename it."
                )
            continue
        rules += _value(tool, name, rule)
        given = f"{_quoted(f'{PARAMETER_OPEN}{name}>' + chr(10))} {rule}"
        parts.append(given if name in tool.required else f"({given})?")
    begin, end = _quoted(f"{FUNCTION_OPEN}{tool.name}>\n"), _quoted(FUNCTION_CLOSE)
    return [f"call_{index}: {' '.join([begin, *parts, end])}", *rules]


def _value(tool: ToolSchema, name: str, rule: str) -> list[str]:
    """The rule of one value and what ends it: literals, JSON, or any text without the format's tags."""
    end = f"\n{PARAMETER_CLOSE}\n"
    declared = tool.schema_of(name)
    if declared is None:
        raise UserError(f"The tool `{tool.name}` requires the parameter `{name}`, which its schema does not allow.")
    kinds = list(alternatives(declared, tool.parameters))
    if any(kind in ("any", "string") and allowed is None for kind, allowed in kinds):
        terminal = rule.upper()
        return [f"{rule}[suffix={_quoted(end)}]: {terminal}", f"{terminal}: {_text(tool, name, declared)}"]
    ways, found = [], []
    for kind, allowed in kinds:
        if kind in ("null", "boolean") and allowed is None:
            allowed = [None] if kind == "null" else [True, False]
        if allowed is not None:
            ways += [_quoted(text + end) for text in _literals(allowed, declared, tool.parameters)]
        elif kind not in found:
            found.append(kind)
    if found:
        ways.append(f"{rule}_json {_quoted(end)}")
    if not ways:
        raise UserError(f"The parameter `{name}` of the tool `{tool.name}` allows no value that can be written.")
    rules = [f"{rule}: {' | '.join(dict.fromkeys(ways))}"]
    if found:
        schema = part(tool.parameters, name) if name in tool.properties else declared
        rules.append(f"{rule}_json: {_json(schema, tool.strict, found)}")
    return rules


def _literals(allowed: Sequence[Any], schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[str]:
    """How the allowed values are written, as far as they are read back from it."""
    texts = []
    for value in allowed:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        try:
            from_text(text, schema, root)
        except InvalidValueError:
            continue
        if not any(tag in text for tag in _TAGS):
            texts.append(text)
    return texts


def _text(tool: ToolSchema, name: str, schema: Mapping[str, Any]) -> str:
    """The terminal of a string: any text, of the length and pattern that the schema asks for."""
    least, most = schema.get("minLength"), schema.get("maxLength")
    bounds = [str(bound) if isinstance(bound, int) else "" for bound in (least or 0, most)]
    length = f"{{{','.join(bounds)}}}" if any(isinstance(bound, int) for bound in (least, most)) else "*"
    tags = "|".join(map(re.escape, _TAGS))
    terminal = f"{grammar.terminal(f'(?s:.{length})')} & ~{grammar.terminal(f'(?s:.*)({tags})(?s:.*)')}"
    pattern = schema.get("pattern")
    if pattern is None:
        return terminal
    if searched := _searched(pattern):
        return f"{terminal} & {searched}"
    if tool.strict:
        message = "can be enforced only without `|`, and with `^` and `$` at its ends"
        raise UserError(f"The pattern of the parameter `{name}` of the tool `{tool.name}` {message}.")
    return terminal


def _searched(pattern: Any) -> str | None:
    """A JSON schema's pattern, which is searched for, as a terminal, which is the whole text; None: not possible."""
    if not isinstance(pattern, str) or not grammar.works(pattern):
        return None
    core = pattern.removeprefix("^")
    begins, ends = core != pattern, core.endswith("$") and not core.endswith("\\$")
    core = core[:-1] if ends else core
    if "|" in core or "^" in core.replace("[^", "") or "$" in core:
        return None
    return grammar.terminal(f"{'' if begins else '(?s:.*)'}(?:{core}){'' if ends else '(?s:.*)'}")
