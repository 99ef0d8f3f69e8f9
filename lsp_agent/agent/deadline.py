"""A cancellation token that also ends by itself, so that one slow model call cannot outlast a run's limit."""

from __future__ import annotations

import time

from lsp_agent.cancel import CancelToken
from lsp_agent.errors import Cancelled

POLL_S = 0.05


class Deadline(CancelToken):
    """Cancelled when `parent` is, when its own `cancel` is called, or after `seconds` (None: never)."""

    def __init__(self, parent: CancelToken, seconds: float | None = None) -> None:
        super().__init__()
        self._parent = parent
        self._at = None if seconds is None else time.monotonic() + seconds

    @property
    def cancelled(self) -> bool:
        """Whether the work must stop."""
        late = self._at is not None and time.monotonic() >= self._at
        return late or self._parent.cancelled or super().cancelled

    def raise_if_cancelled(self) -> None:
        """Raise `Cancelled` if the work must stop."""
        if self.cancelled:
            raise Cancelled

    def wait(self, seconds: float) -> bool:
        """Sleep up to `seconds`; return True as soon as the work must stop."""
        until = time.monotonic() + seconds
        while not self.cancelled:
            left = until - time.monotonic()
            if left <= 0:
                return False
            super().wait(min(left, POLL_S))
        return True
