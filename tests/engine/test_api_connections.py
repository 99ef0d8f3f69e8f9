"""Who may ask, who is told apart from whom, and what a connection that closes costs the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from api_service import Service, Speaker, serving

from lsp_agent.engine.api import prepare

TOKEN = "s3cret-token"
HI = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def guarded() -> Iterator[Service]:
    with serving({"speaker": Speaker(["hello"])}, tcp=True, token=TOKEN) as running:
        yield running


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_the_right_token_opens(guarded: Service) -> None:
    answer = guarded.openai().chat.completions.create(model="speaker", messages=HI)
    assert answer.choices[0].message.content == "hello"


@pytest.mark.parametrize("key", ["wrong", TOKEN[:-1], TOKEN + "x", "none"])
def test_a_wrong_token_does_not(guarded: Service, key: str) -> None:
    with pytest.raises(openai.AuthenticationError) as raised:
        guarded.openai(api_key=key).models.list()
    assert raised.value.code == "invalid_api_key"
    assert raised.value.response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("header", [None, "", "Bearer", f"Basic {TOKEN}", TOKEN, b"Bearer \xff\xfe"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/made/up", CHAT])
def test_without_a_token_nothing_is_told(guarded: Service, path: str, header: Any) -> None:
    with guarded.http() as http:
        response = http.request(
            "POST" if path == CHAT else "GET", path, headers={} if header is None else {"Authorization": header}
        )
        assert response.status_code == 401 and set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::2]", "[", ""])
def test_another_hosts_name_is_refused_even_with_the_token(guarded: Service, host: str) -> None:
    """A stranger's DNS may point its name here, which would make its pages this server's own."""
    headers = {"Host": host, "Authorization": f"Bearer {TOKEN}"}
    with guarded.http() as http:
        for path in ("/v1/models", "/health"):
            response = http.get(path, headers=headers)
            assert response.status_code == 403 and response.json()["error"]["code"] == "forbidden_host"


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "[::1]:1"])
def test_this_machines_names_are_not(guarded: Service, host: str) -> None:
    with guarded.http() as http:
        assert http.get("/v1/models", headers={"Host": host, "Authorization": f"Bearer {TOKEN}"}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000"])
def test_a_web_page_is_refused_even_with_the_token(guarded: Service, origin: str) -> None:
    with guarded.http(headers={"Origin": origin, "Authorization": f"Bearer {TOKEN}"}) as http:
        assert http.get("/v1/models").status_code == 403
        preflight = http.options(CHAT, headers={"Access-Control-Request-Method": "POST"})
        assert preflight.status_code == 403 and "access-control-allow-origin" not in preflight.headers


def test_clients_are_told_apart() -> None:
    speaker = Speaker(["x"])
    with serving({"speaker": speaker}) as service, service.http() as one, service.http() as other:
        body = {"messages": HI}
        one.post(CHAT, json={**body, "user": "me"}, headers={"X-LSP-Agent-Client": "window 7"})
        one.post(CHAT, json={**body, "user": "me"})
        for http in (one, one, other):
            http.post(CHAT, json=body)
        named, by_user, first, again, second = (request.client for request in speaker.asked)
    assert (named, by_user) == ("window 7", "me")
    assert first == again != second and first and second


@pytest.mark.parametrize("stream", [False, True])
def test_a_connection_that_closes_stops_its_generation_at_the_next_step(stream: bool) -> None:
    """The engine is held at a step until the client has gone: that step is the last that is made for it."""
    steps: list[int] = []
    gone = threading.Event()

    def before_step(number: int) -> None:
        steps.append(number)
        if number == 5:
            assert gone.wait(10)

    speaker = Speaker(["x"], endless=True, before_step=before_step)
    with serving({"speaker": speaker}) as service:

        async def leave() -> None:
            transport = httpx.AsyncHTTPTransport(uds=service.uds)
            async with httpx.AsyncClient(transport=transport, base_url="http://engine") as http:
                asking = asyncio.create_task(http.post(CHAT, json={"messages": HI, "stream": stream}))
                while len(steps) < 6:
                    await asyncio.sleep(0.001)
                asking.cancel()

        asyncio.run(leave())
        until(lambda: speaker.asked[0].cancel.cancelled, 2)
        gone.set()
        until(lambda: not service.server.busy)
        assert steps[-1] <= 6
        until(lambda: not service.host.busy)
        assert service.openai().models.list().data  # and the server lives on


def test_a_client_that_leaves_before_its_turn_is_never_served(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = threading.Event(), threading.Event()
    original = prepare.prepare_chat

    def slow(*arguments: Any) -> Any:
        entered.set()
        assert go_on.wait(10)
        return original(*arguments)

    monkeypatch.setattr("lsp_agent.engine.api.server.prepare_chat", slow)
    speaker = Speaker(["x"])
    with serving({"speaker": speaker}) as service:
        with pytest.raises(httpx.ReadTimeout), service.http() as http:
            http.post(CHAT, json={"messages": HI}, timeout=0.2)
        assert entered.is_set()
        time.sleep(0.05)
        go_on.set()
        until(lambda: not service.server.busy)
        assert not speaker.asked


def test_somebody_at_the_cursor_waits_for_no_others_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of others as many are being prepared as there are threads, and more wait."""
    go_on = threading.Event()
    original = prepare.prepare_text

    def slow(engine: Any, model: Any, body: Any, asker: Any) -> Any:
        assert body.priority < 0 or go_on.wait(10)
        return original(engine, model, body, asker)

    monkeypatch.setattr("lsp_agent.engine.api.server.prepare_text", slow)
    with serving({"speaker": Speaker(["x"])}) as service, ThreadPoolExecutor(6) as pool:

        def ask(priority: int) -> int:
            with service.http() as http:
                return http.post("/v1/completions", json={"prompt": "ab", "priority": priority}).status_code

        others = [pool.submit(ask, 0) for _ in range(5)]
        until(lambda: service.server.busy == 5)
        assert ask(-1) == 200 and not any(other.done() for other in others)
        go_on.set()
        assert [other.result() for other in others] == [200] * 5


