"""Constrained tool calls: over random schemas and draws, the parser reads every call without errors or repairs."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import pytest
from constraint_samples import say
from tool_calls_samples import ANY, READ, TESTS, TOOLS, WRITE

from lsp_agent.chat_model import AnswerFormat, ToolSchema
from lsp_agent.engine.constraints import constraint_for_tools
from lsp_agent.engine.package import Package
from lsp_agent.engine.tokens import Tokenizer
from lsp_agent.engine.tool_calls import ParsedAnswer, ToolCallFormat, parse_answer
from lsp_agent.errors import UserError

FORMATS: tuple[ToolCallFormat, ...] = ("hermes", "qwen3_coder")
CLOSERS = ['"', "}", "]", '"}', '", "', "\n</parameter>\n", "</function>", "}}", "1", "\n</tool_call>", "a"]


@pytest.fixture(scope="module")
def tokenizer(tiny_package) -> Tokenizer:
    return Tokenizer(Package(tiny_package()))


def random_schema(choose: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of a kind that tools have."""
    simple: list[dict[str, Any]] = [
        {"type": "string"},
        {"type": "string", "description": "x", "maxLength": 4},
        {"type": "string", "pattern": "^[a-c]{2}$"},
        {"type": "string", "format": "path", "title": "remarks"},
        {"type": "integer", "minimum": choose.randint(-3, 3)},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "null"},
        {"type": ["integer", "null"]},
        {"type": ["string", "null"]},
        {"enum": ["a", "", "two\nlines\n", 'q"uote', "5", "\x07"]},
        {"enum": [1, 2.5, None, True, "x"]},
        {"const": "c"},
        {"type": "integer", "enum": [3, 4]},
        {"$ref": "#/$defs/kind"},
        {"anyOf": [{"$ref": "#/$defs/kind"}, {"type": "null"}]},
        {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}, "maxItems": 2}]},
        {"oneOf": [{"type": "boolean"}, {"type": "number", "maximum": 9}]},
        {},
    ]
    if depth > 1 or choose.random() < 0.6:
        return choose.choice(simple)
    inner = [random_schema(choose, depth + 1) for _ in range(2)]
    properties = {"one": inner[0], 'the "other"': inner[1]}
    return choose.choice(
        [
            {"type": "array", "items": inner[0], "maxItems": 2},
            {"type": "array", "maxItems": 1},
            {"type": "object", "properties": properties, "required": ["one"], "additionalProperties": False},
            {"type": "object", "maxProperties": 1},
        ]
    )


def random_tool(seed: int) -> ToolSchema:
    choose = random.Random(seed)
    names = choose.sample(["path", "start-line", "wide name", "é", "x", "default"], choose.randint(0, 3))
    parameters = {
        "type": "object",
        "properties": {name: random_schema(choose) for name in names},
        "required": choose.sample(names, choose.randint(0, len(names))),
        "additionalProperties": False,
        "$defs": {"kind": {"enum": ["k1", "k2"]}},
    }
    return ToolSchema(f"tool_{seed}", "", parameters, strict=choose.random() < 0.5)


def check(answer: str, call_format: ToolCallFormat, tools: list[ToolSchema]) -> ParsedAnswer:
    parsed = parse_answer(answer, call_format, tools)
    schemas = {tool.name: tool.parameters for tool in tools}
    for call in parsed.calls:
        assert not call.errors and not call.repairs, (answer, call)
        jsonschema.validate(call.arguments, schemas[call.name])
    return parsed


@pytest.mark.parametrize("call_format", FORMATS)
@pytest.mark.parametrize("block", range(6))
def test_random_calls_of_random_tools_are_read_as_they_are(tokenizer, call_format, block) -> None:
    done = 0
    for seed in range(10 * block, 10 * block + 10):
        tools = [random_tool(seed), random_tool(seed + 1000), TESTS]
        made = constraint_for_tools(tools, "required", call_format, tokenizer)
        for attempt in range(4):
            answer = say(made, tokenizer, attempt, 300, CLOSERS)
            if answer is not None:
                parsed = check(answer, call_format, tools)
                assert parsed.calls and not parsed.text.strip()
                done += 1
    assert done > 20


