"""The engine's HTTP face, as OpenAI's API has it; `docs/api.md` says field by field what is answered, and how.

A connection that closes stops what was generated for it within one step. Bodies are read, prompts tokenised and masks
compiled in threads of their own, so that the event loop is free for others at any time.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from lsp_agent.engine.api.admission import Admission
from lsp_agent.engine.api.bodies import client_of, read_json
from lsp_agent.engine.api.chat_requests import TOKENIZE, ChatRequest, TokenizeChatRequest, TokenizeRequest
from lsp_agent.engine.api.errors import ApiError
from lsp_agent.engine.api.exchange import CHAT, TEXT, Exchange
from lsp_agent.engine.api.metrics import CONTENT_TYPE, Metrics
from lsp_agent.engine.api.middleware import Gate
from lsp_agent.engine.api.prepare import check_tokens, prepare_chat, prepare_text, spelled_text
from lsp_agent.engine.api.requests import CompletionRequest, DetokenizeRequest
from lsp_agent.engine.api.serving import Serving

if TYPE_CHECKING:
    from lsp_agent.engine.engine import Engine
    from lsp_agent.engine.service.catalog import ServedModel
    from lsp_agent.engine.service.host import EngineHost

KEEP_ALIVE_S = 60


class EngineServer:
    """Serves the models of a host. `routes`: more routes beside the API's."""

    def __init__(self, host: EngineHost, *, routes: Sequence[Route] = (), admission: Admission | None = None) -> None:
        self._routes = [
            Route("/health", self._health),
            Route("/metrics", self._figures),
            Route("/v1/models", self._models),
            Route("/v1/models/{name}", self._model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/tokenize", self._tokens, methods=["POST"]),
            Route("/detokenize", self._text, methods=["POST"]),
            *routes,
        ]
        self._serving = Serving(host, admission or Admission(), Metrics(self._routes, host.status))
        self.app = self.guarded(None)

    def guarded(self, token: str | None) -> Starlette:
        """The application for listeners where requests must carry a token; `app` is the one where none is needed."""
        return Starlette(
            routes=self._routes,
            middleware=[Middleware(Gate, token=token, metrics=self._serving.metrics)],
            exception_handlers={HTTPException: _no_route},
        )

    @property
    def busy(self) -> int:
        """Requests under way."""
        return self._serving.admission.total

    @property
    def last_used(self) -> float:
        """When the last request was answered, in monotonic seconds."""
        return self._serving.admission.last_used

    def close(self) -> None:
        """End the server's threads; nothing can be asked any more."""
        self._serving.close()

    async def _health(self, request: Request) -> Response:  # noqa: ARG002 - the signature of a route
        self._serving.check_alive()
        return JSONResponse({"status": "ok"})

    async def _figures(self, request: Request) -> Response:  # noqa: ARG002
        return Response(await asyncio.to_thread(self._serving.metrics.text), media_type=CONTENT_TYPE)

    async def _models(self, request: Request) -> Response:  # noqa: ARG002
        entries = [_model_entry(model) for model in self._serving.host.models()]
        return JSONResponse({"object": "list", "data": entries})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(_model_entry(self._serving.host.served(request.path_params["name"])))

    async def _chat(self, request: Request) -> Response:
        body = await self._serving.parsed(ChatRequest.model_validate_json, await read_json(request))
        return await Exchange(self._serving, request, body, prepare_chat, CHAT).response()

    async def _completions(self, request: Request) -> Response:
        body = await self._serving.parsed(CompletionRequest.model_validate_json, await read_json(request))
        return await Exchange(self._serving, request, body, prepare_text, TEXT).response()

    async def _tokens(self, request: Request) -> Response:
        body = await self._serving.parsed(TOKENIZE.validate_json, await read_json(request))
        with self._serving.admission.enter(client_of(request, None)):
            engine, model = await self._serving.engine(body.model)
            answer = await self._serving.threaded(_tokenized, engine, body)
        return JSONResponse({**answer, "max_model_len": model.context_length})

    async def _text(self, request: Request) -> Response:
        body = await self._serving.parsed(DetokenizeRequest.model_validate_json, await read_json(request))
        with self._serving.admission.enter(client_of(request, None)):
            engine, _ = await self._serving.engine(body.model)
            check_tokens(engine, body.tokens, "tokens")
            text = await self._serving.threaded(spelled_text, engine, body.tokens)
        return JSONResponse({"prompt": text})


def _tokenized(engine: Engine, body: TokenizeRequest | TokenizeChatRequest) -> dict[str, Any]:
    """A text's tokens in vLLM's shape."""
    if isinstance(body, TokenizeRequest):
        ids = engine.tokenizer.encode(body.prompt)
    else:
        ids = list(engine.chat_prompt(body.conversation(), body.schemas()).ids)
    strings = [spelled_text(engine, [token]) for token in ids] if body.return_token_strs else None
    return {"count": len(ids), "tokens": ids, "token_strs": strings}


def _model_entry(model: ServedModel) -> dict[str, Any]:
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
