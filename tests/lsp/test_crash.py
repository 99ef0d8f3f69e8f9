"""kill -9 of the server at random points of a job: the tree is untouched or fully changed, and can be recovered."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from editor_client import EditorClient

from lsp_agent.workspace.checkpoints import Checkpoints

KILLS = 12
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


def test_killed_at_random_points_the_tree_is_as_before_or_as_after(tmp_path: Path, script: Callable[..., str]) -> None:
    chance = random.Random(7)
    root = tmp_path / "project"
    root.mkdir()
    write(root)
    model = script(RULE)
    seen = []
    for number in range(KILLS):
        editor = EditorClient(root, "--model", model)
        editor.run("lspAgent.makeGreen")
        if number % 3 == 0:
            cut_short(editor, "running the tests", chance.uniform(0, 3))
        else:  # around the moment at which files are written
            cut_short(editor, "proving it", chance.uniform(0, 1.5))
        # A kill between two renames leaves one file changed; the journal knows it, and whoever comes next mends it.
        checkpoints = Checkpoints(root)
        recovered = checkpoints.recover()
        seen.append(state_of(root))
        assert seen[-1] in ("before", "after"), (seen[-1], recovered)
        if seen[-1] == "after":
            checkpoints.undo()
            assert state_of(root) == "before"
    with EditorClient(root, "--model", model) as editor:
        editor.run("lspAgent.makeGreen")
        editor.message("failed before and pass now", 120)
        assert state_of(root) == "after", seen
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