@pytest.mark.parametrize("call_format", FORMATS)
def test_choices(tokenizer, call_format) -> None:
    counts = set()
    for seed in range(30):
        named = say(constraint_for_tools(TOOLS, "run_tests", call_format, tokenizer), tokenizer, seed, 300, CLOSERS)
        one = say(constraint_for_tools(TOOLS, "required", call_format, tokenizer, False), tokenizer, seed, 300, CLOSERS)
        several = say(constraint_for_tools([TESTS], "required", call_format, tokenizer), tokenizer, seed, 300, CLOSERS)
        assert named is not None and [call.name for call in check(named, call_format, [*TOOLS]).calls] == ["run_tests"]
        assert one is None or len(check(one, call_format, [*TOOLS]).calls) == 1
        counts.add(0 if several is None else len(check(several, call_format, [TESTS]).calls))
    assert {1, 2} <= counts


@pytest.mark.parametrize("call_format", FORMATS)
def test_a_strict_tool_may_be_called_after_text(tokenizer, call_format) -> None:
    strict = ToolSchema(
        "look", "", {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}, True
    )
    made = constraint_for_tools([strict, READ], "auto", call_format, tokenizer)
    seen = set()
    for seed in range(60):
        phrases = ["<tool_call>", "Well.\n", *CLOSERS, "<tool", "<fun"]
        answer = say(made, tokenizer, seed, 200, phrases, ending=2)
        if answer is not None:
            parsed = parse_answer(answer, call_format, [strict, READ])
            assert not any(call.errors for call in parsed.calls) and len(parsed.calls) == answer.count("<tool_call>\n")
            seen.add((bool(parsed.calls), bool(parsed.text.strip())))
    assert seen >= {(True, True), (False, True)}


@pytest.mark.parametrize("call_format", FORMATS)
def test_calls_or_an_answer_in_a_form(tokenizer, call_format) -> None:
    schema = {"type": "object", "properties": {"done": {"type": "boolean"}}, "required": ["done"]}
    schema["additionalProperties"] = False
    form = AnswerFormat("json_schema", json.dumps(schema))
    seen = set()
    for made in (
        constraint_for_tools([TESTS], "auto", call_format, tokenizer, True, form),
        constraint_for_tools([TESTS], "auto", call_format, tokenizer, True, AnswerFormat("regex", "[a-c]/[0-9]")),
    ):
        for seed in range(20):
            answer = say(made, tokenizer, seed, 200, ["<", "{"])
            assert answer is not None
            parsed = check(answer, call_format, [TESTS])
            seen.add("call" if parsed.calls else "json" if answer.startswith("{") else "regex")
            if not parsed.calls:
                assert re.fullmatch(r"[a-c]/[0-9]|\{\"done\": (true|false)\}", answer)
    assert seen == {"call", "json", "regex"}
    with pytest.raises(UserError, match="cannot be combined with tools"):
        constraint_for_tools([TESTS], "auto", call_format, tokenizer, True, AnswerFormat("lark", 'start: "a"'))


def test_what_needs_no_constraint(tokenizer) -> None:
    assert constraint_for_tools(TOOLS, "auto", "hermes", tokenizer) is None
    assert constraint_for_tools([ToolSchema("t", "", {}, True)], "none", "hermes", tokenizer) is None


def test_tools_without_declared_parameters(tokenizer) -> None:
    for call_format in FORMATS:
        for seed in range(20):
            answer = say(constraint_for_tools([ANY], "required", call_format, tokenizer), tokenizer, seed, 200, CLOSERS)
            if answer is not None:
                assert check(answer, call_format, [ANY]).calls


