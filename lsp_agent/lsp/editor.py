"""The editor as a job's thread sees it: every message goes out from the event loop, in the order of the calls."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lsprotocol import types

from lsp_agent.cancel import CancelToken
from lsp_agent.lsp.capabilities import ClientFeatures

if TYPE_CHECKING:
    from pygls.lsp.server import LanguageServer

T = TypeVar("T")
log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 600.0
"""Some editors ask their user before they apply an edit; stopping the job ends the wait."""
_POLL_S = 0.05


@dataclass(frozen=True)
class Answer:
    """The client's answer to an edit; `known` is False when none came in time: it may still apply the edit."""

    applied: bool
    reason: str = ""
    known: bool = True


class Editor:
    """Thread-safe calls to the client. Those that wait for an answer must not be made from the event loop itself."""

    def __init__(self, server: LanguageServer) -> None:
        self._server = server
        self._loop: asyncio.AbstractEventLoop | None = None
        self.features = ClientFeatures()

    def connect(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on messages can be sent through `loop`."""
        self._loop = loop

    def post(self, function: Callable[..., object], *arguments: Any) -> None:
        """Run `function` on the event loop, soon; dropped when the loop has ended."""
        if self._loop is None or self._loop.is_closed():
            return
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # closed between the two lines: the connection is gone
            log.debug("The connection is closed.")

    def show(self, text: str, kind: types.MessageType = types.MessageType.Info) -> None:
        """Show one message to the user; it is logged too, for editors whose messages vanish."""
        self.post(self._server.window_show_message, types.ShowMessageParams(kind, text))
        self.log(text, kind)

    def log(self, text: str, kind: types.MessageType = types.MessageType.Info) -> None:
        """Write to the editor's log of this server."""
        self.post(self._server.window_log_message, types.LogMessageParams(kind, text))

    def publish(self, uri: str, diagnostics: Sequence[types.Diagnostic], version: int | None) -> None:
        """Replace the diagnostics of one document."""
        shown_version = version if self.features.diagnostic_version else None
        self.post(
            self._server.text_document_publish_diagnostics,
            types.PublishDiagnosticsParams(uri, list(diagnostics), shown_version),
        )

    def progress(self, token: str, value: Any) -> None:
        """Send one report of a progress token that was created with `create_progress`."""
        self.post(self._server.protocol.notify, types.PROGRESS, types.ProgressParams(token, value))

    def create_progress(self, token: str) -> bool:
        """Ask the client for a progress token; False when it cannot or will not have one."""
        if not self.features.progress:
            return False
        try:
            self._ask(
                lambda: self._server.window_work_done_progress_create_async(types.WorkDoneProgressCreateParams(token)),
                timeout_s=2.0,
            )
        except Exception as error:
            log.debug("No progress token: %s", type(error).__name__)
            return False
        return True

    def apply_edit(self, label: str, edit: types.WorkspaceEdit, cancel: CancelToken | None = None) -> Answer:
        """Have the client apply `edit`, waiting for its user if it asks one."""
        params = types.ApplyWorkspaceEditParams(edit, label)
        try:
            result = self._ask(lambda: self._server.workspace_apply_edit_async(params), ANSWER_TIMEOUT_S, cancel)
        except FutureTimeout:
            return Answer(False, "the editor did not answer", known=False)
        except Exception as error:
            return Answer(False, f"the editor answered with an error ({error})")
        if result.applied:
            return Answer(True)
        return Answer(False, result.failure_reason or "the editor gave no reason")

    def show_document(self, uri: str) -> bool:
        """Open a file in the editor; False when it cannot."""
        if not self.features.show_document:
            return False
        try:
            params = types.ShowDocumentParams(uri, take_focus=False)
            return bool(self._ask(lambda: self._server.window_show_document_async(params), 10.0).success)
        except Exception as error:
            log.debug("The document was not shown: %s", type(error).__name__)
            return False

    def _ask(self, request: Callable[[], Awaitable[T]], timeout_s: float, cancel: CancelToken | None = None) -> T:
        """Send a request from the event loop and wait for its answer in this thread.

        Raises `concurrent.futures.TimeoutError` after `timeout_s` seconds or on `cancel`.
        """
        loop = self._loop
        if loop is None or loop.is_closed():
            raise FutureTimeout

        async def ask() -> T:
            return await request()

        future: Future[T] = asyncio.run_coroutine_threadsafe(ask(), loop)
        end = time.monotonic() + timeout_s
        while True:
            try:
                return future.result(_POLL_S)
            except FutureTimeout:
                if future.done():
                    raise
                if time.monotonic() > end or loop.is_closed() or (cancel is not None and cancel.cancelled):
                    future.cancel()
                    raise
