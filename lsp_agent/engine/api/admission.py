"""Who may wait: limits on requests under way, of all clients and of each."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from lsp_agent.engine.api.errors import ApiError

MOST = 256
MOST_OF_A_CLIENT = 64


class Admission:
    """Counts requests from their arrival to their answer's end; used in the event loop's thread only."""

    def __init__(self, most: int = MOST, most_of_a_client: int = MOST_OF_A_CLIENT) -> None:
        self._most, self._most_of_a_client = most, most_of_a_client
        self._under_way: Counter[str] = Counter()
        self.last_used = time.monotonic()
        """When a request last ended."""

    @property
    def total(self) -> int:
        """Requests under way."""
        return self._under_way.total()

    @contextmanager
    def enter(self, client: str) -> Iterator[None]:
        """Count a request while it is under way; raises `ApiError` (429) where there are too many."""
        for have, most, whose in (
            (self.total, self._most, "The engine has"),
            (self._under_way[client], self._most_of_a_client, "This client has"),
        ):
            if have >= most:
                message = f"{whose} {have} requests under way, which is the most; wait until one is answered."
                raise ApiError(message, 429, code="rate_limit_exceeded", retry=True)
        self._under_way[client] += 1
        try:
            yield
        finally:
            self.last_used = time.monotonic()
            self._under_way[client] -= 1
            if not self._under_way[client]:
                del self._under_way[client]
