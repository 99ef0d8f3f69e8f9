"""`lsp-agent fix` as a user runs it: real pytest, a scripted model, exit codes, output, undo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lsp_agent.agent.request import FixResult
from lsp_agent.cli import app
from lsp_agent.errors import UserError
from lsp_agent.workspace.changes import FileChange

BUGGY = "def area(width, height):\n    return width + height\n"
TEST = (
    "from shapes import area\n\n\ndef test_area():\n    assert area(3, 4) == 12\n\n\n"
    "def test_zero():\n    assert area(0, 0) == 0\n"
)
FIX = {"on": "infill", "contains": "return <FILL>", "answers": ["width * height"]}


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    root = tmp_path / "shapes"
    root.mkdir()
    (root / "shapes.py").write_text(BUGGY)
    (root / "test_shapes.py").write_text(TEST)
    return root


def model(root: Path, *rules: dict[str, object]) -> str:
    path = root.parent / "model.json"
    path.write_text(json.dumps({"rules": list(rules)}))
    return f"scripted:{path}"


def run(root: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["fix", str(root), *arguments], standalone_mode=False)


def test_green_applies_and_can_be_undone(shapes: Path) -> None:
    result = run(shapes, "--model", model(shapes, FIX))
    assert result.return_value == 0, (result.output, result.exception)
    assert "+    return width * height" in result.stdout
    assert "Failed before, pass now:\n  test_shapes.py::test_area" in result.stdout
    assert (shapes / "shapes.py").read_text() == BUGGY.replace("+", "*")
    undo = next(line for line in result.stdout.splitlines() if "lsp-agent undo" in line).split("`")[1].split()
    undone = CliRunner().invoke(app, [*undo[1:], "--path", str(shapes)], standalone_mode=False)
    assert undone.exit_code == 0, undone.output
    assert (shapes / "shapes.py").read_text() == BUGGY


def test_json_and_dry_run(shapes: Path) -> None:
    result = run(shapes, "--model", model(shapes, FIX), "--json", "--dry-run", "--test", "test_shapes.py::test_area")
    assert result.return_value == 0
    shown = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert shown["status"] == "green" and shown["fixed"] == ["test_shapes.py::test_area"]
    assert shown["still_failing"] == [] and shown["broken"] == [] and shown["run"] is None
    assert "width * height" in shown["diff"] and shown["turns"] >= 1 and shown["seconds"] > 0
    assert shown["tokens"]["total"] > 0 and Path(shown["trajectory"]).exists()
    assert (shapes / "shapes.py").read_text() == BUGGY


def test_not_green_changes_nothing(shapes: Path) -> None:
    result = run(shapes, "--model", model(shapes), "--max-turns", "5")
    assert result.return_value == 1
    assert "Not green: your files are untouched." in result.stdout and "5 turns" in result.stdout
    assert "Still failing:\n  test_shapes.py::test_area" in result.stdout
    assert (shapes / "shapes.py").read_text() == BUGGY


def test_nothing_to_fix(shapes: Path) -> None:
    (shapes / "shapes.py").write_text(BUGGY.replace("+", "*"))
    result = run(shapes, "--model", model(shapes))
    assert result.return_value == 0 and "Nothing to fix" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--test", "test_shapes.py::test_nowhere"], 2, "does not exist"),
        (["--model", "no-such-model"], 2, "no-such-model"),
    ],
)
def test_errors_are_one_sentence(shapes: Path, arguments: list[str], code: int, says: str) -> None:
    if "--model" not in arguments:
        arguments += ["--model", model(shapes)]
    result = run(shapes, *arguments)
    assert isinstance(result.exception, UserError), result.output
    assert result.exception.exit_code == code and says in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_wrong_model_is_said_before_the_tests_are_run(shapes: Path) -> None:
    result = run(shapes, "--model", "no-such-model")
    assert isinstance(result.exception, UserError) and "no-such-model" in str(result.exception)
    assert "running the tests" not in result.output


def test_no_folder_and_no_tests(tmp_path: Path) -> None:
    result = run(tmp_path / "nowhere")
    assert isinstance(result.exception, UserError) and result.exception.exit_code == 2
    (tmp_path / "empty").mkdir()
    result = run(tmp_path / "empty", "--model", model(tmp_path / "empty"))
    assert isinstance(result.exception, UserError) and result.exception.exit_code == 3


def test_json_names_what_the_best_attempt_breaks(shapes: Path) -> None:
    constant = {"on": "infill", "contains": "return <FILL>", "answers": ["12"]}
    result = run(shapes, "--model", model(shapes, constant), "--max-turns", "4", "--json")
    shown = json.loads(result.stdout)
    assert result.return_value == 1 and shown["status"] == "not_green" and shown["run"] is None
    assert shown["broken"] == ["test_shapes.py::test_zero"] and shown["fixed"] == ["test_shapes.py::test_area"]
    assert "+    return 12" in shown["diff"] and shown["still_failing"] == []
    assert (shapes / "shapes.py").read_text() == BUGGY


def test_json_of_a_path_that_is_no_folder(tmp_path: Path) -> None:
    result = run(tmp_path / "nowhere", "--json")
    shown = json.loads(result.stdout)
    assert shown["status"] == "error" and "is not a folder" in shown["message"]
    assert isinstance(result.exception, UserError) and result.exception.exit_code == 2


def test_a_change_of_a_test_is_not_applied_even_if_the_agent_hands_one_out(
    shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = FileChange("test_shapes.py", TEST.encode(), b"")
    monkeypatch.setattr("lsp_agent.agent.fix.fix", lambda *_: FixResult("green", changes=(change,)))
    result = run(shapes, "--json")
    assert isinstance(result.exception, UserError) and "belongs to the tests" in str(result.exception)
    assert (shapes / "test_shapes.py").read_text() == TEST


def test_json_of_an_error(shapes: Path) -> None:
    result = run(shapes, "--json", "--model", "no-such-model")
    assert json.loads(result.stdout)["status"] == "error"


def test_interrupt_leaves_with_130_and_the_tree_untouched(shapes: Path) -> None:
    slow = model(shapes, {"on": "infill", "answers": [""], "delay_s": 60})
    process = subprocess.Popen(
        [sys.executable, "-m", "lsp_agent", "fix", str(shapes), "--model", slow],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(os.environ),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if b"turn 1" in line:
            break
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - began < 20
    assert b"cancelled" in error and b"Traceback" not in error and out == b""
    assert (shapes / "shapes.py").read_text() == BUGGY


def test_a_hanging_candidate_does_not_hang_the_run(shapes: Path) -> None:
    hang = {"on": "infill", "contains": "<FILL>\n", "answers": ["while True: pass", "return width * height"]}
    result = run(shapes, "--model", model(shapes, hang), "--max-seconds", "60")
    assert result.return_value == 0, result.output


def test_an_endless_loop_is_mended(tmp_path: Path) -> None:
    root = tmp_path / "loop"
    root.mkdir()
    (root / "loop.py").write_text("def down(n):\n    while n > 0:\n        n += 1\n    return n\n")
    (root / "test_loop.py").write_text(
        "from loop import down\n\n\ndef test_before():\n    assert down(0) == 0\n\n\ndef test_down():\n"
        "    assert down(3) == 0\n\n\ndef test_after():\n    assert down(-1) == -1\n"
    )
    rules = {"on": "infill", "contains": "while n > 0:\n        <FILL>", "answers": ["n -= 1"]}
    result = run(root, "--model", model(root, rules), "--test-timeout", "6", "--json")
    assert result.return_value == 0, result.output
    assert json.loads(result.stdout)["fixed"] == ["test_loop.py::test_down"]


def test_the_projects_settings_count_and_the_command_line_wins(shapes: Path) -> None:
    (shapes / "lsp-agent.toml").write_text('max_turns = 1\npytest_args = ["-k", "zero"]\n')
    result = run(shapes, "--model", model(shapes, FIX), "--dry-run")
    assert "Nothing to fix" in result.output, "only test_zero was to run, and it passes"
    (shapes / "lsp-agent.toml").write_text("max_turns = 0\n")
    with pytest.raises(UserError, match="max_turns"):
        raise run(shapes, "--model", model(shapes, FIX)).exception or AssertionError("it was accepted")
    assert run(shapes, "--model", model(shapes, FIX), "--max-turns", "9", "--dry-run").return_value == 0


def test_a_run_without_the_sandbox_says_so(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSP_AGENT_SANDBOX", "0")
    result = run(shapes, "--model", model(shapes, FIX), "--dry-run")
    assert "the tests run without the sandbox" in result.stderr
