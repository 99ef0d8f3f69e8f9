"""What the `engine` command and our own clients ask beside OpenAI's API: status, load, stop."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lsp_agent.engine.service.host import EngineHost
from lsp_agent.engine.service.room import gpu_memory
from lsp_agent.engine.service.runtime import HAS_UNIX_SOCKETS, About, Place
from lsp_agent.errors import UserError

log = logging.getLogger(__name__)


class LoadRequest(BaseModel):
    """Body of `/engine/load`. With `package`, an absolute path, `model` means that folder from now on.

    Whoever may ask is the user whose files the engine reads: the socket and the token are theirs alone.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    package: Path | None = None


class StopRequest(BaseModel):
    """Body of `/engine/stop`. `now`: without finishing what was asked."""

    model_config = ConfigDict(extra="forbid")

    now: bool = False


def routes(host: EngineHost, here: Place, about: About) -> list[Route]:
    """The control routes, for the server to mount."""
    process, began = psutil.Process(), time.monotonic()

    async def status(request: Request) -> Response:  # noqa: ARG001 - the signature of a route
        return JSONResponse({**_process(process, here, about, time.monotonic() - began), **host.status()})

    async def stop(request: Request) -> Response:
        try:
            asked = StopRequest.model_validate_json(await request.body() or b"{}")
        except ValidationError:
            return JSONResponse(_error('The body must be {} or {"now": true}.'), 400)
        host.leave(now=asked.now)
        return JSONResponse({"stopping": True})

    async def load(request: Request) -> Response:
        try:
            asked = LoadRequest.model_validate_json(await request.body() or b"{}")
        except ValidationError:
            return JSONResponse(_error('The body must be {"model": NAME}, with "package": PATH perhaps.'), 400)
        return StreamingResponse(_load(host, here, asked), media_type="application/x-ndjson")

    return [
        Route("/engine/status", status),
        Route("/engine/stop", stop, methods=["POST"]),
        Route("/engine/load", load, methods=["POST"]),
    ]


def _process(process: psutil.Process, here: Place, about: About, uptime_s: float) -> dict[str, Any]:
    return {
        "running": True,
        "pid": about.pid,
        "version": about.version,
        "uptime_s": round(uptime_s, 1),
        "socket": str(here.socket) if HAS_UNIX_SOCKETS else None,
        "port": about.port or None,
        "token_file": str(here.token) if about.port else None,
        "log": str(here.log),
        "memory": {"resident_bytes": process.memory_info().rss, "gpu_in_use_bytes": gpu_memory()},
    }


async def _load(host: EngineHost, here: Place, asked: LoadRequest) -> AsyncIterator[str]:
    """JSON lines: `{"progress": [done, total]}` while it loads, then `{"loaded": …}` or `{"error": …}`."""
    lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def work() -> None:
        try:
            if asked.package is not None and asked.model:
                host.add(asked.model, asked.package)
            name = host.resolve(asked.model)
            engine = await host.engine(name, lambda done, total: lines.put_nowait({"progress": [done, total]}))
            lines.put_nowait({"loaded": {"name": name, "context_length": engine.context_length}})
        except UserError as error:
            lines.put_nowait(_error(str(error), getattr(error, "code", None), int(error.exit_code)))
        except Exception as error:
            log.exception("a model cannot be loaded")
            lines.put_nowait(_error(f"The model cannot be loaded ({type(error).__name__}); see {here.log}."))
        finally:
            lines.put_nowait(None)

    task = asyncio.create_task(work())
    try:
        while (line := await lines.get()) is not None:
            yield json.dumps(line) + "\n"
    finally:
        task.cancel()


def _error(message: str, code: str | None = None, exit_code: int | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": code, "exit_code": exit_code}}
