"""The main job over a real connection: fix, versioned edit, proof, undo; and everything that interferes."""

from __future__ import annotations

import codecs
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from editor_client import CALC, FULL_CAPABILITIES, EditorClient, without

from lsp_agent.agent.request import FixResult
from lsp_agent.cancel import CancelToken
from lsp_agent.errors import UserError
from lsp_agent.lsp.fix_job import RecordingRunner, _prove
from lsp_agent.testing.results import TestResult, TestRun
from lsp_agent.workspace.changes import FileChange
from lsp_agent.workspace.workspace import Workspace

Script = Callable[..., str]
RIGHT: dict[str, Any] = {"on": "infill", "answers": ["return a + b"]}
TEST = "test_calc.py::test_add"


def lines_of(editor: EditorClient, name: str) -> list[int]:
    return sorted(d["range"]["start"]["line"] for d in editor.diagnostics.get(editor.uri(name), []))


def slow(seconds: float, **rule: Any) -> dict[str, Any]:
    return {**RIGHT, "delay_s": seconds, **rule}


def wait_for_turn(editor: EditorClient) -> None:
    """Wait until the model is being asked."""

    def asking() -> bool:
        return any("turn" in v.get("message", "") for values in editor.progress.values() for v in values)

    editor.wait(asking, what="the first turn")


def test_from_a_failing_diagnostic_to_green_and_back(project: Path, script: Script) -> None:
    with EditorClient(project, "--model", script(RIGHT)) as editor:
        editor.open("calc.py")
        editor.open("test_calc.py")
        editor.run("lspAgent.runTests")
        editor.wait(lambda: lines_of(editor, "test_calc.py") == [3, 4])
        action = editor.actions("test_calc.py", line=4, only=["quickfix"])["quickfix.lspAgent.fixTest"]
        editor.execute(action["command"])
        text = editor.message("failed before and passes now")
        assert text.startswith("test_add failed before and passes now. 2 of 2 tests pass. (")
        assert "Save calc.py to keep it." in text
        editor.ended()
        values = list(editor.progress.values())[-1]
        assert values[0]["title"] == "Fix test_add"
        percentages = [v["percentage"] for v in values if "percentage" in v]
        assert percentages == sorted(percentages)
        # The edit was versioned and as small as the change, so that cursors stay where they are.
        (edit,) = editor.edits
        (change,) = edit["documentChanges"]
        assert change["textDocument"] == {"uri": editor.uri("calc.py"), "version": 1}
        assert change["edits"] == [
            {
                "range": {"start": {"line": 4, "character": 13}, "end": {"line": 4, "character": 14}},
                "newText": "+",
            }
        ]
        assert editor.text("calc.py") == CALC.replace("a - b", "a + b")
        assert (project / "calc.py").read_text() == CALC, "the open document is the editor's to save"
        editor.wait(lambda: lines_of(editor, "test_calc.py") == [], what="cleared diagnostics")

        undo = editor.actions("calc.py")["source.lspAgent.undo"]
        assert "disabled" not in undo
        editor.execute(undo["command"])
        editor.message("Undone: calc.py restored")
        assert editor.text("calc.py") == CALC
        assert editor.edits[-1]["documentChanges"][0]["textDocument"]["version"] == 2
        editor.wait(lambda: lines_of(editor, "test_calc.py") == [3, 4], what="the diagnostics of the old state")
        editor.wait(lambda: editor.actions("calc.py")["source.lspAgent.undo"].get("disabled"))


def test_closed_files_are_written_by_the_server_and_undone(project: Path, script: Script) -> None:
    with EditorClient(project, "--model", script(RIGHT)) as editor:
        editor.run("lspAgent.makeGreen")
        assert "Save" not in editor.message("failed before and passes now")
        assert editor.edits == []
        assert (project / "calc.py").read_text() == CALC.replace("a - b", "a + b")
        editor.run("lspAgent.undo")
        editor.message("Undone")
        assert (project / "calc.py").read_text() == CALC
        editor.run("lspAgent.undo")
        editor.message("nothing to undo")


