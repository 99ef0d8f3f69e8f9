"""What the parser of JSON inside `<tool_call>` accepts, and what it makes of it."""

from __future__ import annotations

import pytest
from tool_calls_samples import TOOLS, spelled_out, stream, write_hermes

from lsp_agent.chat_model import Problem, Repair
from lsp_agent.engine.tool_calls import CallStart, ParsedAnswer, new_parser, parse_answer

CALL = write_hermes("read_file", {"path": "a.py"})
JSON = CALL.splitlines()[1]


def parse(text: str, cut_off: bool = False) -> ParsedAnswer:
    whole = stream([text], "hermes", cut_off=cut_off)
    assert spelled_out(whole) == text
    assert stream(list(text), "hermes", cut_off=cut_off) == whole
    return parse_answer(text, "hermes", TOOLS, cut_off)


def test_a_call_starts_as_soon_as_its_name_is_known() -> None:
    parser = new_parser("hermes", TOOLS)
    assert parser.feed('<tool_call>\n{"name": "read_fil') == []
    (start,) = parser.feed('e"')
    assert isinstance(start, CallStart) and start.name == "read_file"


def test_consecutive_calls_and_text_around_them() -> None:
    other = write_hermes("run_tests", {})
    answer = parse(f"First.\n{CALL}\n{other}\nDone.")
    assert [(call.name, call.arguments, call.raw) for call in answer.calls] == [
        ("read_file", {"path": "a.py"}, CALL),
        ("run_tests", {}, other),
    ]
    assert answer.text == "First.\n\n\nDone."


REPAIRED = {
    "left as plain content": (JSON, [Repair.MISSING_OPENER]),
    "no <tool_call>": (f"{JSON}\n</tool_call>", [Repair.MISSING_OPENER]),
    "no </tool_call>": (f"<tool_call>\n{JSON}", [Repair.MISSING_CLOSER]),
    "doubled <tool_call>": (f"<tool_call>{CALL}", [Repair.DOUBLED_OPENER]),
    "doubled </tool_call>": (f"{CALL}\n</tool_call>", [Repair.DOUBLED_CLOSER]),
    "a brace too few": (CALL.replace("}}", "}"), [Repair.LENIENT_JSON]),
    "two braces too few": (CALL.replace("}}", ""), [Repair.LENIENT_JSON]),
    "a brace too many": (CALL.replace("}}", "}}}"), [Repair.LENIENT_JSON]),
    "Python's quotes": (CALL.replace('"', "'"), [Repair.LENIENT_JSON]),
    "arguments encoded twice": (
        CALL.replace('{"path": "a.py"}', '"{\\"path\\": \\"a.py\\"}"'),
        [Repair.LENIENT_JSON],
    ),
    "`parameters` for `arguments`": (CALL.replace("arguments", "parameters"), []),
    "arguments before the name": (
        '<tool_call>\n{"arguments": {"path": "a.py"}, "name": "read_file"}\n</tool_call>',
        [],
    ),
    "all in one line": (CALL.replace("\n", ""), []),
    "spread over lines": (CALL.replace(", ", ",\n  ").replace("{", "{\n "), []),
}


@pytest.mark.parametrize(("text", "repairs"), REPAIRED.values(), ids=REPAIRED.keys())
@pytest.mark.parametrize(
    "around", ["{}", "Let me look.\n\n{}", "{}\nThat was it.", "```json\n{}\n```", "```\n\n{}```\n"]
)
def test_slips_of_form_are_mended_and_noted(around: str, text: str, repairs: list[Repair]) -> None:
    answer = parse(around.replace("{}", text))
    (call,) = answer.calls
    assert (call.name, call.arguments, call.errors) == ("read_file", {"path": "a.py"}, ())
    fenced = around.startswith("```")
    assert list(call.repairs) == repairs + [Repair.CODE_FENCE] * fenced
    assert "`" not in answer.text


@pytest.mark.parametrize("text", [text for text, _ in REPAIRED.values()], ids=REPAIRED.keys())
def test_a_slip_never_costs_the_call_after_it(text: str) -> None:
    answer = parse(f"{text}\n{write_hermes('run_tests', {})}")
    assert [(call.name, call.errors) for call in answer.calls] == [("read_file", ()), ("run_tests", ())]


