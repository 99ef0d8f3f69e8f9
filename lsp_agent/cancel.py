"""One cancellation token for decoding, test processes and the agent loop."""

from __future__ import annotations

import threading

from lsp_agent.errors import Cancelled


class CancelToken:
    """A thread-safe flag: set once by whoever cancels, polled or waited on by whoever works."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Ask the work to stop; may be called from any thread, any number of times."""
        self._event.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._event.is_set()

    def raise_if_cancelled(self) -> None:
        """Raise `Cancelled` if `cancel` was called."""
        if self._event.is_set():
            raise Cancelled

    def wait(self, seconds: float) -> bool:
        """Sleep up to `seconds`; return True at once when cancelled."""
        return self._event.wait(seconds)
