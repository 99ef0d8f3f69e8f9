"""One client for many servers: what it asks of each, and how it reads what each answers."""

from __future__ import annotations

from typing import Any

import pytest
from model_servers import (
    HELLO,
    READ,
    Start,
    chat,
    delta,
    said,
    streamed,
)
from starlette.responses import JSONResponse

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import AnswerFormat, ChatOptions, Completion, Message, Sampling, ToolCall, ToolSchema, Usage
from lsp_agent.errors import Unsupported, UserError


def test_sampling_is_spelled_out_because_servers_have_defaults_of_their_own(start: Start) -> None:
    server, model = start(lambda path, body: said("hi"))
    chat(model, stop=("x",), seed=5)
    assert server.asked == [
        (
            "/v1/chat/completions",
            {
                "model": "qwen2.5-coder-7b",
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 8,
                "temperature": 0.0,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "seed": 5,
                "stop": ["x"],
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )
    ]


def test_llama_cpp_has_another_name_for_the_repetition_penalty(start: Start) -> None:
    server, model = start(lambda path, body: said("hi"), "llamacpp")
    chat(model, repetition_penalty=1.1)
    assert server.bodies[0]["repeat_penalty"] == 1.1 and "repetition_penalty" not in server.bodies[0]


@pytest.mark.parametrize(
    ("owner", "wanted", "sent"),
    [
        ("vllm", AnswerFormat("json"), {"response_format": {"type": "json_object"}}),
        ("vllm", AnswerFormat("regex", "a+"), {"structured_outputs": {"regex": "a+"}}),
        ("vllm", AnswerFormat("lark", "start: /a/"), {"structured_outputs": {"grammar": "start: /a/"}}),
        (
            "llamacpp",
            AnswerFormat("json_schema", '{"type": "object"}'),
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
                }
            },
        ),
        ("llamacpp", AnswerFormat("regex", "a+"), "a regex"),
        ("vllm", AnswerFormat("python_function", "def f():"), "a python function"),
    ],
)
def test_a_form_of_the_answer_is_asked_for_or_refused(start: Start, owner: str, wanted: Any, sent: Any) -> None:
    server, model = start(lambda path, body: said("{}"), owner)
    if isinstance(sent, str):
        with pytest.raises(Unsupported, match=sent):
            chat(model, options=ChatOptions(answer_format=wanted))
        assert server.asked == []
    else:
        chat(model, options=ChatOptions(answer_format=wanted))
        assert sent.items() <= server.bodies[0].items()


def test_what_other_servers_do_not_know_is_left_out_of_a_conversation(start: Start) -> None:
    server, model = start(lambda path, body: said("hi"))
    called = model.chat(HELLO, Sampling(), CancelToken())  # warm
    assert called
    call = ToolCall("c1", "read_file", {"path": "a.py"}, raw="<tool_call>…")
    history: list[Message] = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "text", "tool_call_id": "c1"},
    ]
    model.chat(history, Sampling(), CancelToken())
    assert server.bodies[1]["messages"][1]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "a.py"}'}}
    ]


def test_tools_and_the_choice_among_them(start: Start) -> None:
    server, model = start(lambda path, body: said("x"))
    other = ToolSchema("other")
    chat(model, tools=[READ, other], options=ChatOptions(tool_choice="read_file"))
    chat(model, tools=[READ, other], options=ChatOptions(tool_choice="none"))
    named, none = server.bodies
    assert named["tool_choice"] == {"type": "function", "function": {"name": "read_file"}}
    assert [tool["function"]["name"] for tool in named["tools"]] == ["read_file", "other"]
    assert "tools" not in none
    server, model = start(lambda path, body: said("x"), "llamacpp")  # which knows no choice by name
    chat(model, tools=[READ, other], options=ChatOptions(tool_choice="read_file"))
    (body,) = server.bodies
    assert body["tool_choice"] == "required" and [t["function"]["name"] for t in body["tools"]] == ["read_file"]


def test_a_stream_is_put_together(start: Start) -> None:
    counted = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}}
    answer = streamed(
        delta(role="assistant", content=""),
        delta(content="one\u2028"),  # a line break to `str.splitlines`, but not to JSON
        delta(content="two\x85", reasoning_content="thinking"),
        delta(finish="length"),
        {"choices": [], "usage": counted},
    )
    _, model = start(lambda path, body: answer)
    assert chat(model) == [Completion("one\u2028two\x85", "length", Usage(9, 8, 4))]


def test_the_end_of_a_stream_ends_its_answers(start: Start) -> None:
    _, model = start(lambda path, body: streamed(delta(content="one")))  # nobody says why it ended
    assert chat(model) == [Completion("one", "stop", Usage())]


def test_calls_come_in_pieces_and_are_typed(start: Start) -> None:
    answer = streamed(
        delta(role="assistant", content=None),
        delta(tool_calls=[{"index": 0, "id": "c1", "function": {"name": "read_file", "arguments": ""}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": '{"path": "a.py",'}}]),
        delta(tool_calls=[{"index": 1, "id": "c2", "function": {"name": "read_file", "arguments": '{"path":"b"}'}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": ' "lines": "3"}'}}]),
        delta(finish="tool_calls"),
    )
    _, model = start(lambda path, body: answer)
    (got,) = chat(model, tools=[READ])
    assert [(c.id, c.arguments, c.errors) for c in got.tool_calls] == [
        ("c1", {"path": "a.py", "lines": 3}, ()),
        ("c2", {"path": "b"}, ()),
    ]
    assert got.finish_reason == "tool_calls" and got.text == ""


def test_arguments_may_be_an_object_and_an_id_missing(start: Start) -> None:
    call = {"function": {"name": "read_file", "arguments": {"path": "a.py"}}}
    _, model = start(lambda path, body: said("", [call], content=None))
    (got,) = chat(model, tools=[READ])
    assert got.tool_calls[0].arguments == {"path": "a.py"} and got.tool_calls[0].id
    assert got.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "text",
    [
        'I look.<tool_call>\n{"name": "read_file", "arguments": {"path": "a.py"}}\n</tool_call>',
        "I look.<tool_call>\n<function=read_file>\n<parameter=path>\na.py\n</parameter>\n</function>\n</tool_call>",
    ],
)
def test_calls_that_the_server_left_in_the_text_are_read(start: Start, text: str) -> None:
    _, model = start(lambda path, body: said(text))
    (got,) = chat(model, tools=[READ])
    assert [(c.name, c.arguments) for c in got.tool_calls] == [("read_file", {"path": "a.py"})]
    assert got.text == "I look." and got.finish_reason == "tool_calls"
    (plain,) = chat(model)
    assert plain.text == text, "without tools it is text"


def test_thoughts_are_no_part_of_the_answer(start: Start) -> None:
    _, model = start(lambda path, body: said("<think>\nhm\n</think>\n\nyes", reasoning_content="hm"))
    assert chat(model)[0].text == "yes"


@pytest.mark.parametrize("broken", [{}, {"choices": [{}]}, [], {"choices": 3}])
def test_an_answer_without_the_apis_shape_is_one_sentence(start: Start, broken: Any) -> None:
    _, model = start(lambda path, body: JSONResponse(broken))
    with pytest.raises(UserError, match="without the API's shape"):
        chat(model)
