"""The engine's surroundings: its folder, its log, its models in memory."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from starlette.applications import Starlette

from lsp_agent import machine
from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.gpu.errors import GpuLost
from lsp_agent.engine.request import Request
from lsp_agent.engine.service import control, engine_thread, room
from lsp_agent.engine.service import host as hosting
from lsp_agent.engine.service.catalog import Catalog
from lsp_agent.engine.service.host import EngineHost
from lsp_agent.engine.service.process import _load_default
from lsp_agent.engine.service.runtime import About, place, runtime_folder
from lsp_agent.errors import EngineStopping, UserError
from lsp_agent.models import store

# The folder


@pytest.fixture
def chosen(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime folder that is asked for and not there yet."""
    folder = Path(tempfile.mkdtemp(prefix="rt"))
    monkeypatch.setenv("LSP_AGENT_RUNTIME_DIR", str(folder / "run"))
    yield folder / "run"
    shutil.rmtree(folder)


def test_the_folder_is_made_for_the_user_alone(chosen: Path) -> None:
    assert runtime_folder() == chosen == runtime_folder()
    assert stat.S_IMODE(chosen.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o701, 0o750, 0o777])
def test_a_folder_that_others_may_open_is_refused(chosen: Path, mode: int) -> None:
    chosen.mkdir()
    chosen.chmod(mode)
    with pytest.raises(UserError, match=f"Others may open {chosen}; run `chmod 700"):
        place()


def test_a_folder_of_another_user_is_refused(chosen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: chosen.stat().st_uid + 1)
    with pytest.raises(UserError, match="belongs to another user"):
        place()


def test_a_link_to_a_folder_is_refused(chosen: Path) -> None:
    target = chosen.with_name("target")
    target.mkdir(mode=0o700)
    chosen.symlink_to(target)
    with pytest.raises(UserError, match="is not a folder of its own"):
        place()


def test_a_folder_that_others_could_exchange_is_refused(chosen: Path) -> None:
    chosen.parent.chmod(0o777)
    with pytest.raises(UserError, match="Others may replace"):
        place()
    chosen.parent.chmod(0o1777)  # as /tmp
    place()


def test_a_runtime_folder_of_another_user_is_passed_over(chosen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever becomes root by `su` keeps the variable of who they were."""
    monkeypatch.delenv("LSP_AGENT_RUNTIME_DIR")
    (chosen.parent / "xdg").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(chosen.parent / "xdg"))
    monkeypatch.setattr(tempfile, "tempdir", str(chosen.parent))
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(UserError, match=f"lsp-agent-{other} belongs to another user"):
        runtime_folder()
    assert not (chosen.parent / "xdg" / "lsp-agent").exists()


def test_a_path_too_long_for_a_socket_is_refused_or_passed_over(
    chosen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("long" * 30)
    long.mkdir(mode=0o700)
    monkeypatch.setenv("LSP_AGENT_RUNTIME_DIR", str(long))
    with pytest.raises(UserError, match="too long for a socket"):
        place()
    monkeypatch.delenv("LSP_AGENT_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", str(chosen.parent))
    assert runtime_folder(25) == chosen.parent / f"lsp-agent-{os.getuid()}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(chosen.parent / "missing"))
    assert runtime_folder(25) == chosen.parent / f"lsp-agent-{os.getuid()}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(chosen.parent))
    assert runtime_folder(25) == chosen.parent / "lsp-agent"


def test_other_folders_and_devices_mean_another_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {place().name}
    for variable, value in (
        ("LSP_AGENT_CACHE_DIR", str(tmp_path)),
        ("LSP_AGENT_STATE_DIR", str(tmp_path)),
        ("LSP_AGENT_DEVICE", "cuda"),
    ):
        monkeypatch.setenv(variable, value)
        names.add(place().name)
    assert len(names) == 4
    monkeypatch.setattr("lsp_agent.engine.service.runtime.__version__", "9.9")
    assert place().name not in names


def test_a_process_of_the_same_number_is_not_taken_for_the_engine() -> None:
    mine = About.mine("scope", 0)
    assert mine.process is not None
    assert About(mine.pid, mine.created - 100, mine.version, mine.scope).process is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system keeps the time of day")
def test_a_clock_that_is_set_makes_no_engine_look_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, booted = About.mine("scope", 0), psutil.boot_time()
    for module in (psutil, psutil._pslinux):
        monkeypatch.setattr(module, "boot_time", lambda: booted + 3600.0)
    assert mine.process is not None


def test_what_the_engine_holds_counts_as_free_for_choosing_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the second window would get a smaller model than the first."""
    monkeypatch.setattr(machine, "usable_memory", lambda: 1000)
    assert store.available_memory() == 1000
    place().write_about(About.mine("scope", 0))
    assert store.available_memory() > 10_000_000
    place().write_about(About(os.getpid(), 0.0, "0", "scope"))
    assert store.available_memory() == 1000, "the engine is gone"


def test_a_stale_socket_is_no_engine() -> None:
    here = place()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(here.socket))
        listener.listen()
        assert here.listens()
    assert here.socket.exists() and not here.listens()


