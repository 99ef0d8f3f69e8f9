"""Calls inside of code fences: a fence around one call is the call's, every other fence is the answer's."""

from __future__ import annotations

import pytest
from tool_calls_samples import TOOLS, WRITERS, spelled_out, stream

from lsp_agent.chat_model import Repair
from lsp_agent.engine.tool_calls import ParsedAnswer, TextDelta, new_parser, parse_answer

FORMATS = ("qwen3_coder", "hermes")
# What Qwen2.5-Coder 0.5B and 1.5B answered when they were asked to read a file.
SEEN = (
    '```json\n{\n  "name": "read_file",\n  "arguments": {\n    "path": "settings.toml",\n    "start": 20\n  }\n}\n```'
)


def parse(text: str, call_format: str = "hermes", cut_off: bool = False) -> ParsedAnswer:
    whole = stream([text], call_format, cut_off=cut_off)
    assert spelled_out(whole) == text
    assert stream(list(text), call_format, cut_off=cut_off) == whole
    return parse_answer(text, call_format, TOOLS, cut_off)


def test_a_fenced_call_as_small_models_write_it() -> None:
    answer = parse(f"I look.\n\n{SEEN}\nDone.")
    (call,) = answer.calls
    assert call.arguments == {"path": "settings.toml", "start": 20} and not call.errors
    assert call.repairs == (Repair.MISSING_OPENER, Repair.CODE_FENCE)
    assert call.raw == SEEN
    assert answer.text == "I look.\n\n\nDone."


@pytest.mark.parametrize("call_format", FORMATS)
@pytest.mark.parametrize(
    ("opener", "closer"),
    [
        ("```\n", "\n```"),
        ("```xml\n\n", "```"),
        ("  ```json \r\n", "\r\n  ```"),
        ("```json\n", "\n"),
        ("```json\n", ""),
    ],
)
def test_fences_of_every_kind(call_format: str, opener: str, closer: str) -> None:
    answer = parse(opener + WRITERS[call_format]("read_file", {"path": "a"}) + closer, call_format)
    assert [(call.arguments, call.errors) for call in answer.calls] == [({"path": "a"}, ())]
    assert answer.text.strip() == ""
    assert Repair.CODE_FENCE in answer.calls[0].repairs


@pytest.mark.parametrize("call_format", FORMATS)
def test_two_fenced_calls(call_format: str) -> None:
    fenced = [f"```\n{WRITERS[call_format](name, {})}\n```" for name in ("run_tests", "run_tests")]
    answer = parse("\n".join(fenced), call_format)
    assert [call.raw for call in answer.calls] == fenced
    assert answer.text == "\n"


@pytest.mark.parametrize("call_format", FORMATS)
def test_a_fence_around_more_than_one_call_stays_text(call_format: str) -> None:
    written = WRITERS[call_format]("run_tests", {})
    answer = parse(f"```json\n{written}\n{written}\n```", call_format)
    assert [call.raw for call in answer.calls] == [written, written]
    assert answer.text == "```json\n\n\n```"


@pytest.mark.parametrize("call_format", FORMATS)
def test_the_fence_of_code_before_or_after_a_call_stays_with_the_code(call_format: str) -> None:
    written = WRITERS[call_format]("run_tests", {})
    code = "```python\nx = {1: 2}\n```"
    for text, rest in ((f"{code}\n{written}", f"{code}\n"), (f"{written}\n{code}", f"\n{code}")):
        answer = parse(text, call_format)
        assert [(call.raw, call.repairs) for call in answer.calls] == [(written, ())]
        assert answer.text == rest


@pytest.mark.parametrize("call_format", [*FORMATS, "none"])
@pytest.mark.parametrize(
    "prose",
    [
        "```python\nprint(1)\n```",
        '```json\n{"a": 1}\n```',
        "Use ```json fences``` here",
        "```json\n",
        "```",
        "``",
        "a ` b",
        "````\n```json\n{}\n```\n````",
        "```{.json}\n{}\n```",
    ],
)
def test_other_fences_are_text(call_format: str, prose: str) -> None:
    assert parse(prose, call_format) == ParsedAnswer(prose, ())


def test_code_in_fences_streams_as_soon_as_it_is_known_to_be_no_call() -> None:
    parser = new_parser("hermes", TOOLS)
    assert parser.feed("See:\n```py") == [TextDelta("See:\n")]
    assert parser.feed("thon\n") == []
    assert parser.feed("x") == [TextDelta("```python\nx")]
    assert parser.feed(" = 1") == [TextDelta(" = 1")]


@pytest.mark.parametrize(
    ("call_format", "text"),
    [
        ("hermes", '{"name": "read_file", "arguments": {"path": "a"}'),
        ("hermes", '{"name": "read_file", "arguments": {"path": "a"'),
        ("qwen3_coder", "<function=read_file>\n<parameter=path>\na\n</parameter>"),
    ],
)
def test_the_fence_ends_a_call_that_lacks_its_end(call_format: str, text: str) -> None:
    answer = parse(f"```json\n{text}\n```\n", call_format)
    assert [(call.name, call.arguments, call.errors) for call in answer.calls] == [("read_file", {"path": "a"}, ())]
    assert answer.text == "\n"
    assert parse(f"```json\n{text}\n```", call_format, cut_off=True).calls[0].errors


def test_a_fenced_call_that_is_cut_off_is_an_error() -> None:
    for length in range(SEEN.index("arg"), SEEN.rindex("}")):
        (call,) = parse(SEEN[:length], cut_off=True).calls
        assert call.errors
