"""The loaded models: which are in memory, and who has asked what of them."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lsp_agent.engine.chat_template import render
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.request import Request, Step
from lsp_agent.engine.scheduling.generation import Generation
from lsp_agent.engine.service.catalog import Catalog, ServedModel, Source
from lsp_agent.engine.service.engine_thread import EngineThread
from lsp_agent.engine.service.residents import Loading, OnProgress, Resident
from lsp_agent.engine.service.room import fit, give_back_memory, needed_memory
from lsp_agent.errors import EngineStopping, UserError

log = logging.getLogger(__name__)

T = TypeVar("T")
OnStep = Callable[[Step | Exception | None], None]

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
        self.stopping = False
        """Takes no new requests and finishes those that it has."""
        self.leaving_now = False
        """Does not even finish those."""
        self.left = asyncio.Event()
        """Set by `leave`."""
        self.last_used = time.monotonic()
        self._threads = threads
        self.thread = EngineThread()
        self._loading: dict[str, Loading] = {}
        self._one_at_a_time = asyncio.Lock()
        self._lock = threading.Lock()

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
            del resident  # else what makes way would keep its memory
            await asyncio.shield(loading.task)

    # Work

    @contextmanager
    def using(self, engine: Engine) -> Iterator[None]:
        """Keep the model loaded while a request to it is prepared. Raises `UserError` when it is not."""
        resident = self._of(engine)
        self._begin(resident)
        try:
            yield
        finally:
            self._end(resident)

    def submit(self, engine: Engine, request: Request, on_step: OnStep) -> Generation:
        """Queue a request; `on_step` is called on the engine thread with each step, then with None or the error.

        Raises `UserError` for what cannot be served.
        """
        self._check()
        resident = self._of(engine)
        self._begin(resident)
        asked: list[Generation] = []

        def watched(item: Step | Exception | None) -> None:
            if not isinstance(item, Step):
                if isinstance(item, Exception):
                    item = self.thread.told(item)
                resident.answered += 1
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
        """Run `function` on the engine thread between two pieces of work; it should be short.

        Also while the host is stopping: what was begun, such as a score, is finished, and gives back what it took.
        """
        self._check_alive()
        resident = self._of(engine)
        self._begin(resident)
        try:
            return await asyncio.wrap_future(self.thread.call(function))
        except Exception as error:
            raise self.thread.told(error) from error
        finally:
            self._end(resident)

    @property
    def broken(self) -> UserError | None:
        """Why nothing can be answered any more; the process has to end."""
        return self.thread.broken

    @property
    def _residents(self) -> tuple[Resident, ...]:
        return self.thread.residents

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

    async def close(self) -> None:
        """When all is answered: keep on disk what the next start can use."""
        for resident in self._residents:
            await self._close(resident)

    def stop(self) -> None:
        """End the engine thread after the piece of work it is at; what is unfinished stays so."""
        self.stopping = True
        self.thread.stop()
        for resident in self._residents:
            resident.engine.scheduler.wake = _nothing

    # Loading

    async def _load(self, name: str, loading: Loading) -> None:
        try:
            async with self._one_at_a_time:
                source = await asyncio.to_thread(self.catalog.source, name)
                await self._retire(name)
                await self._make_room(source)
                loop = asyncio.get_running_loop()

                def report(done: int, total: int) -> None:
                    loop.call_soon_threadsafe(loading.report, done, total)

                try:
                    resident = await asyncio.to_thread(self._open, source, report)
                except Exception as error:
                    raise self.thread.told(error) from error
                self._take_in(resident)
        finally:
            del self._loading[name]

    def _open(self, source: Source, report: OnProgress) -> Resident:
        stamp, started = source.stamp, time.monotonic()
        # What renders chat templates takes seconds to start: meanwhile.
        threading.Thread(target=render, args=("", (), (), {}), name="warm up", daemon=True).start()
        engine = Engine.load(source.package, threads=self._threads, context=source.context, on_progress=report)
        log.info("loaded %s in %.1f s", source.name, time.monotonic() - started)
        return Resident(source, engine, source.name, stamp, needed_memory(source.package))

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
            name, wanted = oldest.name, oldest.active or unused < GRACE_S
            del oldest  # whatever refers to it keeps its memory
            if wanted:
                await asyncio.sleep(0.05)
            else:
                await self._unload(name)

    async def _retire(self, name: str) -> None:
        """Unload the model, if it is loaded, when its work is done."""
        while (resident := self._resident(name)) is not None:
            resident.leaving = True
            active = resident.active
            del resident
            if active:
                await asyncio.sleep(0.05)
            else:
                await self._unload(name)

    async def _unload(self, name: str) -> None:
        log.info("unloading %s", name)
        resident = self._resident(name)
        assert resident is not None
        with self._lock:
            self.thread.residents = tuple(other for other in self._residents if other is not resident)
        await self._close(resident)
        await asyncio.wrap_future(self.thread.call(gc.collect))  # the engine thread has let go of it by then
        del resident
        await asyncio.to_thread(give_back_memory)

    async def _close(self, resident: Resident) -> None:
        try:
            await asyncio.wrap_future(self.thread.call(resident.engine.close))
        except Exception as error:
            log.warning("cannot keep what the next start could use: %s", error)

    def _take_in(self, resident: Resident) -> None:
        resident.engine.scheduler.wake = self.thread.wake
        with self._lock:
            self.thread.residents = (*self._residents, resident)
        self.thread.wake()

    # Bookkeeping

    def _resident(self, name: str) -> Resident | None:
        return next((resident for resident in self._residents if resident.name == name), None)

    def _of(self, engine: Engine) -> Resident:
        for resident in self._residents:
            if resident.engine is engine:
                return resident
        raise UserError("The model was unloaded before the request began; ask again.")

    def _check_alive(self) -> None:
        if self.broken is not None:
            raise type(self.broken)(str(self.broken))

    def _check(self) -> None:
        self._check_alive()
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
        self._touch(resident)


def _seen(task: asyncio.Task[None]) -> None:
    """Whoever waited for the task is told of its error; nobody may have waited."""
    if not task.cancelled():
        task.exception()


def _nothing() -> None:
    """For a scheduler that no thread serves."""
