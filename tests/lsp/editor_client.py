"""An editor for tests: a real server process, raw JSON-RPC, documents that edits are really applied to.

Positions are counted here by encoding to bytes, independently of the server's code.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALC = '''"""Arithmetic. 😀"""


def add(a, b):
    return a - b  # 😀


def double(a):
    return a * 2
'''
TEST_CALC = """from calc import add, double


def test_add():
    assert add(1, 2) == 3


def test_double():
    assert double(4) == 8
"""


FULL_CAPABILITIES: dict[str, Any] = {
    "general": {"positionEncodings": ["utf-16"]},
    "window": {"workDoneProgress": True, "showDocument": {"support": True}},
    "workspace": {
        "applyEdit": True,
        "workspaceFolders": True,
        "workspaceEdit": {"documentChanges": True, "resourceOperations": ["create", "rename", "delete"]},
    },
    "textDocument": {
        "synchronization": {"didSave": True},
        "codeAction": {
            "dataSupport": True,
            "disabledSupport": True,
            "codeActionLiteralSupport": {"codeActionKind": {"valueSet": ["", "quickfix", "source"]}},
        },
        "publishDiagnostics": {"relatedInformation": True, "dataSupport": True, "versionSupport": True},
    },
}


def without(capabilities: dict[str, Any], *path: str) -> dict[str, Any]:
    """A copy of `capabilities` that lacks the one at `path`."""
    changed = copy.deepcopy(capabilities)
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return changed


class Buffer:
    """One open document."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.version = 1


