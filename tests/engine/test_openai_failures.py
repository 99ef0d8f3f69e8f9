"""Servers that refuse, are busy, break off or never end; and who gives up first."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from model_servers import (
    HELLO,
    Start,
    chat,
    delta,
    refused,
    said,
    streamed,
)
from starlette.responses import Response, StreamingResponse

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.engine.remote import connection
from lsp_agent.errors import Cancelled, PromptTooLong, UnknownModel, UserError


@pytest.mark.parametrize(
    ("status", "body", "kind", "sentence"),
    [
        (401, {"error": {"message": "Invalid key"}}, UserError, "refused the key: Invalid key; set LSP_AGENT_BACKEND"),
        (404, {"error": {"message": "The model `x` does not exist."}}, UnknownModel, "it has qwen2.5-coder-7b: set b"),
        (404, "<html>not here</html>", UserError, "has no such path: is backend.url right"),
        (400, {"error": {"message": "n", "code": "context_length_exceeded"}}, PromptTooLong, "does not fit"),
        (
            400,
            {"object": "error", "message": "This model's maximum context length is 8 tokens."},
            PromptTooLong,
            "maximum context length is 8",
        ),
        (400, {"error": {"type": "exceed_context_size_error", "message": "too big"}}, PromptTooLong, "too big"),
        (413, "", PromptTooLong, "does not fit"),
        (422, {"detail": [{"loc": ["body", "messages"], "msg": "bad"}]}, UserError, "HTTP 422.: body.messages: bad"),
        (500, {"error": "it broke"}, UserError, "HTTP 500.: it broke"),
        (307, "", UserError, "another address: set backend.url"),
        (503, {"error": {"message": "Loading"}}, UserError, "is busy: Loading; try again later"),
        (200, {"error": {"message": "odd"}}, UserError, "HTTP 200.: odd"),
    ],
)
def test_each_refusal_is_one_sentence(start: Start, status: int, body: Any, kind: Any, sentence: str) -> None:
    headers = {"retry-after": "3600", "location": "https://elsewhere.example/v1"}
    _, model = start(lambda path, _: refused(status, body, **headers))
    with pytest.raises(kind, match=sentence) as caught:
        chat(model)
    assert "\n" not in str(caught.value)


def test_an_error_in_mid_stream_is_told(start: Start) -> None:
    _, model = start(lambda path, body: streamed(delta(content="a"), {"error": {"message": "out of memory"}}))
    with pytest.raises(UserError, match="out of memory"):
        chat(model)


def test_a_busy_server_is_waited_for_as_long_as_it_asks(start: Start) -> None:
    answers = [refused(429, {}, **{"retry-after": "0"}), refused(503, "", **{"retry-after": "0.01"}), said("hi")]
    server, model = start(lambda path, body: answers[len(server.asked) - 1])
    assert chat(model)[0].text == "hi" and len(server.asked) == 3


def test_a_busy_server_that_asks_for_no_wait_is_not_asked_for_ever(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LONGEST_WAIT_S", 0.6)
    server, model = start(lambda path, body: refused(429, {}, **{"retry-after": "0"}))
    end = threading.Timer(10, setattr, (server, "answer", lambda path, body: said("at last")))
    end.start()
    with pytest.raises(UserError, match="is busy"):
        chat(model)
    end.cancel()
    assert len(server.asked) <= 4


def test_waiting_for_a_busy_server_ends_with_the_cancellation(start: Start) -> None:
    cancel = CancelToken()

    def answer(path: str, body: dict[str, Any]) -> Response:
        cancel.cancel()
        return refused(503, "", **{"retry-after": "50"})

    _, model = start(answer)
    with pytest.raises(Cancelled):
        model.chat(HELLO, Sampling(), cancel)


def test_a_dropped_connection_is_tried_again_once(start: Start) -> None:
    broken = [streamed(delta(content="on"), breaks=True), streamed(delta(content="on"), done=False)]
    server, model = start(lambda path, body: broken.pop() if broken else said("hi"))
    with pytest.raises(UserError, match="broke twice"):
        chat(model)
    assert len(server.asked) == 2
    broken.append(streamed(delta(content="on"), breaks=True))
    assert chat(model)[0].text == "hi" and len(server.asked) == 4


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (lambda: streamed({"choices": [None]}), "without the API's shape"),
        (lambda: streamed({"choices": 5}), "without the API's shape"),
        (lambda: streamed(delta(content=["a"])), "without the API's shape"),
        (lambda: Response(b"no gzip", headers={"content-encoding": "gzip"}), "not compressed as it says"),
    ],
)
def test_what_no_server_should_send_is_one_sentence(start: Start, answer: Any, what: str) -> None:
    _, model = start(lambda path, body: answer())
    with pytest.raises(UserError, match=what):
        chat(model)


def test_a_gateway_error_is_tried_again_once(start: Start) -> None:
    server, model = start(lambda path, body: refused(502, "bad gateway") if len(server.asked) < 2 else said("hi"))
    assert chat(model)[0].text == "hi"


def test_cancelling_closes_the_connection(start: Start) -> None:
    cancel = CancelToken()

    async def forever() -> Any:
        try:
            yield b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'
            cancel.cancel()
            await asyncio.Event().wait()
        finally:
            server.left.set()

    server, model = start(lambda path, body: StreamingResponse(forever(), media_type="text/event-stream"))
    with pytest.raises(Cancelled):
        model.chat(HELLO, Sampling(), cancel)
    assert server.left.wait(5)


def test_closing_the_model_ends_its_requests(start: Start) -> None:
    asked = threading.Event()

    async def forever() -> Any:
        asked.set()
        await asyncio.Event().wait()
        yield b""

    _, model = start(lambda path, body: StreamingResponse(forever(), media_type="text/event-stream"))
    ended: list[BaseException] = []

    def ask() -> None:
        try:
            chat(model)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert asked.wait(5)
    model.close()
    thread.join(5)
    assert [type(error) for error in ended] == [Cancelled]
    with pytest.raises(Cancelled):
        chat(model)
