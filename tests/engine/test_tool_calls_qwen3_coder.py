"""What the parser of Qwen3-Coder's XML accepts, and what it makes of it."""

from __future__ import annotations

import pytest
from tool_calls_samples import TOOLS, spelled_out, stream, write_qwen3_coder

from lsp_agent.chat_model import Problem, Repair
from lsp_agent.engine.tool_calls import CallEnd, CallStart, ParsedAnswer, TextDelta, new_parser
from lsp_agent.engine.tool_calls import parse_answer as parse_any

CALL = write_qwen3_coder("read_file", {"path": "a.py"})


def parse(text: str, cut_off: bool = False) -> ParsedAnswer:
    whole = stream([text], "qwen3_coder", cut_off=cut_off)
    assert spelled_out(whole) == text
    assert stream(list(text), "qwen3_coder", cut_off=cut_off) == whole
    return parse_any(text, "qwen3_coder", TOOLS, cut_off)


def problems(answer: ParsedAnswer) -> list[list[Problem]]:
    return [[error.problem for error in call.errors] for call in answer.calls]


def test_text_then_a_call_streams_as_text_start_end() -> None:
    parser = new_parser("qwen3_coder", TOOLS)
    assert parser.feed("I look at it.\n\n") == [TextDelta("I look at it.\n\n")]
    assert parser.feed("<tool_call>\n<function=read_file>\n") == []
    (start,) = parser.feed("<parameter=path>\na")
    assert isinstance(start, CallStart)
    assert (start.index, start.name) == (0, "read_file")
    assert parser.feed(".py\n</parameter>\n</function>\n</tool_call>") == []
    (end,) = parser.close()
    assert isinstance(end, CallEnd)
    assert (end.index, end.call.id, end.call.arguments) == (0, start.id, {"path": "a.py"})
    assert end.call.raw == CALL
    assert not end.call.errors and not end.call.repairs


def test_plain_text_streams_at_once_but_for_what_may_become_a_tag() -> None:
    parser = new_parser("qwen3_coder", TOOLS)
    assert parser.feed("a < b, <tool") == [TextDelta("a < b, ")]
    assert parser.feed("box>") == [TextDelta("<toolbox>")]


def test_values_are_typed_by_the_schema() -> None:
    call = write_qwen3_coder("read_file", {"path": '{"looks": "like JSON"}', "start": 7, "whole": True})
    (found,) = parse(call).calls
    assert found.arguments == {"path": '{"looks": "like JSON"}', "start": 7, "whole": True}


def test_consecutive_calls_and_text_around_them() -> None:
    other = write_qwen3_coder("run_tests", {})
    answer = parse(f"First.\n{CALL}\n{other}{CALL}\nDone.")
    assert [call.name for call in answer.calls] == ["read_file", "run_tests", "read_file"]
    assert [call.raw for call in answer.calls] == [CALL, other, CALL]
    assert answer.text == "First.\n\n\nDone."
    assert len({call.id for call in answer.calls}) == 3


def test_a_call_without_opener_may_follow_another_on_the_same_line() -> None:
    bare = "<function=run_tests>\n</function>\n</tool_call>"
    assert [call.raw for call in parse(CALL + bare).calls] == [CALL, bare]


REPAIRED = {
    "no <tool_call>": (CALL.removeprefix("<tool_call>\n"), [Repair.MISSING_OPENER]),
    "no <tool_call>, indented": ("  " + CALL.removeprefix("<tool_call>\n"), [Repair.MISSING_OPENER]),
    "neither <tool_call> nor </tool_call>": (CALL[12:-13], [Repair.MISSING_OPENER]),
    "doubled <tool_call>": ("<tool_call>\n" + CALL, [Repair.DOUBLED_OPENER]),
    "doubled </parameter>": (CALL.replace("</parameter>", "</parameter>\n</parameter>"), [Repair.DOUBLED_CLOSER]),
    "trebled </parameter>": (CALL.replace("</parameter>", "</parameter>" * 3), [Repair.DOUBLED_CLOSER]),
    "doubled </tool_call>": (CALL + "\n</tool_call>", [Repair.DOUBLED_CLOSER]),
    "no </parameter>": (CALL.replace("</parameter>\n", ""), [Repair.MISSING_CLOSER]),
    "no </function>": (CALL.replace("</function>\n", ""), [Repair.MISSING_CLOSER]),
    "no </tool_call>": (CALL.removesuffix("\n</tool_call>"), [Repair.MISSING_CLOSER]),
    "only </tool_call>": (CALL.replace("</parameter>\n</function>\n", ""), [Repair.MISSING_CLOSER]),
    "text between the tags": (CALL.replace("</parameter>", "</parameter>\nso"), [Repair.STRAY_TEXT]),
    "all in one line": (CALL.replace("\n", ""), []),
    "blank lines between the tags": (CALL.replace("<fun", "\n\n<fun").replace("</fun", " \n\n </fun"), []),
    "indented tags": (CALL.replace("<param", "    <param").replace("</param", "    </param"), []),
    "Windows line ends": (CALL.replace("\n", "\r\n"), []),
    "quoted names": (CALL.replace("=path", '="path"').replace("=read_file", "='read_file'"), []),
    "spaces around names": (CALL.replace("=path", "= path "), []),
    "a name without its >": (CALL.replace("path>", "path").replace("file>", "file"), []),
}


