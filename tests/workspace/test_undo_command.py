"""`lsp-agent undo`: what it prints, what it leaves alone, and its exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lsp_agent import cli
from lsp_agent.workspace.changes import FileChange
from lsp_agent.workspace.checkpoints import Checkpoints
from lsp_agent.workspace.workspace import Workspace


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LSP_AGENT_STATE_DIR", str(tmp_path / "state"))
    folder = tmp_path / "project"
    (folder / "pkg").mkdir(parents=True)
    (folder / "a.py").write_text("a = 1\n")
    (folder / "pkg/b.py").write_text("b = 1\n")
    checkpoints = Checkpoints(folder)
    for run_id, after in (("first", b"a = 2\n"), ("second", b"a = 3\n")):
        checkpoints.begin(run_id, Workspace(folder))
        before = (folder / "a.py").read_bytes()
        checkpoints.apply(run_id, [FileChange("a.py", before, after), FileChange(f"{run_id}.py", None, b"new\n")])
    return folder


def lsp_agent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["lsp-agent", "undo", *args])
    with pytest.raises(SystemExit) as left:
        cli.main()
    shown = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return int(left.value.code), shown.out, shown.err


def test_undo_the_last_run_from_a_folder_inside(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / "pkg")
    code, out, err = lsp_agent(capsys, monkeypatch)
    assert code == 0
    assert err == ""
    lines = out.splitlines()
    assert lines[0].split() == ["restored", "a.py"]
    assert lines[1].split() == ["removed", "second.py"]
    assert "The run second is undone" in lines[2]
    assert (root / "a.py").read_text() == "a = 2\n"
    assert lsp_agent(capsys, monkeypatch, "undo-1-second")[0] == 0
    assert (root / "a.py").read_text() == "a = 3\n"


def test_exit_codes(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = ["--path", str(root)]
    code, out, err = lsp_agent(capsys, monkeypatch, "first", *path)
    assert (code, out) == (1, "")
    assert "a.py was edited" in err
    assert err.count("\n") == 1
    assert (root / "first.py").exists()
    code, _, err = lsp_agent(capsys, monkeypatch, "third", *path)
    assert code == 2
    assert "third" in err
    assert lsp_agent(capsys, monkeypatch, *path)[0] == 0
    assert lsp_agent(capsys, monkeypatch, *path)[0] == 0
    assert (root / "a.py").read_text() == "a = 1\n"
    code, _, err = lsp_agent(capsys, monkeypatch, *path)
    assert code == 3
    assert "nothing to undo" in err
    assert lsp_agent(capsys, monkeypatch, "--path", str(root / "missing"))[0] == 3


def test_list_and_dry_run_change_nothing(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ["--path", str(root)]
    code, out, _ = lsp_agent(capsys, monkeypatch, "--list", *path)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["second", "first"]
    code, out, _ = lsp_agent(capsys, monkeypatch, "--dry-run", *path)
    assert code == 0
    assert "-a = 3\n+a = 2\n" in out
    assert (root / "a.py").read_text() == "a = 3\n"
    assert (root / "second.py").exists()


def test_json(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = ["--json", "--path", str(root)]
    listed = json.loads(lsp_agent(capsys, monkeypatch, "--list", *path)[1])
    assert [(run["id"], run["status"]) for run in listed["runs"]] == [("second", "applied"), ("first", "applied")]
    planned = json.loads(lsp_agent(capsys, monkeypatch, "--dry-run", *path)[1])
    assert planned["status"] == "dry_run"
    assert "+a = 2" in planned["diff"]
    code, out, _ = lsp_agent(capsys, monkeypatch, "first", *path)
    assert code == 1
    assert json.loads(out)["status"] == "conflict"
    assert json.loads(lsp_agent(capsys, monkeypatch, "third", *path)[1])["status"] == "unknown_run"
    done = json.loads(lsp_agent(capsys, monkeypatch, *path)[1])
    assert done == {
        "status": "undone",
        "run": "second",
        "undo": "undo-1-second",
        "merged": [],
        "files": [{"path": "a.py", "action": "restored"}, {"path": "second.py", "action": "removed"}],
    }
