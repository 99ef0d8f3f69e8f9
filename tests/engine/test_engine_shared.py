"""One engine for all of a user's clients: who starts it, what they can rely on while it comes and goes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_checkpoint import SPECIAL, vocabulary

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Completion, Sampling
from lsp_agent.engine.service import client, control_client, launch, runtime
from lsp_agent.engine.service.client import EngineModel
from lsp_agent.engine.service.process import seconds_of
from lsp_agent.engine.service.runtime import About, Place, place
from lsp_agent.errors import Cancelled, UnknownModel, UserError
from lsp_agent.models import open_model

NEVER_ENDING = tuple((vocabulary()[0].index(token), -100.0) for token in SPECIAL)


def tokens(count: int) -> Sampling:
    """Answers have so many: the random model's text is not the same each time, as speed decides what is drafted."""
    return Sampling(max_tokens=count, logit_bias=NEVER_ENDING)


SHORT, WHOLE, LONG = tokens(3), tokens(500), tokens(8000)


@pytest.fixture(scope="module")
def package(tiny_package: Callable[[], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with room for a long answer."""
    folder = tmp_path_factory.mktemp("long") / "package"
    shutil.copytree(tiny_package(), folder)
    header = json.loads((folder / "config.json").read_text())
    header["model"]["context"] = 8192
    (folder / "config.json").write_text(json.dumps(header))
    return folder


@pytest.fixture
def open_tiny(package: Path) -> Iterator[Callable[..., EngineModel]]:
    """`open_tiny(name="tiny")`: a client, closed after the test."""
    opened = []

    def connect(name: str = "tiny", path: Path = package) -> EngineModel:
        opened.append(EngineModel(name, path, tier="small"))
        return opened[-1]

    yield connect
    for model in opened:
        model.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(12) as threads:
        yield threads


def ask(model: EngineModel, sampling: Sampling = SHORT, cancel: CancelToken | None = None) -> Completion:
    [answer] = model.infill("def area(width, height):\n    ", "\n", sampling, cancel or CancelToken())
    return answer


def running(about: About, where: Place | None = None) -> int:
    """How many answers the engine decodes."""
    report = control_client.status(where or place(), about)
    return sum(model["queue"]["running"] for model in report["models"].values()) if report else 0


def wait_for(condition: Callable[[], Any], what: str) -> None:
    assert launch.wait_until(lambda: bool(condition()), 60), f"waited in vain: {what}"


def begun(pool: ThreadPoolExecutor, model: EngineModel, sampling: Sampling) -> Future[Completion]:
    """An answer that the engine is at."""
    answer = pool.submit(ask, model, sampling)
    about = model.endpoint.about
    wait_for(lambda: running(about), "the answer begins")
    return answer


def log_lines(part: str) -> list[str]:
    return [line for line in place().log.read_text().splitlines() if part in line]


# Starting


def test_many_that_start_it_at_once_get_one_engine(
    open_tiny: Callable[..., EngineModel], pool: ThreadPoolExecutor
) -> None:
    models = list(pool.map(lambda _: open_tiny(), range(10)))
    assert len({model.endpoint.about for model in models}) == 1
    assert len(log_lines("listens")) == 1
    assert len(log_lines("loaded tiny")) == 1
    assert [answer.usage.completion_tokens for answer in pool.map(ask, models)] == [3] * 10


def test_only_the_user_can_reach_it_and_it_logs_no_prompt(open_tiny: Callable[..., EngineModel]) -> None:
    model = open_tiny()
    model.infill("PURPLE-ELEPHANT = ", "\n", SHORT, CancelToken())
    here = place()
    assert stat.S_IMODE(here.folder.stat().st_mode) == 0o700
    for file in (here.socket, here.lock, here.log):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert len(os.fsencode(here.socket)) <= 103
    assert "PURPLE" not in here.log.read_text()


def test_the_key_of_a_model_server_stays_with_who_has_it(
    open_tiny: Callable[..., EngineModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LSP_AGENT_BACKEND_KEY", "sk-very-secret")
    process = open_tiny().endpoint.about.process
    assert process is not None and "sk-very-secret" not in process.environ().values()


def test_code_in_the_current_folder_is_never_imported(
    open_tiny: Callable[..., EngineModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("uvicorn", "queue", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    process = open_tiny().endpoint.about.process
    assert process is not None and process.cwd() == str(place().folder)
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_loaded_is_one_sentence_and_hurts_nobody(
    open_tiny: Callable[..., EngineModel], package: Path, tmp_path: Path
) -> None:
    model = open_tiny()
    broken = tmp_path / "broken"
    shutil.copytree(package, broken)
    (broken / "weights.bin").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"weights|damaged|install"):
        open_tiny("broken", broken)
    with pytest.raises(UserError, match="no model package"):
        open_tiny("missing", tmp_path / "missing")
    with pytest.raises(UserError, match="in use for another package"):
        open_tiny("tiny", broken)
    with pytest.raises(UserError, match="cannot be a model's name"):
        open_tiny("../tiny", package)
    with pytest.raises(UnknownModel):
        list(control_client.load(place(), model.endpoint.about, "no-such-model", None, CancelToken()))
    assert ask(model).usage.completion_tokens == 3


def test_an_unknown_model_is_one_sentence() -> None:
    with pytest.raises(UserError, match="no-such-model"):
        open_model("no-such-model")
    assert place().about() is None, "an engine was started for nothing"


def test_an_engine_that_cannot_start_says_why(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSP_AGENT_ENGINE_IDLE_SECONDS", "soon")
    with pytest.raises(UserError, match="LSP_AGENT_ENGINE_IDLE_SECONDS is not a number"):
        EngineModel("tiny", package, tier="small")
    for never in ("0", "-1", "nan"):  # it would leave before it could be asked
        monkeypatch.setenv("LSP_AGENT_ENGINE_IDLE_SECONDS", never)
        with pytest.raises(UserError, match="LSP_AGENT_ENGINE_IDLE_SECONDS must be more than 0"):
            seconds_of("LSP_AGENT_ENGINE_IDLE_SECONDS", 600.0)
    monkeypatch.setenv("LSP_AGENT_ENGINE_IDLE_SECONDS", "60")
    monkeypatch.setattr(launch, "sys", type("sys", (), {"executable": shutil.which("false"), "platform": "linux"}))
    with pytest.raises(UserError, match=r"ended while it started; see .*engine-\w+\.log"):
        EngineModel("tiny", package, tier="small")


def test_who_gives_up_while_the_engine_starts_need_not_wait(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    silent = tmp_path / "silent"
    silent.write_text(f"#!/bin/sh\necho $$ > {pid}.new\nmv {pid}.new {pid}\nexec sleep 60\n")
    silent.chmod(0o700)
    monkeypatch.setattr(launch, "sys", type("sys", (), {"executable": str(silent), "platform": "linux"}))
    cancel = CancelToken()
    threading.Timer(0.1, cancel.cancel).start()
    started = time.monotonic()
    try:
        with pytest.raises(Cancelled):
            launch.start(place(), cancel)
        assert time.monotonic() - started < 10
    finally:
        wait_for(pid.exists, "the process")
        os.kill(int(pid.read_text()), signal.SIGKILL)


# Dying


def test_a_killed_engine_is_started_again_and_all_that_was_asked_is_answered(
    open_tiny: Callable[..., EngineModel], pool: ThreadPoolExecutor
) -> None:
    models = [open_tiny(), open_tiny("other")]
    killed = models[0].endpoint.about
    answers = [pool.submit(ask, model, tokens(1000)) for model in models]
    wait_for(lambda: running(killed) == 2, "both are answered")
    os.kill(killed.pid, signal.SIGKILL)
    assert [answer.result(60).usage.completion_tokens for answer in answers] == [1000, 1000]
    new = models[0].endpoint.about
    os.kill(new.pid, signal.SIGKILL)
    wait_for(lambda: launch.gone(new), "it is gone")
    assert place().socket.exists(), "a killed engine leaves its socket behind"
    assert ask(models[1]).usage.completion_tokens == 3
    assert len({killed, new, models[1].endpoint.about}) == 3


def test_an_engine_that_dies_each_time_is_one_sentence(
    open_tiny: Callable[..., EngineModel], pool: ThreadPoolExecutor
) -> None:
    model = open_tiny()
    answer = begun(pool, model, LONG)
    first = model.endpoint.about
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: model.endpoint.about != first and running(model.endpoint.about), "it is asked again")
    os.kill(model.endpoint.about.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"stopped while it answered; run again, or see .*\.log"):
        answer.result(60)


def test_a_client_that_dies_or_cancels_leaves_the_engine_free(
    open_tiny: Callable[..., EngineModel], package: Path, pool: ThreadPoolExecutor
) -> None:
    program = f"""
        from pathlib import Path
        from lsp_agent.cancel import CancelToken
        from lsp_agent.chat_model import Sampling
        from lsp_agent.engine.service.client import EngineModel
        model = EngineModel("tiny", Path({str(package)!r}), tier="small")
        model.infill("x", "y", Sampling(max_tokens=8000, logit_bias={NEVER_ENDING}), CancelToken())
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)]) as dying:
        wait_for(lambda: (about := place().about()) and running(about), "its answer begins")
        about = place().about()
        assert about is not None
        dying.kill()
    wait_for(lambda: not running(about), "its answer is given up")
    model, cancel = open_tiny(), CancelToken()
    assert model.endpoint.about == about, "the engine outlives who started it"
    answer = pool.submit(ask, model, LONG, cancel)
    wait_for(lambda: running(about), "the answer begins")
    cancel.cancel()
    with pytest.raises(Cancelled):
        answer.result(60)
    wait_for(lambda: not running(about), "the answer is given up")


