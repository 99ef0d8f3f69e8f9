"""A model server that somebody else runs: its key, what it says of itself, and opening a model on it."""

from __future__ import annotations

import os
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Tier
from lsp_agent.config import Backend
from lsp_agent.engine.remote import replies
from lsp_agent.engine.remote.connection import Address, Connection, Reply
from lsp_agent.engine.remote.dialect import Dialect, Kind, kind_of
from lsp_agent.engine.remote.families import FAMILIES, Family, family_of
from lsp_agent.engine.remote.openai_model import OpenAiModel
from lsp_agent.engine.remote.refusals import refusal
from lsp_agent.errors import ExitCode, UnknownModel, UserError

KEY_VARIABLE = "LSP_AGENT_BACKEND_KEY"
KEYRING_SERVICE = "lsp-agent"
TIMEOUT = httpx.Timeout(connect=10.0, read=300.0, write=60.0, pool=None)
"""Seconds. Answers are streamed: `read` is the longest silence, which reading a very long prompt may take."""
LOOK_TIMEOUT_S = 15.0
UNKNOWN_CONTEXT = 8192
"""Tokens taken for granted where the server does not say."""
NAMES_SHOWN = 10
GATEWAY, PAUSE_S = (502, 504), 0.2
"""Statuses of a proxy whose server was away, perhaps for a moment."""
_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z0-9])")
SMALL_B, MEDIUM_B = 4.0, 16.0


@dataclass(frozen=True)
class ServedModel:
    """What is known of the model after looking."""

    name: str
    kind: Kind
    context_length: int
    tier: Tier
    family: Family | None


def key_of(backend: Backend) -> tuple[str, str]:
    """The key and where it was found (`environment`, `keyring`); both empty where there is none.

    Raises `UserError` for a key that cannot be sent, or that would cross the network unencrypted.
    """
    key, found = os.environ.get(KEY_VARIABLE, "").strip(), "environment"
    if not key:
        key, found = _from_keyring(backend.url).strip(), "keyring"
    if not key:
        return "", ""
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"The key of {backend.url} has characters that no key has: set it again.", ExitCode.USAGE)
    if backend.url.startswith("http://") and not backend.is_loopback:
        raise UserError(
            f"The key is not sent to {backend.url}, because everybody on the way could read it: use https.",
            ExitCode.USAGE,
        )
    return key, found


def _from_keyring(url: str) -> str:
    """What `keyring set lsp-agent URL` stored, with or without the address's path; keyring is an optional package."""
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        return ""
    parts = urlsplit(url)
    root = f"{parts.scheme}://{parts.netloc}"
    try:
        return next(filter(None, (keyring.get_password(KEYRING_SERVICE, u) for u in (url, f"{url}/", root))), "")
    except KeyringError:  # locked, or there is none on this machine
        return ""


class Remote:
    """The `Endpoint` of a backend."""

    def __init__(self, backend: Backend) -> None:
        self._url = backend.url
        key, _ = key_of(backend)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._address = Address(backend.url, headers=headers, direct=backend.is_loopback)

    def address(self, cancel: CancelToken) -> Address:  # noqa: ARG002
        """See `Endpoint.address`."""
        return self._address

    def again(self, failure: httpx.TransportError | Reply, attempt: int) -> bool:
        """Once, where asking twice costs no more than tokens: not where the server was too slow already."""
        if attempt > 0:
            return False
        if isinstance(failure, Reply):
            if failure.status not in GATEWAY:
                return False
            time.sleep(PAUSE_S)
            return True
        slow = isinstance(failure, httpx.ReadTimeout | httpx.WriteTimeout | httpx.ConnectTimeout)
        return not slow and _tls_error(failure) is None

    def explain(self, error: httpx.TransportError) -> UserError:
        """See `Endpoint.explain`."""
        server = f"the model server {self._url}"
        tls = _tls_error(error)
        if isinstance(tls, ssl.SSLCertVerificationError):
            return UserError(
                f"The certificate of {server} is not trusted ({tls.verify_message}): "
                "set SSL_CERT_FILE to the file with your organisation's root certificate."
            )
        if tls is not None:
            return UserError(f"There is no encrypted connection to {server} ({tls.reason or tls}): is it http?")
        if isinstance(error, httpx.ProxyError):
            return UserError(f"The proxy on the way to {server} refused ({error}): check HTTPS_PROXY and NO_PROXY.")
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            why = "no answer" if isinstance(error, httpx.ConnectTimeout) else str(error) or "no connection"
            return UserError(f"Cannot reach {server} ({why}): check backend.url and that the server runs.")
        if isinstance(error, httpx.TimeoutException):
            return UserError(f"Nothing came from {server} for {TIMEOUT.read:.0f} s: try again, or look at its log.")
        return UserError(f"The connection to {server} broke twice ({error or type(error).__name__}): try again.")


