"""The engine's HTTP face: an OpenAI-compatible subset over a socket that only the user can open.

`/v1/completions` takes `suffix` for fill-in-the-middle and `echo` with `max_tokens: 0` and `logprobs` to score a text;
`/v1/chat/completions` takes messages. Sampling fields beyond OpenAI's (`top_k`, `min_p`, `repetition_penalty`) have the
names that vLLM and llama.cpp's server use. Requests are answered one at a time in one worker thread; a connection that
closes stops its generation within one decode step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling, Usage
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.generation import collect
from lsp_agent.errors import Cancelled, PromptTooLong, UserError

DISCONNECT_POLL_S = 0.05


class _SamplingFields(BaseModel):
    """The sampling fields that both kinds of request share; unknown fields are refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: int = Field(256, ge=0)
    temperature: float = Field(0.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    seed: int | None = None
    stop: list[str] = Field(default_factory=list)
    n: int = Field(1, ge=1, le=32)

    def sampling(self) -> Sampling:
        fields = self.model_dump(include=set(Sampling.__dataclass_fields__) - {"stop"})
        return Sampling(**fields, stop=tuple(self.stop))


class CompletionRequest(_SamplingFields):
    """Body of `/v1/completions`."""

    prompt: str
    suffix: str | None = None
    echo: bool = False
    logprobs: int | None = None


class _ChatMessage(BaseModel):
    role: str
    content: str


class ChatRequest(_SamplingFields):
    """Body of `/v1/chat/completions`."""

    messages: list[_ChatMessage] = Field(min_length=1)


Body = TypeVar("Body", bound=_SamplingFields)


def _error(message: str, status: int, kind: str, code: str | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "code": code, "param": None}}, status_code=status)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class EngineServer:
    """Serves one loaded engine; `last_used` (monotonic seconds) lets the process leave when idle."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._name = name
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
        self.last_used = time.monotonic()
        self.busy = 0
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

    def _complete_text(self, body: CompletionRequest, cancel: CancelToken) -> dict[str, Any]:
        engine = self._engine
        if body.echo:
            if body.max_tokens or body.suffix is not None or body.logprobs is None:
                raise UserError("`echo` is for scoring: send it with `max_tokens: 0`, `logprobs` and no `suffix`.")
            scores = engine.score_text(body.prompt, cancel)
            logprobs = {
                "tokens": [body.prompt[s.start : s.end] for s in scores],
                "text_offset": [s.start for s in scores],
                "token_logprobs": [s.logprob for s in scores],
            }
            usage = Usage(prompt_tokens=len(scores))
            choice = {"index": 0, "text": body.prompt, "finish_reason": "stop", "logprobs": logprobs}
            return {"object": "text_completion", "choices": [choice], "usage": _usage(usage)}
        if body.suffix is None:
            ids = engine.tokenizer.encode(body.prompt)
        else:
            ids = engine.infill_prompt(body.prompt, body.suffix)
        answers, usage = collect(engine, ids, body.sampling(), cancel, body.n)
        choices = [
            {
                "index": index,
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "logprobs": {"mean_logprob": answer.mean_logprob},
            }
            for index, answer in enumerate(answers)
        ]
        return {"object": "text_completion", "choices": choices, "usage": _usage(usage)}

    def _complete_chat(self, body: ChatRequest, cancel: CancelToken) -> dict[str, Any]:
        ids = self._engine.chat_prompt([{"role": m.role, "content": m.content} for m in body.messages])
        answers, usage = collect(self._engine, ids, body.sampling(), cancel, body.n)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": answer.finish_reason,
                "logprobs": {"mean_logprob": answer.mean_logprob},
            }
            for index, answer in enumerate(answers)
        ]
        return {"object": "chat.completion", "choices": choices, "usage": _usage(usage)}

    async def _answer(
        self, request: Request, schema: type[Body], complete: Callable[[Body, CancelToken], dict[str, Any]]
    ) -> Response:
        try:
            body = schema.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "body"
            return _error(f"{where}: {first['msg']}", 400, "invalid_request_error")
        cancel = CancelToken()
        self.busy += 1
        try:
            work = asyncio.get_running_loop().run_in_executor(self._worker, complete, body, cancel)
            watch = asyncio.create_task(_cancel_on_disconnect(request.is_disconnected, cancel))
            try:
                answer = await work
            finally:
                watch.cancel()
        except UserError as error:
            code = PromptTooLong.code if isinstance(error, PromptTooLong) else None
            return _error(str(error), 400, "invalid_request_error", code)
        except Cancelled:
            return Response(status_code=499)  # nobody reads it: the client has gone
        finally:
            self.busy -= 1
            self.last_used = time.monotonic()
        return JSONResponse({"id": "cmpl", "created": int(time.time()), "model": self._name, **answer})


async def _cancel_on_disconnect(is_disconnected: Callable[[], Awaitable[bool]], cancel: CancelToken) -> None:
    while not await is_disconnected():
        await asyncio.sleep(DISCONNECT_POLL_S)
    cancel.cancel()
