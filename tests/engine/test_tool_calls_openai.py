"""Tool calls in OpenAI's shape and back, and as chat templates take them."""

from __future__ import annotations

import json

import pytest
from tool_calls_samples import READ, TOOLS, WRITERS
from transformers.utils.chat_template_utils import render_jinja_template

from lsp_agent.engine.tool_calls import (
    Problem,
    ToolCall,
    assistant_message,
    call_from_openai,
    call_to_openai,
    delta_to_openai,
    new_parser,
    parse_answer,
    template_messages,
    tool_from_openai,
    tool_to_openai,
)

CALL = ToolCall("call_1", "read_file", {"path": "größer.py", "start": 3})


def test_a_call_has_openais_shape() -> None:
    entry = call_to_openai(CALL)
    assert entry == {
        "id": "call_1",
        "type": "function",
        "function": {"name": "read_file", "arguments": '{"path": "größer.py", "start": 3}'},
    }
    assert call_from_openai(entry) == CALL


def test_raw_text_errors_and_repairs_travel_along() -> None:
    text = WRITERS["qwen3_coder"]("read_file", {"start": "x"}).removeprefix("<tool_call>\n")
    (call,) = parse_answer(text, "qwen3_coder", TOOLS).calls
    assert call.errors and call.repairs and call.raw
    assert call_from_openai(json.loads(json.dumps(call_to_openai(call))), TOOLS) == call


def test_calls_of_other_servers_are_checked_and_typed() -> None:
    def entry(arguments: object) -> dict:
        return {"id": "x", "type": "function", "function": {"name": "read_file", "arguments": arguments}}

    assert call_from_openai(entry('{"path": "a", "start": "4"}'), TOOLS).arguments == {"path": "a", "start": 4}
    assert call_from_openai(entry({"path": "a"}), TOOLS).arguments == {"path": "a"}
    for lacking in ("", None, "{}"):
        errors = call_from_openai(entry(lacking), TOOLS).errors
        assert [error.problem for error in errors] == [Problem.MISSING_PARAMETER]
    for broken in ('{"path": ', "[1]", "[" * 100_000, 5):
        errors = call_from_openai(entry(broken), TOOLS).errors
        assert [error.problem for error in errors] == [Problem.MALFORMED]


def test_tools_go_there_and_back() -> None:
    for tool in TOOLS:
        assert tool_from_openai(tool_to_openai(tool)) == tool
        assert tool_from_openai(tool_to_openai(tool)["function"]) == tool
    assert tool_from_openai({"name": "bare"}).parameters == {}


@pytest.mark.parametrize("call_format", ["qwen3_coder", "hermes"])
def test_streamed_deltas_add_up_to_the_message(call_format) -> None:
    written = [WRITERS[call_format](name, {"path": "a", "content": "b"}) for name in ("write_file", "read_file")]
    text = "I write.\n" + "\n".join(written) + "\nDone."
    parser = new_parser(call_format, TOOLS)
    events = [event for character in text for event in parser.feed(character)] + parser.close()
    content, calls = "", {}
    for delta in map(delta_to_openai, events):
        content += delta.get("content", "")
        for part in delta.get("tool_calls", ()):
            call = calls.setdefault(part["index"], {"function": {"name": "", "arguments": ""}})
            function = part.pop("function")
            call.update({key: value for key, value in part.items() if key != "index"})
            for key, value in function.items():
                call["function"][key] += value
    parsed = parse_answer(text, call_format, TOOLS)
    expected = assistant_message(parsed.text, parsed.calls)["tool_calls"]
    for entry, call in zip(expected, calls.values(), strict=True):
        entry["id"] = call["id"]
    assert content == parsed.text == "I write.\n\n\nDone."
    assert list(calls.values()) == expected


# Writes calls the way the families' own templates do, in the smallest form.
TEMPLATES = {
    "qwen3_coder": (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n<function="
        "{{ c.function.name }}>\n{% for k, v in c.function.arguments|items %}<parameter={{ k }}>\n"
        "{{ v|tojson if v is mapping else v|string }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
        "{% endfor %}{% endfor %}"
    ),
    "hermes": (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments|tojson }}}\n</tool_call>'
        "{% endfor %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("call_format", ["qwen3_coder", "hermes"])
@pytest.mark.parametrize("entry", [CALL, call_to_openai(CALL)], ids=["call", "entry"])
def test_a_chat_template_takes_the_normalised_message_and_the_parser_reads_it_back(call_format, entry) -> None:
    history = [{"role": "assistant", "content": None, "tool_calls": [entry]}]
    messages = template_messages(history)
    assert history == [{"role": "assistant", "content": None, "tool_calls": [entry]}]
    ((rendered,), _) = render_jinja_template(
        [messages], chat_template=TEMPLATES[call_format], tools=[tool_to_openai(READ)]
    )
    (call,) = parse_answer(rendered, call_format, TOOLS).calls
    assert (call.name, call.arguments) == (CALL.name, CALL.arguments)


def test_messages_without_calls_stay_as_they_are() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "tool", "tool_call_id": "call_1", "content": "text"}]
    assert template_messages(messages) == messages
    broken = {"id": "x", "function": {"name": "read_file", "arguments": "{"}}
    (message,) = template_messages([{"role": "assistant", "tool_calls": [broken]}])
    assert message["tool_calls"][0]["function"]["arguments"] == {}


def test_events_of_a_call_have_one_id() -> None:
    parser = new_parser("hermes", TOOLS)
    start, end = parser.feed(WRITERS["hermes"]("run_tests", {}) + "\n.")[:2]
    assert start.id == end.call.id != ""