@pytest.mark.parametrize(("text", "repairs"), REPAIRED.values(), ids=REPAIRED.keys())
@pytest.mark.parametrize("around", ["{}", "Let me look.\n\n{}", "{}\nThat was it.", "```xml\n{}\n```"])
def test_slips_of_form_are_mended_and_noted(around: str, text: str, repairs: list[Repair]) -> None:
    answer = parse(around.format(text))
    (call,) = answer.calls
    assert (call.name, call.arguments, call.errors) == ("read_file", {"path": "a.py"}, ())
    fenced = around.startswith("```")
    assert list(call.repairs) == repairs + [Repair.CODE_FENCE] * fenced
    if Repair.MISSING_CLOSER not in repairs and not fenced:
        assert call.raw == text.strip()
    assert answer.text.split() == ([] if fenced else around.format("").split())


@pytest.mark.parametrize("between", ["\n", "", "\n\nThen:\n"])
@pytest.mark.parametrize("text", [text for text, _ in REPAIRED.values()], ids=REPAIRED.keys())
def test_a_slip_never_costs_the_call_after_it(text: str, between: str) -> None:
    if text.startswith("  ") or "\n" not in text:
        between = between or "\n"
    after = write_qwen3_coder("write_file", {"path": "b.py", "content": "x\n"})
    answer = parse(text + between + after)
    assert [call.arguments for call in answer.calls] == [{"path": "a.py"}, {"path": "b.py", "content": "x\n"}]
    assert problems(answer) == [[], []]


def test_a_parameter_that_was_not_closed_ends_where_the_next_declared_one_begins() -> None:
    text = write_qwen3_coder("write_file", {"path": "a.py", "content": "x"}).replace("</parameter>\n", "", 1)
    (call,) = parse(text).calls
    assert call.arguments == {"path": "a.py", "content": "x"}


