"""The engine as a service: what its client can rely on. Uses the real 0.5B model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import AnswerFormat, ChatOptions, Message, Sampling, ToolSchema
from lsp_agent.engine.service.client import EngineModel
from lsp_agent.errors import Cancelled, UserError
from lsp_agent.models import open_model, store

pytestmark = pytest.mark.model

PREFIX = "def area(width, height):\n    "
SUFFIX = "\n\n\nprint(area(2, 3))\n"
MIDDLE = "return width * height"
LINE = Sampling(max_tokens=16, stop=("\n",))
STORY: list[Message] = [{"role": "user", "content": "Tell a very long story about a lighthouse."}]


def opened(name: str) -> EngineModel:
    try:
        store.resolve(name)
    except UserError as error:
        pytest.skip(str(error))
    model = open_model(name)
    assert isinstance(model, EngineModel)
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineModel]:
    """On an engine of this module's own, which all of its tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSP_AGENT_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        client = opened("qwen2.5-coder-0.5b")
    yield client
    client.close()


def ask(model: EngineModel, path: str, body: dict[str, object]) -> httpx.Response:
    async def post() -> httpx.Response:
        transport = httpx.AsyncHTTPTransport(uds=str(model.endpoint.place.socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as http:
            return await http.post(path, json=body)

    return asyncio.run(post())


def test_infill_answers_with_what_fits_between(model: EngineModel) -> None:
    [answer] = model.infill(PREFIX, SUFFIX, LINE, CancelToken())
    assert answer.text == MIDDLE
    assert answer.finish_reason == "stop"
    assert answer.mean_logprob is not None and answer.mean_logprob < 0


def test_the_second_question_about_a_text_reads_only_what_is_new(model: EngineModel) -> None:
    first = model.infill("# a comment\n" * 20 + PREFIX, SUFFIX, LINE, CancelToken())[0].usage
    second = model.infill("# a comment\n" * 20 + PREFIX, SUFFIX + "# more\n", LINE, CancelToken())[0].usage
    assert second.cached_tokens >= first.prompt_tokens - 20
    assert second.prompt_tokens - second.cached_tokens < 20


def test_n_answers_count_their_prompt_once(model: EngineModel) -> None:
    answers = model.infill(PREFIX, SUFFIX, Sampling(max_tokens=8, temperature=1.0, seed=1), CancelToken(), n=3)
    assert len(answers) == 3
    assert [answer.usage.prompt_tokens > 0 for answer in answers] == [True, False, False]


def test_the_same_seed_draws_the_same_answers(model: EngineModel) -> None:
    """From the same cache: rounding of activations to int8 makes a prompt read in other pieces differ a little."""
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=1)
    model.infill(PREFIX, SUFFIX, sampling, CancelToken())
    first, second = (
        [answer.text for answer in model.infill(PREFIX, SUFFIX, sampling, CancelToken(), n=3)] for _ in range(2)
    )
    assert first == second
    other = Sampling(max_tokens=8, temperature=1.0, seed=2)
    assert [answer.text for answer in model.infill(PREFIX, SUFFIX, other, CancelToken(), n=3)] != first


def test_a_wrong_operator_is_the_surprising_token(model: EngineModel) -> None:
    text = "def add(a, b):\n    return a - b\n"
    scores = model.score(text, CancelToken())
    assert text[min(scores, key=lambda s: s.logprob).start :].startswith(" - b")


def test_cancel_stops_decoding_and_the_engine_is_free_at_once(model: EngineModel) -> None:
    cancel = CancelToken()
    threading.Timer(0.5, cancel.cancel).start()
    with pytest.raises(Cancelled):
        model.chat(STORY, Sampling(max_tokens=1500), cancel)
    started = time.monotonic()
    model.chat([{"role": "user", "content": "Hi"}], Sampling(max_tokens=2), CancelToken())
    assert time.monotonic() - started < 10


def test_a_prompt_beyond_the_context_is_refused_in_one_sentence(model: EngineModel) -> None:
    with pytest.raises(UserError, match=r"context holds 8192"):
        model.chat([{"role": "user", "content": "word " * 9000}], Sampling(), CancelToken())


def test_what_is_asked_of_the_answer_reaches_the_engine(model: EngineModel) -> None:
    """Options of a chat, over the API's fields: a format, a tool that must be called, text to copy from."""
    asked: list[Message] = [{"role": "user", "content": "What is 6 times 7?"}]
    sampling = Sampling(max_tokens=40)
    digits = ChatOptions(answer_format=AnswerFormat("regex", "[0-9]{2}"), urgent=True)
    text = model.chat(asked, sampling, CancelToken(), options=digits)[0].text
    assert len(text) == 2 and text.isdecimal()
    forced = ChatOptions(tool_choice="read_file")
    [call] = model.chat(asked, sampling, CancelToken(), tools=[READ_FILE], options=forced)[0].tool_calls
    assert call.name == "read_file" and not call.errors
    copied = ChatOptions(prediction="6 times 7 is 42. " * 10)
    assert model.chat(asked, sampling, CancelToken(), options=copied)[0].text


def test_an_engine_killed_while_it_answers_is_started_again_and_asked_again(model: EngineModel) -> None:
    pid = model.endpoint.about.pid
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    [answer] = model.chat(STORY, Sampling(max_tokens=120), CancelToken())
    assert answer.finish_reason in ("stop", "length")
    assert model.endpoint.about.pid != pid
    assert model.infill(PREFIX, SUFFIX, LINE, CancelToken())[0].text == MIDDLE


READ_FILE = ToolSchema(
    "read_file",
    "Read the first lines of a file",
    {
        "type": "object",
        "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}},
        "required": ["path", "lines"],
    },
)
PORT: list[Message] = [{"role": "user", "content": "Read the first 20 lines of settings.toml and tell me the port."}]
SETTINGS = 'host = "localhost"\nport = 8417\n'


def call_and_result(asked: EngineModel) -> list[Message]:
    """Ask, check the call that comes back, and give the conversation that goes on after its result."""
    [answer] = asked.chat(PORT, Sampling(max_tokens=100), CancelToken(), tools=[READ_FILE])
    [call] = answer.tool_calls
    assert answer.finish_reason == "tool_calls" and not answer.problems
    assert (call.name, call.arguments, call.errors) == ("read_file", {"path": "settings.toml", "lines": 20}, ())
    return [
        *PORT,
        {"role": "assistant", "content": answer.text, "tool_calls": answer.tool_calls},
        {"role": "tool", "tool_call_id": call.id, "content": SETTINGS},
    ]


def test_a_tool_is_called_with_typed_arguments(model: EngineModel) -> None:
    conversation = call_and_result(model)
    first = model.chat(PORT, Sampling(max_tokens=1), CancelToken(), tools=[READ_FILE])[0].usage
    after = model.chat(conversation, Sampling(max_tokens=1), CancelToken(), tools=[READ_FILE])[0].usage
    assert after.prompt_tokens > first.prompt_tokens
    assert after.cached_tokens >= first.prompt_tokens - 1


def test_a_stream_says_what_the_whole_answer_says(model: EngineModel) -> None:
    body = {"messages": [{"role": "user", "content": "Count to five."}], "max_tokens": 24, "temperature": 0}
    whole = ask(model, "/v1/chat/completions", body).json()["choices"][0]
    *blocks, done, _ = ask(model, "/v1/chat/completions", {**body, "stream": True}).text.split("\n\n")
    choices = [json.loads(block.removeprefix("data: "))["choices"][0] for block in blocks]
    assert done == "data: [DONE]"
    assert len(choices) > 5
    assert "".join(choice["delta"].get("content", "") for choice in choices) == whole["message"]["content"]
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + [whole["finish_reason"]]


def test_a_client_that_leaves_a_stream_frees_the_engine(model: EngineModel) -> None:
    async def leave() -> None:
        transport = httpx.AsyncHTTPTransport(uds=str(model.endpoint.place.socket))
        body = {"messages": STORY, "max_tokens": 1500, "stream": True}
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as http,
            http.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            async for line in response.aiter_lines():
                if '"content"' in line:
                    return

    asyncio.run(leave())
    started = time.monotonic()
    model.chat([{"role": "user", "content": "Hi"}], Sampling(max_tokens=2), CancelToken())
    assert time.monotonic() - started < 10


def test_a_tools_result_is_answered_from() -> None:
    """The 0.5B model calls its tool again and again, the 1.5B model answers once no tools are on offer."""
    larger = opened("qwen2.5-coder-1.5b")
    try:
        [answer] = larger.chat(call_and_result(larger), Sampling(max_tokens=40), CancelToken())
    finally:
        larger.close()
    assert "8417" in answer.text
    assert answer.finish_reason == "stop"
