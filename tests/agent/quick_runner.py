"""A `Runner` that runs `test_*.py` files in this process: the loop's tests need hundreds of runs in little time."""

from __future__ import annotations

import sys
import time
import traceback
import unittest
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from lsp_agent.cancel import CancelToken
from lsp_agent.testing.integrity import ProtectedFiles
from lsp_agent.testing.results import Frame, TestResult, TestRun


class QuickRunner:
    """Files in the tree's root and in `tests/`; functions named `test_*`; coverage by tracing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs: list[tuple[tuple[str, ...], dict[str, str]]] = []
        """Of each run, the nodeids asked for and the outcomes."""
        self.timeouts: list[float] = []
        self.test_seconds = 0.001
        """What each test claims to have taken."""
        self.before_run: Callable[[Path], None] = lambda tree: None
        self.protected = ProtectedFiles(root)

    def is_protected(self, path: str) -> bool:
        return path in self.protected

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
        cancel.raise_if_cancelled()
        self.timeouts.append(timeout_s)
        self.before_run(tree)
        cancel.raise_if_cancelled()
        began = time.monotonic()
        results: dict[str, TestResult] = {}
        covered: dict[str, dict[str, frozenset[int]]] = {}
        for file in sorted([*tree.glob("test_*.py"), *tree.glob("tests/test_*.py")]):
            path = file.relative_to(tree).as_posix()
            if nodeids and not any(n.partition("::")[0] == path for n in nodeids):
                continue
            self._run_file(tree, file, path, list(nodeids), results, covered if coverage else None)
        self.runs.append((tuple(nodeids), {n: r.outcome for n, r in results.items()}))
        missing = [n for n in nodeids if n not in results and not any(r.startswith(n) for r in results)]
        error = f"This test does not exist: {missing[0]}." if missing and not results else ""
        return TestRun(results, time.monotonic() - began, ("quick",), error=error, coverage=covered)

    def _run_file(
        self,
        tree: Path,
        file: Path,
        path: str,
        nodeids: list[str],
        results: dict[str, TestResult],
        covered: dict[str, dict[str, frozenset[int]]] | None,
    ) -> None:
        sys.path[:0] = [str(tree), str(tree / "src")]
        before = set(sys.modules)
        sys.dont_write_bytecode = True
        try:
            module = ModuleType(file.stem)
            module.__file__ = str(file)
            try:
                exec(compile(file.read_text(), str(file), "exec"), module.__dict__)
            except BaseException as error:
                results[path] = self._failure(tree, path, path, 1, error, "error")
                return
            for name, function in list(vars(module).items()):
                nodeid = f"{path}::{name}"
                if not name.startswith("test_") or (nodeids and nodeid not in nodeids and path not in nodeids):
                    continue
                line = function.__code__.co_firstlineno
                lines: dict[str, set[int]] = {}
                try:
                    if covered is not None:
                        sys.settrace(_tracer(tree, lines))
                    function()
                    results[nodeid] = TestResult(nodeid, "passed", self.test_seconds, path, line)
                except unittest.SkipTest:
                    results[nodeid] = TestResult(nodeid, "skipped", self.test_seconds, path, line)
                except BaseException as error:
                    results[nodeid] = self._failure(tree, nodeid, path, line, error, "failed")
                finally:
                    sys.settrace(None)
                if covered is not None:
                    covered[nodeid] = {p: frozenset(x) for p, x in lines.items()}
        finally:
            del sys.path[:2]
            for name in set(sys.modules) - before:
                if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(tree)):
                    del sys.modules[name]

    @staticmethod
    def _failure(tree: Path, nodeid: str, path: str, line: int, error: BaseException, outcome: Any) -> TestResult:
        frames = tuple(
            Frame(Path(f.filename).relative_to(tree).as_posix(), f.lineno or 1, f.name)
            for f in traceback.extract_tb(error.__traceback__)
            if f.filename.startswith(str(tree))
        )
        if isinstance(error, SyntaxError) and (error.filename or "").startswith(str(tree)):
            frames += (Frame(Path(error.filename or "").relative_to(tree).as_posix(), error.lineno or 1, "<module>"),)
        return TestResult(nodeid, outcome, 0.001, path, line, type(error).__name__, str(error), frames)


def _tracer(tree: Path, lines: dict[str, set[int]]) -> Any:
    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(str(tree)):
            return None
        if event == "line":
            lines.setdefault(Path(name).relative_to(tree).as_posix(), set()).add(frame.f_lineno)
        return trace

    return trace