def test_an_unsaved_bug_is_fixed_in_the_buffer(project: Path, script: Script) -> None:
    (project / "calc.py").write_text(CALC.replace("a - b", "a + b"))
    with EditorClient(project, "--model", script(RIGHT)) as editor:
        editor.open("calc.py")
        editor.replace("calc.py", "a + b", "a * b")
        editor.replace("calc.py", '"""Arithmetic. 😀"""', '"""Arithmetic. 😀😀"""')
        editor.run("lspAgent.makeGreen")
        editor.message("failed before and passes now")
        assert editor.text("calc.py") == CALC.replace("a - b", "a + b").replace('😀"', '😀😀"')
        assert editor.edits[0]["documentChanges"][0]["textDocument"]["version"] == 3
        assert (project / "calc.py").read_text() == CALC.replace("a - b", "a + b")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_line_ends_marks_and_characters_survive(project: Path, script: Script, encoding: str) -> None:
    content = codecs.BOM_UTF8 + '"""😀"""\r\n\r\n\r\ndef add(a, b):\r\n    x = "😀"; return a - b  # 中'.encode()
    (project / "calc.py").write_bytes(content)
    (project / "test_calc.py").write_text("from calc import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n")
    capabilities = {**FULL_CAPABILITIES, "general": {"positionEncodings": [encoding]}}
    with EditorClient(project, "--model", script(RIGHT), capabilities=capabilities) as editor:
        editor.open("calc.py")
        editor.run("lspAgent.makeGreen")
        editor.message("failed before and passes now")
        assert editor.text("calc.py").encode() == content.removeprefix(codecs.BOM_UTF8).replace(b"a - b", b"a + b")
        (edit,) = editor.edits[0]["documentChanges"][0]["edits"]
        assert edit["newText"] == "+"
    with EditorClient(project, "--model", script(RIGHT)) as editor:
        editor.run("lspAgent.makeGreen")
        editor.message("failed before and passes now")
        assert (project / "calc.py").read_bytes() == content.replace(b"a - b", b"a + b")


def test_stop_while_the_model_thinks(project: Path, script: Script) -> None:
    with EditorClient(project, "--model", script(slow(60))) as editor:
        editor.open("calc.py")
        editor.run("lspAgent.makeGreen")
        wait_for_turn(editor)
        times = []
        for _ in range(20):  # the editor stays responsive meanwhile
            began = time.monotonic()
            actions = editor.actions("calc.py")
            times.append(time.monotonic() - began)
        assert sorted(times)[-2] < 0.1, times
        began = time.monotonic()
        editor.execute(actions["source.lspAgent.stop"]["command"])
        assert "Your files are untouched" in editor.message("stopped after")
        editor.ended()
        assert time.monotonic() - began < 2.0
        assert editor.text("calc.py") == CALC
        assert (project / "calc.py").read_text() == CALC


def test_not_green_leaves_everything_and_says_so(project: Path, script: Script) -> None:
    with EditorClient(project, "--model", script(), options={"maxTurns": 3}) as editor:
        editor.open("calc.py")
        editor.run("lspAgent.makeGreen")
        assert "your files are untouched" in editor.message("Not green after")
        assert editor.edits == []
        assert (project / "calc.py").read_text() == CALC
        editor.wait(lambda: lines_of(editor, "test_calc.py") == [3, 4], what="diagnostics of the baseline")


def test_nothing_failing_is_said(project: Path, script: Script) -> None:
    (project / "calc.py").write_text(CALC.replace("a - b", "a + b"))
    with EditorClient(project, "--model", script()) as editor:
        editor.run("lspAgent.makeGreen")
        editor.message("Nothing to fix")


def test_typing_elsewhere_meanwhile_is_merged_and_proven_again(project: Path, script: Script) -> None:
    with EditorClient(project, "--model", script(slow(1.5))) as editor:
        editor.open("calc.py")
        editor.run("lspAgent.makeGreen")
        wait_for_turn(editor)
        editor.replace("calc.py", '"""Arithmetic.', '"""My arithmetic.')
        editor.message("failed before and passes now")
        expected = CALC.replace("a - b", "a + b").replace("Arithmetic.", "My arithmetic.")
        assert editor.text("calc.py") == expected
        assert editor.edits[0]["documentChanges"][0]["textDocument"]["version"] == 2


