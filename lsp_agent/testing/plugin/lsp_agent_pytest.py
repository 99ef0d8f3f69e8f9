"""The pytest plugin that tells lsp-agent what a test run did. PYTEST_DONT_REWRITE

It runs in the project's interpreter (Python 3.8 to 3.14, pytest 6.2 to 9), so it is one file without dependencies.
The runner loads it with `-p lsp_agent_pytest` and writes its settings, one JSON object, to standard input: they hold
the key of the records and so never show in the environment or the command line.

Every record is one line of the events file: a keyed BLAKE2 digest, a space, and a JSON array
`[sequence, kind, fields]`. A line that test code writes has no valid digest, a removed line leaves a gap in the
sequence, and a fork of the test process writes nothing. All that the recorder calls while tests run (os, time, json)
is bound to local names before any test code is imported: tests patch those modules.
"""

# pathlib is what tests patch, and slower:
# ruff: noqa: PTH100, PTH118, PTH120, PTH123
from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

MESSAGE_LINES, MESSAGE_CHARS, REPORT_CHARS, FRAMES = 12, 1500, 4000, 40
CUT = "\n[... cut by lsp-agent: {} more characters ...]\n"
# Options of other plugins that would hide, repeat, reorder or slow down results; set only where the option exists.
NEUTRAL: dict[str, Any] = {
    "numprocesses": None,  # pytest-xdist: records come from this process
    "dist": "no",
    "tx": [],
    "no_cov": True,  # pytest-cov: slows every run down and may fail it
    "cov_fail_under": None,
    "reruns": 0,  # pytest-rerunfailures
    "stepwise": False,
    "usepdb": False,
    "looponfail": False,
    "randomly_reorganize": False,
    "randomly_seed": 0,
}


