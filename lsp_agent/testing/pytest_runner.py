"""Runs pytest in the project's interpreter, in the sandbox, and returns what its plugin recorded."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from lsp_agent.cancel import CancelToken
from lsp_agent.errors import Cancelled
from lsp_agent.testing.environment import scrubbed_environment
from lsp_agent.testing.installation import link_chain
from lsp_agent.testing.integrity import ProtectedFiles
from lsp_agent.testing.interpreter import Interpreter, find_interpreter
from lsp_agent.testing.merging import Progress
from lsp_agent.testing.process import DUMP_SIGNAL, Ended, run_group
from lsp_agent.testing.records import Session, read_faults, read_session
from lsp_agent.testing.results import Frame, TestRun
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
        progress = Progress()
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
                faults = functools.partial(self._faults, tree, run_dir)
                again = progress.add(session, ended, output, fail_fast, faults)
            finally:
                shutil.rmtree(run_dir, ignore_errors=True)
                (run_dir.parent / f"{run_dir.name}.out").unlink(missing_ok=True)
            if not again:
                break
        else:
            progress.complete = False
        return progress.to_run(time.monotonic() - began, command, output)

    def _process(
        self,
        tree: Path,
        wanted: Sequence[str],
        run_dir: Path,
        progress: Progress,
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
        settings = {
            "events": f"{inner_run}/events",
            "faults": f"{inner_run}/faults",
            "key": key.hex(),
            "root": inner_tree,
            "outside": self._outside(),
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
        needs = [*interpreter.prefixes, *interpreter.import_path, *link_chain(interpreter.executable)]
        launch = self.sandbox.launch(argv, tree=tree, run_dir=run_dir, plugin=PLUGIN_DIR, needs=needs)
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

    def _outside(self) -> list[str]:
        """Return the folders inside the workspace whose files are not the project's: its virtual environments."""
        return [str(p) for p in self.interpreter.prefixes if p.is_relative_to(self.root) and p != self.root]

    def _faults(self, tree: Path, run_dir: Path) -> tuple[Frame, ...]:
        return read_faults(run_dir / "faults", self.sandbox.locate(tree, run_dir)[0], self._outside())


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
