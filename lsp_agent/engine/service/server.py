"""The engine's HTTP face: an OpenAI-compatible subset over a socket that only the user can open.

`/v1/completions` takes `suffix` for fill-in-the-middle and `echo` with `max_tokens: 0` and `logprobs` to score a text;
`/v1/chat/completions` takes messages and tools, and streams if asked to. Sampling fields beyond OpenAI's (`top_k`,
`min_p`, `repetition_penalty`) have the names that vLLM and llama.cpp's server use. Requests are answered one at a time
in one worker thread; a connection that closes stops its generation within one decode step.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Completion, Usage
from lsp_agent.engine.answers import collect, stream, total_usage
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.gpu.errors import GpuLost, explain
from lsp_agent.engine.service import shapes
from lsp_agent.engine.service.requests import ChatRequest, CompletionRequest, SamplingFields
from lsp_agent.errors import Cancelled, PromptTooLong, UserError

CHUNK = "chat.completion.chunk"
DISCONNECT_POLL_S = 0.05
_log = logging.getLogger(__name__)

Body = TypeVar("Body", bound=SamplingFields)


def _error_body(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": code, "param": None}}


def _error(message: str, status: int, code: str | None = None) -> JSONResponse:
    return JSONResponse(_error_body(message, code), status_code=status)


class EngineServer:
    """Serves one loaded engine; `last_used` (monotonic seconds) lets the process leave when idle."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._name = name
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
        self.last_used = time.monotonic()
        self.busy = 0
        self.broken = False
        """The GPU was lost: this process can answer nothing more."""
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )

    async def _models(self, request: Request) -> Response:  # noqa: ARG002 - the signature of a route
        entry = {
            "id": self._name,
            "object": "model",
            "owned_by": "lsp-agent",
            "context_length": self._engine.context_length,
        }
        return JSONResponse({"object": "list", "data": [entry]})

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest, self._complete_text)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest, self._complete_chat)

    def _complete_text(self, body: CompletionRequest, cancel: CancelToken) -> Iterator[Any]:
        engine = self._engine
        if body.echo:
            if body.max_tokens or body.suffix is not None or body.logprobs is None:
                raise UserError("`echo` is for scoring: send it with `max_tokens: 0`, `logprobs` and no `suffix`.")
            scores = engine.score_text(body.prompt, cancel)
            choices, total = [shapes.score_choice(body.prompt, scores)], Usage(prompt_tokens=len(scores))
        else:
            if body.suffix is None:
                ids = engine.tokenizer.encode(body.prompt)
            else:
                ids = engine.infill_prompt(body.prompt, body.suffix)
            answers = collect(engine, ids, body.sampling(), cancel, body.n)
            choices, total = [shapes.text_choice(*item) for item in enumerate(answers)], total_usage(answers)
        yield {"object": "text_completion", "choices": choices, "usage": shapes.usage(total)}

    def _complete_chat(self, body: ChatRequest, cancel: CancelToken) -> Iterator[Any]:
        tools = body.offered()
        ids = self._engine.chat_prompt(body.conversation(), tools)
        if not body.stream:
            answers = collect(self._engine, ids, body.sampling(), cancel, body.n, tools)
            choices = [shapes.chat_choice(*item) for item in enumerate(answers)]
            yield {"object": "chat.completion", "choices": choices, "usage": shapes.usage(total_usage(answers))}
            return
        chunks, ended = shapes.ChatChunks(), []
        for index, piece in stream(self._engine, ids, body.sampling(), cancel, body.n, tools):
            if isinstance(piece, Completion):
                ended.append(piece)
            yield {"object": CHUNK, "choices": [chunks.choice(index, piece)]}
        if body.stream_options.include_usage:
            yield {"object": CHUNK, "choices": [], "usage": shapes.usage(total_usage(ended))}

    async def remember(self) -> None:
        """Let the engine keep what its next start can use, after the request that runs, if any."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._worker, self._engine.remember)
        except Exception as error:
            _log.warning("cannot keep which experts were used most: %s", error)
            self.broken = self.broken or isinstance(explain(error), GpuLost)

    async def _answer(
        self, request: Request, schema: type[Body], complete: Callable[[Body, CancelToken], Iterator[Any]]
    ) -> Response:
        """Answer with the one object that `complete` yields, or stream all of them when the body says so."""
        try:
            body = schema.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "body"
            return _error(f"{where}: {first['msg']}", 400)
        objects = self._objects(request, body, complete)
        try:
            first_object = await anext(objects)
        except UserError as error:
            lost = isinstance(error, GpuLost)
            code = error.code if isinstance(error, PromptTooLong | GpuLost) else None
            return _error(str(error), 503 if lost else 400, code)
        except Cancelled:
            return Response(status_code=499)  # nobody reads it: the client has gone
        if isinstance(body, ChatRequest) and body.stream:
            return StreamingResponse(_events(first_object, objects), media_type="text/event-stream")
        await objects.aclose()
        return JSONResponse(first_object)

    async def _objects(
        self, request: Request, body: Body, complete: Callable[[Body, CancelToken], Iterator[Any]]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Run `complete` in the worker thread and give what it yields, until it ends or nobody reads on."""
        cancel = CancelToken()
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
        about = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self._name}

        def work() -> None:
            end: Exception | None = None
            try:
                for item in complete(body, cancel):
                    cancel.raise_if_cancelled()
                    loop.call_soon_threadsafe(queue.put_nowait, {**about, **item})
            except Exception as error:
                end = explain(error) or error
                self.broken = self.broken or isinstance(end, GpuLost)
            loop.call_soon_threadsafe(queue.put_nowait, end)

        self.busy += 1
        watch = asyncio.create_task(_cancel_on_disconnect(request.is_disconnected, cancel))
        try:
            loop.run_in_executor(self._worker, work)
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            cancel.cancel()
            watch.cancel()
            self.busy -= 1
            self.last_used = time.monotonic()


async def _events(first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[str, None]:
    """Write objects as server-sent events; an error ends them, since the status has been sent."""
    async with contextlib.aclosing(rest):
        yield _event(first)
        try:
            async for item in rest:
                yield _event(item)
        except (UserError, Cancelled) as error:
            yield _event(_error_body(str(error) or "The request was cancelled."))
    yield "data: [DONE]\n\n"


def _event(item: dict[str, Any]) -> str:
    return f"data: {json.dumps(item, ensure_ascii=False)}\n\n"


async def _cancel_on_disconnect(is_disconnected: Callable[[], Awaitable[bool]], cancel: CancelToken) -> None:
    while not await is_disconnected():
        await asyncio.sleep(DISCONNECT_POLL_S)
    cancel.cancel()