def test_typing_that_breaks_the_proof_is_not_overwritten(project: Path, script: Script) -> None:
    with EditorClient(project, "--model", script(slow(1.5))) as editor:
        editor.open("calc.py")
        editor.run("lspAgent.makeGreen")
        wait_for_turn(editor)
        editor.replace("calc.py", "a * 2", "a * 3")
        assert "test_double does not pass" in editor.message("does not hold")
        assert editor.text("calc.py") == CALC.replace("a * 2", "a * 3")
        assert editor.edits == []
        assert editor.shown, "the diff is shown"


def test_typing_in_the_same_place_is_a_conflict_with_the_diff(project: Path, script: Script) -> None:
    with EditorClient(project, "--model", script(slow(1.5))) as editor:
        editor.open("calc.py")
        editor.run("lspAgent.makeGreen")
        wait_for_turn(editor)
        editor.replace("calc.py", "a - b", "a - b - 1")
        editor.message("edited in the same place")
        assert editor.text("calc.py") == CALC.replace("a - b", "a - b - 1")
        assert editor.edits == []
        diff = Path(editor.shown[0].removeprefix("file://")).read_text()
        assert "+    return a + b" in diff


def test_typing_at_the_very_moment_of_the_edit_is_not_lost(project: Path, script: Script) -> None:
    with EditorClient(project, "--model", script(RIGHT)) as editor:
        editor.open("calc.py")

        def type_first(_edit: dict[str, Any]) -> None:
            editor.before_edit = None
            editor.replace("calc.py", '"""Arithmetic.', '"""Mine.')

        editor.before_edit = type_first  # type: ignore[assignment]
        editor.run("lspAgent.makeGreen")
        editor.message("failed before and passes now")
        assert editor.text("calc.py") == CALC.replace("a - b", "a + b").replace("Arithmetic.", "Mine.")
        assert len(editor.edits) == 2


@pytest.mark.parametrize("double", ["passed", "skipped", "failed", "gone"])
def test_the_proof_on_the_merged_tree_is_as_strict_as_the_agents(project: Path, double: str) -> None:
    def run_of(**outcomes: Any) -> TestRun:
        results = {f"t.py::test_{n}": TestResult(f"t.py::test_{n}", o) for n, o in outcomes.items() if o != "gone"}
        return TestRun(results, 0.1, ("pytest",))

    runs = iter([run_of(add="failed", double="passed"), run_of(add="passed", double=double)])
    runner = RecordingRunner(SimpleNamespace(run=lambda *_, **__: next(runs)))  # type: ignore[arg-type]
    runner.run(project, timeout_s=1, cancel=CancelToken())
    editor = SimpleNamespace(show_document=lambda _uri: True)
    folder: Any = SimpleNamespace(settings=SimpleNamespace(test_timeout_seconds=1), editor=editor)
    job: Any = SimpleNamespace(cancel=CancelToken())
    change = FileChange("calc.py", CALC.encode(), CALC.replace("a - b", "a + b").encode())
    result = FixResult("green", (change,), fixed=("t.py::test_add",))
    if double in ("passed", "skipped"):
        _prove(folder, job, runner, Workspace(project), [change], result)
    else:
        with pytest.raises(UserError, match="test_double does not pass there"):
            _prove(folder, job, runner, Workspace(project), [change], result)


def two_files(root: Path) -> None:
    """A failure whose fix takes a change in an open and one in a closed file."""
    (root / "other.py").write_text("def sub(a, b):\n    return a * b\n")
    (root / "test_other.py").write_text("from other import sub\n\n\ndef test_sub():\n    assert sub(1, 2) == 3\n")


@pytest.mark.parametrize(
    "answer",
    [
        {"applied": False, "failureReason": "the user said no"},
        {"applied": True},  # says so, but leaves the document as it is, as some editors do with a stale version
    ],
)
def test_a_refused_edit_leaves_nothing_half_applied(project: Path, script: Script, answer: dict[str, Any]) -> None:
    two_files(project)
    with EditorClient(project, "--model", script(RIGHT)) as editor:
        editor.open("calc.py")
        other = (project / "other.py").read_text()
        editor.before_edit = lambda _edit: answer
        editor.run("lspAgent.makeGreen")
        editor.message("did not apply the edit")
        editor.ended()
        assert editor.text("calc.py") == CALC
        assert (project / "calc.py").read_text() == CALC
        assert (project / "other.py").read_text() == other
        editor.before_edit = None
        editor.run("lspAgent.makeGreen")
        editor.message("failed before and pass now")
        assert "a + b" in editor.text("calc.py")
        assert "a + b" in (project / "other.py").read_text()
        editor.run("lspAgent.undo")
        editor.message("Undone")
        assert editor.text("calc.py") == CALC
        assert (project / "other.py").read_text() == other