VALUES = {
    "empty": "",
    "line breaks of its own at both ends": "\n\nx\n\n",
    "spaces at both ends": "  x  ",
    "trailing blank line with spaces": "x\n   ",
    "carriage return": "x\r\ny\r",
    "comparison": "if a < b and c > d: pass",
    "markup": "<div class='x'>\n</div>\n<p>",
    "a closing tag within a line": "print('</parameter>') and <parameter=x> too",
    "a closing tag on its own line": "before\n</parameter>\nafter",
    "an opening tag of no parameter": "before\n<parameter=other>\nafter",
    "closing tags within a string": 'x = "<parameter=a>1</parameter></function></tool_call>"\n',
    "a closed call within a line": "write `</parameter></function></tool_call>` at the end",
    "a whole call": f"# Format\n{write_qwen3_coder('run', {'x': 1})}\nand so on",
    "a whole call of a known tool": f"# Format\n{CALL}\nand so on",
    "two whole calls": f"{CALL}\n{write_qwen3_coder('run', {'x': 1, 'y': 2})}",
    "a whole call that is all": CALL,
    "an indented call": "    " + CALL.replace("\n", "\n    "),
    "an unclosed function": "<function=f>\nx",
    "JSON": '{"a": [1, 2]}',
    "entities": "&lt;b&gt; &amp;amp;",
    "other alphabets": "größer 東京 🦀 \u2028 x",
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize("after", ["", "\nDone.", "\n" + CALL])
def test_string_values_arrive_character_for_character(value: str, after: str) -> None:
    answer = parse(write_qwen3_coder("write_file", {"path": "f", "content": value}) + after)
    assert answer.calls[0].arguments == {"path": "f", "content": value}
    assert answer.calls[0].errors == ()
    assert len(answer.calls) == (2 if CALL in after else 1)
    assert answer.text == ("\n" if CALL in after else after)


CUT = write_qwen3_coder("write_file", {"path": "a.py", "content": "x = 1\ny = 2"})


@pytest.mark.parametrize("length", range(CUT.index("<function"), CUT.rindex("\n</parameter>")))
@pytest.mark.parametrize("cut_off", [False, True])
def test_a_call_that_is_cut_off_is_an_error_and_never_half_run(length: int, cut_off: bool) -> None:
    (call,) = parse(CUT[:length], cut_off).calls
    assert call.errors
    assert call.raw == CUT[:length].rstrip() or call.raw == CUT[:length]


def test_a_call_cut_off_after_its_last_value_runs_unless_the_length_limit_cut_it() -> None:
    text = CUT[: CUT.rindex("</function>")].rstrip()
    assert problems(parse(text)) == [[]]
    assert problems(parse(text, cut_off=True)) == [[Problem.CUT_OFF]]


def test_text_after_a_value_without_the_calls_closing_tags_is_an_error() -> None:
    text = CALL.replace("</function>\n</tool_call>", "")
    assert problems(parse(text)) == [[]]
    assert problems(parse(text + "I am done.")) == [[Problem.CUT_OFF]]


def test_a_call_quoted_in_a_value_that_was_cut_off_is_not_run() -> None:
    text = write_qwen3_coder("write_file", {"path": "doc.md", "content": f"Like this:\n{CALL}\nand"})
    answer = parse(text[: text.index("\nand")], cut_off=True)
    assert [call.name for call in answer.calls] == ["write_file"]
    assert answer.calls[0].errors


def test_unknown_names_are_reported_with_what_there_is() -> None:
    (tool,) = parse(CALL.replace("read_file", "read_fil")).calls
    assert [error.problem for error in tool.errors] == [Problem.UNKNOWN_TOOL]
    assert tool.arguments == {"path": "a.py"}
    assert "`read_fil`" in tool.error_text and "did you mean `read_file`" in tool.error_text
    (parameter,) = parse(write_qwen3_coder("read_file", {"path": "a.py", "begin": 3})).calls
    assert [(e.problem, e.parameter) for e in parameter.errors] == [(Problem.UNKNOWN_PARAMETER, "begin")]
    assert "`path`, `start`, `whole`" in parameter.error_text


def test_missing_repeated_and_untypable_parameters_are_reported() -> None:
    (missing,) = parse(write_qwen3_coder("read_file", {"start": 3})).calls
    assert [(e.problem, e.parameter) for e in missing.errors] == [(Problem.MISSING_PARAMETER, "path")]
    again = "<parameter=path>\nb.py\n</parameter>\n</function>"
    (repeated,) = parse(CALL.replace("</function>", again)).calls
    assert [e.problem for e in repeated.errors] == [Problem.DUPLICATE_PARAMETER]
    assert repeated.arguments == {"path": "a.py"}
    (invalid,) = parse(write_qwen3_coder("read_file", {"path": "a", "start": "the top"})).calls
    assert [(e.problem, e.parameter) for e in invalid.errors] == [(Problem.INVALID_VALUE, "start")]
    assert 'must be integer, not "the top"' in invalid.error_text


@pytest.mark.parametrize(
    "prose",
    [
        "Wrap calls in <tool_call> and </tool_call>.",
        "Use `<function=NAME>` for the name.",
        "<function=NAME> is how a call begins.",
        "<tool_call>\nis the opening tag",
        "<tool_call><function=x> and so on",
        "</function>\n</tool_call>\n</parameter>",
        "<parameter=path>\na\n</parameter>",
        "x <",
        "generic<T>, a<b>c",
    ],
)
def test_prose_about_the_format_stays_text(prose: str) -> None:
    answer = parse(prose)
    assert answer == ParsedAnswer(prose, ())


def test_an_answer_of_a_model_without_tool_calls_is_all_text() -> None:
    assert parse_any(CALL, "none", TOOLS) == ParsedAnswer(CALL, ())
