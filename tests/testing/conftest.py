"""Tiny projects, and runners for them that load no third-party pytest plugin (three times faster).

`LSP_AGENT_TEST_INTERPRETER=PATH` runs the tiny projects with another Python and pytest than those of this process.
"""

import os
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from lsp_agent.cancel import CancelToken
from lsp_agent.testing.pytest_runner import PytestRunner
from lsp_agent.testing.results import TestRun
from lsp_agent.testing.sandbox import Sandbox, probe

NAKED = "PYTEST_DISABLE_PLUGIN_AUTOLOAD"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), "utf-8")
    return root


@pytest.fixture
def project(tmp_path: Path) -> Callable[..., Path]:
    """Call with file=text pairs: writes a project and returns its folder."""
    return lambda files: write(tmp_path / "project", files)


@pytest.fixture(params=["full", "none"])
def level(request: pytest.FixtureRequest) -> str:
    """Both ways to run tests: in the sandbox and without it."""
    if request.param == "full" and probe().level != "full":
        pytest.skip(probe().reason)
    return request.param


@pytest.fixture
def sandboxed() -> None:
    if probe().level != "full":
        pytest.skip(probe().reason)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TestRun]:
    """Run a project's tests in place; `level="none"` does it without the sandbox."""
    monkeypatch.setenv(NAKED, "1")

    def run_(root: Path, *nodeids: str, level: str = "full", timeout_s: float = 30, **options: object) -> TestRun:
        pytest_args = options.pop("pytest_args", ())
        tree = options.pop("tree", root)
        cancel = options.pop("cancel", None) or CancelToken()
        passed = (NAKED, *options.pop("pass_environment", ()))
        sandbox = Sandbox(root, enabled=level == "full")
        other = os.environ.get("LSP_AGENT_TEST_INTERPRETER") if "interpreter" not in options else None
        runner = PytestRunner(
            root,
            interpreter=Path(other) if other else options.pop("interpreter", None),
            pytest_args=pytest_args,
            sandbox=sandbox,
            pass_environment=passed,
        )
        return runner.run(tree, nodeids, timeout_s=timeout_s, cancel=cancel, **options)

    return run_