def test_a_client_without_apply_edit_gets_saved_files_changed_on_disk(project: Path, script: Script) -> None:
    capabilities = without(FULL_CAPABILITIES, "workspace", "applyEdit")
    with EditorClient(project, "--model", script(RIGHT), capabilities=capabilities) as editor:
        editor.open("calc.py")
        editor.run("lspAgent.makeGreen")
        editor.message("failed before and passes now")
        assert (project / "calc.py").read_text() == CALC.replace("a - b", "a + b")


def test_a_client_without_apply_edit_keeps_its_unsaved_changes(project: Path, script: Script) -> None:
    capabilities = without(FULL_CAPABILITIES, "workspace", "applyEdit")
    with EditorClient(project, "--model", script(RIGHT), capabilities=capabilities) as editor:
        editor.open("calc.py")
        editor.replace("calc.py", "Arithmetic", "Mine")
        editor.run("lspAgent.makeGreen")
        editor.message("has unsaved changes: save it and start again")
        assert (project / "calc.py").read_text() == CALC


def test_a_client_without_document_changes_gets_plain_ones(project: Path, script: Script) -> None:
    capabilities = without(FULL_CAPABILITIES, "workspace", "workspaceEdit")
    with EditorClient(project, "--model", script(RIGHT), capabilities=capabilities) as editor:
        editor.open("calc.py")
        editor.run("lspAgent.makeGreen")
        editor.message("failed before and passes now")
        assert list(editor.edits[0]) == ["changes"]
        assert editor.text("calc.py") == CALC.replace("a - b", "a + b")


def test_the_barest_client_can_do_the_main_job(project: Path, script: Script) -> None:
    with EditorClient(project, "--model", script(RIGHT), capabilities={}) as editor:
        editor.open("calc.py")
        editor.execute(editor.actions("calc.py")["lspAgent.makeGreen"])
        editor.message("Make all tests green …")
        editor.message("failed before and passes now")
        assert (project / "calc.py").read_text() == CALC.replace("a - b", "a + b")


def test_undo_refuses_rather_than_overwrite_a_later_edit(project: Path, script: Script) -> None:
    with EditorClient(project, "--model", script(RIGHT)) as editor:
        editor.open("calc.py")
        editor.run("lspAgent.makeGreen")
        editor.message("failed before and passes now")
        editor.ended()
        editor.replace("calc.py", "a + b", "a + b + 0")
        editor.run("lspAgent.undo")
        editor.message("nothing was undone")
        assert editor.text("calc.py") == CALC.replace("a - b", "a + b + 0")
        editor.ended()
        editor.replace("calc.py", "a + b + 0", "a + b")
        editor.replace("calc.py", "Arithmetic", "Mine")
        editor.run("lspAgent.undo")
        assert "Later edits in calc.py were kept" in editor.message("Undone")
        assert editor.text("calc.py") == CALC.replace("Arithmetic", "Mine")


def test_two_servers_on_one_workspace_never_overwrite_each_other(project: Path, script: Script) -> None:
    model = script(slow(1.0))
    with EditorClient(project, "--model", model) as one, EditorClient(project, "--model", model) as two:
        ends: list[str] = []

        def run(editor: EditorClient) -> None:
            editor.run("lspAgent.makeGreen")
            editor.wait(lambda: editor.messages and editor.progress, 60)
            editor.ended(60)
            ends.append(editor.messages[-1])

        threads = [threading.Thread(target=run, args=(editor,)) for editor in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        assert (project / "calc.py").read_text() == CALC.replace("a - b", "a + b"), ends
        assert len(ends) == 2
        assert any("failed before and passes now" in end for end in ends), ends
        one.run("lspAgent.undo")
        one.message("Undone")
        assert (project / "calc.py").read_text() == CALC
