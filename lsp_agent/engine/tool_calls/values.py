"""Parameter values, typed by a tool's JSON schema.

Only the type, `enum` and `const` of the value itself are looked at, through `anyOf`, `oneOf`, `allOf` and `$ref`; what
lies inside arrays and objects is the tool's own to check.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

MAX_SCHEMA_DEPTH = 16
"""Deepest nest of `anyOf` and `$ref` that is followed: references may form a circle."""

MAX_LITERAL_CHARS = 1 << 16
"""Longest text that is tried as a Python literal where it is no JSON."""

# A text is read as the first of these that it can be. Strings come last: everything is a string, so in a union the
# other types could never be said otherwise.
_ORDER = ("null", "boolean", "integer", "number", "array", "object", "string", "any")
_INTEGER = re.compile(r"[+-]?[0-9]+(?:\.0+)?")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class InvalidValueError(ValueError):
    """A value that its schema does not allow; the message completes "The parameter x …"."""


def from_text(text: str, schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """Read the text of one value, as the XML format writes it, by its schema.

    A string stays the exact text, even if it looks like JSON. Other types are read with surrounding whitespace
    dropped, as JSON or as Python writes them (`true` and `True`, `null` and `None`): chat templates render both.
    In a union the first type that fits wins, in the order null, boolean, integer, number, array, object, string.
    `root` is the tool's whole schema, for `$ref`. Raises InvalidValueError.
    """
    possible = list(alternatives(schema, root))
    for kind, allowed in sorted(possible, key=lambda alternative: _ORDER.index(alternative[0])):
        try:
            value = text if kind in ("string", "any") else _READERS[kind](text.strip())
        except ValueError:
            continue
        if allowed is None or _among(value, allowed):
            return value
        if kind == "string" and _among(text.strip(), allowed):
            return text.strip()
    raise InvalidValueError(f"must be {_described(possible)}, not {_excerpt(text)}")


def from_json(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """Fit one decoded JSON value to its schema: as it is where it fits, else as its text read by the schema.

    A quoted number for an integer parameter becomes that number, and a number for a string parameter becomes its JSON
    text. Raises InvalidValueError.
    """
    for kind, allowed in alternatives(schema, root):
        if _is(value, kind) and (allowed is None or _among(value, allowed)):
            return int(value) if kind == "integer" else value
    return from_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), schema, root)


def decode_json(text: str) -> Any:
    """Decode JSON as models write it: raw line breaks in strings are allowed, NaN and infinities are not.

    Halves of surrogate pairs become U+FFFD, since no tokenizer or socket takes them. Raises ValueError and nothing
    else.
    """
    try:
        return _clean(json.loads(text, strict=False, parse_constant=_refuse))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def decode_lenient(text: str) -> Any:
    """Decode JSON, or else a Python literal made of the same types (single quotes, `True`, `None`).

    Raises ValueError and nothing else.
    """
    try:
        return decode_json(text)
    except ValueError:
        if len(text) > MAX_LITERAL_CHARS:
            raise
    try:
        return _clean(ast.literal_eval(text))
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        # TypeError: a set of dictionaries, which is what `{{…}}` is to Python.
        raise ValueError("neither JSON nor a Python literal") from error


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not a finite number")
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {_clean(key): _clean(item) for key, item in value.items()}
    raise ValueError(f"{type(value).__name__} is no JSON type")


def _read_word(words: Mapping[str, Any]) -> Any:
    def read(text: str) -> Any:
        if text not in words:
            raise ValueError(text)
        return words[text]

    return read


def _read_integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(text)
    return int(text.partition(".")[0])


def _read_number(text: str) -> int | float:
    if not _NUMBER.fullmatch(text):
        raise ValueError(text)
    value = float(text) if set(text) & set(".eE") else int(text)
    return _clean(value)


def _read_container(kind: type) -> Any:
    def read(text: str) -> Any:
        value = decode_lenient(text)
        if not isinstance(value, kind):
            raise ValueError(text)
        return value

    return read


_READERS = {
    "null": _read_word({"null": None, "None": None}),
    "boolean": _read_word({"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}),
    "integer": _read_integer,
    "number": _read_number,
    "array": _read_container(list),
    "object": _read_container(dict),
}


def alternatives(schema: Any, root: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, list[Any] | None]]:
    """Flatten a schema into its possible types (or `any`), each with the values that it is limited to, if it is.

    `root` is what `$ref` leads into.
    """
    if not isinstance(schema, Mapping) or depth > MAX_SCHEMA_DEPTH:
        yield "any", None
        return
    if "$ref" in schema:
        yield from alternatives(_resolve(schema["$ref"], root), root, depth + 1)
        return
    for union in ("anyOf", "oneOf"):
        if schema.get(union):
            for part in schema[union]:
                yield from alternatives(part, root, depth + 1)
            return
    if schema.get("allOf"):
        # Written around one `$ref` by schema generators; its first part names the type.
        yield from alternatives(schema["allOf"][0], root, depth + 1)
        return
    allowed = [schema["const"]] if "const" in schema else schema.get("enum")
    kinds = schema.get("type")
    if kinds is None and allowed is not None:
        kinds = [kind for kind in _ORDER if kind != "integer" and any(_is(member, kind) for member in allowed)]
    elif kinds is None:
        kinds = "object" if "properties" in schema else "array" if "items" in schema else "any"
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        yield (kind if kind in _ORDER else "any"), allowed


def _resolve(reference: Any, root: Any) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    for part in reference[1:].strip("/").split("/"):
        if not isinstance(root, Mapping):
            return None
        root = root.get(part.replace("~1", "/").replace("~0", "~")) if part else root
    return root


def _is(value: Any, kind: str) -> bool:
    if kind == "any":
        return True
    if kind in ("integer", "number"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind == "number" or isinstance(value, int) or value.is_integer())
    types = {"null": type(None), "boolean": bool, "array": list, "object": dict, "string": str}
    return isinstance(value, types[kind])


def _among(value: Any, allowed: list[Any]) -> bool:
    return any(value == member and isinstance(value, bool) == isinstance(member, bool) for member in allowed)


def _described(possible: list[tuple[str, list[Any] | None]]) -> str:
    parts = [
        kind if allowed is None else "one of " + ", ".join(json.dumps(member, ensure_ascii=False) for member in allowed)
        for kind, allowed in possible
    ]
    return " or ".join(dict.fromkeys(parts))


def _excerpt(text: str) -> str:
    return json.dumps(text if len(text) <= 80 else text[:77] + "...", ensure_ascii=False)
