"""`ChatModel` over the engine's HTTP: starts the engine process, asks it, restarts it once if it has gone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import (
    DEFAULT_OPTIONS,
    ChatOptions,
    Completion,
    Message,
    Sampling,
    Tier,
    TokenScore,
    ToolSchema,
)
from lsp_agent.engine.gpu.errors import GpuLost
from lsp_agent.engine.service.shapes import completions
from lsp_agent.engine.tool_calls import message_to_openai, tool_to_openai
from lsp_agent.errors import Cancelled, PromptTooLong, UserError
from lsp_agent.paths import state_dir

IDLE_SECONDS = 600.0
"""An engine that nobody asked anything for so long gives its memory back; the next request starts it again."""
LOAD_TIMEOUT_S = 300.0
POLL_S = 0.05
LOST_GPU_S = 10.0
"""How long an engine whose GPU was lost takes to end, at most."""
LONGEST_PARENT = 70
LOGS_KEPT = 10


class EngineProcess:
    """One engine child process and its private socket."""

    def __init__(self, name: str, package: Path, threads: int | None, context: int | None) -> None:
        self._folder = _private_folder()
        self.socket = self._folder / "engine.sock"
        # -P and a folder of our own: the user's current folder holds other people's code, and its `queue.py` or
        # `numpy/` must not be imported instead of the real one.
        command = [sys.executable, "-P", "-m", "lsp_agent.engine.service.process", "--name", name, "--package"]
        command += [str(package.absolute())]
        command += ["--socket", str(self.socket), "--idle-seconds", str(IDLE_SECONDS)]
        for option, value in (("--threads", threads), ("--context", context)):
            if value is not None:
                command += [option, str(value)]
        number, log_name = tempfile.mkstemp(prefix="engine-", suffix=".log", dir=_log_folder())  # 0600
        self.log = Path(log_name)
        with os.fdopen(number, "wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,  # a line that a buffer swallowed would not wake the selector
                start_new_session=True,  # Ctrl-C in the terminal cancels the run, not the engine under it
            )

    def wait_ready(self, cancel: CancelToken) -> None:
        """Block until the model is loaded; raise its sentence, or one that names the log.

        A load may take any time while it makes progress.
        """
        message = self._next_message(cancel)
        while "progress" in message:
            message = self._next_message(cancel)
        if "error" in message:
            self.stop()
            raise UserError(message["error"])

    def _next_message(self, cancel: CancelToken) -> dict[str, Any]:
        assert self._process.stdout is not None
        waited = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not selector.select(POLL_S):
                waited += POLL_S
                if cancel.cancelled:
                    self.stop()
                    raise Cancelled
                if waited > LOAD_TIMEOUT_S:
                    self.stop()
                    raise UserError(f"The engine did not load its model in {LOAD_TIMEOUT_S:.0f} s; see {self.log}.")
        line = self._process.stdout.readline()
        message: dict[str, Any] = {"error": f"The engine ended while it loaded; see {self.log}."}
        return json.loads(line) if line else message

    @property
    def pid(self) -> int:
        """Process id, for tests that kill it."""
        return self._process.pid

    def ended(self, within_s: float = 0.0) -> bool:
        """Whether the process is gone, or goes within the given seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        return self._process.poll() is not None

    def stop(self) -> None:
        """End the process and remove its socket; safe to call twice."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _private_folder() -> Path:
    """A new folder (0700) whose path is short: socket paths may have 107 bytes at most."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    for parent in (runtime, tempfile.gettempdir(), "/tmp"):  # noqa: S108 - a private folder is made in it
        if parent and len(parent) < LONGEST_PARENT and os.access(parent, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix="lsp-agent-", dir=parent))
    raise UserError("The engine needs a folder for its socket; set TMPDIR to a writable folder with a short path.")


def _log_folder() -> Path:
    """Where engines log, with all but the newest few logs removed."""
    folder = state_dir() / "logs"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    logs = sorted(folder.glob("engine-*.log"), key=lambda path: path.lstat().st_mtime)
    for old in logs[: -(LOGS_KEPT - 1)]:
        old.unlink(missing_ok=True)
    return folder


