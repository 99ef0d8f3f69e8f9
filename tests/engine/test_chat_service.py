"""Chats over HTTP: tools, calls and streams, in OpenAI's shapes. The engine is one that says what it is told to."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import httpx
import pytest
from api_service import Speaker
from api_service import ask as post
from tool_calls_samples import TOOLS, WRITERS, write_qwen3_coder

from lsp_agent.chat_model import Problem
from lsp_agent.engine.remote.replies import completions
from lsp_agent.engine.tool_calls import call_to_openai, parse_answer, tool_to_openai

TOOL_ENTRIES = [tool_to_openai(tool) for tool in TOOLS]
READ = write_qwen3_coder("read_file", {"path": "a.py", "start": 3})
TESTS = write_qwen3_coder("run_tests", {})

ask = partial(post, messages=[{"role": "user", "content": "hi"}], tools=TOOL_ENTRIES)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    *blocks, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def added_up(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make whole choices of a stream's, as every client of the API does."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            delta = part.pop("delta")
            choice = choices.setdefault(part["index"], {"message": {"content": None}})
            choice.update(part)
            message = choice["message"]
            if (text := delta.pop("content", None)) is not None:
                message["content"] = (message["content"] or "") + text
            for call in delta.pop("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                assert call.pop("index") == len(calls)
                calls.append(call)
            message.update(delta)
    return [choices[index] for index in sorted(choices)]


def test_an_answer_with_calls() -> None:
    response = ask(Speaker([f"I look.\n{READ}\n{TESTS}"]))
    body = response.json()
    (choice,) = body["choices"]
    assert body["object"] == "chat.completion"
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == "I look.\n\n"
    names = [call["function"]["name"] for call in choice["message"]["tool_calls"]]
    assert names == ["read_file", "run_tests"]
    call = choice["message"]["tool_calls"][0]
    assert call["type"] == "function" and call["id"]
    assert json.loads(call["function"]["arguments"]) == {"path": "a.py", "start": 3}
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def test_content_is_null_where_there_are_only_calls() -> None:
    (choice,) = ask(Speaker([READ])).json()["choices"]
    assert choice["message"]["content"] is None
    (choice,) = ask(Speaker([""])).json()["choices"]
    assert choice["message"]["content"] == ""
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("call_format", WRITERS)
def test_a_stream_adds_up_to_the_whole_answer(call_format: str) -> None:
    write = WRITERS[call_format]
    texts = [f"I look.\n{write('read_file', {'path': 'a'})}\n{write('run_tests', {})}\nDone.", "Nothing to do.", ""]
    speaker = Speaker(texts, call_format)
    whole = ask(speaker, n=3).json()
    chunks = events(ask(speaker, n=3, stream=True, stream_options={"include_usage": True}))
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    *_, last = chunks
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    streamed = added_up(chunks)
    for choice in [*streamed, *whole["choices"]]:
        choice["message"]["content"] = choice["message"]["content"] or None
        for call in choice["message"].get("tool_calls", ()):
            assert call.pop("id").startswith("call_")
        assert choice["message"].pop("refusal", None) is None
    assert streamed == whole["choices"]


def test_text_is_streamed_as_it_is_said() -> None:
    chunks = events(ask(Speaker(["one two three"]), stream=True))
    assert [c["choices"][0]["delta"].get("content") for c in chunks][:5] == ["o", "n", "e", " ", "t"]
    assert [c["choices"][0]["delta"].get("role") for c in chunks][:2] == ["assistant", None]
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_call_that_cannot_be_read_is_text_and_a_problem(streamed: bool) -> None:
    cut = READ[: READ.index("a.py")]
    response = ask(Speaker([f"I look.\n{cut}"], cut_off=True), stream=streamed)
    (choice,) = added_up(events(response)) if streamed else response.json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == f"I look.\n{cut}"
    assert "tool_calls" not in choice["message"]
    (problem,) = choice["message"]["lsp_agent"]["problems"]
    assert problem["problem"] == "cut_off" and "whole" in problem["message"]


def test_a_call_with_wrong_arguments_is_a_call_that_says_so() -> None:
    text = write_qwen3_coder("read_file", {"start": "top"})
    body = ask(Speaker([text])).json()
    (answer,) = completions(body)
    (call,) = answer.tool_calls
    assert [error.problem for error in call.errors] == [Problem.INVALID_VALUE, Problem.MISSING_PARAMETER]
    assert answer.text == "" and answer.problems == ()
    assert (call.raw, call.arguments) == (text, {"start": "top"})


def test_the_client_reads_what_the_server_writes() -> None:
    text = f"I look.\n{READ}\n<tool_call>\n<function=run_tests>"
    (answer,) = completions(ask(Speaker([text])).json())
    (call,) = answer.tool_calls
    assert (call.name, call.arguments, call.raw) == ("read_file", {"path": "a.py", "start": 3}, READ)
    assert answer.text == text.replace(READ, "")
    assert [problem.problem for problem in answer.problems] == [Problem.CUT_OFF]
    assert answer.usage.prompt_tokens == 3 and answer.mean_logprob == -0.5


def test_the_conversation_reaches_the_template() -> None:
    speaker = Speaker(["ok"])
    (call,) = parse_answer(READ, "qwen3_coder", TOOLS).calls
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "Read it."}]},
        {"role": "assistant", "content": None, "tool_calls": [call_to_openai(call)]},
        {"role": "tool", "tool_call_id": call.id, "content": "x = 1"},
    ]
    assert ask(speaker, messages=conversation).status_code == 200
    ((messages, tools),) = speaker.chats
    assert messages == [
        {"role": "user", "content": "Read it."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "x = 1", "tool_call_id": call.id},
    ]
    assert tuple(tools) == TOOLS


def test_tool_choice_none_offers_no_tools_and_reads_no_calls() -> None:
    speaker = Speaker([READ])
    (choice,) = ask(speaker, tool_choice="none").json()["choices"]
    assert speaker.chats[0][1] == []
    assert choice["message"]["content"] == READ and choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL_ENTRIES[0], TOOL_ENTRIES[0]]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"description": "no name"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "bad name!"}}]}, "tools[0].function.name"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "too long"}]}, "too long"),
        ({"messages": [{"role": "user", "content": "too long"}], "stream": True}, "too long"),
    ],
)
def test_a_bad_request_gets_the_apis_error_shape(body: dict[str, Any], names: str) -> None:
    response = ask(Speaker(["x"]), **body)
    assert response.status_code == 400
    assert names in response.json()["error"]["message"]


def test_an_error_within_a_stream_ends_it() -> None:
    *_, last = events(ask(Speaker(["one two three"], fails_after=2), stream=True))
    assert last["error"]["message"] == "The engine ran out of memory."
