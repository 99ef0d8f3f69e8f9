"""kill -9 of the server during a job: the tree is untouched or fully changed, or is so after the recovery."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from editor_client import EditorClient

from lsp_agent.workspace.checkpoints import Checkpoints

BEFORE = {
    "calc.py": "def add(a, b):\n    return a - b\n",
    "pkg/other.py": "def plus(a, b):\r\n    return a * b",
    "test_all.py": (
        "from calc import add\nfrom pkg.other import plus\n\n\n"
        "def test_add():\n    assert add(1, 2) == 3\n\n\ndef test_plus():\n    assert plus(1, 2) == 3\n"
    ),
}
AFTER = {
    **BEFORE,
    "calc.py": BEFORE["calc.py"].replace("a - b", "a + b"),
    "pkg/other.py": BEFORE["pkg/other.py"].replace("a * b", "a + b"),
}
HALF = {**BEFORE, "calc.py": AFTER["calc.py"]}
KILL_HOOK = """
import itertools, os, signal
step = os.environ.get("KILL_AT")
if step:
    from lsp_agent.workspace import transaction

    def reached(name):
        if name == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def carry_out(root, record, get, commit, real=transaction.carry_out, look=transaction._current):
        numbers = itertools.count(1)

        def current(place):  # looked at once before each file is renamed into its place
            reached(f"rename {next(numbers)}")
            return look(place)

        def committed():
            reached("before commit")
            commit()
            reached("after commit")

        transaction._current = current
        real(root, record, get, committed)

    transaction.carry_out = carry_out
"""
RULE = {"on": "infill", "answers": ["return a + b"]}


def write(root: Path) -> None:
    for name, text in BEFORE.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(text.encode())


def tree(root: Path) -> dict[str, str]:
    """Every file below `root`: nothing may be left behind either."""
    return {p.relative_to(root).as_posix(): p.read_bytes().decode() for p in root.rglob("*") if p.is_file()}


def state_of(root: Path) -> str:
    now = tree(root)
    return "before" if now == BEFORE else "after" if now == AFTER else f"neither: {now}"


def cut_short(editor: EditorClient, part: str, seconds: float) -> None:
    """Kill the server some seconds after a progress message that contains `part`."""

    def reached() -> bool:
        return any(part in v.get("message", "") for values in editor.progress.values() for v in values)

    editor.wait(reached, 120, part)
    time.sleep(seconds)
    editor.kill()


def killed_at(step: str, root: Path, hooks: Path, model: str) -> None:
    """Run a fix in a server that kills itself at `step` of writing the files."""
    environment = {
        "PYTHONPATH": os.pathsep.join([str(hooks), os.environ.get("PYTHONPATH", "")]),
        "KILL_AT": step,
    }
    editor = EditorClient(root, "--model", model, environment=environment)
    editor.run("lspAgent.makeGreen")
    assert editor.process.wait(120) == -signal.SIGKILL, (step, editor.messages)


@pytest.mark.timeout(240)
def test_killed_at_any_point_the_tree_is_as_before_or_as_after(tmp_path: Path, script: Callable[..., str]) -> None:
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(KILL_HOOK)
    root = tmp_path / "project"
    root.mkdir()
    write(root)
    model = script(RULE)
    checkpoints = Checkpoints(root)

    # At random moments of the first test run and of the proof, mostly before anything is written.
    chance = random.Random(7)
    for part, longest in (("running the tests", 1.5), ("proving it", 0.3)):
        editor = EditorClient(root, "--model", model)
        editor.run("lspAgent.makeGreen")
        cut_short(editor, part, chance.uniform(0, longest))
        checkpoints.recover()
        if state_of(root) == "after":
            checkpoints.undo()
        assert state_of(root) == "before"

    # Where one file or both are written already, the journal knows it, and whoever comes next mends it.
    for step, mixed in (("rename 1", BEFORE), ("rename 2", HALF), ("before commit", AFTER)):
        killed_at(step, root, hooks, model)
        assert {name: text for name, text in tree(root).items() if name in BEFORE} == mixed, step
        assert any("it was taken back" in sentence for sentence in checkpoints.recover()), step
        assert state_of(root) == "before", step
    killed_at("after commit", root, hooks, model)
    assert state_of(root) == "after"
    assert checkpoints.recover() == []
    checkpoints.undo()
    assert state_of(root) == "before"

    with EditorClient(root, "--model", model) as editor:
        editor.run("lspAgent.makeGreen")
        editor.message("failed before and pass now", 120)
        assert state_of(root) == "after"
        editor.run("lspAgent.undo")
        editor.message("Undone")
        assert state_of(root) == "before"


@pytest.mark.parametrize("applied", [False, True])
def test_killed_while_the_editor_applies_its_part(tmp_path: Path, script: Callable[..., str], applied: bool) -> None:
    root = tmp_path / "project"
    root.mkdir()
    write(root)
    model = script(RULE)
    editor = EditorClient(root, "--model", model)
    editor.open("calc.py")

    def kill(edit: dict) -> dict:
        if applied:
            editor.before_edit = None
            editor._apply(edit)
        editor.kill()
        return {"applied": applied}

    editor.before_edit = kill
    editor.run("lspAgent.makeGreen")
    assert editor.process.wait(120) < 0
    assert (root / "calc.py").read_bytes().decode() == BEFORE["calc.py"], "the editor has not saved"
    with EditorClient(root, "--model", model) as again:
        again.open("calc.py", AFTER["calc.py"] if applied else BEFORE["calc.py"])  # the editor still has its buffer
        if applied:
            again.message("it can be undone")
            assert (root / "pkg/other.py").read_bytes().decode() == AFTER["pkg/other.py"]
            again.run("lspAgent.undo")
            again.message("Undone")
            assert again.text("calc.py") == BEFORE["calc.py"]
        else:
            again.message("it was taken back")
        assert state_of(root) == "before"


def test_a_model_that_cannot_be_opened_is_one_sentence(tmp_path: Path) -> None:
    root = tmp_path / "project"
    root.mkdir()
    write(root)
    with EditorClient(root, "--model", f"scripted:{tmp_path}/missing.json") as editor:
        editor.run("lspAgent.makeGreen")
        editor.message("cannot be read")
        assert state_of(root) == "before"