class EngineModel:
    """Implements `lsp_agent.chat_model.ChatModel` on an engine process of its own."""

    def __init__(
        self,
        name: str,
        package: Path,
        *,
        tier: Tier,
        context_length: int,
        threads: int | None = None,
        cancel: CancelToken | None = None,
        file_tokens: tuple[str, str] | None = None,
        infills: bool = True,
    ) -> None:
        """`infills`: the model was trained to fill in the middle; that its vocabulary has the tokens says little."""
        self.name = name
        self._infills = infills
        self.file_tokens = file_tokens
        self.tier: Tier = tier
        self.context_length = context_length
        self._package = package
        self._threads = threads
        # A request must be abandoned from outside when the user cancels; only an async client can do that cleanly.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-client", daemon=True)
        self._thread.start()
        self._closed = False
        try:
            self._start(cancel or CancelToken())
        except BaseException:
            self._stop_loop()
            raise

    def _start(self, cancel: CancelToken) -> None:
        self.process = EngineProcess(self.name, self._package, self._threads, self.context_length)
        self.process.wait_ready(cancel)
        transport = httpx.AsyncHTTPTransport(uds=str(self.process.socket))
        self._http = httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=None)  # noqa: S113

    def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        cancel: CancelToken,
        n: int = 1,
        tools: Sequence[ToolSchema] = (),
        options: ChatOptions = DEFAULT_OPTIONS,  # noqa: ARG002
    ) -> list[Completion]:
        """See `ChatModel.chat`."""
        body = {"messages": [message_to_openai(message) for message in messages], **_body(sampling, n)}
        if tools:
            body["tools"] = [tool_to_openai(tool) for tool in tools]
        return completions(self._post("/v1/chat/completions", body, cancel))

    def infill(
        self,
        prefix: str,
        suffix: str,
        sampling: Sampling,
        cancel: CancelToken,
        n: int = 1,
        options: ChatOptions = DEFAULT_OPTIONS,  # noqa: ARG002
    ) -> list[Completion]:
        """See `ChatModel.infill`."""
        if not self._infills:
            raise UserError(
                f"{self.name} was not trained to fill in the middle; choose a coder model (`lsp-agent model list`)."
            )
        answer = self._post("/v1/completions", {"prompt": prefix, "suffix": suffix, **_body(sampling, n)}, cancel)
        return completions(answer)

    def score(self, text: str, cancel: CancelToken) -> list[TokenScore]:
        """See `ChatModel.score`."""
        body = {"prompt": text, "echo": True, "max_tokens": 0, "logprobs": 0}
        scored = self._post("/v1/completions", body, cancel)["choices"][0]["logprobs"]
        return [
            TokenScore(start, start + len(token), logprob)
            for start, token, logprob in zip(
                scored["text_offset"], scored["tokens"], scored["token_logprobs"], strict=True
            )
        ]

    def close(self) -> None:
        """End the engine process; safe to call twice, and from any thread."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._http.aclose(), self._loop).result(2)
        self._stop_loop()
        self.process.stop()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _post(self, path: str, body: dict[str, Any], cancel: CancelToken) -> dict[str, Any]:
        for attempt in range(2):
            cancel.raise_if_cancelled()
            if self._closed:
                raise Cancelled
            if self.process.ended():  # it was idle for long, or somebody killed it
                self.process.stop()
                self._start(cancel)
            try:
                response = self._wait(self._http.post(path, json=body), cancel)
            except httpx.TransportError as error:
                if attempt == 0 and self.process.ended(within_s=2.0):
                    continue
                raise UserError(
                    f"The engine stopped while it answered; run again, or see {self.process.log}."
                ) from error
            if response.status_code != 200:
                refused = _error(response)
                if isinstance(refused, GpuLost) and attempt == 0 and self.process.ended(within_s=LOST_GPU_S):
                    continue  # a new process may use the GPU, or the CPU where the device was not chosen
                raise refused
            answer: dict[str, Any] = response.json()
            return answer
        raise UserError(f"The engine stops each time it is asked; see {self.process.log}.")

    def _wait(self, request: Any, cancel: CancelToken) -> httpx.Response:
        future = asyncio.run_coroutine_threadsafe(request, self._loop)
        while True:
            try:
                response: httpx.Response = future.result(POLL_S)
                return response
            except concurrent.futures.CancelledError as error:
                raise Cancelled from error
            except TimeoutError:
                if cancel.cancelled or self._closed:
                    future.cancel()  # closes the connection, which stops the engine within one decode step
                    raise Cancelled from None


def _body(sampling: Sampling, n: int) -> dict[str, Any]:
    fields = asdict(sampling) | {"stop": list(sampling.stop), "n": n}
    bias = dict(fields.pop("logit_bias"))
    return fields | ({"logit_bias": bias} if bias else {})


def _error(response: httpx.Response) -> UserError:
    try:
        error = response.json()["error"]
        kinds = {kind.code: kind for kind in (PromptTooLong, GpuLost)}
        return kinds.get(error.get("code"), UserError)(error["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return UserError(f"The engine answered with HTTP status {response.status_code}.")