def cut(text: str, limit: int) -> str:
    """Return `text` with its middle cut out, visibly, when it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    head = limit // 3
    return text[:head] + CUT.format(len(text) - limit) + text[len(text) - (limit - head) :]


def make_encoder() -> Callable[[Any], str]:
    """Return a JSON encoder that does not go through attributes of the json module, which tests patch."""
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # not CPython
        return json.JSONEncoder().encode
    text = json.encoder.encode_basestring_ascii
    encoder = make(None, str, text, None, ":", ",", False, False, True)
    return lambda value: "".join(encoder(value, 0))


def make_emit(path: str, key: bytes) -> Callable[..., None]:
    """Return the function that appends one record; it owns the key and survives closed descriptors."""
    encode = make_encoder()
    digest = hashlib.blake2b
    open_, write, fstat, getpid = os.open, os.write, os.fstat, os.getpid
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
    owner = getpid()
    fd = open_(path, flags)
    identity = fstat(fd)[1:3]
    sequence = 0

    def emit(kind: str, **fields: Any) -> None:
        nonlocal fd, sequence
        if getpid() != owner:
            return  # a fork of the test process that went on to run the rest of the session
        payload = encode([sequence, kind, fields]).encode("ascii")
        line = digest(payload, key=key, digest_size=16).hexdigest().encode("ascii") + b" " + payload + b"\n"
        sequence += 1
        try:
            try:
                alive = fstat(fd)[1:3] == identity
            except OSError:
                alive = False
            if not alive:  # a test closed every descriptor, and the number may be another file's by now
                fd = open_(path, flags)
            while line:
                line = line[write(fd, line) :]
        except OSError:
            pass  # the gap in the sequence tells the runner

    return emit


class Recorder:
    """Hooks that turn a session into records."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.emit = make_emit(settings["events"], bytes.fromhex(settings["key"]))
        self.root: str = settings["root"]
        self.outside: list[str] = [p.rstrip("/") + "/" for p in settings["outside"]]
        self.nodeids: list[str] = settings["nodeids"]
        self.ignore = [os.path.join(self.root, p) for p in settings["ignore"]]
        self.skip = set(settings["skip"])
        self.coverage: Any | None = None
        if settings["coverage"]:
            self.coverage = (MonitoringCoverage if hasattr(sys, "monitoring") else TraceCoverage)(self.relative)
        self.clock = time.perf_counter
        self.realpath, self.isabs, self.join = os.path.realpath, os.path.isabs, os.path.join
        self.real_root = self.realpath(self.root)
        self.current: dict[str, Any] = {}
        self.faults = open(settings["faults"], "a")  # noqa: SIM115 - stays open for faulthandler
        self.dump_signal: int = settings["dump_signal"]

    # -- paths and exceptions --------------------------------------------------------------------------------------

    def relative(self, filename: str) -> str | None:
        """Return the posix path inside the tree, or None for files that are not the project's."""
        if not filename or filename[0] == "<":
            return None
        path = filename if self.isabs(filename) else self.join(self.root, filename)
        for root in (self.root, self.real_root):
            if path.startswith(root + "/"):
                inside = "/site-packages/" not in path and not any(path.startswith(p) for p in self.outside)
                return os_normpath(path[len(root) + 1 :]) if inside else None
        return None

    def frames(self, error: BaseException | None, depth: int = 0) -> list[tuple[str, int, str]]:
        """Return the frames inside the tree, outermost first, those of a cause before those of its consequence."""
        if error is None or depth > 4:
            return []
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        found = self.frames(cause, depth + 1)
        trace = error.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            path = self.relative(code.co_filename)
            if path is not None:
                found.append((path, trace.tb_lineno, code.co_name))
            trace = trace.tb_next
        if isinstance(error, SyntaxError) and error.filename and error.lineno:
            path = self.relative(error.filename)
            if path is not None:
                found.append((path, error.lineno, "<module>"))
        for part in getattr(error, "exceptions", ())[:3] if depth < 4 else ():  # an exception group
            if isinstance(part, BaseException):
                found.extend(self.frames(part, depth + 1))
        return found[-FRAMES:]

    def failure(self, error: BaseException | None, longrepr: str) -> dict[str, Any]:
        """Return the fields that describe `error`."""
        try:
            message = str(error) if error is not None else longrepr
        except Exception as problem:  # a broken __str__ is the project's, not ours
            message = f"<the exception's own text failed: {type(problem).__name__}>"
        lines = message.strip().splitlines()
        if len(lines) > MESSAGE_LINES:
            rest = len(lines) - MESSAGE_LINES
            lines = [*lines[:MESSAGE_LINES], f"[... cut by lsp-agent: {rest} more lines ...]"]
        return {
            "exception": type(error).__name__ if error is not None else "",
            "message": cut("\n".join(lines), MESSAGE_CHARS),
            "frames": self.frames(error),
            "longrepr": cut(longrepr, REPORT_CHARS),
        }

    # -- start -----------------------------------------------------------------------------------------------------

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_load_initial_conftests(self, early_config: Any) -> Any:
        """Neutralise options before the plugins that own them read them; report a conftest that cannot be loaded."""
        neutralise(early_config.known_args_namespace)
        config_file = str(getattr(early_config, "inipath", None) or "")
        if config_file and self.relative(config_file) is None:
            # The test folders of a project around this one; pytest skips them too when it chooses the root itself.
            early_config._inicache["testpaths"] = []
        outcome = yield
        self.problem("conftest", outcome.excinfo)

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_cmdline_main(self, config: Any) -> Any:
        """Neutralise the parsed options and open the session."""
        neutralise(config.option)
        if self.nodeids:  # asked for by name: the project's own -k and -m do not deselect them
            config.option.keyword = config.option.markexpr = ""
        if self.ignore:  # files whose collection killed the interpreter before
            config.option.ignore = [*(config.option.ignore or []), *self.ignore]
        self.emit("session", python=sys.version.split()[0], pytest=pytest.__version__)
        outcome = yield
        self.problem("run" if self.current else "usage", outcome.excinfo)

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self) -> None:
        """Send fatal errors to our file, after pytest's own faulthandler plugin chose standard error."""
        faulthandler.enable(file=self.faults, all_threads=False)
        # Where a test hangs, on the runner's request; a timer of our own would dead-lock forks on their way out.
        faulthandler.register(self.dump_signal, file=self.faults, all_threads=True)

    def problem(self, where: str, excinfo: Any) -> None:
        """Record an exception that ended pytest before or outside the tests."""
        if excinfo is None:
            return
        error = excinfo[1]
        inner = getattr(error, "cause", None) or error.__cause__ or error  # ConftestImportFailure wraps the real one
        if isinstance(inner, BaseException):
            self.emit("problem", where=where, path=str(getattr(error, "path", "")), **self.failure(inner, str(error)))

    def pytest_internalerror(self, excrepr: Any, excinfo: Any) -> None:
        """Record an error inside pytest or one of its plugins."""
        self.emit("problem", where="internal", path="", **self.failure(excinfo.value, str(excrepr)))

    # -- collection ------------------------------------------------------------------------------------------------

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_make_collect_report(self, collector: Any) -> Any:
        """Record the file being collected, and the collectors that fail."""
        if isinstance(collector, pytest.File):
            self.emit("collecting", nodeid=collector.nodeid)
        outcome = yield
        report = outcome.get_result()
        if report.failed:
            call = getattr(report, "call", None)
            error = call.excinfo.value if call is not None and call.excinfo is not None else None
            if error is not None and error.__cause__ is not None:  # CollectError says "from" the real exception
                error = error.__cause__
            path = self.relative(node_path(collector)) or collector.nodeid
            nodeid = collector.nodeid if collector.nodeid not in ("", ".") else path
            text = str(report.longrepr)
            self.emit("collect_error", nodeid=nodeid, path=path, **self.failure(error, text))

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> Any:
        """Keep the tests that were asked for, before the project's own hooks see them."""
        missing: list[str] = []
        if self.nodeids:
            wanted = set(self.nodeids)
            found = {name for item in items for name in prefixes(item.nodeid) if name in wanted}
            missing = [name for name in self.nodeids if name not in found]
            items[:] = [item for item in items if any(name in wanted for name in prefixes(item.nodeid))]
        if self.skip:
            items[:] = [item for item in items if item.nodeid not in self.skip]
        yield
        self.emit("missing", nodeids=missing)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: Any) -> None:
        """Record what will run: id, file, line of the definition."""
        self.emit("collected", tests=[[item.nodeid, *self.definition(item)] for item in session.items])

    def definition(self, item: Any) -> tuple[str, int]:
        """Return the file of a test, relative to the tree, and the 1-based line of its `def` or `class`."""
        filename = node_path(item)
        path = self.relative(filename) or filename
        line = (item.location[1] or 0) + 1
        code = getattr(getattr(item, "obj", None), "__code__", None)
        if code is not None and code.co_filename == filename:
            # co_firstlineno is the first decorator's line.
            import linecache

            for number in range(code.co_firstlineno, code.co_firstlineno + 60):
                if linecache.getline(filename, number).lstrip().startswith(("def ", "async def ")):
                    return path, number
        return path, line

    # -- tests -----------------------------------------------------------------------------------------------------

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        """Record start and end of one test."""
        self.emit("start", nodeid=item.nodeid)
        self.current = {"outcome": ""}
        began = self.clock()
        if self.coverage is not None:
            self.coverage.start()
        outcome = yield
        seconds = self.clock() - began
        if self.coverage is not None:
            lines = self.coverage.stop()
            self.emit("coverage", nodeid=item.nodeid, lines={p: sorted(n) for p, n in lines.items()})
        if outcome.excinfo is not None:  # pytest.exit() or KeyboardInterrupt: the test ended the whole session
            error = outcome.excinfo[1]
            fields = self.failure(error, "the test ended the whole test session")
            self.emit("finish", nodeid=item.nodeid, seconds=seconds, **dict(fields, outcome="crashed"))
        else:
            self.emit("finish", nodeid=item.nodeid, seconds=seconds, **self.current)

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:  # noqa: ARG002
        """Merge the outcome of one phase (or subtest) into that of the test; the first bad one stays."""
        outcome = yield
        report = outcome.get_result()
        error = call.excinfo.value if call.excinfo is not None else None
        known = self.current.get("outcome")
        if known in ("failed", "error"):
            return
        expected = hasattr(report, "wasxfail")
        if report.failed:
            state = "failed" if report.when == "call" else "error"
        elif report.skipped:
            state = "xfailed" if expected else "skipped"
        elif report.when == "call":
            state = "xpassed" if expected else "passed"
        else:
            return
        if state == "passed" and known:
            return  # a passing subtest after an expected failure
        self.current = {"outcome": state}
        if state in ("failed", "error"):
            self.current.update(self.failure(error, str(report.longrepr)))
        elif state in ("skipped", "xfailed"):
            self.current["message"] = cut(str(getattr(report, "wasxfail", "") or error or ""), MESSAGE_CHARS)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, exitstatus: Any) -> None:
        """Close the session; what breaks in other plugins after this is a problem, and the results stand."""
        self.emit("end", status=int(exitstatus))


