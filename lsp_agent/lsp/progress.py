"""Progress of a job: the client's progress bar where it has one, else a message at the start and log lines."""

from __future__ import annotations

import threading
import time
import uuid

from lsprotocol import types

from lsp_agent.lsp.editor import Editor

MIN_INTERVAL_S = 0.1
"""Of reports that come faster only the last is sent, this long after the one before."""


class Progress:
    """One job's progress; the methods are called from the job's thread, in the order begin, report…, end."""

    def __init__(self, editor: Editor, title: str, *, quiet: bool = False) -> None:
        self.token = f"lsp-agent-{uuid.uuid4().hex}"
        self._editor = editor
        self._title = title
        self._quiet = quiet
        self._shown = False
        self._last_report = 0.0
        self._message: str | None = None
        """The message that is to be sent next."""
        self._percentage = 0
        self._ended = False
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Create the token and begin; without one, say that the work has begun unless it is `quiet`."""
        self._shown = self._editor.create_progress(self.token)
        if self._shown:
            begin = types.WorkDoneProgressBegin(title=self._title, cancellable=True, percentage=0)
            self._editor.progress(self.token, begin)
        elif not self._quiet:
            self._editor.show(f"{self._title} …")

    def report(self, message: str, percentage: int | None = None) -> None:
        """Say what is being done; `percentage` (0 to 100) never goes back."""
        with self._lock:
            self._percentage = max(self._percentage, min(100, percentage or 0))
            waiting = self._message is not None
            self._message = message
            wait = self._last_report + MIN_INTERVAL_S - time.monotonic()
        if waiting:
            return  # the timer that waits with the former message sends this one
        if wait <= 0:
            self._flush()
        else:
            timer = threading.Timer(wait, self._flush)
            timer.daemon = True
            timer.start()

    def _flush(self) -> None:
        with self._lock:
            message, self._message = self._message, None
            if message is None or self._ended:
                return
            self._last_report = time.monotonic()
            if self._shown:
                report = types.WorkDoneProgressReport(message=message, percentage=self._percentage, cancellable=True)
                self._editor.progress(self.token, report)
            elif not self._quiet:
                self._editor.log(f"{self._title}: {message}")

    def end(self, message: str) -> None:
        """End it; safe to call twice."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            if not self._shown:
                return
            self._editor.progress(self.token, types.WorkDoneProgressEnd(message=message))
