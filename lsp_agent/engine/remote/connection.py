"""HTTP to a model server that can be given up at once: requests run on an event loop in a thread of its own.

Closing the connection is how a server is told to stop an answer; only an async client can do that from outside.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx

from lsp_agent.cancel import CancelToken
from lsp_agent.engine.gpu.errors import GpuLost
from lsp_agent.engine.remote.replies import Collected
from lsp_agent.errors import Cancelled, UserError

POLL_S = 0.05
BUSY = frozenset({429, 503})
"""Statuses of a server that may answer later, perhaps with `Retry-After`."""
LONGEST_WAIT_S = 60.0
"""How long a busy server is waited for in all."""
LEAST_WAIT_S = 0.25
"""Between two questions to a busy server, also where it says that none is needed: it may say so for ever."""
LARGEST_ANSWER = 64 << 20
"""Bytes of an answer; no honest one is as large."""

T = TypeVar("T")


@dataclass(frozen=True)
class Address:
    """Where the API is: `url` up to and with its version (`http://host:8000/v1`), perhaps on a unix `socket`.

    `headers` may hold a key, so they are never shown. `direct`: not through the proxy that the environment names.
    """

    url: str
    socket: Path | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    direct: bool = False


@dataclass(frozen=True)
class Reply:
    """One answer: its status and JSON (None where it was none). A stream's pieces have been put together."""

    status: int
    body: Any
    headers: httpx.Headers = field(default_factory=httpx.Headers, repr=False)

    @property
    def code(self) -> str | None:
        """OpenAI's name of the error, if it has one."""
        try:
            code: str | None = self.body["error"]["code"]
            return code
        except (KeyError, TypeError):
            return None


class Endpoint(Protocol):
    """A server that can be asked. Ours may have to be started first; somebody else's is just there."""

    def address(self, cancel: CancelToken) -> Address:
        """Where the next attempt goes; may block while the server starts. Raises `UserError` and `Cancelled`."""

    def again(self, failure: httpx.TransportError | Reply, attempt: int) -> bool:
        """Whether to ask once more after a broken connection or a reply of status 500 and more; may block a little.

        `attempt` counts from 0. Replies that are `BUSY` are waited for where this says no.
        """

    def explain(self, error: httpx.TransportError) -> UserError:
        """The sentence about a connection that stays broken."""