# The log


def test_the_log_is_rotated_with_all_that_is_printed(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "engine-x.log"
    program = f"""
        import logging, os, sys
        from pathlib import Path
        from lsp_agent.engine.service.logs import log_to
        log_to(Path({str(path)!r}), most_bytes=1000)
        for number in range(40):
            logging.getLogger("engine").warning("sentence %d %s", number, "." * 50)
            os.write(1, b"from a library in C\\n")
            print("from Python", file=sys.stderr, flush=True)
        os.abort()
    """
    path.parent.mkdir()
    for number in range(12):
        (path.parent / f"engine-other{number}.log").write_text("")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, check=False)
    assert done.stdout == done.stderr == b""
    files = sorted(path.parent.glob("engine-x.log*"))
    assert [file.name for file in files] == ["engine-x.log", *(f"engine-x.log.{n}" for n in (1, 2, 3))]
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert "from a library in C" in file.read_text() and "from Python" in file.read_text()
    assert "sentence 39" in files[0].read_text() and "Fatal Python error: Aborted" in files[0].read_text()
    assert len(list(path.parent.glob("engine-other*"))) == 10, "logs of others pile up"


# Models in memory


class Loads:
    """Counts loads; `hold` makes them wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.go = threading.Event()
        self.go.set()
        load = Engine.load

        def counted(package: Path, **options: Any) -> Engine:
            self.names.append(package.parent.name)
            options["on_progress"](1, 2)
            assert self.go.wait(60)
            return load(package, **options, device="cpu")

        monkeypatch.setattr(Engine, "load", counted)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    monkeypatch.setattr(hosting, "GRACE_S", 0.0)
    return Loads(monkeypatch)


@pytest.fixture
def with_host(
    tiny_package: Callable[[], Path], tmp_path: Path
) -> Callable[[Callable[..., Coroutine[Any, Any, None]]], None]:
    """`with_host(test)`: run an async test with a host of the models a, b and c."""

    def run(test: Callable[[EngineHost], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            host = EngineHost(Catalog(), threads=1)
            for name in "abc":
                (tmp_path / name).mkdir()
                shutil.copytree(tiny_package(), tmp_path / name / "package")
                host.add(name, tmp_path / name / "package")
            try:
                await asyncio.wait_for(test(host), 120)
            finally:
                host.stop()

        asyncio.run(main())

    return run


def loaded(host: EngineHost) -> list[str]:
    return sorted(host.status()["models"])


async def generate(host: EngineHost, engine: Engine, count: int = 4, cancel: CancelToken | None = None) -> list[int]:
    """The tokens of an answer."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    tokens: list[int] = []
    errors: list[Exception] = []

    def on_step(item: Any) -> None:
        if item is None or isinstance(item, Exception):
            errors.extend([item] if item else [])
            loop.call_soon_threadsafe(ended.set)
        else:
            tokens.append(item.token)

    host.submit(engine, Request([1, 2, 3], Sampling(max_tokens=count), cancel or CancelToken()), on_step)
    await ended.wait()
    if errors:
        raise errors[0]
    return tokens


def test_several_who_want_a_model_wait_for_one_load(with_host: Any, loads: Loads) -> None:
    async def test(host: EngineHost) -> None:
        heard: list[tuple[int, int]] = []
        one, two = await asyncio.gather(
            host.engine("a", lambda *progress: heard.append(progress)), host.engine("a", None)
        )
        assert one is two and loads.names == ["a"] and heard == [(1, 2)]
        assert host.resolve(None) == "a", "what is loaded answers those who name no model"
        assert len(await generate(host, one)) == 4
        assert host.status()["models"]["a"]["answered"] == 1

    with_host(test)


def test_others_answer_while_a_model_loads(with_host: Any, loads: Loads) -> None:
    async def test(host: EngineHost) -> None:
        engine = await host.engine("a")
        loads.go.clear()
        loading = asyncio.create_task(host.engine("b"))
        while loads.names != ["a", "b"]:
            await asyncio.sleep(0.01)
        assert len(await generate(host, engine)) == 4
        assert host.busy and host.status()["loading"] == {"b": (1, 2)} and not loading.done()
        loads.go.set()
        await loading
        assert loaded(host) == ["a", "b"] and not host.busy

    with_host(test)


