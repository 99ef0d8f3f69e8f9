"""Reading what a client sends: a JSON body of bounded size, and who it is."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request

from lsp_agent.engine.api.errors import ApiError

MAX_BYTES = 32 << 20
"""Of a body: some eight million tokens of code."""
CLIENT_HEADER = "x-lsp-agent-client"
LONGEST_CLIENT = 128


async def read_json(request: Request, most: int = MAX_BYTES) -> bytes:
    """The body, of which it is checked that it is JSON by name and not too large; raises `ApiError`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Web pages may send other types to any address without being asked first.
        message = "Send the body as JSON, with `Content-Type: application/json`."
        raise ApiError(message, 415, code="unsupported_content_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError("Send the body uncompressed.", 415, code="unsupported_content_encoding")
    length = request.headers.get("content-length", "0")
    body = bytearray()
    if not length.isdigit() or int(length) <= most:
        try:
            async for part in request.stream():
                body += part
                if len(body) > most:
                    break
            else:
                return bytes(body)
        except ClientDisconnect:
            raise ApiError("The client has gone.", 499, code="cancelled") from None
    raise ApiError(f"The body may have {most} bytes; shorten it.", 413, code="body_too_large")


def client_of(request: Request, user: str | None) -> str:
    """Who asks: by the header, by the body's `user`, or else one for each connection."""
    named = request.headers.get(CLIENT_HEADER) or user
    return str(named or getattr(request.state, "connection", ""))[:LONGEST_CLIENT]
