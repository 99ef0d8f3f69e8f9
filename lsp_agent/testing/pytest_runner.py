"""Runs pytest in the project's interpreter, in the sandbox, and returns what its plugin recorded."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lsp_agent.cancel import CancelToken
from lsp_agent.errors import Cancelled
from lsp_agent.testing.environment import scrubbed_environment
from lsp_agent.testing.integrity import ProtectedFiles
from lsp_agent.testing.interpreter import Interpreter, find_interpreter
from lsp_agent.testing.process import DUMP_SIGNAL, MAX_PROCESSES, Ended, run_group
from lsp_agent.testing.records import Session, read_faults, read_session, result_of
from lsp_agent.testing.results import TestResult, TestRun
from lsp_agent.testing.sandbox import RUN_DIR, Sandbox

PLUGIN_DIR = Path(__file__).parent / "plugin"
MAX_CRASHES = 8
"""How many interpreter deaths one run survives by starting again with the tests that are left."""
OUTPUT_CHARS = 8000
_NOT_OURS = ("__pycache__",)
_SKIPPED_FOLDERS = {".git", ".venv", "venv", "node_modules"}


def limits() -> dict[str, int]:
    """Return the resource limits of a test process: generous, so that only runaways meet them."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"CORE": 0, "FSIZE": 1 << 30, "DATA": max(2 << 30, memory // 2)}


@dataclass
class _Progress:
    """What several pytest processes of one run have said together."""

    results: dict[str, TestResult] = field(default_factory=dict)
    tests: dict[str, tuple[str, int]] = field(default_factory=dict)
    coverage: dict[str, dict[str, frozenset[int]]] = field(default_factory=dict)
    ignore: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    complete: bool = True
    error: str = ""


