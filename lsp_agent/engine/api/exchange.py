"""One request for generated text, from its body to the end of its answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Completion
from lsp_agent.engine.api import shapes
from lsp_agent.engine.api.answering import Answering, Inbox
from lsp_agent.engine.api.bodies import client_of
from lsp_agent.engine.api.errors import ApiError, api_error
from lsp_agent.engine.api.metrics import Stopwatch
from lsp_agent.engine.api.middleware import where
from lsp_agent.engine.api.prepare import Asker, Prepared
from lsp_agent.engine.api.requests import GenerationFields
from lsp_agent.engine.api.scoring import score
from lsp_agent.engine.api.serving import Serving
from lsp_agent.engine.request import ORDINARY
from lsp_agent.engine.tool_calls import Piece

if TYPE_CHECKING:
    from lsp_agent.engine.engine import Engine
    from lsp_agent.engine.service.catalog import ServedModel

NOT_STORED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_log = logging.getLogger(__name__)

T = TypeVar("T")
Generating = TypeVar("Generating", bound=GenerationFields)
Prepare = Callable[["Engine", "ServedModel", Generating, Asker], Prepared]
Object = dict[str, Any]
Part = tuple[int, Piece | Completion]


@dataclass(frozen=True)
class Kind:
    """Which of the two APIs it is: how ids begin, what objects are called, and who writes choices."""

    prefix: str
    whole: str
    chunk: str
    choices: Callable[[int, int], shapes.ChatChoices | shapes.TextChoices]


CHAT = Kind("chatcmpl", "chat.completion", "chat.completion.chunk", shapes.ChatChoices)
TEXT = Kind("cmpl", "text_completion", "text_completion", shapes.TextChoices)


class Exchange(Generic[Generating]):
    """Asks the engine what a body says and answers with one object, or streams many when the body says so."""

    def __init__(
        self, serving: Serving, request: Request, body: Generating, prepare: Prepare[Generating], kind: Kind
    ) -> None:
        self._serving, self._request, self._body, self._prepare, self._kind = serving, request, body, prepare, kind
        self._asker = Asker(client_of(request, body.user), CancelToken())
        self._inbox = Inbox()
        self._stopwatch = Stopwatch()

    async def response(self) -> Response:
        """The answer; raises what goes wrong before any of it is there."""
        objects = self._objects()
        try:
            first = await anext(objects)  # what goes wrong before it still has a status
        except BaseException:
            await objects.aclose()
            raise
        if self._body.stream:
            return StreamingResponse(_events(first, objects), media_type="text/event-stream", headers=NOT_STORED)
        await objects.aclose()
        return JSONResponse(first)

    async def _objects(self) -> AsyncGenerator[Object, None]:
        """Everything that is sent, until the end or until nobody reads on."""
        watch = asyncio.create_task(self._watch())
        try:
            with self._serving.admission.enter(self._asker.client):
                engine, model = await self._serving.engine(self._body.model)
                with self._serving.host.using(engine):
                    prepared = await self._threaded(self._prepare, engine, model, self._body, self._asker)
                about = {"id": f"{self._kind.prefix}-{uuid.uuid4().hex}", "created": int(time.time())}
                about |= {"model": model.name, "system_fingerprint": shapes.FINGERPRINT}
                async with contextlib.aclosing(self._answer(engine, prepared)) as objects:
                    async for item in objects:
                        yield {**about, **item}
        finally:
            self._asker.cancel.cancel()
            watch.cancel()

    async def _threaded(self, function: Callable[..., T], *arguments: object) -> T:
        return await self._serving.threaded(function, *arguments, urgent=self._body.priority < ORDINARY)

    async def _watch(self) -> None:
        """Stop at once when the connection closes."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._asker.cancel.cancel()
        self._inbox.fail(ApiError("The client has gone.", 499, code="cancelled"))

    async def _answer(self, engine: Engine, prepared: Prepared) -> AsyncGenerator[Object, None]:
        choices = self._kind.choices(prepared.answers, prepared.requests[0].top)
        answering = Answering(engine, prepared, choices)
        options = self._body.stream_options
        with_usage = bool(self._body.stream and options and options.include_usage)
        unknown = {"usage": None} if with_usage else {}
        try:
            async with contextlib.aclosing(self._parts(engine, prepared, answering)) as parts:
                async for part in parts:
                    if self._body.stream:
                        yield {"object": self._kind.chunk, "choices": [choices.chunk(*part)], **unknown}
            if not self._body.stream:
                yield {"object": self._kind.whole, "choices": answering.whole(), "usage": answering.usage()}
            elif with_usage:
                yield {"object": self._kind.chunk, "choices": [], "usage": answering.usage()}
        finally:
            self._serving.metrics.generated(answering.timings, self._stopwatch)

    async def _parts(self, engine: Engine, prepared: Prepared, answering: Answering) -> AsyncGenerator[Part, None]:
        """More of the answers, with their numbers, as it comes."""
        if prepared.texts:
            await self._echo(engine, prepared, answering)
        self._asker.cancel.raise_if_cancelled()
        if not prepared.requests[0].sampling.max_tokens:
            for ended in answering.end_unasked():
                yield ended
            return
        for asked in prepared.requests:
            answering.begin(self._serving.host.submit(engine, asked, self._inbox.open()))
        while (told := await self._inbox.next()) is not None:
            self._stopwatch.step()
            parts = answering.feed(*told)
            if (remember := answering.take_unremembered()) is not None:
                await self._threaded(remember)
            for part in parts:
                yield part
        for part in answering.close():
            yield part

    async def _echo(self, engine: Engine, prepared: Prepared, answering: Answering) -> None:
        if not prepared.scored:
            answering.echo([None] * len(prepared.requests))
            return
        async with self._serving.scoring:
            answering.echo([await score(self._serving.host, engine, asked) for asked in prepared.requests])


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
