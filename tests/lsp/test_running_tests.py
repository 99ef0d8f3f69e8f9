"""Running the tests from the editor: diagnostics, unsaved buffers, stopping, staying responsive, several folders."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from editor_client import FULL_CAPABILITIES, EditorClient, check_time, patience, without

SLOW_TEST = "import time\n\n\ndef test_slow():\n    time.sleep(60)\n"


def marked(editor: EditorClient, name: str) -> list[tuple[int, str]]:
    """0-based lines of our diagnostics, and their first lines."""
    found = editor.diagnostics.get(editor.uri(name), [])
    return sorted((d["range"]["start"]["line"], d["message"].splitlines()[0]) for d in found)


def test_failing_tests_are_shown_where_they_fail_and_where_they_are_defined(project: Path) -> None:
    (project / "calc.py").write_text("def add(a, b):\n    return a + None\n\n\ndef double(a):\n    return a * 2\n")
    with EditorClient(project) as editor:
        editor.open("test_calc.py")
        editor.run("lspAgent.runTests")
        assert "1 of 2 tests failed: test_add" in editor.message("failed")
        editor.wait(lambda: editor.uri("calc.py") in editor.diagnostics)
        assert [line for line, _ in marked(editor, "calc.py")] == [1]
        assert "TypeError: unsupported operand" in marked(editor, "calc.py")[0][1]
        assert [line for line, _ in marked(editor, "test_calc.py")] == [3]
        fix = editor.actions("calc.py", line=1)["quickfix.lspAgent.fixTest"]
        assert fix["title"] == "Fix failing test test_add"
        assert fix["diagnostics"][0]["message"].startswith("test_add fails: TypeError")


def test_unsaved_buffers_are_what_the_tests_see(project: Path) -> None:
    with EditorClient(project) as editor:
        editor.open("calc.py")
        editor.run("lspAgent.runTests")
        editor.message("1 of 2 tests failed")
        editor.wait(lambda: marked(editor, "test_calc.py"))
        editor.replace("calc.py", "a - b", "a + b")
        editor.run("lspAgent.runTests")
        editor.message("2 of 2 tests passed")
        editor.wait(lambda: not marked(editor, "test_calc.py"), what="cleared diagnostics")
        assert "a - b" in (project / "calc.py").read_text()


def test_progress_begins_reports_and_ends(project: Path) -> None:
    with EditorClient(project) as editor:
        editor.run("lspAgent.runTests")
        editor.ended()
        (values,) = editor.progress.values()
        assert values[0]["kind"] == "begin"
        assert values[0]["cancellable"]
        assert values[-1]["kind"] == "end"
        assert "1 of 2 tests failed" in values[-1]["message"]


def test_a_client_without_progress_gets_messages(project: Path) -> None:
    with EditorClient(project, capabilities=without(FULL_CAPABILITIES, "window")) as editor:
        editor.run("lspAgent.runTests")
        editor.message("Run the tests …")
        editor.message("1 of 2 tests failed")
        assert editor.progress == {}


@pytest.mark.parametrize("way", ["progress", "action"])
def test_a_run_can_be_stopped_within_two_seconds(project: Path, way: str) -> None:
    (project / "test_slow.py").write_text(SLOW_TEST)
    with EditorClient(project) as editor:
        editor.open("calc.py")

        def stop() -> float:
            editor.messages.clear()
            editor.progress.clear()
            editor.run("lspAgent.runTests")
            editor.wait(lambda: editor.progress)
            time.sleep(1.0)
            began = time.monotonic()
            if way == "progress":
                editor.notify("window/workDoneProgress/cancel", {"token": next(iter(editor.progress))})
            else:
                actions = editor.actions("calc.py")
                assert "Run the tests is running" in actions["source.lspAgent.runTests"]["disabled"]["reason"]
                editor.execute(actions["source.lspAgent.stop"]["command"])
            editor.message("stopped after")
            editor.ended()
            return time.monotonic() - began

        check_time(stop, 2.0)
        assert "source.lspAgent.stop" not in editor.actions("calc.py")
        assert "disabled" not in editor.actions("calc.py")["source.lspAgent.runTests"]


def test_a_second_job_is_refused_with_a_sentence(project: Path) -> None:
    (project / "test_slow.py").write_text(SLOW_TEST)
    with EditorClient(project) as editor:
        editor.run("lspAgent.runTests")
        editor.wait(lambda: editor.progress)
        editor.run("lspAgent.runTests")
        editor.message("'Run the tests' is still running")
        editor.run("lspAgent.stop")
        editor.ended()


def test_requests_are_answered_quickly_while_tests_burn_the_cpu(project: Path) -> None:
    (project / "test_busy.py").write_text(
        "import time\n\n\ndef test_busy():\n    end = time.time() + 60\n    while time.time() < end: sum(range(9))\n"
    )
    with EditorClient(project) as editor:
        editor.open("calc.py")
        editor.actions("calc.py")
        editor.run("lspAgent.runTests")
        editor.wait(lambda: editor.progress)
        time.sleep(1.0)
        check_time(lambda: editor.answer_time("calc.py"), 0.1)
        assert not editor.messages, "the tests still run"
        editor.run("lspAgent.stop")
        editor.ended()


def test_files_changed_outside_the_editor_are_noticed(project: Path) -> None:
    with EditorClient(project) as editor:
        editor.run("lspAgent.runTests")
        editor.message("1 of 2 tests failed")
        editor.wait(lambda: marked(editor, "test_calc.py"))
        time.sleep(0.5)
        (project / "calc.py").write_text((project / "calc.py").read_text().replace("a - b", "a + b"))
        editor.wait(lambda: not marked(editor, "test_calc.py"), 15, "cleared diagnostics")
        (project / "test_calc.py").unlink()


def test_with_the_policy_off_stale_results_are_removed(project: Path) -> None:
    with EditorClient(project, options={"runTestsOnSave": "off"}) as editor:
        editor.run("lspAgent.runTests")
        editor.message("1 of 2 tests failed")
        editor.wait(lambda: marked(editor, "test_calc.py"))
        time.sleep(0.5)
        (project / "calc.py").write_text("def add(a, b):\n    return 0\n")
        editor.wait(lambda: not marked(editor, "test_calc.py"), 15, "cleared diagnostics")
        editor.wait(lambda: "results of the failing tests were removed" in editor.logs[-1])
        assert len(editor.messages) == 1


def test_saving_runs_the_failing_tests_again_and_a_users_job_goes_first(project: Path) -> None:
    with EditorClient(project) as editor:
        editor.open("calc.py")
        editor.run("lspAgent.runTests")
        editor.message("1 of 2 tests failed")
        editor.wait(lambda: marked(editor, "test_calc.py"))
        editor.replace("calc.py", "a - b", "a + b")
        editor.save("calc.py")
        editor.run("lspAgent.runTests")  # at the same moment
        editor.message("2 of 2 tests passed")
        editor.wait(lambda: not marked(editor, "test_calc.py"))


def test_each_folder_has_its_own_jobs_and_a_removed_one_is_cancelled(tmp_path: Path) -> None:
    roots = [tmp_path / "one", tmp_path / "two"]
    for root in roots:
        root.mkdir()
        (root / f"test_{root.name}.py").write_text("def test_it():\n    assert False\n")
    (roots[1] / "test_slow.py").write_text(SLOW_TEST)
    with EditorClient(roots[0], folders=roots) as editor:
        editor.run("lspAgent.runTests")
        slow = {"command": "lspAgent.runTests", "arguments": [{"folder": roots[1].as_uri()}]}
        editor.execute(slow)
        editor.message("1 of 1 test failed")  # while the other folder's job runs
        editor.wait(lambda: len(editor.progress) == 2)
        event = {"event": {"added": [], "removed": [{"uri": roots[1].as_uri(), "name": "two"}]}}
        began = time.monotonic()
        editor.notify("workspace/didChangeWorkspaceFolders", event)
        editor.message("stopped after")
        assert time.monotonic() - began < patience(2.0)
        editor.execute(slow)
        editor.message("no longer part of the workspace")
        event = {"event": {"removed": [], "added": [{"uri": roots[1].as_uri(), "name": "two"}]}}
        (roots[1] / "test_slow.py").unlink()
        editor.notify("workspace/didChangeWorkspaceFolders", event)
        editor.execute(slow)
        editor.wait(lambda: (roots[1] / "test_two.py").as_uri() in editor.diagnostics)


def test_a_file_without_a_folder_gets_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with EditorClient(None) as editor:
        editor.root = tmp_path
        editor.open("a.py")
        actions = editor.actions("a.py")
        assert "Open the project's folder" in actions["source.lspAgent.makeGreen"]["disabled"]["reason"]
        editor.execute({"command": "lspAgent.runTests"})
        editor.message("Open the project's folder first")


def test_a_broken_project_is_one_sentence(project: Path) -> None:
    (project / "conftest.py").write_text("import does_not_exist\n")
    with EditorClient(project) as editor:
        editor.run("lspAgent.runTests")
        text = editor.message("conftest")
        assert "does_not_exist" in text
        assert "Traceback" not in text


def test_bad_settings_are_one_sentence(project: Path) -> None:
    (project / "lsp-agent.toml").write_text("sandbox = false\n")
    with EditorClient(project) as editor:
        editor.message("may not set 'sandbox'")
        editor.run("lspAgent.runTests")
        editor.wait(lambda: len(editor.messages) == 2)
        (project / "lsp-agent.toml").unlink()
        time.sleep(1.5)  # the watcher was not started with bad settings; the server looks at the next command
        editor.notify("workspace/didChangeConfiguration", {"settings": {}})
        editor.run("lspAgent.runTests")
        editor.message("1 of 2 tests failed")


def test_without_a_model_fixing_is_disabled_with_what_to_do(project: Path) -> None:
    with EditorClient(project) as editor:
        editor.open("test_calc.py")
        editor.run("lspAgent.runTests")
        editor.message("1 of 2 tests failed")
        editor.wait(lambda: marked(editor, "test_calc.py"))
        actions = editor.actions("test_calc.py", line=4)
        assert "lsp-agent model pull" in actions["quickfix.lspAgent.fixTest"]["disabled"]["reason"]
        assert "disabled" not in actions["source.lspAgent.runTests"]


def test_a_client_without_literals_gets_commands(project: Path, script: Callable[..., str]) -> None:
    capabilities = without(FULL_CAPABILITIES, "textDocument", "codeAction", "codeActionLiteralSupport")
    with EditorClient(project, "--model", script(), capabilities=capabilities) as editor:
        editor.open("test_calc.py")
        editor.run("lspAgent.runTests")
        editor.message("1 of 2 tests failed")
        editor.wait(lambda: marked(editor, "test_calc.py"))
        actions = editor.actions("test_calc.py", line=4)
        assert isinstance(actions["lspAgent.fixTest"]["command"], str)
        editor.execute(actions["lspAgent.runTests"])
        editor.wait(lambda: len(editor.messages) == 2)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_positions_use_the_negotiated_encoding(project: Path, encoding: str) -> None:
    (project / "test_emoji.py").write_text("def test_emoji():\n    assert '😀😀' == 'ä'\n")
    capabilities = {**FULL_CAPABILITIES, "general": {"positionEncodings": [encoding]}}
    with EditorClient(project, capabilities=capabilities) as editor:
        assert editor.server["capabilities"]["positionEncoding"] == encoding
        editor.run("lspAgent.runTests")
        editor.wait(lambda: len(marked(editor, "test_emoji.py")) == 2)
        spans = [d["range"] for d in editor.diagnostics[editor.uri("test_emoji.py")]]
        (span,) = [span for span in spans if span["start"]["line"] == 1]
        line = "    assert '😀😀' == 'ä'"
        assert span["end"] == editor.position(line, len(line)) | {"line": 1}


def test_many_clients_at_once_do_not_disturb_each_other(project: Path) -> None:
    def one(results: list[str]) -> None:
        with EditorClient(project) as editor:
            editor.run("lspAgent.runTests")
            results.append(editor.message("1 of 2 tests failed"))

    results: list[str] = []
    threads = [threading.Thread(target=one, args=(results,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2