@pytest.mark.parametrize(
    "value",
    ['one " and }}', "</tool_call>", "<tool_call>\n{", 'a "quoted" \\ {[', "line\nbreak", "}}", "größer 🦀", ""],
)
def test_string_values_arrive_character_for_character(value: str) -> None:
    answer = parse(write_hermes("write_file", {"path": "f", "content": value}) + "\nDone.")
    assert [call.arguments for call in answer.calls] == [{"path": "f", "content": value}]
    assert answer.text == "\nDone."


def test_raw_line_breaks_inside_strings_are_taken() -> None:
    (call,) = parse(CALL.replace("a.py", "a\n\tb")).calls
    assert call.arguments == {"path": "a\n\tb"}


def test_values_are_fitted_to_the_schema() -> None:
    (call,) = parse(write_hermes("read_file", {"path": 5, "start": "7", "whole": "true"})).calls
    assert (call.arguments, call.errors) == ({"path": "5", "start": 7, "whole": True}, ())


@pytest.mark.parametrize("length", range(len("<tool_call>\n"), CALL.index("}}")))
@pytest.mark.parametrize("cut_off", [False, True])
def test_a_call_that_is_cut_off_is_an_error(length: int, cut_off: bool) -> None:
    answer = parse(CALL[:length], cut_off)
    # Only a whole value may be taken for a whole call, and never when the length limit was hit.
    complete = CALL[:length].endswith('"a.py"') and not cut_off
    assert [bool(call.errors) for call in answer.calls] == [not complete]


def test_broken_json_is_reported_and_the_next_call_still_read() -> None:
    broken = CALL.replace('"a.py"', 'open("a.py")')
    answer = parse(f"{broken}\n{CALL}")
    assert [[error.problem for error in call.errors] for call in answer.calls] == [[Problem.MALFORMED], []]
    assert answer.calls[0].raw == broken
    assert "not valid JSON" in answer.calls[0].error_text


def test_doubled_braces_are_an_error_and_no_crash() -> None:
    broken = CALL.replace('{"path"', '{{"path"')
    answer = parse(f"{broken}\n{CALL}")
    assert [[error.problem for error in call.errors] for call in answer.calls] == [[Problem.MALFORMED], []]


def test_an_unescaped_quote_does_not_swallow_the_next_call() -> None:
    broken = CALL.replace("a.py", 'say "hi')
    answer = parse(f"{broken}\n{CALL}")
    assert [call.raw for call in answer.calls] == [broken, CALL]
    assert [bool(call.errors) for call in answer.calls] == [True, False]


def test_a_call_that_breaks_off_does_not_swallow_the_next_one() -> None:
    broken = '<tool_call>\n{"name": "read_file", "arguments": {"path": "say\n'
    answer = parse(broken + CALL)
    assert [call.raw for call in answer.calls] == [broken, CALL]
    assert [[error.problem for error in call.errors] for call in answer.calls] == [[Problem.CUT_OFF], []]


def test_unknown_tools_are_reported_when_they_are_surely_calls() -> None:
    (call,) = parse(CALL.replace("read_file", "cat")).calls
    assert [error.problem for error in call.errors] == [Problem.UNKNOWN_TOOL]


@pytest.mark.parametrize(
    "prose",
    [
        '{"name": "lsp-agent", "version": 1}',
        '{"name": "cat", "arguments": {}}',
        '{"name": "read_file"}',
        "{'a': 1}",
        "fn main() {\n}\n",
        "<tool_call> wraps calls",
        'It is {"name": "read_file", "arguments": {}}.',
        "x <",
        "{",
    ],
)
def test_other_json_and_prose_stay_text(prose: str) -> None:
    assert parse(prose) == ParsedAnswer(prose, ())


@pytest.mark.parametrize("bomb", ["[" * 50_000, "(" * 50_000, "-" * 50_000 + "1", "1" * 10_000, '{"a":' * 50_000])
def test_values_that_overwhelm_decoders_are_errors(bomb: str) -> None:
    text = f'<tool_call>\n{{"name": "read_file", "arguments": {{"path": {bomb}}}}}\n</tool_call>'
    (call,) = parse_answer(text, "hermes", TOOLS).calls
    assert call.errors and call.raw == text