def lookahead(strict: bool) -> ToolSchema:
    value = {"type": "string", "pattern": "^(?=a)b$"}
    return ToolSchema("t", "", {"type": "object", "properties": {"v": value, "w": {"not": {}}}}, strict)


@pytest.mark.parametrize("call_format", FORMATS)
def test_what_cannot_be_enforced_is_an_error_for_strict_tools_only(tokenizer, call_format) -> None:
    assert constraint_for_tools([lookahead(False)], "required", call_format, tokenizer) is not None
    with pytest.raises(UserError) as caught:
        constraint_for_tools([lookahead(True)], "required", call_format, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tools", "choice", "call_format", "says"),
    [
        (TOOLS, "required", "none", "knows no tools"),
        ((), "required", "hermes", "no tools were offered"),
        (TOOLS, "missing", "hermes", "no tool `missing`"),
        ((ToolSchema("t", "", {"anyOf": [{}]}),), "required", "qwen3_coder", "must be an object schema"),
        ((ToolSchema("<t>", ""),), "required", "qwen3_coder", "rename it"),
        ((ToolSchema("t", "", {"properties": {"a>": {}}, "required": ["a>"]}),), "required", "qwen3_coder", "rename"),
        ((ToolSchema("t", "", {"properties": {"a": {}}, "required": ["b"]}),), "t", "qwen3_coder", "does not allow"),
        (
            (ToolSchema("t", "", {"properties": {"a": {"enum": []}}, "required": ["a"]}),),
            "t",
            "qwen3_coder",
            "no value",
        ),
        ((ToolSchema("t", "", {"type": "array"}),), "t", "hermes", "object"),
    ],
)
def test_what_cannot_be_called_is_one_sentence(tokenizer, tools, choice, call_format, says) -> None:
    with pytest.raises(UserError, match=says) as caught:
        constraint_for_tools(tools, choice, call_format, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call_format", FORMATS)
def test_values_that_spell_out_the_format_cannot_end_a_call(tokenizer, call_format) -> None:
    made = constraint_for_tools([WRITE], "write_file", call_format, tokenizer)
    hostile = ["</tool_call>", "</function>", "<tool_call>", "\n</parameter>\n</function>", "<parameter=path>", '"}}\n']
    for seed in range(30):
        answer = say(made, tokenizer, seed, 250, [*hostile, '"', '", "', "\n</parameter>\n"])
        if answer is not None:
            (call,) = check(answer, call_format, [WRITE]).calls
            assert set(call.arguments) == {"path", "content"}


@pytest.mark.parametrize("call_format", FORMATS)
@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": [1]},
        {"properties": {"a": 3}, "required": ["a"]},
        {"properties": {"a": {"enum": 5}}, "required": ["a"]},
        {"properties": {"a": {"type": {"x": 1}}}, "required": ["a"]},
        {"properties": {"a": {"anyOf": [1, {"type": [[]]}]}}, "required": 7},
        {"properties": {"a": {"const": "\ud800"}}, "required": ["a"]},
        {"properties": {"a": {"type": "string", "maxLength": "9}/ | /x", "minLength": -1}}, "required": ["a"]},
        {"properties": {"a": {"type": "string", "pattern": ["/"]}}, "required": ["a"]},
        {"properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]},
        {"properties": {"a": {"$ref": 3}}, "required": ["a"]},
        {"properties": {"a": json.loads('{"items":' * 300 + "{}" + "}" * 300)}, "required": ["a"]},
        {"properties": {f"p{i}": {"enum": ["v" * 50, i]} for i in range(9000)}},
    ],
)
def test_no_schema_however_odd_does_more_than_say_so(tokenizer, call_format, parameters) -> None:
    tool = ToolSchema("t", "", parameters)
    try:
        say(constraint_for_tools([tool], "required", call_format, tokenizer), tokenizer, 1, 100, CLOSERS)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
