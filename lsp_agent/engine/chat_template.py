"""The checkpoint's own chat template, rendered in a process of its own.

A template is a program that came with the weights. transformers renders it in Jinja's sandbox, which keeps it from the
interpreter but not from looping for ever or from filling the memory; limits on a child process do. Run as a module,
this file is that child: a JSON request a line on standard input, a JSON answer a line on standard output.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from lsp_agent.errors import UserError

RENDER_SECONDS = 10.0
"""A conversation of a million characters takes a real template a few milliseconds."""
START_SECONDS = 120.0
MEMORY_BYTES = 4 << 30
MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_RENDERED_CHARACTERS = 1 << 26


class _Renderer:
    """The child process; started when it is first needed, and again after it was stopped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, request: Mapping[str, Any]) -> str:
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                self._stop()
                process = self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                answer = json.loads(_line(process, RENDER_SECONDS))
            except (OSError, ValueError, TimeoutError) as error:
                self._stop()
                what = f"did not finish in {RENDER_SECONDS:.0f} s" if isinstance(error, TimeoutError) else "crashed"
                raise UserError(f"The model's chat template {what}; use another checkpoint of this model.") from error
        if "error" in answer:
            raise UserError(f"The model's chat template refuses these messages: {answer['error']}.")
        return str(answer["text"])

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=tempfile.gettempdir(),
            # That torch is missing is on purpose.
            env={**os.environ, "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"},
            start_new_session=True,
        )
        self._process = process
        try:
            _line(process, START_SECONDS)
        except (OSError, TimeoutError) as error:
            self._stop()
            raise UserError("The process that writes chat prompts did not start; install lsp-agent again.") from error
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._stop()


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Read the child's next line; raises TimeoutError, and OSError when the child has ended."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        # The child writes a line in one go, so waiting for its beginning is enough.
        if not selector.select(seconds):
            raise TimeoutError
    if not (line := process.stdout.readline()):
        raise OSError
    return line


_RENDERER = _Renderer()
atexit.register(_RENDERER.close)


def render(
    template: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], variables: dict[str, Any]
) -> str:
    """Write a conversation as the text of a prompt that ends where the assistant answers.

    `messages` and `tools` are what transformers' `apply_chat_template` takes; `variables` are further names that the
    template may look at. Raises `UserError` when the template refuses them, takes too long or writes too much.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise UserError("The model's chat template is too long to be one; use another checkpoint of this model.")
    return _RENDERER.render(
        {"template": template, "messages": list(messages), "tools": list(tools), "variables": variables}
    )


def _answer(request: dict[str, Any]) -> dict[str, str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: Any = render_jinja_template(
            conversations=[request["messages"]],
            tools=request["tools"] or None,
            chat_template=request["template"],
            add_generation_prompt=True,
            **request["variables"],
        )
        text: str = rendered[0][0]
    except Exception as error:  # a template raises what its author wrote
        return {"error": f"{type(error).__name__}: {error}"[:500].rstrip(".")}
    return {"text": text} if len(text) <= MAX_RENDERED_CHARACTERS else {"error": "the prompt is too long"}


def main() -> None:
    """Answer requests until standard input ends, which it does with the parent."""
    import transformers.utils.chat_template_utils  # noqa: F401 - slow, so before the first request

    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    _say({})
    for request in sys.stdin.buffer:
        _set_alarm(2 * RENDER_SECONDS)  # ends us if the parent, who gives up first, is no more
        _say(_answer(json.loads(request)))
        _set_alarm(0)


def _set_alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _say(message: dict[str, str]) -> None:
    sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
