"""The engine's HTTP face, as OpenAI's API has it; `docs/api.md` says field by field what is answered, and how.

A connection that closes stops what was generated for it within one step. Bodies are read, prompts tokenised and masks
compiled in threads of their own, so that the event loop is free for others at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn
from pydantic import TypeAdapter
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from lsp_agent.cancel import CancelToken
from lsp_agent.engine.service import shapes
from lsp_agent.engine.service.admission import Admission
from lsp_agent.engine.service.answering import Answering, Inbox
from lsp_agent.engine.service.api_errors import ApiError, api_error
from lsp_agent.engine.service.bodies import client_of, read_json
from lsp_agent.engine.service.chat_requests import ChatRequest, TokenizeChatRequest, TokenizeRequest
from lsp_agent.engine.service.metrics import CONTENT_TYPE, Metrics, Stopwatch
from lsp_agent.engine.service.middleware import Gate, where
from lsp_agent.engine.service.prepare import (
    Asker,
    Prepared,
    check_tokens,
    prepare_chat,
    prepare_text,
    spelled_text,
)
from lsp_agent.engine.service.requests import CompletionRequest, DetokenizeRequest
from lsp_agent.engine.service.scoring import score

if TYPE_CHECKING:
    from lsp_agent.engine.engine import Engine
    from lsp_agent.engine.service.host import EngineHost, ServedModel

KEEP_ALIVE_S = 60
PREPARING_THREADS = 3
_log = logging.getLogger(__name__)
_tokenize = TypeAdapter[TokenizeRequest | TokenizeChatRequest](TokenizeRequest | TokenizeChatRequest)

Generating = TypeVar("Generating", ChatRequest, CompletionRequest)
Object = dict[str, Any]


NOT_STORED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class EngineServer:
    """Serves the models of a host; `busy` and `last_used` (monotonic seconds) let the process leave when idle.

    `routes`: more routes beside the API's.
    """

    def __init__(self, host: EngineHost, *, routes: Sequence[Route] = (), admission: Admission | None = None) -> None:
        self._host = host
        self._admission = admission or Admission()
        self._threads = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="prepare")
        self._scoring = asyncio.Lock()
        self.last_used = time.monotonic()
        self._routes = [
            Route("/health", self._health),
            Route("/metrics", self._figures),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/tokenize", self._tokens, methods=["POST"]),
            Route("/detokenize", self._text, methods=["POST"]),
            *routes,
        ]
        self.metrics = Metrics(self._routes, host.status)
        self.app = self.guarded(None)

    def guarded(self, token: str | None) -> Starlette:
        """The application for listeners where requests must carry a token; `app` is the one where none is needed."""
        return Starlette(
            routes=self._routes,
            middleware=[Middleware(Gate, token=token, metrics=self.metrics)],
            exception_handlers={HTTPException: _no_route},
        )

    @property
    def busy(self) -> int:
        """Requests under way."""
        return self._admission.total

    def close(self) -> None:
        """End the threads; nothing can be asked any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _health(self, request: Request) -> Response:  # noqa: ARG002 - the signature of a route
        self._check_alive()
        return JSONResponse({"status": "ok"})

    async def _figures(self, request: Request) -> Response:  # noqa: ARG002
        return Response(await asyncio.to_thread(self.metrics.text), media_type=CONTENT_TYPE)

    async def _models(self, request: Request) -> Response:  # noqa: ARG002
        return JSONResponse({"object": "list", "data": [_model_entry(model) for model in self._host.models()]})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(_model_entry(self._served(request.path_params["name"])))

    async def _chat(self, request: Request) -> Response:
        def prepare(engine: Engine, model: ServedModel, body: ChatRequest, asker: Asker) -> Prepared:
            return prepare_chat(engine, model.sampling, body, asker)

        return await self._generate(request, ChatRequest, prepare, "chatcmpl")

    async def _completions(self, request: Request) -> Response:
        def prepare(engine: Engine, model: ServedModel, body: CompletionRequest, asker: Asker) -> Prepared:
            return prepare_text(engine, model.sampling, model.infills, body, asker)

        return await self._generate(request, CompletionRequest, prepare, "cmpl")

    async def _tokens(self, request: Request) -> Response:
        body = await self._threaded(_tokenize.validate_json, await read_json(request))
        with self._admission.enter(client_of(request, None)):
            engine, model = await self._engine(body.model)
            ids = await self._threaded(_tokenized, engine, body)
        strings = [spelled_text(engine, [token]) for token in ids] if body.return_token_strs else None
        return JSONResponse(
            {"count": len(ids), "max_model_len": model.context_length, "tokens": ids, "token_strs": strings}
        )

    async def _text(self, request: Request) -> Response:
        body = await self._threaded(DetokenizeRequest.model_validate_json, await read_json(request))
        with self._admission.enter(client_of(request, None)):
            engine, _ = await self._engine(body.model)
            check_tokens(engine, body.tokens, "tokens")
            text = await self._threaded(spelled_text, engine, body.tokens)
        return JSONResponse({"prompt": text})

    async def _threaded(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def _check_alive(self) -> None:
        if self._host.broken is not None:
            raise self._host.broken
        if self._host.stopping:
            raise ApiError("The engine is stopping; ask again in a moment.", 503, code="stopping", retry=True)

    def _served(self, name: str | None) -> ServedModel:
        resolved = self._host.resolve(name)
        return next(model for model in self._host.models() if model.name == resolved)

    async def _engine(self, name: str | None) -> tuple[Engine, ServedModel]:
        self._check_alive()
        model = self._served(name)
        return await self._host.engine(model.name), model

    async def _generate(
        self,
        request: Request,
        schema: type[Generating],
        prepare: Callable[[Engine, ServedModel, Generating, Asker], Prepared],
        kind: str,
    ) -> Response:
        """Answer with one object, or stream many when the body says so."""
        body: Generating = await self._threaded(schema.model_validate_json, await read_json(request))
        objects = self._objects(request, body, prepare, kind)
        try:
            first = await anext(objects)  # what goes wrong before it still has a status
        except BaseException:
            await objects.aclose()
            raise
        if body.stream:
            return StreamingResponse(_events(first, objects), media_type="text/event-stream", headers=NOT_STORED)
        await objects.aclose()
        return JSONResponse(first)

    async def _objects(
        self,
        request: Request,
        body: Generating,
        prepare: Callable[[Engine, ServedModel, Generating, Asker], Prepared],
        kind: str,
    ) -> AsyncGenerator[Object, None]:
        """Everything that is sent, until the end or until nobody reads on."""
        asker = Asker(client_of(request, body.user), CancelToken())
        stopwatch = Stopwatch()
        inbox = Inbox()
        watch = asyncio.create_task(_watch(request, asker.cancel, inbox))
        try:
            with self._admission.enter(asker.client):
                engine, model = await self._engine(body.model)
                prepared = await self._threaded(prepare, engine, model, body, asker)
                asker.cancel.raise_if_cancelled()
                about = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.name}
                about["system_fingerprint"] = shapes.FINGERPRINT
                items = self._answer(engine, body, prepared, inbox, stopwatch)
                async with contextlib.aclosing(items):
                    async for item in items:
                        yield {**about, **item}
        finally:
            asker.cancel.cancel()
            watch.cancel()
            self.last_used = time.monotonic()

    async def _answer(
        self,
        engine: Engine,
        body: ChatRequest | CompletionRequest,
        prepared: Prepared,
        inbox: Inbox,
        stopwatch: Stopwatch,
    ) -> AsyncGenerator[Object, None]:
        choices: shapes.ChatChoices | shapes.TextChoices
        if isinstance(body, ChatRequest):
            kinds, top = ("chat.completion", "chat.completion.chunk"), 0
            choices = shapes.ChatChoices(prepared.answers)
        else:
            kinds, top = ("text_completion", "text_completion"), body.logprobs or 0
            choices = shapes.TextChoices(prepared.answers, top)
        answering = Answering(engine, prepared, choices)
        with_usage = bool(body.stream and body.stream_options and body.stream_options.include_usage)
        unknown = {"usage": None} if with_usage else {}

        def chunks(parts: list[Any]) -> list[Object]:
            if not body.stream:
                return []
            return [{"object": kinds[1], "choices": [choices.chunk(*part)], **unknown} for part in parts]

        try:
            if prepared.texts:
                async with self._scoring if prepared.scored else contextlib.nullcontext():
                    scorings = [
                        await score(self._host, engine, asked, top) if prepared.scored else None
                        for asked in prepared.requests
                    ]
                answering.echo(scorings)
            if prepared.requests[0].sampling.max_tokens:
                for asked in prepared.requests:
                    answering.begin(self._host.submit(engine, asked, inbox.open()))
                while (told := await inbox.next()) is not None:
                    stopwatch.step()
                    parts = answering.feed(*told)
                    if (remember := answering.take_unremembered()) is not None:
                        await self._threaded(remember)
                    for item in chunks(parts):
                        yield item
                for item in chunks(answering.close()):
                    yield item
            else:
                for item in chunks(answering.end_unasked()):
                    yield item
            if not body.stream:
                yield {"object": kinds[0], "choices": answering.whole(), "usage": answering.usage()}
            elif with_usage:
                yield {"object": kinds[1], "choices": [], "usage": answering.usage()}
        finally:
            self.metrics.generated(answering.timings, stopwatch)