class TraceCoverage:
    """Lines executed between `start` and `stop`, through sys.settrace (before Python 3.12)."""

    def __init__(self, relative: Callable[[str], str | None]) -> None:
        import threading

        self.relative, self.threads = relative, threading
        self.known: dict[str, str | None] = {}
        self.lines: dict[str, set] = {}

    def start(self) -> None:
        """Forget the lines so far and trace this thread and those that it starts."""
        self.lines = {}
        self.threads.settrace(self.trace)
        sys.settrace(self.trace)

    def stop(self) -> dict[str, set]:
        """Return path -> executed lines since `start`."""
        sys.settrace(None)
        self.threads.settrace(None)
        return self.lines

    def trace(self, frame: Any, event: str, argument: Any) -> Any:  # noqa: ARG002
        """Global trace function: choose the frames worth a local one."""
        filename = frame.f_code.co_filename
        if filename not in self.known:
            self.known[filename] = self.relative(filename)
        path = self.known[filename]
        if path is None:
            return None
        seen = self.lines.setdefault(path, set())

        def local(frame: Any, event: str, argument: Any) -> Any:  # noqa: ARG001
            if event == "line":
                seen.add(frame.f_lineno)
            return local

        return local


class MonitoringCoverage:
    """Lines executed between `start` and `stop`, through sys.monitoring (from Python 3.12): once a line and test."""

    def __init__(self, relative: Callable[[str], str | None]) -> None:
        self.relative = relative
        self.known: dict[str, str | None] = {}
        self.lines: dict[str, set] = {}
        self.monitoring: Any = getattr(sys, "monitoring")  # noqa: B009 - unknown to older type stubs
        free = [number for number in (4, 3, 5, 2, 1) if self.monitoring.get_tool(number) is None]
        self.tool = free[0]
        self.monitoring.use_tool_id(self.tool, "lsp-agent")
        self.monitoring.register_callback(self.tool, self.monitoring.events.LINE, self.line)
        self.monitoring.register_callback(self.tool, self.monitoring.events.PY_START, self.enter)

    def start(self) -> None:
        """Forget the lines so far and switch line events on."""
        self.lines = {}
        self.monitoring.set_events(self.tool, self.monitoring.events.LINE | self.monitoring.events.PY_START)
        self.monitoring.restart_events()

    def stop(self) -> dict[str, set]:
        """Return path -> executed lines since `start`."""
        self.monitoring.set_events(self.tool, 0)
        return self.lines

    def enter(self, code: Any, offset: int) -> Any:  # noqa: ARG002
        """Record the line of a function that has only one: Python 3.13 has no line event for it."""
        numbers = {number for _, _, number in code.co_lines() if number is not None}
        return self.line(code, numbers.pop()) if len(numbers) == 1 else self.monitoring.DISABLE

    def line(self, code: Any, number: int) -> Any:
        """Record one line and ask for no second event of it."""
        filename = code.co_filename
        if filename not in self.known:
            self.known[filename] = self.relative(filename)
        path = self.known[filename]
        if path is not None:
            self.lines.setdefault(path, set()).add(number)
        return self.monitoring.DISABLE


