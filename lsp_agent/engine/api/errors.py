"""Errors in the shapes and status codes of OpenAI's API."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from lsp_agent.engine.gpu.errors import GpuLost
from lsp_agent.errors import Cancelled, UnknownModel, UserError

RETRY_AFTER_S = 1

_UNION = {"str", "int", "named", "allowed", "mode", "to_text", "to_chat"}
UNAVAILABLE = {GpuLost.code, "engine_stopping"}


class ApiError(Exception):
    """What a client gets instead of an answer. `param` names the field at fault, as `messages[0].role`."""

    def __init__(
        self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None, retry: bool = False
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.retry = message, status, param, code, retry

    @property
    def body(self) -> dict[str, Any]:
        """The error's JSON."""
        kind = "invalid_request_error"
        if self.status >= 500:
            kind = "server_error"
        elif self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as a response."""
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.retry else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def api_error(error: Exception) -> ApiError:
    """Any error as one for clients; one of ours that nobody foresaw tells them nothing of its cause."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, Cancelled):
        return ApiError("The request was cancelled.", 499, code="cancelled")
    if isinstance(error, UserError):
        code = getattr(error, "code", None)
        if code in UNAVAILABLE:
            return ApiError(str(error), 503, code=code, retry=True)
        if isinstance(error, UnknownModel):
            return ApiError(str(error), 404, param="model", code=code)
        return ApiError(str(error), code=code)
    return ApiError("The engine failed at this request; see its log.", 500, code="internal_error")


def _invalid(error: ValidationError) -> ApiError:
    """The first thing wrong with a body. Never quotes what was sent."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    param = ""
    for part in first["loc"]:
        if part in _UNION or "[" in str(part):  # which of several types was tried is no part of the field's name
            continue
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    message = first["msg"].removeprefix("Value error, ").removeprefix("Invalid JSON: ")
    if first["type"] == "json_invalid":
        return ApiError(f"The body is not valid JSON: {message}.", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(f"{param}: this engine knows no such field.", param=param, code="unknown_parameter")
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(f"{param or 'body'}: {message}", param=param or None, code=code)