def _tokenized(engine: Engine, body: TokenizeRequest | TokenizeChatRequest) -> list[int]:
    if isinstance(body, TokenizeRequest):
        return engine.tokenizer.encode(body.prompt)
    return list(engine.chat_prompt(body.conversation(), body.schemas()).ids)


def _model_entry(model: ServedModel) -> Object:
    """Write a model: OpenAI's fields, vLLM's name of the context's length, and ours."""
    length = {"context_length": model.context_length, "max_model_len": model.context_length}
    about = {"id": model.name, "object": "model", "created": model.created, "owned_by": "lsp-agent"}
    return {**about, **length, "loaded": model.loaded}


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        told = ApiError(f"This path does not take {request.method}.", 405, code="method_not_allowed")
    else:
        told = ApiError("This engine has no such path; see docs/api.md.", error.status_code, code="unknown_url")
    response = told.response()
    response.headers.update(error.headers or {})
    return response


async def _watch(request: Request, cancel: CancelToken, inbox: Inbox) -> None:
    """Stop at once when the connection closes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    cancel.cancel()
    inbox.fail(ApiError("The client has gone.", 499, code="cancelled"))


async def _events(first: Object, rest: AsyncGenerator[Object, None]) -> AsyncGenerator[str, None]:
    """Write objects as server-sent events; an error ends them, since the status has been sent."""
    async with contextlib.aclosing(rest):
        yield _event(first)
        try:
            async for item in rest:
                yield _event(item)
        except Exception as error:
            told = api_error(error)
            if told.status == 500:
                _log.error("A stream failed: %s", where(error))
            yield _event(told.body)
    yield "data: [DONE]\n\n"


def _event(item: Object) -> str:
    return f"data: {json.dumps(item, ensure_ascii=False)}\n\n"


class _Connection(H11Protocol):
    """Numbers connections, so that clients that do not say who they are can be told apart."""

    _numbers = itertools.count(1)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "connection": f"connection {next(self._numbers)}"}


def uvicorn_config(app: Starlette) -> uvicorn.Config:
    """How to serve `EngineServer.app`: quietly, and with connections that are told apart."""
    return uvicorn.Config(
        app,
        http=_Connection,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
