"""Reads what the pytest plugin recorded: verified lines in, one `Session` out."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lsp_agent.testing.results import Frame, TestResult


@dataclass
class Session:
    """What one pytest process told before it ended or was killed."""

    opened: bool = False
    """pytest parsed its options and configured itself."""
    status: int | None = None
    """pytest's exit status, None when the session never came to its end."""
    tests: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Collected tests: nodeid -> (path, line)."""
    collected: bool = False
    results: dict[str, TestResult] = field(default_factory=dict)
    running: str = ""
    """The test that was started and did not finish."""
    collecting: str = ""
    """The file whose collection began last, while collection was under way."""
    missing: list[str] = field(default_factory=list)
    """Asked for, and not collected."""
    problem: dict[str, Any] | None = None
    """The exception that ended pytest outside of tests and collection."""
    coverage: dict[str, dict[str, frozenset[int]]] = field(default_factory=dict)
    intact: bool = True
    """Whether no record is missing and no line is foreign."""


def read_session(path: Path, key: bytes, size: int | None = None) -> Session:
    """Return the session in the first `size` bytes of an events file (None: in all of it).

    Reading stops at the first line that is foreign, torn or out of sequence, and `intact` says so.
    """
    session = Session()
    try:
        lines = path.read_bytes()[:size].split(b"\n")
    except OSError:
        session.intact = False
        return session
    if lines and not lines[-1]:
        lines.pop()
    for sequence, line in enumerate(lines):
        digest, _, payload = line.partition(b" ")
        wanted = hashlib.blake2b(payload, key=key, digest_size=16).hexdigest().encode("ascii")
        if not hmac.compare_digest(digest, wanted):
            session.intact = False
            break
        number, kind, fields = json.loads(payload)
        if number != sequence:
            session.intact = False
            break
        _apply(session, kind, fields)
    return session


def _apply(session: Session, kind: str, fields: dict[str, Any]) -> None:
    if kind == "session":
        session.opened = True
    elif kind == "collecting":
        session.collecting = fields["nodeid"]
    elif kind == "collect_error":
        session.results[fields["nodeid"]] = TestResult(
            fields["nodeid"], "error", path=fields["path"], line=_line_in(fields), **_failure(fields)
        )
    elif kind == "missing":
        session.missing = fields["nodeids"]
    elif kind == "collected":
        session.collected, session.collecting = True, ""
        session.tests = {nodeid: (path, line) for nodeid, path, line in fields["tests"]}
    elif kind == "start":
        session.running = fields["nodeid"]
    elif kind == "finish":
        nodeid = fields["nodeid"]
        session.running = ""
        outcome = fields["outcome"] or "error"
        failure = _failure(fields) if outcome != "passed" else {}
        session.results[nodeid] = result_of(session, nodeid, outcome, seconds=fields["seconds"], **failure)
    elif kind == "coverage":
        session.coverage[fields["nodeid"]] = {p: frozenset(lines) for p, lines in fields["lines"].items()}
    elif kind == "problem":
        session.problem = fields
    elif kind == "end":
        session.status = fields["status"]


def result_of(session: Session, nodeid: str, outcome: Any, **fields: Any) -> TestResult:
    """Return a result of a collected test, with its file and line."""
    path, line = session.tests.get(nodeid, (nodeid.partition("::")[0], 1))
    return TestResult(nodeid, outcome, path=path, line=line, **fields)


def _failure(fields: dict[str, Any]) -> dict[str, Any]:
    frames = tuple(Frame(*frame) for frame in fields.get("frames", ()))
    names = ("exception", "message", "longrepr")
    return {"frames": frames, **{name: fields.get(name, "") for name in names}}


def _line_in(fields: dict[str, Any]) -> int:
    """Return the last line of the traceback that lies in the file itself."""
    lines = [line for path, line, _ in fields["frames"] if path == fields["path"]]
    return int(lines[-1]) if lines else 1


_FAULT_FRAME = re.compile(r'^  File "(?P<path>.*)", line (?P<line>\d+) in (?P<function>.*)$')


def read_faults(path: Path, root: str, outside: list[str]) -> tuple[Frame, ...]:
    """Return the frames inside `root`, outermost first, of the last stack that faulthandler wrote to `path`.

    The stack is that of the thread that died, or, when a run's time was up, that of the thread that runs pytest.
    """
    try:
        text = path.read_text("utf-8", "replace")
    except OSError:
        return ()
    stacks = re.split(r"^(?:Current thread|Thread|Stack).*$", text, flags=re.MULTILINE)[1:]
    if not stacks:
        return ()
    chosen = stacks[0] if "Fatal Python error" in text else next((s for s in stacks if "/_pytest/" in s), stacks[-1])
    frames = []
    for line in reversed(chosen.splitlines()):
        match = _FAULT_FRAME.match(line)
        if match is None:
            continue
        filename = match["path"]
        inside = filename.startswith(root + "/") and "/site-packages/" not in filename
        if inside and not any(filename.startswith(folder + "/") for folder in outside):
            relative = PurePosixPath(filename[len(root) + 1 :]).as_posix()
            frames.append(Frame(relative, int(match["line"]), match["function"]))
    return tuple(frames)
