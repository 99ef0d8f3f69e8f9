"""What all routes of the API share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from lsp_agent.engine.api.admission import Admission
from lsp_agent.engine.api.errors import ApiError
from lsp_agent.engine.api.metrics import Metrics

if TYPE_CHECKING:
    from lsp_agent.engine.engine import Engine
    from lsp_agent.engine.service.catalog import ServedModel
    from lsp_agent.engine.service.host import EngineHost

T = TypeVar("T")

THREADS = 3
QUICKLY_READ = 1 << 16
"""Bytes of a body that are parsed in less time than a thread takes to begin."""


class Serving:
    """The host of the models, threads for what would hold up the event loop, and who is under way.

    `scoring`: held while a text is scored, so that scoring takes one state of the engine at most.
    """

    def __init__(self, host: EngineHost, admission: Admission, metrics: Metrics) -> None:
        self.host, self.admission, self.metrics = host, admission, metrics
        self.scoring = asyncio.Lock()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="prepare")
        self._urgent = ThreadPoolExecutor(1, thread_name_prefix="prepare-urgent")

    async def threaded(self, function: Callable[..., T], *arguments: object, urgent: bool = False) -> T:
        """Run a function in a thread; what is `urgent` waits for no other's long prompts."""
        threads = self._urgent if urgent else self._threads
        return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)

    async def parsed(self, parse: Callable[[bytes], T], body: bytes) -> T:
        """Read a body; in a thread where that takes long."""
        return parse(body) if len(body) < QUICKLY_READ else await self.threaded(parse, body)

    def check_alive(self) -> None:
        """Raise what keeps the engine from answering anything."""
        if self.host.broken is not None:
            raise self.host.broken
        if self.host.stopping:
            raise ApiError("The engine is stopping; ask again in a moment.", 503, code="engine_stopping", retry=True)

    async def engine(self, name: str | None) -> tuple[Engine, ServedModel]:
        """The loaded model that answers to a name; raises `UserError` and `ApiError`."""
        self.check_alive()
        model = self.host.served(name)
        return await self.host.engine(model.name), model

    def close(self) -> None:
        """End the threads."""
        for threads in (self._threads, self._urgent):
            threads.shutdown(wait=False, cancel_futures=True)
