"""What servers say when they refuse: every shape of error that is about, and one sentence for each cause."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lsp_agent.engine.gpu.errors import GpuLost
from lsp_agent.engine.remote.connection import BUSY, Reply
from lsp_agent.errors import PromptTooLong, UnknownModel, UserError

LONGEST_QUOTE = 300
_TOO_LONG = re.compile(
    r"context[ _](length|size|window)|exceeds? the (available|maximum) context|(prompt|input|message) is too long|"
    r"too many (input )?tokens|maximum model length",
    re.IGNORECASE,
)
_TOO_LONG_CODES = frozenset({PromptTooLong.code, "exceed_context_size_error", "string_above_max_length"})
_NO_MODEL = re.compile(r"model\b.*\b(not found|does not exist|not exist|unknown|no such)|unknown model", re.IGNORECASE)
_OURS = {kind.code: kind for kind in (PromptTooLong, GpuLost, UnknownModel)}


class Refused(UserError):  # noqa: N818 - named by what it says
    """A request that was refused for a reason of its own; `detail` is the server's message."""

    def __init__(self, sentence: str, status: int, detail: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.detail = detail

    def about(self, *statuses: int) -> bool:
        """Whether the status is one of these."""
        return self.status in statuses


def our_refusal(reply: Reply) -> UserError:
    """Our engine's errors are sentences already."""
    message, codes = read_error(reply.body)
    kind = next((_OURS[code] for code in codes if code in _OURS), None)
    if not message:
        return UserError(f"The engine answered with HTTP status {reply.status}.")
    return kind(message) if kind else Refused(message, reply.status, message)


def refusal(reply: Reply, where: str, key_name: str) -> UserError:
    """What another server's refusal means. `where` begins the sentence; `key_name` is what its key is kept under.

    `UnknownModel` is without advice: the caller can name the models that there are.
    """
    message, codes = read_error(reply.body)
    quoted = f": {message[:LONGEST_QUOTE].rstrip('.')}" if message else ""
    status = reply.status
    if status == 401 or (status == 403 and not message):
        return UserError(
            f"{where} refused the key{quoted}; set LSP_AGENT_BACKEND_KEY, or run `keyring set lsp-agent {key_name}`."
        )
    if status == 413 or _TOO_LONG_CODES & codes or (status in (400, 422, 500) and _TOO_LONG.search(message)):
        return PromptTooLong(f"The prompt does not fit the model's context{quoted}.")
    if "model_not_found" in codes or (status in (400, 404) and _NO_MODEL.search(message)):
        return UnknownModel(f"{where} does not have this model{quoted}.")
    if status in BUSY:
        return UserError(f"{where} is busy{quoted}; try again later.")
    if 300 <= status < 400:
        return UserError(f"{where} sends requests on to another address: set backend.url to that one.")
    if status == 404 and not message:
        return Refused(f"{where} has no such path: is backend.url right? It mostly ends in /v1.", status, message)
    return Refused(f"{where} refused the request (HTTP {status}){quoted}.", status, message)


def read_error(body: Any) -> tuple[str, frozenset[str]]:
    """The message and the codes or types of an error, in whichever shape it came: empty where there are none."""
    if isinstance(body, Mapping) and isinstance(body.get("error"), Mapping):
        body = body["error"]
    if not isinstance(body, Mapping):
        return (body.strip() if isinstance(body, str) else ""), frozenset()
    message = next((body[key] for key in ("message", "error", "detail", "msg") if body.get(key)), "")
    if isinstance(message, list):  # FastAPI: a list of what is wrong with which field
        message = "; ".join(_field_error(entry) for entry in message)
    codes = frozenset(str(body[key]) for key in ("code", "type") if body.get(key))
    return str(message).strip(), codes


def _field_error(entry: Any) -> str:
    if not isinstance(entry, Mapping):
        return str(entry)
    return f"{'.'.join(str(part) for part in entry.get('loc') or ())}: {entry.get('msg')}"