def open_backend(backend: Backend, cancel: CancelToken | None = None) -> OpenAiModel:
    """Look at the server and return its model. Raises `UserError` when it cannot be used, and `Cancelled`."""
    connection = Connection(Remote(backend), TIMEOUT)
    try:
        model = look(backend, connection, cancel or CancelToken())
    except BaseException:
        connection.close()
        raise
    ours_to_write = model.family is not None and model.kind != "ollama"
    return OpenAiModel(
        model.name,
        connection,
        Dialect(model.kind),
        tier=model.tier,
        context_length=model.context_length,
        file_tokens=model.family.file_tokens if model.family and ours_to_write else None,
        family=model.family,
        stream=model.kind != "lsp-agent",
        where=_where(backend),
        key_name=backend.url,
    )


def check(backend: Backend, cancel: CancelToken | None = None) -> ServedModel:
    """What `open_backend` would open. Raises as it does."""
    connection = Connection(Remote(backend), TIMEOUT)
    try:
        return look(backend, connection, cancel or CancelToken())
    finally:
        connection.close()


def look(backend: Backend, connection: Connection, cancel: CancelToken) -> ServedModel:
    """Ask what the server has."""
    reply = connection.ask("GET", "models", None, cancel, LOOK_TIMEOUT_S)
    if reply.status not in (200, 404, 405, 501):
        raise refusal(reply, _where(backend), backend.url)
    entry = _entry(backend, replies.model_entries(reply.body) if reply.status == 200 else [])
    name = str(entry["id"])
    kind = kind_of(entry.get("owned_by"))
    meta = entry["meta"] if isinstance(entry.get("meta"), Mapping) else {}
    context = backend.context_length or next(
        (
            number
            for number in (*map(entry.get, ("context_length", "max_model_len", "context_window")), meta.get("n_ctx"))
            if isinstance(number, int) and number > 0
        ),
        UNKNOWN_CONTEXT,
    )
    described = f"{name} {entry.get('root') or ''}"
    tier = backend.tier or _tier(described, meta.get("n_params"))
    family = FAMILIES.get(backend.family) if backend.family else family_of(described)
    return ServedModel(name, kind, context, tier, family)


def _where(backend: Backend) -> str:
    return f"The model server {backend.url}"


def _entry(backend: Backend, entries: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    wanted, where = backend.model, _where(backend)
    names = ", ".join(str(entry["id"]) for entry in entries[:NAMES_SHOWN])
    names += " and more" if len(entries) > NAMES_SHOWN else ""
    if not entries:
        if wanted is None:
            raise UserError(f"{where} does not say which models it has: set backend.model, if the address is right.")
        return {"id": wanted}
    if wanted is None:
        if len(entries) > 1:
            raise UserError(f"{where} has several models ({names}): set backend.model to one of them.")
        return entries[0]
    for entry in entries:
        aliases = entry["aliases"] if isinstance(entry.get("aliases"), list) else ()
        if wanted in (entry["id"], str(entry["id"]).removesuffix(":latest"), *aliases):
            return {**entry, "id": wanted}
    raise UnknownModel(f"{where} has no model {wanted!r}; it has {names}: set backend.model to one of them.")


def _tier(described: str, parameters: object) -> Tier:
    """By size, in 10⁹ parameters; a name without a size is mostly that of a large model."""
    sizes = [float(size) for size in _SIZE.findall(described.lower())]
    size = parameters / 1e9 if isinstance(parameters, int | float) else max(sizes, default=MEDIUM_B + 1)
    return "small" if size <= SMALL_B else "medium" if size <= MEDIUM_B else "large"


def _tls_error(error: BaseException) -> ssl.SSLError | None:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None
