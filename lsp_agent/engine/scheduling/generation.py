"""One request on its way through the scheduler, and the handle by which its steps are had."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lsp_agent.engine.request import Request, Step, Timings
from lsp_agent.engine.scheduling.decoding import Decoding
from lsp_agent.engine.tokens import Tokenizer
from lsp_agent.errors import Cancelled

if TYPE_CHECKING:
    from lsp_agent.engine.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

OnStep = Callable[[Step | Exception | None], None]
"""Called on the engine's thread with each step, then once with None or with the error that ended the request. The end
comes from `submit` itself where there is nothing to generate, or no engine any more."""


class Job:
    """A request and its answers in the making: what the scheduler holds of it."""

    def __init__(
        self, request: Request, tokenizer: Tokenizer, limit: int, arrived: float, on_step: OnStep | None
    ) -> None:
        """`limit`: most tokens of each answer; `arrived`: seconds of the scheduler's clock."""
        self.request, self.arrived, self.on_step = request, arrived, on_step
        self.timings = Timings(prompt_tokens=len(request.prompt))
        self.decodings = [Decoding(self, index, tokenizer, limit) for index in range(request.n)]
        self.results: deque[Step | Exception | None] = deque()
        self.begun = False
        """Its prompt has been, or is being, read."""
        self.ended = False
        self.abandoned = False
        """Nobody will ask for its steps."""

    @property
    def unwanted(self) -> bool:
        """Whether nothing of it need be computed any more."""
        return self.abandoned or self.request.cancel.cancelled

    def give(self, result: Step | Exception | None) -> None:
        """Hand out a step, or the end."""
        if self.on_step is None:
            self.results.append(result)
            return
        try:
            self.on_step(result)
        except Exception:  # others' requests go on
            log.exception("A step could not be handed out; its request is dropped.")
            self.abandoned = True

    def end(self, error: Exception | None = None) -> None:
        """Hand out the end, once."""
        if not self.ended:
            self.ended = True
            self.give(error)


class Generation(Iterator[Step]):
    """The steps of one request; `timings` grows with them.

    Iterating, which is for the thread that runs the engine, makes the scheduler work until the next step is there; it
    raises `Cancelled` within one step of the request's `cancel`. Where the request was submitted with `on_step`, steps
    go there, and there is nothing to iterate over. What it read stays in the prefix cache.
    """

    def __init__(self, job: Job, scheduler: Scheduler) -> None:
        self._job, self._scheduler = job, scheduler
        self.timings = job.timings

    def finish(self, index: int) -> None:
        """End answer `index` here: no more of its steps are wanted. From any thread; it works within one step."""
        self._job.decodings[index].unwanted = True
        self._scheduler.wake()

    def __next__(self) -> Step:
        job = self._job
        if job.request.cancel.cancelled and not job.ended:
            self._scheduler.drop_unwanted()
            job.results.clear()
            raise Cancelled
        while not job.results:
            if job.ended:
                raise StopIteration
            if not self._scheduler.advance() and not job.ended:  # it ends there when it is cancelled meanwhile
                raise RuntimeError("the scheduler forgot a request")  # a bug; better than waiting for ever
        result = job.results.popleft()
        if isinstance(result, Step):
            return result
        if result is None:
            raise StopIteration
        raise result

    def __del__(self) -> None:
        if self._job.on_step is None:
            self._job.abandoned = True
