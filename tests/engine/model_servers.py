"""Model servers of other makers for tests: real HTTP on a loopback port, with answers that the test decides.

The fixture `start` opens a model on one (see `conftest`); `chat` and `infill` ask it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import ChatOptions, Completion, Message, Sampling, ToolSchema
from lsp_agent.engine.remote.openai_model import OpenAiModel

Answer = Callable[[str, dict[str, Any]], Response]
"""Given the path and the body (an empty one of a GET), the response."""
Start = Callable[..., "tuple[ModelServer, OpenAiModel]"]
HELLO: list[Message] = [{"role": "user", "content": "hello"}]
READ = ToolSchema(
    "read_file",
    "Read a file.",
    {"type": "object", "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}}, "required": ["path"]},
)


class ModelServer:
    """Answers requests with `answer`; `asked` holds path and body of each POST, `headers` those of the last request."""

    def __init__(self) -> None:
        self.url = ""
        self.serve(lambda path, body: said("hello"))

    def serve(self, answer: Answer, owner: str = "vllm", model: str = "qwen2.5-coder-7b", **entry: Any) -> None:
        """Be another server from now on."""
        self.answer = answer
        self.models: list[dict[str, Any]] = [{"id": model, "owned_by": owner, **entry}]
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.headers: dict[str, str] = {}
        self.left = threading.Event()
        """Set when a client closed its connection in mid-answer."""

    async def __call__(self, request: Request) -> Response:
        self.headers = dict(request.headers)
        path = request.url.path
        if request.method == "GET" and path == "/v1/models":
            return JSONResponse({"object": "list", "data": self.models}) if self.models else Response(status_code=404)
        body = json.loads(await request.body() or b"{}")
        self.asked.append((path, body))
        return self.answer(path, body)

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [body for _, body in self.asked]

    @contextlib.contextmanager
    def running(self) -> Iterator[ModelServer]:
        app = Starlette(routes=[Route("/{path:path}", self.__call__, methods=["GET", "POST"])])
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        # No graceful end: a test may leave an answer that never ends.
        config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=0)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join(5)
            listener.close()


def said(text: str = "", calls: list[dict[str, Any]] | None = None, **message: Any) -> JSONResponse:
    """A whole answer of a chat."""
    whole = {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {}), **message}
    return JSONResponse(chat_body([whole]))


def chat_body(messages: list[dict[str, Any]]) -> dict[str, Any]:
    choices = [{"index": i, "message": m, "finish_reason": "stop"} for i, m in enumerate(messages)]
    return {"choices": choices, "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def completed(*texts: str) -> JSONResponse:
    """A whole answer of `/v1/completions`."""
    choices = [{"index": i, "text": text, "finish_reason": "stop"} for i, text in enumerate(texts)]
    return JSONResponse({"choices": choices, "usage": {"prompt_tokens": 7, "completion_tokens": 3}})


def refused(status: int, body: Any, **headers: str) -> Response:
    if isinstance(body, str):
        return Response(body, status, headers)
    return JSONResponse(body, status, headers)


def error(message: str, code: Any = None, status: int = 400) -> Response:
    return refused(status, {"error": {"message": message, "type": "BadRequestError", "code": code}})


def streamed(*chunks: dict[str, Any], done: bool = True, breaks: bool = False) -> StreamingResponse:
    """Chunks as server-sent events; `breaks`: the connection is cut after them."""

    async def events() -> Any:
        for chunk in chunks:
            yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
        if breaks:
            raise ConnectionError
        if done:
            yield b"data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def delta(index: int = 0, finish: str | None = None, **part: Any) -> dict[str, Any]:
    """One chunk of a streamed chat."""
    return {"choices": [{"index": index, "delta": part, "finish_reason": finish}]}


def chat(model: OpenAiModel, n: int = 1, tools: Any = (), options: ChatOptions | None = None, **s: Any) -> Any:
    return model.chat(HELLO, Sampling(**{"max_tokens": 8, **s}), CancelToken(), n, tools, options or ChatOptions())


def infill(model: OpenAiModel, prefix: str = "a = ", suffix: str = "\n", **s: Any) -> Completion:
    return model.infill(prefix, suffix, Sampling(**{"max_tokens": 8, **s}), CancelToken())[0]
