"""The laws of parsing, on any input: no crash, no lost text, the same events however the stream is cut, round trips."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tool_calls_samples import TOOLS, WRITERS, spelled_out, stream

from lsp_agent.chat_model import ToolSchema, Usage
from lsp_agent.engine.tool_calls import (
    AnswerReader,
    CallEnd,
    CallStart,
    call_from_openai,
    call_to_openai,
    new_parser,
    parse_answer,
)

FORMATS = ("qwen3_coder", "hermes")
TAGS = re.compile(r'</?(?:tool_call|function|parameter)[^<>\n]{0,20}>|[{}"\n]')
PIECES = [
    *("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>", ">", "<", "\n", " "),
    *("read_file", "write_file", "path", "content", "start", "7", "text", "\r\n", "\\", '"', "{", "}", "[", "]", ":"),
    *('{"name": "read_file"', ', "arguments": {"path": "a"}}', '"arguments"', "'", "é", "\u2028", "<parameter=path>\n"),
    *("```", "```json\n", "\n```\n", "`"),
    *("<function=read_file>\n", "<tool_call>\n<function=write_file>\n<parameter=path>\n"),
]
# No lone surrogates: a tokenizer never decodes to one.
characters = st.characters(exclude_categories=["Cs"])
any_text = st.text(characters, max_size=40)
answers = st.lists(st.sampled_from(PIECES) | any_text, max_size=25).map("".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=8,
)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
TYPES = {
    "string": any_text,
    "integer": st.integers(),
    "number": st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
    "boolean": st.booleans(),
    "null": st.none(),
    "array": st.lists(json_values, max_size=4),
    "object": st.dictionaries(any_text, json_values, max_size=4),
}


@st.composite
def calls(draw: st.DrawFn) -> tuple[ToolSchema, dict[str, object]]:
    kinds = draw(st.dictionaries(names, st.sampled_from(sorted(TYPES)), max_size=4))
    schema = {"type": "object", "properties": {name: {"type": kind} for name, kind in kinds.items()}}
    arguments = {name: draw(TYPES[kind]) for name, kind in kinds.items()}
    return ToolSchema(draw(names), "", {**schema, "required": list(kinds)}), arguments


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, str]:
    """Valid answers with tags dropped, doubled, swapped or cut."""
    call_format = draw(st.sampled_from(FORMATS))
    pairs = draw(
        st.lists(
            st.tuples(st.sampled_from([tool.name for tool in TOOLS]), st.sampled_from(["path", "content", "start"])),
            min_size=1,
            max_size=4,
        )
    )
    value = st.sampled_from(["a.py", "x\n", "</parameter>", "<function=f>", "7", "}"]) | any_text
    written = [WRITERS[call_format](tool, {"path": draw(value), other: draw(value)}) for tool, other in pairs]
    text = draw(any_text) + draw(st.sampled_from(["\n", "", "\n\n"])).join(written) + draw(any_text)
    for _ in range(draw(st.integers(0, 4))):
        tags = list(TAGS.finditer(text))
        if not tags:
            break
        tag = draw(st.sampled_from(tags))
        other = draw(st.sampled_from(tags))
        fenced = "\n```json\n" + tag[0]
        instead = {
            "fence": fenced,
            "unfence": tag[0] + "\n```\n",
            "drop": "",
            "double": tag[0] * 2,
            "swap": other[0],
            "cut": tag[0][:-1],
            "insert": tag[0] + "\nx",
        }
        text = text[: tag.start()] + instead[draw(st.sampled_from(sorted(instead)))] + text[tag.end() :]
    return call_format, text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text


def cut(text: str, data: st.DataObject) -> list[str]:
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=30)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def check_laws(text: str, call_format: str, cut_off: bool, data: st.DataObject) -> None:
    whole = stream([text], call_format, cut_off=cut_off)
    assert spelled_out(whole) == text
    assert stream(cut(text, data), call_format, cut_off=cut_off) == whole
    assert stream(list(text), call_format, cut_off=cut_off) == whole
    reader = AnswerReader(new_parser(call_format, TOOLS))
    pieces = [piece for part in cut(text, data) for piece in reader.feed(part)] + reader.close(cut_off)
    assert "".join(piece if isinstance(piece, str) else piece.raw for piece in pieces) == text
    answer = reader.completion(cut_off, Usage(), None)
    assert answer.text == "".join(piece for piece in pieces if isinstance(piece, str))
    assert list(answer.tool_calls) == [piece for piece in pieces if not isinstance(piece, str)]
    assert bool(answer.problems) == any(isinstance(e, CallEnd) and e.call.malformed for e in whole)
    starts = [event.index for event in whole if isinstance(event, CallStart)]
    ends = [event for event in whole if isinstance(event, CallEnd)]
    assert starts == [end.index for end in ends] == list(range(len(ends)))
    for end in ends:
        assert end.call.raw
        assert end.call.errors or end.call.name in {tool.name for tool in TOOLS}
        assert call_from_openai(call_to_openai(end.call)) == end.call


@pytest.mark.parametrize("call_format", [*FORMATS, "none"])
@given(text=answers, cut_off=st.booleans(), data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_text_is_parsed_without_loss_however_it_is_cut(call_format, text, cut_off, data) -> None:
    check_laws(text, call_format, cut_off, data)


@given(mutant=mutated(), cut_off=st.booleans(), data=st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_answers_are_parsed_without_loss_however_they_are_cut(mutant, cut_off, data) -> None:
    check_laws(mutant[1], mutant[0], cut_off, data)


def is_ambiguous(value: object) -> bool:
    """Whether a value, written unescaped, holds what the format itself could go on with."""
    return isinstance(value, str) and "<" in value


@pytest.mark.parametrize("call_format", FORMATS)
@given(made=st.lists(calls(), min_size=1, max_size=3), before=any_text, after=any_text)
@settings(max_examples=200, deadline=None)
@example(made=[(ToolSchema("f", "", {"properties": {"x": {"type": "string"}}}), {"x": "\r"})], before="", after="")
@example(made=[(ToolSchema("f", "", {"properties": {"x": {"type": "number"}}}), {"x": 1e22})], before="", after="")
def test_arguments_survive_the_format(call_format, made, before, after) -> None:
    tools = {tool.name: (tool, arguments) for tool, arguments in made}
    assume("<" not in before + after and "{" not in before + after and "}" not in after)
    if call_format == "qwen3_coder":
        assume(not any(is_ambiguous(value) for _, arguments in made for value in arguments.values()))
    written = [WRITERS[call_format](name, arguments) for name, (_, arguments) in tools.items()]
    text = before + "\n".join(written) + after
    answer = parse_answer(text, call_format, [tool for tool, _ in tools.values()])
    assert [(call.name, call.arguments, call.raw) for call in answer.calls] == [
        (name, arguments, raw) for (name, (_, arguments)), raw in zip(tools.items(), written, strict=True)
    ]
    assert not any(call.errors or call.repairs for call in answer.calls)


# What the format itself goes on with after a value: only before these is a literal closing tag taken for the real one.
GOES_ON = re.compile(r"</parameter>\s*(?:</?(?:parameter|function|tool_call)|<?/?\Z)")
code = st.lists(st.sampled_from(PIECES[:20]) | any_text, max_size=12).map("".join)


@given(value=code)
@settings(max_examples=500, deadline=None)
def test_code_that_holds_tags_survives_unless_it_continues_the_format(value) -> None:
    assume(not GOES_ON.search(value) and "<function=" not in value)
    assume(not re.search(r"^\s*<parameter=\s*(?:path|content)", value, re.MULTILINE))
    text = WRITERS["qwen3_coder"]("write_file", {"path": "f", "content": value})
    (call,) = parse_answer(text, "qwen3_coder", TOOLS).calls
    assert call.arguments == {"path": "f", "content": value}


def test_a_long_value_streams_in_linear_time() -> None:
    import time

    def seconds(lines: int) -> float:
        text = WRITERS["qwen3_coder"]("write_file", {"path": "f", "content": "if a < b: </p> </x\n" * lines})
        began = time.perf_counter()
        (end,) = [e for e in stream(re.findall(r"(?s).{1,4}", text), "qwen3_coder") if isinstance(e, CallEnd)]
        assert len(end.call.arguments["content"]) == 19 * lines
        return time.perf_counter() - began

    # 8 times the text, and room for a busy machine; rescanning from the start would take 64 times as long.
    assert min(seconds(4000) for _ in range(4)) < 24 * max(min(seconds(500) for _ in range(4)), 0.005)
