"""JSON schemas as llguidance takes them: read with care, whitespace settled, numbers kept finite."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lsp_agent.engine.constraints import grammar
from lsp_agent.errors import UserError

MAX_DEPTH = 64
"""Deepest nest of a schema."""
KNOWN_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
)
"""Formats of strings that llguidance enforces; JSON Schema calls any other a remark."""
ANSWER_LAYOUT: Mapping[str, Any] = {"whitespace_pattern": r" |\r?\n[ \t]{0,64}"}
"""One space or line break with its indentation where JSON may have whitespace: a small model may write it for ever."""
CALL_LAYOUT: Mapping[str, Any] = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""As chat templates write calls, so that what is between names and values is forced."""

_LARGEST = 2**53 - 1
_ANY = "value-with-finite-numbers"
_ANY_REF = {"$ref": f"#/$defs/{_ANY}"}
_MANY = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_ONE = ("items", "additionalProperties", "not", "contains", "if", "then", "else", "propertyNames")
_ELSEWHERE = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")


def read_schema(text: str) -> dict[str, Any]:
    """The schema in a JSON text; raises `UserError`."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("The JSON schema of the answer is not valid JSON; correct it.") from error
    if not isinstance(schema, dict):
        raise UserError("The JSON schema of the answer must be a JSON object.")
    return schema


def for_answer(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema for a whole answer."""
    return {**_walked(schema, _Walk(finite=False, strict=True)), "x-guidance": dict(ANSWER_LAYOUT)}


def for_arguments(schema: Mapping[str, Any], strict: bool, kinds: Sequence[str] = ()) -> dict[str, Any]:
    """A schema for a call's arguments or one of them; of its types only `kinds`, if there are any.

    Numbers have no exponent and at most 16 digits before the point, since a call with an infinite one is not run.
    What llguidance knows no way to enforce is an error if the schema is `strict`, else left out.
    """
    made = _walked(schema, _Walk(finite=True, strict=strict))
    definitions = {**made.pop("$defs", {}), _ANY: _finite({})}
    if kinds and made.get("type") not in kinds:
        made = {"allOf": [made, {"type": list(kinds)}]}
    return {**made, "$defs": definitions, "x-guidance": {**CALL_LAYOUT, "lenient": not strict}}


def part(root: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The schema of property `name` of an object schema, on its own: references still lead into the whole."""
    declared = root["properties"][name]
    if "$ref" not in json.dumps(declared):
        return dict(declared) if isinstance(declared, Mapping) else {}
    pointer = name.replace("~", "~0").replace("/", "~1")
    whole = _moved({key: value for key, value in root.items() if key in (*_MANY, "additionalProperties")})
    return {"$ref": f"#/$defs/root/properties/{pointer}", "$defs": {"root": whole}}


def _moved(value: Any) -> Any:
    """Make references to the root lead to where `part` puts it."""
    if isinstance(value, list):
        return [_moved(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    moved = {key: _moved(item) for key, item in value.items()}
    reference = value.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = f"#/$defs/root{reference[1:]}"
    return moved


@dataclass(frozen=True)
class _Walk:
    """How to go through a schema: with numbers bounded, with what cannot be enforced kept, so that it is an error."""

    finite: bool
    strict: bool
    depth: int = 0

    def deeper(self) -> _Walk:
        if self.depth == MAX_DEPTH:
            raise UserError(f"The JSON schema is nested more than {MAX_DEPTH} deep; make it flatter.")
        return replace(self, depth=self.depth + 1)


def _walked(schema: Any, walk: _Walk) -> Any:
    if not isinstance(schema, Mapping):
        return _ANY_REF if walk.finite and schema is True else schema
    made = {key: value for key, value in schema.items() if key not in ("x-guidance", "$schema", "$id")}
    if made.get("format") not in KNOWN_FORMATS:
        made.pop("format", None)
    if not walk.strict and "pattern" in made and not grammar.works(made["pattern"]):
        del made["pattern"]
    inner = walk.deeper()
    for key in _MANY:
        if isinstance(made.get(key), Mapping):
            made[key] = {name: _walked(item, inner) for name, item in made[key].items()}
    for key in _LISTS:
        if isinstance(made.get(key), list):
            made[key] = [_walked(item, inner) for item in made[key]]
    for key in _ONE:
        if isinstance(made.get(key), Mapping | bool):
            made[key] = _walked(made[key], inner)
    return _finite(made) if walk.finite and not made.keys() & set(_ELSEWHERE) else made


def _finite(schema: dict[str, Any]) -> dict[str, Any]:
    """Bound the numbers that the schema leaves unbounded, also those within values that it says nothing about."""
    kinds = schema.get("type", ("number", "array", "object"))
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    bounded = dict(schema)
    if kinds & {"number", "integer"}:
        if "exclusiveMinimum" not in schema:
            bounded.setdefault("minimum", -_LARGEST)
        if "exclusiveMaximum" not in schema:
            bounded.setdefault("maximum", _LARGEST)
    if "array" in kinds:
        bounded.setdefault("items", _ANY_REF)
    if "object" in kinds:
        bounded.setdefault("additionalProperties", _ANY_REF)
    return bounded