# Leaving


def test_an_idle_engine_gives_its_memory_back_and_comes_again(
    open_tiny: Callable[..., EngineModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LSP_AGENT_ENGINE_IDLE_SECONDS", "0.2")
    model = open_tiny()
    first = model.endpoint.about
    wait_for(lambda: launch.gone(first), "it leaves")
    assert not place().socket.exists() and place().about() is None
    monkeypatch.setenv("LSP_AGENT_ENGINE_IDLE_SECONDS", "60")
    assert ask(model).usage.completion_tokens == 3
    assert model.endpoint.about != first
    model.close()
    with pytest.raises(Cancelled):
        ask(model)


def test_an_engine_that_is_stopped_finishes_and_others_are_answered_by_the_next(
    open_tiny: Callable[..., EngineModel], pool: ThreadPoolExecutor
) -> None:
    model, other = open_tiny(), open_tiny()
    first = model.endpoint.about
    answer = begun(pool, model, WHOLE)
    stopped = pool.submit(control_client.stop, place(), first, False, 60.0)
    wait_for(lambda: launch.gone(first) or (control_client.status(place(), first) or {}).get("stopping"), "it is told")
    late = pool.submit(ask, other)
    assert answer.result(60).usage.completion_tokens == 500
    assert model.endpoint.about == first, "the answer came from the engine that was stopped"
    stopped.result(60)
    assert launch.gone(first)
    assert late.result(60).usage.completion_tokens == 3
    assert other.endpoint.about != first


def test_an_engine_that_is_stopped_at_once_breaks_off(
    open_tiny: Callable[..., EngineModel], pool: ThreadPoolExecutor
) -> None:
    model, cancel = open_tiny(), CancelToken()
    first = model.endpoint.about
    answer = pool.submit(ask, model, LONG, cancel)
    wait_for(lambda: running(first), "the answer begins")
    control_client.stop(place(), first, True, 60.0)
    assert launch.gone(first)
    assert not answer.done(), answer.exception()
    wait_for(lambda: model.endpoint.about != first and running(model.endpoint.about), "a new engine is asked")
    cancel.cancel()
    with pytest.raises(Cancelled):
        answer.result(60)


def test_an_engine_that_hangs_is_killed(open_tiny: Callable[..., EngineModel]) -> None:
    about = open_tiny().endpoint.about
    os.kill(about.pid, signal.SIGSTOP)
    control_client.stop(place(), about, now=True, seconds=1.0)
    assert launch.gone(about)


def test_a_newer_version_has_the_older_engine_finish_and_leave(
    open_tiny: Callable[..., EngineModel], package: Path, pool: ThreadPoolExecutor
) -> None:
    old = f"""
        import lsp_agent
        lsp_agent.__version__ = "0.0.9"
        from pathlib import Path
        from lsp_agent.cancel import CancelToken
        from lsp_agent.chat_model import Sampling
        from lsp_agent.engine.service import launch
        from lsp_agent.engine.service.client import EngineModel
        launch.MODULE = "old_engine"
        model = EngineModel("tiny", Path({str(package)!r}), tier="small")
        print(model.endpoint.about.pid, flush=True)
        input()
        [answer] = model.infill("x", "y", Sampling(max_tokens=2000, logit_bias={NEVER_ENDING}), CancelToken())
        print(model.endpoint.about.pid, answer.usage.completion_tokens, flush=True)
        input()
    """
    old_version = "import lsp_agent; lsp_agent.__version__ = '0.0.9'"
    environment = {**os.environ, "PYTHONPATH": str(site("old_engine", old_version))}
    command = [sys.executable, "-c", textwrap.dedent(old)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment) as old_client:
        pid = int(old_client.stdout.readline())
        [older] = place().others()
        assert (older.pid, older.version) == (pid, "0.0.9")
        [file] = [file for file in place().folder.glob("engine-*.json") if str(pid) in file.read_text()]
        old_place = dataclasses.replace(place(), name=file.stem)
        print("ask", file=old_client.stdin, flush=True)
        wait_for(lambda: running(older, old_place), "its answer begins")
        newer = open_tiny().endpoint.about
        assert old_client.stdout.readline().split() == [str(pid), "2000"], "its answer was not finished"
        wait_for(lambda: launch.gone(older), "the older engine leaves")
        old_client.kill()
    assert not launch.gone(newer)


def site(name: str, preparation: str) -> Path:
    """A folder with a module that is the engine's process after some preparation."""
    folder = place().folder.parent / f"{place().folder.name}-site"
    folder.mkdir()
    (folder / f"{name}.py").write_text(
        f"{preparation}\nfrom lsp_agent.engine.service.process import main\nif __name__ == '__main__':\n    main()\n"
    )
    return folder


def test_where_there_are_no_unix_sockets_a_port_and_a_token_do(
    open_tiny: Callable[..., EngineModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    preparation = "from lsp_agent.engine.service import runtime; runtime.HAS_UNIX_SOCKETS = False"
    monkeypatch.setenv("PYTHONPATH", str(site("tcp_engine", preparation)))
    monkeypatch.setattr(launch, "MODULE", "tcp_engine")
    for module in (runtime, control_client, client):
        monkeypatch.setattr(module, "HAS_UNIX_SOCKETS", False)
    model = open_tiny()
    first = model.endpoint.about
    assert first.port and not place().socket.exists()
    assert httpx.get(f"http://127.0.0.1:{first.port}/v1/models").status_code == 401
    assert ask(model).usage.completion_tokens == 3
    os.kill(first.pid, signal.SIGKILL)
    assert ask(model).usage.completion_tokens == 3
    control_client.stop(place(), model.endpoint.about, now=False, seconds=30.0)
    assert launch.gone(model.endpoint.about)


def test_a_client_that_comes_while_the_engine_leaves_gets_the_next(
    open_tiny: Callable[..., EngineModel], pool: ThreadPoolExecutor
) -> None:
    model = open_tiny()
    first = model.endpoint.about
    answer = begun(pool, model, WHOLE)
    assert control_client.ask_to_stop(place(), first, now=False)
    late = open_tiny("other")
    assert late.endpoint.about != first
    assert answer.result(60).usage.completion_tokens == 500 and launch.gone(first)


# The command


def command(*arguments: str, code: int = 0) -> str:
    """What `lsp-agent engine …` prints; on standard error where it fails."""
    run = [sys.executable, "-m", "lsp_agent", "engine", *arguments]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def test_the_command_starts_shows_and_stops_it(package: Path, pool: ThreadPoolExecutor) -> None:
    assert json.loads(command("status", "--json")) == {"running": False, "log": str(place().log)}
    started = json.loads(command("start", "--tcp", "0", "--package", f"mine={package}", "--model", "mine", "--json"))
    token = Path(started["token_file"])
    assert started["started"] and stat.S_IMODE(token.stat().st_mode) == 0o600
    key = {"Authorization": f"Bearer {token.read_text()}"}
    url = f"{started['url']}/completions"
    body = {"model": "mine", "prompt": "x = ", "max_tokens": 3, "temperature": 0}
    assert httpx.post(url, json=body).status_code == 401
    stop = started["url"].replace("/v1", "/engine/stop")
    assert httpx.post(stop, json={"now": True}).status_code == 401
    assert httpx.post(url, json=body, headers={**key, "X-LSP-Agent-Client": "me"}).json()["usage"]["total_tokens"] > 3
    about = place().about()
    assert about is not None and about.port
    status = json.loads(command("status", "--json"))
    assert status["pid"] == about.pid == started["pid"] and status["memory"]["resident_bytes"] > 1e7
    mine = status["models"]["mine"]
    assert (mine["placement"], mine["context_length"], mine["answered"]) == ("cpu", 8192, 1)
    assert mine["cache"]["requests"] == 1 and mine["queue"]["running"] == 0
    assert "mine on cpu" in command("status")
    assert "runs already, with other options" in command("start", "--threads", "1", code=2)
    assert "has stopped" in command("stop")
    assert launch.gone(about)
    assert "does not run" in command("stop")


def test_in_the_foreground_it_ends_with_an_interrupt(package: Path) -> None:
    run = [sys.executable, "-m", "lsp_agent", "engine", "start", "--foreground", "--package", f"mine={package}"]
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True) as process:
        wait_for(place().listens, "it listens")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr is not None and "listens" in process.stderr.read()
    assert not place().listens()


def test_two_models_answer_at_once(open_tiny: Callable[..., EngineModel], pool: ThreadPoolExecutor) -> None:
    one, other = open_tiny("one"), open_tiny("other")
    assert one.endpoint.about == other.endpoint.about
    stop = CancelToken()
    long = pool.submit(ask, one, LONG, stop)
    wait_for(lambda: running(one.endpoint.about), "the long answer begins")
    assert ask(other, WHOLE).usage.completion_tokens == 500
    assert not long.done(), "the models took turns by whole answers"
    stop.cancel()
    with pytest.raises(Cancelled):
        long.result(60)


def test_threads_share_one_load(open_tiny: Callable[..., EngineModel], pool: ThreadPoolExecutor) -> None:
    """One model object, many threads: also right after the engine was killed."""
    model = open_tiny()
    os.kill(model.endpoint.about.pid, signal.SIGKILL)
    barrier = threading.Barrier(4)

    def at_once(_: int) -> int:
        barrier.wait(30)
        return ask(model).usage.completion_tokens

    assert list(pool.map(at_once, range(4))) == [3] * 4
    assert len(log_lines("listens")) == 2
