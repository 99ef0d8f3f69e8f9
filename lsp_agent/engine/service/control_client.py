"""Asks an engine what is beside OpenAI's API: its status, to load a model, to stop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from lsp_agent.cancel import CancelToken
from lsp_agent.engine.service.launch import gone, until_cancelled, wait_until
from lsp_agent.engine.service.runtime import HAS_UNIX_SOCKETS, About, Place
from lsp_agent.errors import EngineStopping, ExitCode, UnknownModel, UserError

LOAD_TIMEOUT_S = 300.0
"""A load may take any time while it makes progress."""
ANSWER_S = 5.0
SIGNAL_S = 5.0


def base_url(about: About) -> str:
    """Where the engine's server is, without a path."""
    return "http://engine" if HAS_UNIX_SOCKETS else f"http://127.0.0.1:{about.port}"


def headers(place: Place) -> dict[str, str]:
    """What a request must carry: nothing on a unix socket, the token on a port."""
    if HAS_UNIX_SOCKETS:
        return {}
    try:
        return {"Authorization": f"Bearer {place.token.read_text().strip()}"}
    except OSError as error:
        raise httpx.ConnectError("the engine has gone") from error


def open_client(place: Place, about: About, timeout: float | None) -> httpx.Client:
    """A client of the control routes."""
    transport = httpx.HTTPTransport(uds=str(place.socket)) if HAS_UNIX_SOCKETS else httpx.HTTPTransport()
    return httpx.Client(transport=transport, base_url=base_url(about), headers=headers(place), timeout=timeout)


def status(place: Place, about: About) -> dict[str, Any] | None:
    """What the engine says of itself; None when it does not answer."""
    try:
        with open_client(place, about, ANSWER_S) as client:
            answer: dict[str, Any] = client.get("/engine/status").raise_for_status().json()
            return answer
    except (httpx.HTTPError, ValueError):
        return None


def ask_to_stop(place: Place, about: About, now: bool) -> bool:
    """Whether the engine heard it."""
    try:
        with open_client(place, about, ANSWER_S) as client:
            return client.post("/engine/stop", json={"now": now}).is_success
    except httpx.HTTPError:
        return False


def stop(place: Place, about: About, now: bool, seconds: float) -> None:
    """End an engine: let it finish for up to `seconds`, or not if `now`. Returns when its process is gone.

    Raises `UserError` when not even a signal ends it.
    """
    asked = ask_to_stop(place, about, now)
    if asked and wait_until(lambda: gone(about), 2.0 if now else seconds):
        return
    if asked and not now and ask_to_stop(place, about, now=True) and wait_until(lambda: gone(about), 2.0):
        return
    for end in ("terminate", "kill") if asked else ("kill",):  # what does not answer does not heed a request either
        process = about.process
        if process is None:
            return
        getattr(process, end)()
        if wait_until(lambda: gone(about), SIGNAL_S):
            return
    raise UserError(f"The engine's process {about.pid} does not end; end it by hand.")


def load(
    place: Place, about: About, name: str | None, package: Path | None, cancel: CancelToken
) -> Iterator[Mapping[str, Any]]:
    """Have a model loaded: `{"progress": [done, total]}` as it goes on, `{"loaded": {name, context_length}}` last.

    Raises the engine's `UserError`, `Cancelled`, and `httpx.TransportError` when the engine goes away.
    """
    body = {"model": name, "package": str(package.absolute()) if package else None}
    with open_client(place, about, None) as client:

        def lines() -> Iterator[str]:
            with client.stream("POST", "/engine/load", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    yield json.dumps({"error": _sentence(response)})
                    return
                yield from response.iter_lines()

        ended = False
        try:
            for line in until_cancelled(lines(), cancel, LOAD_TIMEOUT_S):
                said = json.loads(line)
                if "error" in said:
                    raise _error(said["error"])
                ended = "loaded" in said
                yield said
        except TimeoutError:
            raise UserError(f"The engine did not load its model in {LOAD_TIMEOUT_S:.0f} s; see {place.log}.") from None
    if not ended:
        raise httpx.RemoteProtocolError("the engine ended while it loaded the model")


def _sentence(response: httpx.Response) -> dict[str, Any]:
    try:
        error: dict[str, Any] = response.json()["error"]
        return error
    except (ValueError, KeyError, TypeError):
        return {"message": f"The engine answered with HTTP status {response.status_code}."}


def _error(about: Mapping[str, Any]) -> UserError:
    kinds = {kind.code: kind for kind in (UnknownModel, EngineStopping)}
    kind = kinds.get(about.get("code") or "", UserError)
    return kind(about["message"], ExitCode(about.get("exit_code") or ExitCode.ENVIRONMENT))
