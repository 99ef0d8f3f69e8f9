"""A real server over unix sockets or loopback for the tests of the API, and an engine that says what it is told to."""

from __future__ import annotations

import asyncio
import itertools
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import uvicorn

from lsp_agent.chat_model import Message, ToolSchema
from lsp_agent.engine.api.admission import Admission
from lsp_agent.engine.api.server import EngineServer, uvicorn_config
from lsp_agent.engine.prefixes.cache import CacheStats
from lsp_agent.engine.request import Request, Step, Timings
from lsp_agent.engine.service.host import EngineHost
from lsp_agent.errors import Cancelled, UserError

END = 0
"""The speaker's end token; all others are characters by their code points."""


class Spelling:
    """Stands in for `Tokenizer`: a token a character."""

    end_ids = frozenset({END})

    def __init__(self, tool_calls: str) -> None:
        self.fim = {"prefix": 1, "suffix": 2, "middle": 3}
        self.tool_calls = tool_calls
        self.remembered: list[tuple[Any, ...]] = []
        self.answers = SimpleNamespace(remember=lambda *what: self.remembered.append(what))

    def encode(self, text: str) -> list[int]:
        return list(map(ord, text))

    encode_text = encode

    def token_bytes(self, token: int) -> bytes:
        return chr(token).encode() if token > 3 else b""

    def spelled(self, token: int) -> bytes:
        return self.token_bytes(token) or f"<{token}>".encode()


@dataclass
class Speaker:
    """Stands in for `Engine`: says `texts`, a character a step, one text a sequence, over and over if `endless`.

    `before_step(number)` is called on the engine thread ahead of each step. It is its own scheduler.
    """

    texts: Sequence[str] = ("",)
    call_format: str = "qwen3_coder"
    cut_off: bool = False
    fails_after: int | None = None
    endless: bool = False
    before_step: Callable[[int], Any] = lambda number: None
    context_length: int = 4096
    timings: Timings = field(default_factory=lambda: Timings(prompt_tokens=3, cached_tokens=2))
    asked: list[Request] = field(default_factory=list)
    chats: list[tuple[list[Message], list[ToolSchema]]] = field(default_factory=list)
    stop_ids: frozenset[int] = frozenset({END})

    def __post_init__(self) -> None:
        self.tokenizer = Spelling(self.call_format)
        self.config = SimpleNamespace(vocabulary=0x110000)
        self.scheduler = self
        self.broken: UserError | None = None
        self.placement = "cpu"
        self.prefixes = SimpleNamespace(stats=CacheStats)
        self.wake: Callable[[], None] = lambda: None
        self._running: deque[tuple[Iterator[Step], Request, Any]] = deque()
        self.finished: list[int] = []

    def chat_prompt(self, messages: list[Message], tools: Sequence[ToolSchema]) -> Any:
        if messages[0]["content"] == "too long":
            raise UserError("The prompt is too long.")
        self.chats.append((messages, list(tools)))
        return SimpleNamespace(ids=[11, 12, 13], boundaries=[2])

    def submit(self, request: Request, on_step: Any) -> Any:
        self.asked.append(request)
        self._running.append((self._steps(request), request, on_step))
        self.wake()
        return SimpleNamespace(timings=self.timings, finish=self.finished.append)

    def advance(self) -> bool:
        if not self._running:
            return False
        steps, request, on_step = self._running.popleft()
        try:
            request.cancel.raise_if_cancelled()
            step = next(steps, None)
        except (UserError, Cancelled) as error:
            on_step(error)
            return True
        if step is not None:
            self._running.append((steps, request, on_step))
        on_step(step)
        return True

    def status(self) -> dict[str, Any]:
        return {"running": len(self._running), "waiting": 0, "clients": {"secret": {"running": 1}}}

    def _steps(self, request: Request) -> Iterator[Step]:
        texts = [self.texts[index % len(self.texts)] for index in range(request.n)]
        for number in itertools.count():
            self.before_step(number)
            if number == self.fails_after:
                raise UserError("The engine ran out of memory.")
            if number >= max(map(len, texts)) + 1 and not self.endless:
                return
            for index, text in enumerate(texts):
                if number < len(text) or self.endless:
                    character = text[number % len(text)]
                    last = self.cut_off and number == len(text) - 1
                    top = ((ord(character), -0.5), (ord("?"), -1.5))[: request.top]
                    yield Step(index, ord(character), character, -0.5, "length" if last else None, top)
                elif number == len(text) and not (self.cut_off and text):
                    yield Step(index, END, "", -0.5, "stop", ((END, -0.5),)[: request.top])

    def remember(self) -> None:
        """See `Engine.remember`."""


@dataclass
class Service:
    """A running server. `server` and `host` are its parts."""

    server: EngineServer
    host: EngineHost
    uds: str | None
    port: int | None
    token: str | None

    @property
    def url(self) -> str:
        return "http://engine" if self.uds else f"http://127.0.0.1:{self.port}"

    def http(self, **options: Any) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=self.uds, verify=False)  # reading certificates takes long
        return httpx.Client(transport=transport, base_url=self.url, timeout=60, **options)

    def openai(self, api_key: str | None = None, **options: Any) -> openai.OpenAI:
        key = api_key or self.token or "none"
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, http_client=self.http(), max_retries=0, **options)


@contextmanager
def serving(
    engines: dict[str, Any], *, token: str | None = None, tcp: bool = False, admission: Admission | None = None
) -> Iterator[Service]:
    """Serve engines from a thread of its own, over a unix socket or loopback."""
    with tempfile.TemporaryDirectory(prefix="api-") as folder:
        listener = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
        path = str(Path(folder) / "s")
        listener.bind(("127.0.0.1", 0) if tcp else path)
        listener.listen(64)
        host = EngineHost.holding(engines)
        server = EngineServer(host, admission=admission)
        http = uvicorn.Server(uvicorn_config(server.guarded(token)))
        thread = threading.Thread(target=lambda: asyncio.run(http.serve([listener])), daemon=True)
        thread.start()
        port = listener.getsockname()[1] if tcp else None
        try:
            yield Service(server, host, None if tcp else path, port, token)
        finally:
            http.should_exit = http.force_exit = True
            thread.join(10)
            host.stop()
            server.close()
            listener.close()
            assert not thread.is_alive()


def ask(engine: Any, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    """Ask once, without sockets."""
    host = EngineHost.holding({"speaker": engine})
    server = EngineServer(host)

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app=server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as http:
            return await http.post(path, json=body)

    try:
        return asyncio.run(post())
    finally:
        host.stop()
        server.close()
