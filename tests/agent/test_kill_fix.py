"""Killing loses nothing: the engine in the middle of a run, and `lsp-agent fix` itself, at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import FakeModel, Project

from lsp_agent.cancel import CancelToken
from lsp_agent.cli import app
from lsp_agent.errors import ExitCode, UserError
from lsp_agent.workspace.checkpoints import Checkpoints

SEARCH_KILLS = 3
APPLY_KILLS = 6
FILES = {
    "a_py": "def one():\n    return 2\n",
    "b_py": "def two():\n    return 3\n",
    "test_a_py": "from a import one\n\n\ndef test_one():\n    assert one() == 1\n",
    "test_b_py": "from b import two\n\n\ndef test_two():\n    assert two() == 2\n",
}
RULES = [
    {"on": "infill", "contains": "test_one", "answers": ["7", "8", "9", "1"], "delay_s": 0.05},
    {"on": "infill", "contains": "test_two", "answers": ["7", "8", "9", "2"], "delay_s": 0.05},
]
# The command as it is, but for a runner that takes milliseconds and a disk that is slow, so that kills meet writes.
COMMAND = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
from quick_runner import QuickRunner
import lsp_agent.testing.pytest_runner as runners
runners.PytestRunner = lambda root, **options: QuickRunner(root)
def slow_down(owner, name):
    real = getattr(owner, name)
    def slow(*args, **options):
        time.sleep(0.02)
        return real(*args, **options)
    setattr(owner, name, slow)
slow_down(os, "fsync")
slow_down(Path, "replace")
from lsp_agent.workspace.checkpoints import Checkpoints
begin, apply = Checkpoints.begin, Checkpoints.apply
def say_and_begin(*args, **options):
    print("BEGIN", file=sys.stderr, flush=True)
    begin(*args, **options)
def apply_and_say(*args, **options):
    apply(*args, **options)
    print("APPLIED", file=sys.stderr, flush=True)
Checkpoints.begin, Checkpoints.apply = say_and_begin, apply_and_say
from lsp_agent.cli import main
main()
"""


def test_the_engine_dies_in_the_middle_of_a_run(calc: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the client raises when the engine is gone for good ends the run: one sentence, exit 3, no file touched."""

    def die(cancel: CancelToken) -> None:
        if len(calc.model.asked) == 3:
            raise UserError("The engine stopped while it answered; run again, or see engine.log.")

    calc.model.on_ask = die
    monkeypatch.setattr("lsp_agent.models.open_model", lambda *_, **__: calc.model)
    monkeypatch.setattr("lsp_agent.testing.pytest_runner.PytestRunner", lambda root, **_: calc.runner)
    before = calc.tree()
    result = CliRunner().invoke(app, ["fix", str(calc.root), "--json"], standalone_mode=False)
    assert isinstance(result.exception, UserError) and result.exception.exit_code == ExitCode.ENVIRONMENT
    assert json.loads(result.stdout) == {"status": "error", "message": str(result.exception)}
    assert len(calc.model.asked) == 3 and calc.model.closed == 1 and calc.tree() == before
    (record,) = (Path(os.environ["LSP_AGENT_STATE_DIR"]) / "runs").glob("*.jsonl")
    kinds = [json.loads(line)["kind"] for line in record.read_text().splitlines()]
    assert kinds.count("ask") == 3 and kinds[-1] == "ended"


def start(root: Path, script: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", COMMAND, str(Path(__file__).parent), "fix", str(root), "--model"]
    return subprocess.Popen([*command, f"scripted:{script}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(process: subprocess.Popen[bytes], text: bytes) -> float:
    """Read what the command says until `text`; returns when that was."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        if text in line:
            return time.monotonic()
        said.append(line)
    raise AssertionError(f"it ended without saying {text!r}: {said}")


def undo(root: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["undo", "--path", str(root), "--json", *arguments], standalone_mode=False)
    assert result.exception is None, result.exception
    return result.stdout


def test_kill_9_at_random_points(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(tmp_path / "cache"))
    project.write(**FILES)
    script = tmp_path / "model.json"
    script.write_text(json.dumps({"rules": RULES}))
    before = project.tree()
    after = {**before, "a.py": b"def one():\n    return 1\n", "b.py": b"def two():\n    return 2\n"}

    process = start(project.root, script)
    searching = wait_for(process, b"tests fail")
    begun = wait_for(process, b"BEGIN")
    applied = wait_for(process, b"APPLIED")
    process.communicate(timeout=60)
    assert process.returncode == 0 and project.tree() == after, "unkilled, it mends both files"
    undo(project.root)
    assert project.tree() == before

    choose = random.Random(5)
    seen: set[str] = set()
    for kill in range(SEARCH_KILLS + APPLY_KILLS):
        process = start(project.root, script)
        if kill < SEARCH_KILLS:
            wait_for(process, b"tests fail")
            time.sleep(choose.uniform(0, begun - searching))
        else:
            wait_for(process, b"BEGIN")
            time.sleep(choose.uniform(0, applied - begun))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        left = {name: text for name, text in project.tree().items() if not Path(name).name.startswith(".lsp-agent")}
        assert set(left) == set(before) and all(left[n] in (before[n], after[n]) for n in left), "a file is torn"

        listed = json.loads(undo(project.root, "--list"))["runs"]
        assert project.tree() in (before, after), "some of the files are changed and some are not"
        newest = next(run for run in Checkpoints(project.root).runs() if run.undoes is None)
        assert project.tree() == (after if newest.status == "applied" else before)
        assert all(run["status"] in ("applied", "undone", "rolled_back") for run in listed)
        seen.add(newest.status)
        if project.tree() == after:
            undo(project.root)
        assert project.tree() == before
    assert seen & {"begun", "rolled_back"}, "no kill met the applying of a change; the test shows nothing"


def test_a_run_after_a_kill_works(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(tmp_path / "cache"))
    project.write(**FILES)
    script = tmp_path / "model.json"
    script.write_text(json.dumps({"rules": RULES}))
    process = start(project.root, script)
    wait_for(process, b"proving it")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    project.model = FakeModel(infills=lambda p: "1" if "test_one" in p else "2")
    assert project.fix().status == "green"
    assert start(project.root, script).wait(60) == 0
