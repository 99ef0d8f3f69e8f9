"""What goes wrong is told in the API's own shapes, whatever is sent; what is told to the log names no prompt."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from api_service import Service, Speaker, ask, serving

from lsp_agent.engine.api import bodies
from lsp_agent.engine.api.admission import Admission
from lsp_agent.engine.api.errors import api_error
from lsp_agent.engine.gpu.errors import GpuLost
from lsp_agent.engine.remote.connection import Reply
from lsp_agent.engine.remote.refusals import our_refusal
from lsp_agent.errors import PromptTooLong, UnknownModel, UserError

HI = [{"role": "user", "content": "hi"}]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with serving({"speaker": Speaker(["hello"])}) as running:
        yield running


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[httpx.Client]:
    with service.http() as client:
        yield client


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else ""


def error(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, in exactly the API's shape."""
    body = response.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text and ".py" not in response.text
    return body["error"]


def test_what_is_wrong_with_a_text_or_a_chat_to_tokenise_is_named_as_sent(http: httpx.Client) -> None:
    for body, param in (
        ({}, "prompt"),
        ({"prompt": 1}, "prompt"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x"}], "prompt": "x"}, "prompt"),
        ([], None),
    ):
        response = http.post("/tokenize", json=body)
        assert response.status_code == 400 and error(response)["param"] == param


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        b"[]",
        b'"text"',
        b'{"messages": [}',
        b'{"messages": "\xff\xfe"}',
        b'{"messages": "\\ud800"}',
        b"[" * 100_000,
        b'{"messages": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
        b'{"n": 1' + b"0" * 5000 + b', "messages": [{"role": "user", "content": "x"}]}',
    ],
    ids=lambda content: content[:16].decode(errors="replace"),
)
def test_whatever_is_no_request_is_a_bad_request(http: httpx.Client, content: bytes) -> None:
    response = http.post("/v1/chat/completions", content=content, headers=JSON)
    assert response.status_code == 400
    assert error(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": HI, "colour": "red"}, "colour"),
        ({"messages": HI, "n": 0}, "n"),
        ({"messages": HI, "n": 33}, "n"),
        ({"messages": HI, "temperature": 3}, "temperature"),
        ({"messages": HI, "top_p": -0.1}, "top_p"),
        ({"messages": HI, "frequency_penalty": 2.5}, "frequency_penalty"),
        ({"messages": HI, "max_tokens": 0}, "max_tokens"),
        ({"messages": HI, "stop": ["x"] * 17}, "stop"),
        ({"messages": HI, "stop": [""]}, "stop[0]"),
        ({"messages": HI, "stop": "x" * 1001}, "stop[0]"),
        ({"messages": HI, "logit_bias": {"7": 101}}, "logit_bias.7"),
        ({"messages": HI, "logit_bias": {"9000000": 1}}, "logit_bias"),
        ({"messages": HI, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HI, "response_format": {"type": "xml"}}, "response_format.type"),
        ({"messages": HI, "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"messages": HI, "structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"messages": HI, "modalities": ["audio"]}, "modalities[0]"),
        ({"messages": HI, "functions": []}, "functions"),
        ({"messages": HI, "tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools"),
        (
            {
                "messages": HI,
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": "x" * 300_000}}}],
            },
            "tools[0].function.parameters",
        ),
    ],
    ids=name_of,
)
def test_the_field_at_fault_is_named(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    told = error(response)
    assert told["param"] == param and param in told["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0][0]"),
        ({"prompt": [4, 0x110000]}, "prompt[0]"),
        ({"prompt": ["a"] * 17, "n": 2}, "n"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "echo": True, "suffix": "b"}, "echo"),
        ({"prompt": [65], "suffix": "b"}, "prompt"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ],
    ids=name_of,
)
def test_the_field_of_a_completion_at_fault_is_named(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert (error(response)["param"] or "").startswith(param.partition("[")[0])


def test_what_was_sent_is_not_quoted(http: httpx.Client) -> None:
    body = {"messages": [{"role": "PURPLE-ELEPHANT", "content": 5}], "n": "PURPLE-ELEPHANT"}
    assert "PURPLE" not in http.post("/v1/chat/completions", json=body).text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v2/models", 404, "unknown_url"),
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
    ],
)
def test_a_path_that_is_none(http: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    response = http.request(method, path)
    assert response.status_code == status and error(response)["code"] == code


def test_an_unknown_model_is_not_found(service: Service) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        service.openai().chat.completions.create(model="gpt-5", messages=HI)
    assert raised.value.code == "model_not_found" and raised.value.param == "model"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_body_that_says_it_is_no_json_is_refused(http: httpx.Client, kind: str | None) -> None:
    """A web page may send these to any address without being asked for leave."""
    headers = {"Content-Type": kind} if kind else {}
    response = http.post("/v1/chat/completions", content=json.dumps({"messages": HI}).encode(), headers=headers)
    assert response.status_code == 415 and error(response)["code"] == "unsupported_content_type"


def test_a_compressed_body_is_refused(http: httpx.Client) -> None:
    response = http.post("/v1/completions", content=b"\x1f\x8b", headers={**JSON, "Content-Encoding": "gzip"})
    assert response.status_code == 415 and error(response)["code"] == "unsupported_content_encoding"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(
    http: httpx.Client, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies.read_json, "__defaults__", (1000,))
    content = json.dumps({"messages": [{"role": "user", "content": "x" * 5000}]}).encode()
    sent = iter([content[:400], content[400:]]) if chunked else content
    response = http.post("/v1/chat/completions", content=sent, headers=JSON)
    assert response.status_code == 413 and error(response)["code"] == "body_too_large"


def test_a_length_that_is_a_lie_is_refused_unread(service: Service) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(service.uds)
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99999999999\r\n\r\n{"
        )
        raw.settimeout(10)
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_a_full_queue_says_when_to_come_again() -> None:
    speaker = Speaker(["x"], endless=True)
    with serving({"speaker": speaker}, admission=Admission(3, 2)) as service:
        one, other = service.openai(), service.openai(default_headers={"X-LSP-Agent-Client": "other"})
        ask = {"model": "speaker", "messages": HI, "stream": True}
        waiting = [one.chat.completions.create(**ask, user="one") for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as raised:
            one.chat.completions.create(**ask, user="one")
        assert raised.value.code == "rate_limit_exceeded" and "This client" in raised.value.message
        assert int(raised.value.response.headers["retry-after"]) >= 1
        waiting.append(other.chat.completions.create(**ask))
        with pytest.raises(openai.RateLimitError, match="The engine has 3"):
            one.chat.completions.create(**ask, user="third")
        for stream in waiting:
            stream.close()


def test_while_stopping_and_after_the_gpu_was_lost_nothing_is_answered() -> None:
    with serving({"speaker": Speaker(["x"])}) as service:
        client = service.openai()
        service.host.thread.broken = GpuLost("The GPU stopped working in mid-run; run again.")
        with pytest.raises(openai.InternalServerError) as raised:
            client.chat.completions.create(model="speaker", messages=HI)
        assert raised.value.status_code == 503 and raised.value.code == "gpu_lost"
        assert service.http().get("/health").status_code == 503
        service.host.thread.broken = None
        assert service.http().get("/health").status_code == 200
        service.host.stopping = True
        with pytest.raises(openai.InternalServerError) as raised:
            client.chat.completions.create(model="speaker", messages=HI)
        assert raised.value.status_code == 503 and raised.value.response.headers["retry-after"]
        assert service.http().get("/health").status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_ours_tells_no_secrets(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    def fail(number: int) -> None:
        raise RuntimeError("PURPLE-ELEPHANT")

    class Failing(Speaker):
        def advance(self) -> bool:
            try:
                return super().advance()
            except RuntimeError as error:
                self.tell(error)
                return True

        def submit(self, request: Any, on_step: Any) -> Any:
            self.tell = on_step
            return super().submit(request, on_step)

    with caplog.at_level(logging.INFO):
        response = ask(Failing(["x"], before_step=fail), messages=HI, stream=stream)
    assert response.status_code == 500
    told = error(response)
    assert told["type"] == "server_error" and "PURPLE" not in response.text + caplog.text
    assert "RuntimeError in" in caplog.text and "test_api_errors.py" in caplog.text


def test_no_prompt_reaches_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="lsp_agent"):
        ask(Speaker(["x"]), messages=[{"role": "user", "content": "PURPLE-ELEPHANT"}])
        ask(Speaker(["x"]), messages=[{"role": "user", "content": "PURPLE-ELEPHANT"}], n="PURPLE-ELEPHANT")
    assert "PURPLE" not in caplog.text


@pytest.mark.parametrize("failure", [PromptTooLong("Too long."), GpuLost("Lost."), UnknownModel("Which?")])
def test_our_own_client_raises_what_the_engine_raised(failure: UserError) -> None:
    told = api_error(failure)
    raised = our_refusal(Reply(told.status, told.body))
    assert type(raised) is type(failure) and str(raised) == str(failure)


def test_what_is_no_fault_of_ours_is_a_bad_request() -> None:
    told = api_error(UserError("Do otherwise."))
    assert told.status == 400 and str(our_refusal(Reply(told.status, told.body))) == "Do otherwise."