class Connection:
    """Asks an endpoint; thread-safe. A request ends within `POLL_S` of its cancellation and of `close`."""

    def __init__(self, endpoint: Endpoint, timeout: httpx.Timeout | None = None) -> None:
        self.endpoint = endpoint
        self._timeout = timeout
        self._clients: dict[tuple[str, Path | None], httpx.AsyncClient] = {}
        self._closed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="model client", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        cancel: CancelToken,
        timeout_s: float | None = None,
    ) -> Reply:
        """Send one request and wait for its whole answer, whatever its status.

        `path` is relative to the API's address (`chat/completions`), or to the address above it (`/props`).
        `timeout_s`: longest silence, other than the connection's own.
        Raises `Cancelled` when cancelled or closed, and the endpoint's `UserError` when there is no answer.
        """
        failures, waits, waited = 0, 0, 0.0
        while True:
            self._check(cancel)
            address = self.endpoint.address(cancel)
            try:
                reply = self._wait(self._exchange(address, method, path, body, timeout_s), cancel)
            except httpx.TransportError as error:
                self._check(cancel)
                if not self.endpoint.again(error, failures):
                    raise self.endpoint.explain(error) from error
                failures += 1
                continue
            if reply.status < 500 and reply.status not in BUSY:
                return reply
            if reply.status >= 500 and self.endpoint.again(reply, failures):
                failures += 1
                continue
            delay = _delay(reply, waits)
            if reply.status not in BUSY or waited + delay > LONGEST_WAIT_S or reply.code == GpuLost.code:
                return reply
            waits, waited = waits + 1, waited + delay
            self._pause(delay, cancel)

    def close(self) -> None:
        """End all requests and the thread; safe to call twice, and from any thread."""
        if self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(Exception):
            self._run(self._shut()).result(2)
        self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._loop.close()

    def _check(self, cancel: CancelToken) -> None:
        cancel.raise_if_cancelled()
        if self.closed:
            raise Cancelled

    def _pause(self, seconds: float, cancel: CancelToken) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._check(cancel)
            self._closed.wait(min(left, POLL_S))

    def _run(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, work: Coroutine[Any, Any, Reply], cancel: CancelToken) -> Reply:
        try:
            future = self._run(work)
        except RuntimeError as error:  # closed meanwhile
            work.close()
            raise Cancelled from error
        while True:
            try:
                return future.result(POLL_S)
            except concurrent.futures.CancelledError as error:
                raise Cancelled from error
            except TimeoutError:
                if cancel.cancelled or self.closed:
                    future.cancel()  # closes the connection, which stops the server's work
                    raise Cancelled from None

    async def _shut(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for client in self._clients.values():
            await client.aclose()

    def _client(self, address: Address) -> httpx.AsyncClient:
        """On the loop only. A client for each place; of a place that moved, the old one is left to its requests."""
        key = address.url, address.socket
        if key not in self._clients:
            try:
                self._clients[key] = _open_client(address, self._timeout)
            except (OSError, ValueError, ImportError, httpx.InvalidURL) as error:
                raise UserError(
                    f"{address.url} cannot be asked ({error}): check that address, and SSL_CERT_FILE, SSL_CERT_DIR, "
                    "HTTPS_PROXY and ALL_PROXY where they are set."
                ) from error
        return self._clients[key]

    async def _exchange(
        self, address: Address, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float | None
    ) -> Reply:
        root = address.url.rpartition("/")[0] if path.startswith("/") else f"{address.url}/"
        timeout = self._timeout if timeout_s is None else httpx.Timeout(timeout_s)
        client, headers = self._client(address), dict(address.headers)
        async with client.stream(method, root + path, json=body, headers=headers, timeout=timeout) as response:
            try:
                return await _read(response)
            except httpx.DecodingError as error:
                raise httpx.RemoteProtocolError("the answer is not compressed as it says") from error


def _open_client(address: Address, timeout: httpx.Timeout | None) -> httpx.AsyncClient:
    httpx.URL(address.url)  # raises for hosts that have no encoding
    verify = address.url.startswith("https:")  # otherwise there is nothing to load certificates for
    transport = None
    if address.socket or address.direct:  # a client with a transport of its own heeds no proxy
        socket = str(address.socket) if address.socket else None
        transport = httpx.AsyncHTTPTransport(verify=verify, uds=socket)
    return httpx.AsyncClient(transport=transport, verify=verify, timeout=timeout, follow_redirects=False)


async def _read(response: httpx.Response) -> Reply:
    kind = response.headers.get("content-type", "")
    if response.status_code == 200 and kind.startswith("text/event-stream"):
        collected = await _collect(response)
        return Reply(collected.status, collected.body, response.headers)
    content = bytearray()
    async for piece in response.aiter_bytes():
        content += piece
        _check_size(len(content))
    try:
        return Reply(response.status_code, json.loads(content), response.headers)
    except (ValueError, RecursionError):
        return Reply(response.status_code, None, response.headers)


async def _collect(response: httpx.Response) -> Collected:
    """Put a stream of server-sent events together. Raises as for a broken connection when it ends too early."""
    collected = Collected()
    async for data in _events(response):
        if data == b"[DONE]":
            return collected
        try:
            collected.add(json.loads(data))
        except (ValueError, RecursionError) as error:
            raise httpx.RemoteProtocolError("the stream held something that is not JSON") from error
        except (TypeError, AttributeError, LookupError) as error:
            raise httpx.RemoteProtocolError("the stream held something without the API's shape") from error
    if not collected.complete:
        raise httpx.RemoteProtocolError("the stream ended before the answer did")
    return collected


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of each event. httpx's own lines would also break at characters that JSON strings may hold."""
    rest, total = b"", 0
    async for piece in response.aiter_bytes():
        total += len(piece)
        _check_size(total)
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _check_size(size: int) -> None:
    if size > LARGEST_ANSWER:
        raise httpx.RemoteProtocolError("the answer is far too large")


def _delay(reply: Reply, waits: int) -> float:
    """Seconds that a busy server asks for, or a little more each time."""
    asked = reply.headers.get("retry-after", "").strip()
    if asked:
        with contextlib.suppress(ValueError):
            return max(LEAST_WAIT_S, float(asked))
        with contextlib.suppress(ValueError, TypeError):
            return max(LEAST_WAIT_S, parsedate_to_datetime(asked).timestamp() - time.time())
    return min(8.0, 0.5 * 2**waits)