os_normpath = os.path.normpath


def node_path(node: Any) -> str:
    """Return the file of a collector or item, in every pytest since 6.2."""
    return str(getattr(node, "path", None) or node.fspath)


def prefixes(nodeid: str) -> list[str]:
    """Return every name that selects `nodeid`: itself, without parameters, its classes, its file, its folders."""
    names = [nodeid]
    base = nodeid.split("[", 1)[0]
    while base:
        names.append(base)
        base = base.rpartition("::")[0] if "::" in base else base.rpartition("/")[0]
    return names


def neutralise(options: Any) -> None:
    """Set the options of `NEUTRAL` that exist."""
    for name, value in NEUTRAL.items():
        if hasattr(options, name):
            setattr(options, name, value)


def limit_resources(limits: dict[str, int]) -> None:
    """Lower this process's resource limits (names without RLIMIT_, bytes or counts); they pass on to its children."""
    import resource

    for name, value in limits.items():
        number = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def redirect(origin: str, tree: str) -> None:
    """Let imports of files under `origin` (editable installs) come from `tree` instead."""
    sys.path[:] = [tree + p[len(origin) :] if p == origin or p.startswith(origin + "/") else p for p in sys.path]
    for name, module in list(sys.modules.items()):  # setuptools' editable finders
        mapping = getattr(module, "MAPPING", None)
        if name.startswith("__editable__") and isinstance(mapping, dict):
            for package, path in mapping.items():
                if path.startswith(origin + "/"):
                    mapping[package] = tree + path[len(origin) :]


def read_settings() -> dict[str, Any]:
    """Read the settings from standard input and put an empty one in its place."""
    parts = []
    while True:
        part = os.read(0, 1 << 16)
        if not part:
            break
        parts.append(part)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    settings: dict[str, Any] = json.loads(b"".join(parts).decode("utf-8"))
    return settings


def pytest_addoption(parser: Any, pluginmanager: Any) -> None:  # noqa: ARG001
    """Start, in the earliest hook there is: before conftest files and installed plugins are imported."""
    settings = read_settings()
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != here]
    if settings["pythonpath"]:
        os.environ["PYTHONPATH"] = settings["pythonpath"]
    else:
        os.environ.pop("PYTHONPATH", None)
    for origin, tree in settings["redirect"]:
        redirect(origin, tree)
    limit_resources(settings["limits"])
    pluginmanager.register(Recorder(settings), "lsp_agent_recorder")
