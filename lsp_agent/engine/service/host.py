"""The loaded models and the one thread that computes: whoever asks, the work is done there, piece by piece."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lsp_agent.engine.chat_template import render
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.generation import Generation
from lsp_agent.engine.gpu.errors import GpuLost, explain
from lsp_agent.engine.request import Request, Step
from lsp_agent.engine.service.catalog import Catalog, ServedModel, Source
from lsp_agent.engine.service.residents import Loading, OnProgress, Resident
from lsp_agent.engine.service.room import fit, give_back_memory
from lsp_agent.errors import EngineStopping, UserError

log = logging.getLogger(__name__)

T = TypeVar("T")
OnStep = Callable[[Step | Exception | None], None]

QUIET_S = 1.0
"""After so long without work there is time to keep on disk what the next start can use."""
GRACE_S = 5.0
"""A model that was asked for is not unloaded for so long: its request may still be in the making."""
STALE_S = 120.0
"""A model that was not used for so long is unloaded where another one gets a faster placement by that."""
PATIENCE_S = 20.0
"""After so long a model that others keep busy takes no new requests, so that one that waits for its memory can load."""


class EngineHost:
    """Loads models when they are asked for and runs them in turn. For one event loop; `submit` from any thread."""

    def __init__(self, catalog: Catalog | None = None, *, threads: int | None = None) -> None:
        self.catalog = catalog or Catalog()
        self.broken: UserError | None = None
        """Why nothing can be answered any more; the process has to end."""
        self.stopping = False
        """Takes no new requests and finishes those that it has."""
        self.leaving_now = False
        """Does not even finish those."""
        self.left = asyncio.Event()
        """Set by `leave`."""
        self.last_used = time.monotonic()
        self._threads = threads
        self._residents: tuple[Resident, ...] = ()  # replaced, never changed: the engine thread reads it
        self._loading: dict[str, Loading] = {}
        self._one_at_a_time = asyncio.Lock()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._calls: deque[tuple[concurrent.futures.Future[Any], Callable[[], Any]]] = deque()
        self._unremembered = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def holding(cls, engines: Mapping[str, Engine]) -> EngineHost:
        """A host of engines that are loaded already, the first of them the default."""
        host = cls(Catalog(default=next(iter(engines), None)))
        for name, engine in engines.items():
            host._take_in(Resident(None, engine, name))
        return host

    # Models by name

    def models(self) -> list[ServedModel]:
        """All models that can be asked for; loads nothing."""
        listed = {resident.name: resident.served for resident in self._residents}
        if any(resident.source is None for resident in self._residents):
            return list(listed.values())
        for source in self.catalog.sources():
            listed.setdefault(source.name, source.served)
        return list(listed.values())

    def served(self, name: str | None) -> ServedModel:
        """The entry of the model that answers to `name`. Raises as `resolve`."""
        name = self.resolve(name)
        resident = self._resident(name)
        return resident.served if resident else self.catalog.source(name).served

    def add(self, name: str, package: Path) -> None:
        """Let `name` mean a package folder. Raises `UserError`, also when the name is in use for another."""
        resident = self._resident(name)
        if resident is not None and resident.source is not None and resident.source.package != package:
            if resident.active or time.monotonic() - resident.last_used < GRACE_S:
                raise UserError(f"{name} is in use for another package; choose another name.")
            resident.leaving = True
        self.catalog.add(name, package)

    def resolve(self, name: str | None) -> str:
        """The name of the model that answers to `name`; None and "" are the default's.

        Raises `UnknownModel`, and `UserError` where no model is installed.
        """
        if not name and self.catalog.default is None and self._residents:
            return max(self._residents, key=lambda resident: resident.last_used).name
        wanted = name or self.catalog.default
        if wanted is not None and self._resident(wanted) is not None:
            return wanted
        return self.catalog.source(wanted).name

    async def engine(self, name: str | None = None, on_progress: OnProgress | None = None) -> Engine:
        """The model's engine, loaded if need be; it is not unloaded for the next few seconds, nor while it works.

        Raises `UnknownModel`, and `UserError` when the model cannot be loaded.
        """
        name = self.resolve(name)
        while True:
            self._check()
            resident = self._resident(name)
            if resident is not None and not resident.leaving and not resident.outdated:
                self._touch(resident)
                return resident.engine
            loading = self._loading.get(name)
            if loading is None:
                loading = self._loading[name] = Loading()
                loading.task = asyncio.create_task(self._load(name, loading))
                loading.task.add_done_callback(_seen)
            if on_progress is not None:
                loading.listeners.append(on_progress)
            assert loading.task is not None
            await asyncio.shield(loading.task)

    # Work

    def submit(self, engine: Engine, request: Request, on_step: OnStep) -> Generation:
        """Queue a request; `on_step` is called on the engine thread with each step, then with None or the error.

        Raises `UserError` for what cannot be served.
        """
        resident = self._of(engine)
        self._begin(resident)
        asked: list[Generation] = []

        def watched(item: Step | Exception | None) -> None:
            if not isinstance(item, Step):
                if isinstance(item, Exception):
                    item = self._noted(item)
                if asked:
                    resident.recent.append(asked[0].timings)
                self._end(resident)
            on_step(item)

        try:
            asked.append(engine.submit(request, watched))
        except BaseException:
            self._end(resident)
            raise
        return asked[0]

    async def call(self, engine: Engine, function: Callable[[], T]) -> T:
        """Run `function` on the engine thread between two pieces of work; it should be short."""
        resident = self._of(engine)
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._begin(resident)
        try:
            self._calls.append((future, function))
            self._wake.set()
            return await asyncio.wrap_future(future)
        except Exception as error:
            raise self._noted(error) from error
        finally:
            self._end(resident)

    @property
    def busy(self) -> bool:
        """Whether anything is computed or loaded."""
        return bool(self._loading) or any(resident.active for resident in self._residents)

    def status(self) -> dict[str, Any]:
        """What is loaded and what it does, as plain data."""
        return {
            "models": {resident.name: resident.status() for resident in self._residents},
            "loading": {name: loading.progress for name, loading in self._loading.items()},
            "stopping": self.stopping,
        }

    def leave(self, now: bool = False) -> None:
        """Take no more requests, and have the process end when all are answered, or `now`."""
        self.stopping = True
        self.leaving_now = self.leaving_now or now
        self.left.set()

    def stop(self) -> None:
        """End the engine thread after the piece of work it is at; what is unfinished stays so."""
        self.stopping = self._ended = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for resident in self._residents:
            resident.engine.scheduler.wake = _nothing

    # Loading

    async def _load(self, name: str, loading: Loading) -> None:
        try:
            async with self._one_at_a_time:
                source = await asyncio.to_thread(self.catalog.source, name)
                if (old := self._resident(name)) is not None:
                    old.leaving = True
                    await self._idle(old)
                    await self._unload(old)
                await self._make_room(source)
                loop = asyncio.get_running_loop()

                def report(done: int, total: int) -> None:
                    loop.call_soon_threadsafe(loading.report, done, total)

                resident = await asyncio.to_thread(self._open, source, report)
                self._take_in(resident)
        finally:
            del self._loading[name]

    def _open(self, source: Source, report: OnProgress) -> Resident:
        stamp, started = source.stamp, time.monotonic()
        # What renders chat templates takes seconds to start: meanwhile.
        threading.Thread(target=render, args=("", (), (), {}), name="warm up", daemon=True).start()
        engine = Engine.load(source.package, threads=self._threads, context=source.context, on_progress=report)
        log.info("loaded %s in %.1f s", source.name, time.monotonic() - started)
        return Resident(source, engine, source.name, stamp)

    async def _make_room(self, source: Source) -> None:
        """Unload models that were not used for longest until this one fits, or nothing is left to unload."""
        began = time.monotonic()
        while self._residents and (how := await asyncio.to_thread(fit, source, self._residents)) != "well":
            oldest = min(self._residents, key=lambda resident: (resident.active > 0, resident.last_used))
            unused = time.monotonic() - oldest.last_used
            if how == "somehow" and (oldest.active or unused < STALE_S):
                return
            if time.monotonic() - began > PATIENCE_S:
                oldest.leaving = True
            if oldest.active or unused < GRACE_S:
                await asyncio.sleep(0.05)
            else:
                await self._unload(oldest)

    async def _idle(self, resident: Resident) -> None:
        while resident.active:
            await asyncio.sleep(0.05)

    async def _unload(self, resident: Resident) -> None:
        log.info("unloading %s", resident.name)
        with self._lock:
            self._residents = tuple(other for other in self._residents if other is not resident)
        await self._between(gc.collect)  # the engine thread has let go of it by then
        del resident
        await asyncio.to_thread(give_back_memory)

    async def _between(self, function: Callable[[], Any]) -> None:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._calls.append((future, function))
        self._wake.set()
        await asyncio.wrap_future(future)

    def _take_in(self, resident: Resident) -> None:
        resident.engine.scheduler.wake = self._wake.set
        with self._lock:
            self._residents = (*self._residents, resident)
        self._wake.set()

    # Bookkeeping

    def _resident(self, name: str) -> Resident | None:
        return next((resident for resident in self._residents if resident.name == name), None)

    def _of(self, engine: Engine) -> Resident:
        self._check()
        for resident in self._residents:
            if resident.engine is engine:
                return resident
        raise UserError("The model was unloaded before the request began; ask again.")

    def _check(self) -> None:
        if self.broken is not None:
            raise self.broken
        if self.stopping:
            raise EngineStopping("The engine is stopping; ask again.")

    def _touch(self, resident: Resident) -> None:
        resident.last_used = self.last_used = time.monotonic()

    def _begin(self, resident: Resident) -> None:
        with self._lock:
            resident.active += 1
        self._touch(resident)

    def _end(self, resident: Resident) -> None:
        with self._lock:
            resident.active -= 1
            resident.answered += 1
        self._unremembered = True
        self._touch(resident)

    def _noted(self, error: Exception) -> Exception:
        """The error for who asked; a lost GPU breaks the host."""
        told = explain(error) or error
        if isinstance(told, GpuLost):
            self.broken = self.broken or told
        return told

    # The engine thread

    def _run(self) -> None:
        while not self._ended:
            self._wake.clear()
            self._run_calls()
            worked = False
            for resident in self._residents:
                try:
                    worked |= resident.engine.scheduler.advance()
                    self.broken = self.broken or resident.engine.scheduler.broken
                except Exception as error:  # no request's fault: those are told by their generations
                    log.exception("the engine failed")
                    told = self._noted(error)
                    self.broken = self.broken or UserError(f"The engine failed ({type(told).__name__}); ask again.")
                    return
            resident = None  # type: ignore[assignment]  # an unloaded model's memory must not wait for the next one
            if not worked and not self._wake.wait(QUIET_S if self._unremembered else None):
                self._remember()

    def _run_calls(self) -> None:
        while self._calls:
            future, function = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    def _remember(self) -> None:
        self._unremembered = False
        for resident in self._residents:
            try:
                resident.engine.remember()
            except Exception as error:
                log.warning("cannot keep what the next start could use: %s", error)
                self._noted(error)


def _seen(task: asyncio.Task[None]) -> None:
    """Whoever waited for the task is told of its error; nobody may have waited."""
    if not task.cancelled():
        task.exception()


def _nothing() -> None:
    """For a scheduler that no thread serves."""
