"""How a parameter's text, or its JSON, becomes a value of the type that the schema names."""

from __future__ import annotations

import pytest

from lsp_agent.engine.tool_calls.values import InvalidValueError, from_json, from_text

REF = {"$defs": {"Mode": {"enum": ["fast", "slow"]}, "Loop": {"$ref": "#/$defs/Loop"}}}

TYPED = [
    ("string", "5", "5"),
    ("string", '{"a": 1}', '{"a": 1}'),
    ("string", "null", "null"),
    ("string", " spaced ", " spaced "),
    ("integer", " 5\n", 5),
    ("integer", "-12", -12),
    ("integer", "5.0", 5),
    ("number", "5", 5),
    ("number", "2.5e-3", 0.0025),
    ("number", "5.0", 5.0),
    ("boolean", "true", True),
    ("boolean", "False", False),
    ("null", "None", None),
    ("array", '[1, "two", null]', [1, "two", None]),
    ("array", "[1, 'two', None, (3,)]", [1, "two", None, [3]]),
    ("object", '{"a": {"b": true}}', {"a": {"b": True}}),
    ("object", "{'a': {'b': True}}", {"a": {"b": True}}),
    ("object", '{"a": "line\nbreak"}', {"a": "line\nbreak"}),
    ("object", '{"a": "\\ud800"}', {"a": "\ufffd"}),
    (["string", "null"], "null", None),
    (["string", "null"], "text", "text"),
    (["string", "null"], "5", "5"),
    (["integer", "string"], "5", 5),
    (["integer", "string"], "five", "five"),
    (["integer", "boolean"], "True", True),
]


@pytest.mark.parametrize(("kind", "text", "value"), TYPED)
def test_text_becomes_the_schemas_type(kind: str | list[str], text: str, value: object) -> None:
    found = from_text(text, {"type": kind}, {})
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("integer", "5.5"),
        ("integer", "1_000"),
        ("integer", "٣"),
        ("integer", ""),
        ("integer", "9" * 5000),
        ("number", "NaN"),
        ("number", "1e999"),
        ("number", "inf"),
        ("boolean", "yes"),
        ("boolean", "1"),
        ("null", "nothing"),
        ("array", '{"a": 1}'),
        ("array", "[1, 'two', null]"),
        ("array", "[1, 2"),
        ("array", "[NaN]"),
        ("array", "[1e999]"),
        ("array", "[" * 100_000),
        ("array", "(" * 50_000),
        ("array", "[" + "-" * 60_000 + "1]"),
        ("array", "[__import__('os')]"),
        ("object", "[]"),
        ("object", "{1: 2}"),
        ("object", "{1, 2}"),
        ("object", "{{'a': 1}}"),
        ("object", "{[]: 1}"),
        ("object", "a: 1"),
    ],
)
def test_text_that_is_not_of_the_type_is_refused(kind: str, text: str) -> None:
    with pytest.raises(InvalidValueError, match=f"^must be {kind}, not "):
        from_text(text, {"type": kind}, {})


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "None", None),
        ({"anyOf": [{"type": "array", "items": {}}, {"type": "string"}]}, '["a"]', ["a"]),
        ({"anyOf": [{"type": "array", "items": {}}, {"type": "string"}]}, "[a", "[a"),
        ({"oneOf": [{"type": "integer"}, {"enum": ["auto"]}]}, "auto", "auto"),
        ({"enum": ["a", "b"]}, "b", "b"),
        ({"enum": ["a", "b"]}, " b\n", "b"),
        ({"type": "string", "enum": ["1", "2"]}, "2", "2"),
        ({"enum": [1, 2, None]}, "2", 2),
        ({"enum": [1, 2, None]}, "null", None),
        ({"enum": [True, "maybe"]}, "true", True),
        ({"const": 3}, "3", 3),
        ({"$ref": "#/$defs/Mode"}, "slow", "slow"),
        ({"allOf": [{"$ref": "#/$defs/Mode"}], "default": "fast"}, "fast", "fast"),
        ({"properties": {"a": {}}}, '{"a": 1}', {"a": 1}),
        ({"items": {"type": "integer"}}, "[1]", [1]),
        ({}, '{"a": 1}', '{"a": 1}'),
        ({"$ref": "#/$defs/Missing"}, "x", "x"),
        ({"$ref": "#/$defs/Loop"}, "x", "x"),
        ({"type": "made-up"}, "x", "x"),
    ],
)
def test_unions_enumerations_and_references(schema: dict, text: str, value: object) -> None:
    found = from_text(text, schema, REF)
    assert found == value
    assert type(found) is type(value)


def test_a_refusal_says_what_is_allowed() -> None:
    with pytest.raises(InvalidValueError, match=r'must be one of "fast", "slow", not "quick"'):
        from_text("quick", {"$ref": "#/$defs/Mode"}, REF)
    with pytest.raises(InvalidValueError, match=r'must be integer or null, not "x+'):
        from_text("x" * 500, {"type": ["integer", "null"]}, {})
    with pytest.raises(InvalidValueError):
        from_text("true", {"enum": [1]}, {})


@pytest.mark.parametrize(
    ("schema", "given", "value"),
    [
        ({"type": "integer"}, 5, 5),
        ({"type": "integer"}, 5.0, 5),
        ({"type": "integer"}, "5", 5),
        ({"type": "number"}, 5, 5),
        ({"type": "boolean"}, "True", True),
        ({"type": "string"}, "true", "true"),
        ({"type": "string"}, 5, "5"),
        ({"type": "string"}, True, "true"),
        ({"type": "string"}, {"a": 1}, '{"a": 1}'),
        ({"type": ["string", "integer"]}, "5", "5"),
        ({"type": "array"}, "[1]", [1]),
        ({"type": ["string", "null"]}, None, None),
        ({"description": "whatever"}, {"a": 1}, {"a": 1}),
    ],
)
def test_json_is_kept_where_it_fits_and_read_again_where_not(schema: dict, given: object, value: object) -> None:
    found = from_json(given, schema, {})
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("kind", "given"), [("integer", 5.5), ("integer", True), ("array", {}), ("boolean", 1)])
def test_json_of_another_type_is_refused(kind: str, given: object) -> None:
    with pytest.raises(InvalidValueError):
        from_json(given, {"type": kind}, {})