class PytestRunner:
    """Implements `Runner` with pytest; results come from the plugin in `plugin/`, never from text.

    `root` is the workspace. `interpreter` overrides the search of `find_interpreter`; `pytest_args` come after the
    project's own options. Every run is a fresh process.
    """

    def __init__(
        self,
        root: Path,
        *,
        interpreter: Path | None = None,
        pytest_args: Sequence[str] = (),
        sandbox: Sandbox | None = None,
        pass_environment: Iterable[str] = (),
    ) -> None:
        self.root = root.absolute()
        self.sandbox = sandbox or Sandbox(self.root)
        self.pytest_args = tuple(pytest_args)
        self.pass_environment = tuple(pass_environment)
        self._explicit = interpreter
        self._interpreter: Interpreter | None = None
        self._protected: ProtectedFiles | None = None

    @property
    def interpreter(self) -> Interpreter:
        """The project's interpreter, looked for once. Raises UserError when there is none with pytest."""
        if self._interpreter is None:
            self._interpreter = find_interpreter(self.root, self._explicit, wrap=self.sandbox.observe)
        return self._interpreter

    def is_protected(self, path: str) -> bool:
        """Whether no run may change `path` (relative, posix): tests, conftest, test configuration and data."""
        if self._protected is None:
            self._protected = ProtectedFiles(self.root)
        return path in self._protected

    def run(
        self,
        tree: Path,
        nodeids: Sequence[str] = (),
        *,
        timeout_s: float,
        cancel: CancelToken,
        coverage: bool = False,
        fail_fast: bool = False,
    ) -> TestRun:
        """Run all tests of `tree`, or `nodeids` (tests, classes, files or folders), as `Runner.run` says."""
        began = time.monotonic()
        cancel.raise_if_cancelled()
        tree = tree.absolute()
        remove_bytecode(tree)
        progress = _Progress()
        wanted = list(dict.fromkeys(nodeids))
        command: tuple[str, ...] = ()
        output = ""
        for _ in range(MAX_CRASHES + 1):
            run_dir = Path(tempfile.mkdtemp(prefix="lsp-agent-run-"))
            try:
                command, ended, session = self._process(
                    tree, wanted, run_dir, progress, began + timeout_s, cancel, coverage, fail_fast
                )
                output = tail(run_dir.parent / f"{run_dir.name}.out")
                again = self._merge(progress, session, ended, run_dir, tree, output, fail_fast)
            finally:
                shutil.rmtree(run_dir, ignore_errors=True)
                (run_dir.parent / f"{run_dir.name}.out").unlink(missing_ok=True)
            if not again:
                break
        else:
            progress.complete = False
        if progress.complete and progress.missing and not progress.error:
            progress.error = _missing_sentence(progress.missing, progress.results)
        order = [nodeid for nodeid in progress.tests if nodeid in progress.results]
        results = {nodeid: progress.results[nodeid] for nodeid in dict.fromkeys([*progress.results, *order])}
        return TestRun(
            results,
            time.monotonic() - began,
            command,
            progress.complete,
            progress.error,
            progress.coverage,
            output,
        )

    def _process(
        self,
        tree: Path,
        wanted: Sequence[str],
        run_dir: Path,
        progress: _Progress,
        deadline: float,
        cancel: CancelToken,
        coverage: bool,
        fail_fast: bool,
    ) -> tuple[tuple[str, ...], Ended, Session]:
        """Run one pytest process."""
        interpreter = self.interpreter
        for name in ("events", "faults"):
            (run_dir / name).touch(0o600)
        inner_tree, inner_run = self.sandbox.locate(tree, run_dir)
        full = self.sandbox.level == "full"
        key = secrets.token_bytes(32)
        environment = scrubbed_environment(self.pass_environment)
        pythonpath = environment.get("PYTHONPATH", "")
        plugin = f"{RUN_DIR}/plugin" if full else str(PLUGIN_DIR)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [plugin, pythonpath]))
        if full:
            environment["TMPDIR"] = "/tmp"  # noqa: S108 - the sandbox's own
        outside = [str(p) for p in interpreter.prefixes if p.is_relative_to(self.root) and p != self.root]
        settings = {
            "events": f"{inner_run}/events",
            "faults": f"{inner_run}/faults",
            "key": key.hex(),
            "root": inner_tree,
            "outside": outside,
            "nodeids": list(wanted),
            "ignore": progress.ignore,
            "skip": list(progress.results),
            "coverage": coverage,
            "dump_signal": int(DUMP_SIGNAL),
            "redirect": [] if full or tree == self.root else [[str(self.root), str(tree)]],
            "limits": limits(),
            "pythonpath": pythonpath,
        }
        files = dict.fromkeys(nodeid.partition("::")[0] for nodeid in wanted)
        arguments = [name for name in files if name not in progress.ignore and (tree / name).exists()]
        argv = [
            *(str(interpreter.executable), "-m", "pytest", "-p", "lsp_agent_pytest", f"--rootdir={inner_tree}"),
            *("-o", f"cache_dir={inner_run}/cache", "--tb=short", "--continue-on-collection-errors"),
            *(self.pytest_args or ()),
            "-x" if fail_fast else "--maxfail=0",
            *arguments,
        ]
        needs = [*interpreter.prefixes, *interpreter.import_path, *_link_chain(interpreter.executable)]
        home = Path(environment.get("HOME") or Path.home())
        launch = self.sandbox.launch(argv, tree=tree, run_dir=run_dir, plugin=PLUGIN_DIR, needs=needs, home=home)
        mounted = [tree / path.relative_to(self.root) for path in self.sandbox.environments(needs)]
        mounted = [path for path in mounted if not path.exists()]
        ended = run_group(
            launch.argv,
            cwd=launch.cwd,
            environment=environment,
            stdin=json.dumps(settings).encode(),
            output=run_dir.parent / f"{run_dir.name}.out",
            deadline=deadline,
            cancel=cancel,
            namespaced=full,
            watched=run_dir / "events",
        )
        for place in mounted:  # an empty folder that bubblewrap made to mount on
            with contextlib.suppress(OSError):
                place.rmdir()
        if ended.how == "cancelled":
            raise Cancelled
        return tuple(argv), ended, read_session(run_dir / "events", key, ended.known)

    def _merge(
        self,
        progress: _Progress,
        session: Session,
        ended: Ended,
        run_dir: Path,
        tree: Path,
        output: str,
        fail_fast: bool,
    ) -> bool:
        """Add what one process said; return whether another is to run the tests that are left."""
        progress.results.update(session.results)
        progress.coverage.update(session.coverage)
        progress.missing = session.missing
        if session.collected:
            progress.tests.update(session.tests)
        left = [nodeid for nodeid in session.tests if nodeid not in progress.results]
        if session.problem is not None:
            progress.error = _problem_sentence(session.problem)
        elif not session.opened and ended.how == "exited":
            progress.error = f"pytest did not start: {_last_line(output)}"
        elif session.status in (3, 4):
            progress.error = f"pytest stopped: {_last_line(output)}"
        if progress.error:
            progress.complete = False
            return False
        if ended.how == "exited" and session.status is not None and session.intact:
            if not progress.tests and not progress.results and not session.missing:
                progress.error = "pytest found no tests here: check the folder and the project's test configuration."
            crashed = [n for n in left if n != session.running]
            if session.status == 2 and crashed and not fail_fast:
                return True  # a test ended the session (pytest.exit): it counts as crashed, the others still run
            progress.complete = not left
            return False
        root, _ = self.sandbox.locate(tree, run_dir)
        outside = [str(p) for p in self.interpreter.prefixes if p.is_relative_to(self.root) and p != self.root]
        frames = read_faults(run_dir / "faults", root, outside)
        victim = session.running or session.collecting
        if victim:
            timed_out = ended.how == "timeout"
            fields = {"frames": frames, "message": _death(ended), "longrepr": "" if timed_out else output}
            result = result_of(session, victim, "timeout" if timed_out else "crashed", **fields)
            progress.results[victim] = replace(result, exception="Timeout" if timed_out else "Crash")
            if not session.collected:
                progress.ignore.append(victim)
        elif ended.how == "exited" and not left and session.collected and session.intact:
            return False  # everything was recorded; the interpreter died on its way out
        if ended.how == "timeout" or not victim or fail_fast or not session.intact:
            progress.complete = False
            if not progress.results and ended.how == "timeout":
                progress.error = "The time was up before pytest had collected the tests."
            elif not progress.results or not session.intact:
                progress.error = "The test process ended without a complete record of what it did."
            return False
        return bool([n for n in left if n != victim]) or not session.collected