def test_a_reader_that_stops_reading_holds_up_nobody() -> None:
    speaker = Speaker(["x" * 50], endless=True, before_step=lambda number: time.sleep(0.001))
    with serving({"speaker": speaker}) as service:
        stalled = service.openai().chat.completions.create(model="speaker", messages=HI, stream=True)
        started = time.monotonic()
        for _ in range(20):
            assert service.http().get("/health").status_code == 200
        assert time.monotonic() - started < 5
        stalled.close()


def test_the_loop_answers_while_a_long_prompt_is_tokenised_and_decoded(tiny_engine: Any) -> None:
    """A quarter of a million characters of tokenising, and decoding on the engine's thread, beside it."""
    waits: list[float] = []
    with serving({"tiny": tiny_engine()}) as service, service.http() as http:
        text = "def add(a, b):\n    return a + b\n" * 8_000
        done = threading.Event()

        def ask() -> None:
            with service.http() as other:
                for _ in range(2):
                    assert other.post("/tokenize", json={"prompt": text}).json()["count"] > 50_000
                other.post("/v1/completions", json={"prompt": "def f", "max_tokens": 100, "stream": True})
            done.set()

        asking = threading.Thread(target=ask)
        asking.start()
        while not done.is_set():
            started = time.monotonic()
            assert http.get("/health").status_code == 200
            waits.append(time.monotonic() - started)
        asking.join()
    assert len(waits) > 5
    assert sorted(waits)[int(len(waits) * 0.95)] < 0.1


def test_a_model_is_kept_while_a_request_to_it_is_prepared() -> None:
    """Tokenising a long prompt takes longer than a model without work stays loaded beside one that wants its place."""
    kept: list[bool] = []

    class Preparing(Speaker):
        def chat_prompt(self, *asked: Any) -> Any:
            kept.append(service.host.busy)
            return super().chat_prompt(*asked)

    with serving({"speaker": Preparing(["hello"])}) as service:
        assert service.http().post(CHAT, json={"messages": HI}).status_code == 200
        until(lambda: not service.host.busy)
    assert kept == [True]
