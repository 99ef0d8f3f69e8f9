"""What stands before every route: who may ask, and that all that goes wrong is told in the API's shape."""

from __future__ import annotations

import hmac
import logging
import time
import traceback
from pathlib import PurePath
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lsp_agent.engine.api.errors import ApiError, api_error
from lsp_agent.engine.api.metrics import Metrics

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
OPEN_ROUTES = {"/health"}
_log = logging.getLogger(__name__)


class Gate:
    """Refuses strangers, counts requests, and answers for routes that fail.

    With a `token` (over TCP, which every user and every web page of this machine can reach) each request must carry it
    and name this machine as its host, so that no name that a stranger's DNS points here passes. Pages of browsers,
    which alone send an `Origin`, are refused in any case.
    """

    def __init__(self, app: ASGIApp, token: str | None, metrics: Metrics) -> None:
        self._app, self._token, self._metrics = app, token, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return
        status, started = 0, time.monotonic()

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, note)
        except Exception as error:
            told = api_error(error)
            if told.status == 500:
                _log.error("A request to %s failed: %s", self._metrics.route(scope["path"]), where(error))
            if status:  # part of an answer is out; that it breaks off tells the rest
                return
            await told.response()(scope, receive, note)
        finally:
            self._metrics.answered(scope["path"], status or 499, time.monotonic() - started)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if "origin" in headers:
            raise ApiError("This engine answers no web pages.", 403, code="forbidden_origin")
        if self._token is None:
            return
        if _hostname(headers.get("host", "")) not in LOOPBACK:
            raise ApiError("This engine answers under the names of this machine only.", 403, code="forbidden_host")
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(errors="replace"), self._token.encode())
        if not (right and scheme.lower() == "bearer") and scope["path"] not in OPEN_ROUTES:
            message = "The API key is missing or wrong; send the engine's token as `Authorization: Bearer TOKEN`."
            raise ApiError(message, 401, code="invalid_api_key")


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def where(error: BaseException) -> str:
    """An error's kind and the places in the code that it went through; its message may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    places = [f"{PurePath(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return f"{type(error).__name__} in {' > '.join(places)}"
