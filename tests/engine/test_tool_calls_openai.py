"""Tool calls in OpenAI's shape and back, and as chat templates take them."""

from __future__ import annotations

import json

import pytest
from tool_calls_samples import READ, TOOLS, WRITERS

from lsp_agent.chat_model import Message, Problem, ToolCall
from lsp_agent.engine.chat_template import render
from lsp_agent.engine.tool_calls import (
    call_from_openai,
    call_to_openai,
    format_of_template,
    message_from_openai,
    message_to_openai,
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


def test_messages_go_there_and_back() -> None:
    conversation: list[Message] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "I read.", "tool_calls": [CALL]},
        {"role": "tool", "content": "text", "tool_call_id": "call_1"},
    ]
    sent = json.loads(json.dumps([message_to_openai(message) for message in conversation]))
    assert [message_from_openai(entry) for entry in sent] == conversation


def test_other_clients_messages_are_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert message_from_openai({"role": "user", "content": parts, "name": "x"}) == {"role": "user", "content": "ab"}
    assert message_from_openai({"role": "assistant", "content": None})["content"] == ""
    assert message_from_openai({"role": "assistant", "tool_calls": []}) == {"role": "assistant", "content": ""}


# Writes calls the way the families' own templates do, in the smallest form.
TEMPLATES = {
    "qwen3_coder": (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n<function="
        "{{ c.function.name }}>\n{% for k, v in c.function.arguments|items %}<parameter={{ k }}>\n"
        "{{ v|tojson if v is mapping else v|string }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
        "{% endfor %}{% endfor %}{{ tools }}"
    ),
    "hermes": (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments|tojson }}}\n</tool_call>'
        "{% endfor %}{% endfor %}{{ tools }}"
    ),
    "none": "{% for m in messages %}{{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize("call_format", ["qwen3_coder", "hermes"])
def test_a_chat_template_takes_the_message_and_the_parser_reads_it_back(call_format) -> None:
    messages = template_messages([{"role": "assistant", "content": "", "tool_calls": [CALL]}])
    rendered = render(TEMPLATES[call_format], messages, [tool_to_openai(READ)], {})
    (call,) = parse_answer(rendered, call_format, TOOLS).calls
    assert (call.name, call.arguments) == (CALL.name, CALL.arguments)


@pytest.mark.parametrize("call_format", ["qwen3_coder", "hermes", "none"])
def test_a_template_tells_its_format(call_format) -> None:
    assert format_of_template(TEMPLATES[call_format]) == call_format


def test_messages_for_templates() -> None:
    messages: list[Message] = [
        {"role": "user", "content": "hi\n"},
        {"role": "tool", "tool_call_id": "call_1", "content": "text\n"},
    ]
    assert template_messages(messages) == messages
    (message,) = template_messages([{"role": "assistant", "content": "I read.\n\n", "tool_calls": [CALL]}])
    assert message["content"] == "I read."


def test_events_of_a_call_have_one_id() -> None:
    parser = new_parser("hermes", TOOLS)
    start, end = parser.feed(WRITERS["hermes"]("run_tests", {}) + "\n.")[:2]
    assert start.id == end.call.id != ""