class EditorClient:
    """Use as a context manager; leaving it shuts the server down and checks that it went cleanly."""

    def __init__(
        self,
        root: Path | None,
        *arguments: str,
        capabilities: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        folders: list[Path] | None = None,
    ) -> None:
        self.root = root
        self.capabilities = FULL_CAPABILITIES if capabilities is None else capabilities
        self.encoding = self.capabilities.get("general", {}).get("positionEncodings", ["utf-16"])[0]
        self.buffers: dict[str, Buffer] = {}
        self.messages: list[str] = []
        self.logs: list[str] = []
        self.progress: dict[str, list[dict[str, Any]]] = {}
        self.diagnostics: dict[str, list[dict[str, Any]]] = {}
        self.edits: list[dict[str, Any]] = []
        self.shown: list[str] = []
        self.before_edit: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None
        """Called with a workspace edit; what it returns, if anything, is the answer in place of applying it."""
        self.changed = threading.Condition()
        self._answers: dict[int, dict[str, Any]] = {}
        self._next = 0
        self._write_lock = threading.Lock()
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lsp_agent", "serve", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            cwd=root or "/",
        )
        self.stderr = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._error_reader = threading.Thread(target=self._read_errors, daemon=True)
        self._error_reader.start()
        folders = folders if folders is not None else [root] if root is not None else []
        self.server = self.request(
            "initialize",
            {
                "processId": os.getpid(),
                "rootUri": root.as_uri() if root is not None else None,
                "capabilities": self.capabilities,
                "workspaceFolders": [{"uri": f.as_uri(), "name": f.name} for f in folders] or None,
                "initializationOptions": options,
            },
        )
        self.startup_s = time.monotonic() - self.started
        self.notify("initialized", {})

    def __enter__(self) -> EditorClient:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if self.process.poll() is None and kind is None:
                self.request("shutdown", None)
                self.notify("exit", None)
                assert self.process.wait(10) == 0, self.stderr.decode()
                self._error_reader.join(5)
                assert b"Traceback" not in self.stderr, self.stderr.decode()
        finally:
            self.kill()

    def kill(self) -> None:
        """End the server with SIGKILL."""
        self.process.kill()
        self.process.wait(10)
        with contextlib.suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.close()

    # the wire -----------------------------------------------------------------------------------------------------

    def _send(self, message: dict[str, Any]) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self.process.stdin is not None
        with self._write_lock:
            self.process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            self.process.stdin.flush()

    def notify(self, method: str, params: Any) -> None:
        self._send({"method": method, "params": params})

    def request(self, method: str, params: Any, timeout: float = 20.0) -> Any:
        self._next += 1
        number = self._next
        self._send({"id": number, "method": method, "params": params})
        self.wait(lambda: number in self._answers, timeout, f"an answer to {method}")
        answer = self._answers.pop(number)
        assert "error" not in answer, answer["error"]
        return answer.get("result")

    def wait(self, condition: Callable[[], Any], timeout: float = 30.0, what: str = "") -> Any:
        """Wait until `condition` holds, which is looked at after every message."""
        with self.changed:
            if not self.changed.wait_for(condition, timeout):
                state = f"messages {self.messages}, logs {self.logs[-5:]}, diagnostics {self.diagnostics}"
                raise AssertionError(f"waited {timeout} s for {what or condition}: {state}, {self.stderr.decode()}")
        return condition()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        while chunk := self.process.stderr.read1():
            self.stderr += chunk

    def _read(self) -> None:
        stream = self.process.stdout
        assert stream is not None
        while True:
            length = 0
            while (line := stream.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            body = stream.read(length)
            if not body:
                return
            message = json.loads(body)
            if "method" in message and "id" in message:
                # Answers may need to wait for the test; the reader must not.
                threading.Thread(target=self._answer, args=(message,), daemon=True).start()
                continue
            with self.changed:
                if "id" in message:
                    self._answers[message["id"]] = message
                else:
                    self._notified(message["method"], message["params"])
                self.changed.notify_all()

    def _notified(self, method: str, params: Any) -> None:
        if method == "window/showMessage":
            # Where the machine has no sandbox every folder says so once; the tests are about the other messages.
            if "not sandboxed" not in params["message"]:
                self.messages.append(params["message"])
        elif method == "window/logMessage":
            self.logs.append(params["message"])
        elif method == "textDocument/publishDiagnostics":
            self.diagnostics[params["uri"]] = params["diagnostics"]
        elif method == "$/progress":
            self.progress[params["token"]].append(params["value"])
        else:
            raise AssertionError(f"unexpected notification {method}")

    def _answer(self, message: dict[str, Any]) -> None:
        method, params = message["method"], message["params"]
        result: Any = None
        with self.changed:
            if method == "window/workDoneProgress/create":
                self.progress[params["token"]] = []
            elif method == "window/showDocument":
                self.shown.append(params["uri"])
                result = {"success": True}
            elif method == "workspace/applyEdit":
                self.edits.append(params["edit"])
            else:
                raise AssertionError(f"unexpected request {method}")
            self.changed.notify_all()
        if method == "workspace/applyEdit":
            answer = self.before_edit(params["edit"]) if self.before_edit is not None else None
            result = answer if answer is not None else self._apply(params["edit"])
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._send({"id": message["id"], "result": result})

    # documents ----------------------------------------------------------------------------------------------------

    def uri(self, name: str) -> str:
        assert self.root is not None
        return (self.root / name).as_uri()

    def open(self, name: str, text: str | None = None) -> str:
        assert self.root is not None
        uri = self.uri(name)
        if text is None:
            text = (self.root / name).read_bytes().decode().removeprefix("\ufeff")
        self.buffers[uri] = Buffer(text)
        item = {"uri": uri, "languageId": "python", "version": 1, "text": text}
        self.notify("textDocument/didOpen", {"textDocument": item})
        return uri

    def text(self, name: str) -> str:
        return self.buffers[self.uri(name)].text

    def replace(self, name: str, old: str, new: str) -> None:
        """The user edits: an incremental change."""
        buffer = self.buffers[self.uri(name)]
        start = buffer.text.index(old)
        span = {"start": self.position(buffer.text, start), "end": self.position(buffer.text, start + len(old))}
        buffer.text = buffer.text[:start] + new + buffer.text[start + len(old) :]
        self._did_change(self.uri(name), [{"range": span, "text": new}])

    def _did_change(self, uri: str, changes: list[dict[str, Any]]) -> None:
        buffer = self.buffers[uri]
        buffer.version += 1
        identifier = {"uri": uri, "version": buffer.version}
        self.notify("textDocument/didChange", {"textDocument": identifier, "contentChanges": changes})

    def save(self, name: str) -> None:
        assert self.root is not None
        (self.root / name).write_bytes(self.text(name).encode())
        self.notify("textDocument/didSave", {"textDocument": {"uri": self.uri(name)}})

    def position(self, text: str, offset: int) -> dict[str, int]:
        lines = re.split(r"\r\n|\n|\r", text[:offset])
        return {"line": len(lines) - 1, "character": len(self._encoded(lines[-1])) // self._unit}

    def _encoded(self, text: str) -> bytes:
        return text.encode({"utf-8": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}[self.encoding])

    @property
    def _unit(self) -> int:
        return {"utf-8": 1, "utf-16": 2, "utf-32": 4}[self.encoding]

    def _offset(self, text: str, position: dict[str, int]) -> int:
        starts = [0, *(m.end() for m in re.finditer(r"\r\n|\n|\r", text))]
        start = starts[position["line"]]
        line = self._encoded(re.split(r"\r\n|\n|\r", text[start:], maxsplit=1)[0])
        units = position["character"] * self._unit
        assert units <= len(line), f"{position} is past the end of its line"
        codec = {"utf-8": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}[self.encoding]
        return start + len(line[:units].decode(codec))

    def _apply(self, edit: dict[str, Any]) -> dict[str, Any]:
        changes = edit.get("documentChanges")
        if changes is None:
            changes = [
                {"textDocument": {"uri": uri, "version": None}, "edits": edits}
                for uri, edits in edit["changes"].items()
            ]
        for change in changes:
            buffer = self.buffers[change["textDocument"]["uri"]]
            version = change["textDocument"]["version"]
            if version is not None and version != buffer.version:
                return {"applied": False, "failureReason": "the document has changed"}
        for change in changes:
            uri = change["textDocument"]["uri"]
            buffer = self.buffers[uri]
            spans = [
                (
                    self._offset(buffer.text, e["range"]["start"]),
                    self._offset(buffer.text, e["range"]["end"]),
                    e["newText"],
                )
                for e in change["edits"]
            ]
            with self.changed:
                for start, end, new in sorted(spans, reverse=True):
                    buffer.text = buffer.text[:start] + new + buffer.text[end:]
                self._did_change(uri, [{"text": buffer.text}])
                self.changed.notify_all()
        return {"applied": True}

    # what a user does ---------------------------------------------------------------------------------------------

    def actions(self, name: str, line: int = 0, only: list[str] | None = None) -> dict[str, dict[str, Any]]:
        """The code actions on a 0-based line, by kind."""
        uri = self.uri(name)
        span = {"start": {"line": line, "character": 0}, "end": {"line": line, "character": 0}}
        here = [d for d in self.diagnostics.get(uri, []) if d["range"]["start"]["line"] == line]
        context: dict[str, Any] = {"diagnostics": here, **({"only": only} if only is not None else {})}
        params = {"textDocument": {"uri": uri}, "range": span, "context": context}
        return {
            action.get("kind", action.get("command")): action
            for action in self.request("textDocument/codeAction", params)
        }

    def execute(self, command: dict[str, Any]) -> None:
        params = {"command": command["command"], "arguments": command.get("arguments", [])}
        assert self.request("workspace/executeCommand", params, timeout=5.0) is None

    def run(self, command: str, **arguments: Any) -> None:
        folder = {"folder": self.root.as_uri()} if self.root is not None else {}
        self.execute({"command": command, "arguments": [{**folder, **arguments}]})

    def message(self, part: str, timeout: float = 60.0) -> str:
        """Wait for a shown message that contains `part`."""
        self.wait(lambda: any(part in m for m in self.messages), timeout, f"a message with {part!r}")
        return next(m for m in self.messages if part in m)

    def ended(self, timeout: float = 30.0) -> None:
        """Wait until every progress has ended."""
        self.wait(
            lambda: self.progress and all(v and v[-1]["kind"] == "end" for v in self.progress.values()),
            timeout,
            "the end of the job",
        )