def _death(ended: Ended) -> str:
    if ended.how == "timeout":
        return f"still running when its time was up after {ended.seconds:.1f} s"
    if ended.how == "too many processes":
        return f"killed: it had more than {MAX_PROCESSES} processes"
    code = ended.returncode
    if code < 0 or code > 128:
        return f"the interpreter was killed by signal {-code if code < 0 else code - 128}"
    return f"the interpreter ended with exit status {code} in the middle of the test"


def _problem_sentence(problem: dict[str, object]) -> str:
    where = {
        "conftest": "A conftest file cannot be loaded",
        "usage": "pytest refused to start",
        "run": "pytest broke down",
    }
    start = where.get(str(problem["where"]), "pytest failed internally")
    frames = problem.get("frames")
    place = f" at {frames[-1][0]}:{frames[-1][1]}" if isinstance(frames, list) and frames else ""
    message = str(problem["message"]).strip().splitlines()
    return f"{start}: {problem['exception']}{place}: {message[0] if message else 'no message'}"


def _missing_sentence(missing: Sequence[str], results: dict[str, TestResult]) -> str:
    """Return the sentence about tests that were asked for and do not exist, empty when a broken file explains it."""
    unknown = [name for name in missing if name.partition("::")[0] not in results]
    if not unknown:
        return ""
    more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
    return f"This test does not exist: {unknown[0]}{more}."


def _last_line(output: str) -> str:
    """Return the line of pytest's output that a human would look at first."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for mark in ("error: ", "ERROR: ", "Error: ", "E  "):
        for line in lines:
            if mark in line and "usage: " not in line:
                return line
    return lines[-1] if lines else "it printed nothing"


def _link_chain(executable: Path) -> list[Path]:
    """Return every link from the interpreter to the real file: a sandbox without one of them cannot start it."""
    chain = []
    path = executable
    for _ in range(20):
        if not path.is_symlink():
            break
        path = Path(os.path.normpath(path.parent / path.readlink()))
        chain.append(path)
    return chain


def remove_bytecode(tree: Path) -> None:
    """Remove `__pycache__` folders from a scratch tree: nothing stale in them can then shadow an edit."""
    for folder, names, _ in os.walk(tree):
        for name in _NOT_OURS:
            if name in names:
                shutil.rmtree(Path(folder) / name, ignore_errors=True)
        names[:] = [name for name in names if name not in _SKIPPED_FOLDERS and name not in _NOT_OURS]


def tail(path: Path, limit: int = OUTPUT_CHARS) -> str:
    """Return the end of a file as text, with a visible mark where the beginning is left out."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - limit))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return text if size <= limit else f"[... cut by lsp-agent: {size - limit} more bytes ...]\n{text}"