def test_the_model_that_was_not_used_for_longest_makes_room(
    with_host: Any, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LSP_AGENT_ENGINE_MEMORY", "1.2 GiB")  # two of them, with what Python and its libraries take

    async def test(host: EngineHost) -> None:
        engines = {}
        for name in ("a", "b", "a", "c"):
            engine = await host.engine(name)
            await generate(host, engine)
            engines[name] = weakref.ref(engine)
            del engine
        assert loaded(host) == ["a", "c"]
        assert [name for name in "abc" if engines[name]()] == ["a", "c"], "its memory was not freed"
        await generate(host, await host.engine("b"))
        assert loaded(host) == ["b", "c"] and loads.names == ["a", "b", "c", "b"]

    with_host(test)


def test_a_model_at_work_is_not_unloaded_until_it_is_done(
    with_host: Any, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LSP_AGENT_ENGINE_MEMORY", "0.6 GiB")

    async def test(host: EngineHost) -> None:
        engine, cancel = await host.engine("a"), CancelToken()
        begun = asyncio.create_task(generate(host, engine, 500, cancel))
        while not host.busy:
            await asyncio.sleep(0.005)
        loading = asyncio.create_task(host.engine("b"))
        tokens = await begun
        assert len(tokens) == 500 or tokens[-1] in engine.stop_ids
        await loading
        assert loaded(host) == ["b"]
        with pytest.raises(UserError, match="unloaded before the request began; ask again"):
            host.submit(engine, Request([1]), lambda _: None)

    with_host(test)


def test_a_model_that_others_keep_busy_gives_way_at_last(
    with_host: Any, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LSP_AGENT_ENGINE_MEMORY", "0.6 GiB")
    monkeypatch.setattr(hosting, "PATIENCE_S", 0.2)

    async def test(host: EngineHost) -> None:
        answered: list[str] = []

        async def keep_asking() -> None:
            while "b" not in answered:
                await generate(host, await host.engine("a"), 20)
                answered.append("a")

        async def ask_once() -> None:
            await generate(host, await host.engine("b"))
            answered.append("b")

        await host.engine("a")
        await asyncio.gather(keep_asking(), keep_asking(), ask_once())
        assert "b" in answered and loads.names[:2] == ["a", "b"]

    with_host(test)


def test_a_stale_model_makes_way_for_a_faster_placement_and_a_fresh_one_does_not(
    with_host: Any, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"a": "resident", "b": "hybrid", "c": "hybrid"}
    monkeypatch.setattr(room, "_kind_on_gpu", lambda source: kinds[source.name])

    async def test(host: EngineHost) -> None:
        for name in "ab":
            await host.engine(name)
        assert loaded(host) == ["a", "b"]
        monkeypatch.setattr(hosting, "STALE_S", 0.0)
        await host.engine("c")
        assert loaded(host) == ["c"]

    with_host(test)


def test_a_package_that_was_exchanged_is_loaded_anew(with_host: Any, loads: Loads) -> None:
    async def test(host: EngineHost) -> None:
        first = await host.engine("a")
        source = host.catalog.source("a")
        header = (source.package / "config.json").read_bytes()
        (source.package / "config.json").unlink()
        assert await host.engine("a") is first, "a model that was removed still answers"
        (source.package / "config.json").write_bytes(header)
        second = await host.engine("a")
        assert second is not first and loads.names == ["a", "a"]
        assert len(await generate(host, second)) == 4

    with_host(test)


def test_a_model_that_makes_way_is_gone_before_the_next_is_loaded(
    with_host: Any, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only from the list: two large ones at once fit nowhere."""
    monkeypatch.setenv("LSP_AGENT_ENGINE_MEMORY", "0.6 GiB")
    load, engines, alive = Engine.load, list[weakref.ref[Engine]](), list[int]()

    def watched(package: Path, **options: Any) -> Engine:
        alive.append(sum(engine() is not None for engine in engines))
        engine = load(package, **options)
        engines.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(Engine, "load", watched)

    async def test(host: EngineHost) -> None:
        await generate(host, await host.engine("a"))
        await generate(host, await host.engine("b"))
        config = host.catalog.source("b").package / "config.json"
        header = config.read_bytes()
        config.unlink()
        config.write_bytes(header)
        await generate(host, await host.engine("b"))
        assert loads.names == ["a", "b", "b"] and alive == [0, 0, 0]

    with_host(test)


def test_a_gpu_that_is_lost_while_a_model_loads_ends_the_engine(
    with_host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(package: Path, **options: Any) -> Engine:
        raise RuntimeError("CUDA failure 719: unspecified launch failure ; GPU=0")

    monkeypatch.setattr(Engine, "load", lose)

    async def test(host: EngineHost) -> None:
        with pytest.raises(GpuLost):
            await host.engine("a")
        assert isinstance(host.broken, GpuLost)

    with_host(test)


def test_an_engine_that_failed_sends_who_asks_to_the_next_one(
    with_host: Any, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(host: EngineHost) -> None:
        engine = await host.engine("a")

        def fail() -> bool:
            raise ZeroDivisionError

        monkeypatch.setattr(engine.scheduler, "advance", fail)
        host.thread.wake()
        while host.broken is None:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineStopping):
            await host.engine("a")

    with_host(test)


def test_a_model_whose_package_was_removed_is_in_nobodys_way(with_host: Any, loads: Loads) -> None:
    async def test(host: EngineHost) -> None:
        engine = await host.engine("a")
        shutil.rmtree(host.catalog.source("a").package)
        await host.engine("b")
        assert loaded(host) == ["a", "b"] and len(await generate(host, engine)) == 4

    with_host(test)


def test_a_load_that_fails_leaves_the_rest(with_host: Any, loads: Loads) -> None:
    async def test(host: EngineHost) -> None:
        engine = await host.engine("a")
        (host.catalog.source("b").package / "tokenizer.json").write_text("{")
        for _ in range(2):
            with pytest.raises(UserError):
                await host.engine("b")
        assert len(await generate(host, engine)) == 4
        assert loads.names == ["a", "b", "b"]

    with_host(test)


def test_a_load_that_fails_by_our_fault_is_told(with_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that only ended would look as if the engine had died."""

    def fail(package: Path, **options: Any) -> Engine:
        raise RuntimeError("PURPLE-ELEPHANT")

    monkeypatch.setattr(Engine, "load", fail)

    async def test(host: EngineHost) -> None:
        app = Starlette(routes=control.routes(host, place(), About.mine("scope", 0)))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as client:
            reply = await client.post("/engine/load", json={"model": "a"})
        assert "cannot be loaded (RuntimeError); see" in json.loads(reply.text)["error"]["message"]
        assert "ELEPHANT" not in reply.text

    with_host(test)


def test_a_default_model_that_cannot_be_loaded_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(EngineHost):
        async def engine(self, name: str | None = None, on_progress: Any = None) -> Engine:
            raise RuntimeError("no such kernel")

    host = Failing(Catalog())
    asyncio.run(_load_default(host))
    host.stop()
    assert "no such kernel" in caplog.text


def test_nothing_new_is_taken_when_it_is_to_stop(with_host: Any, loads: Loads) -> None:
    async def test(host: EngineHost) -> None:
        engine = await host.engine("a")
        assert await host.call(engine, lambda: threading.current_thread().name) == "engine"
        with pytest.raises(ZeroDivisionError):
            await host.call(engine, lambda: 1 // 0)
        host.leave()
        with pytest.raises(EngineStopping):
            await host.engine("a")
        assert await host.call(engine, lambda: "gives back what it took") == "gives back what it took"
        with pytest.raises(EngineStopping):
            host.submit(engine, Request([1]), lambda _: None)

    with_host(test)


def test_what_the_next_start_can_use_is_kept_once_it_is_quiet(
    with_host: Any, loads: Loads, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_thread, "QUIET_S", 0.01)
    kept = threading.Event()

    def remember(engine: Engine) -> None:
        kept.set()
        raise OSError("no room")

    monkeypatch.setattr(Engine, "remember", remember)

    async def test(host: EngineHost) -> None:
        engine = await host.engine("a")
        await generate(host, engine)
        assert await asyncio.to_thread(kept.wait, 30)
        assert len(await generate(host, engine)) == 4

    with caplog.at_level(logging.WARNING):
        with_host(test)
    assert "no room" in caplog.text


def test_a_limit_of_memory_must_be_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSP_AGENT_ENGINE_MEMORY", "24GB")
    assert room.memory_limit() == 24 << 30
    monkeypatch.setenv("LSP_AGENT_ENGINE_MEMORY", "much")
    with pytest.raises(UserError, match="LSP_AGENT_ENGINE_MEMORY"):
        room.memory_limit()


# Starting a process


def test_what_libraries_print_goes_to_the_log_and_messages_to_who_started_it() -> None:
    program = """
        import os, sys
        from lsp_agent.engine.service import catalog, process

        class Failing(catalog.Catalog):
            def __init__(self, *arguments):
                print("Failed to load libcudnn.so.9", flush=True)
                os.write(1, b"from a library in C\\n")
                raise process.UserError("Too little memory.")

        catalog.Catalog = Failing
        process.main([])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"error": "Too little memory.", "exit_code": 3}]
    assert done.returncode == 3
    log = place().log.read_text()
    assert "libcudnn.so.9" in log and "from a library in C" in log
    assert not place().socket.exists()
