"""What a server does about the runs that others left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from editor_client import CALC

from lsp_agent.lsp.convert import uri_of
from lsp_agent.lsp.documents import Documents
from lsp_agent.lsp.folder import Folder
from lsp_agent.lsp.models import Models
from lsp_agent.lsp.opening import finish_interrupted
from lsp_agent.workspace.changes import FileChange
from lsp_agent.workspace.checkpoints import Checkpoints
from lsp_agent.workspace.workspace import Workspace

FIXED = CALC.replace("a - b", "a + b").encode()


class FakeEditor:
    """Records what is shown."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def show(self, text: str, *_: object) -> None:
        self.shown.append(text)


def folder_of(root: Path, editor: FakeEditor) -> Folder:
    fake: Any = editor
    return Folder(uri_of(root), root, Documents(), fake, Models(), {})


@pytest.mark.parametrize(("age_s", "status"), [(0.0, "awaiting_editor"), (366 * 86400.0, "undone")])
def test_a_run_whose_process_id_belongs_to_a_later_process_is_settled(project: Path, age_s: float, status: str) -> None:
    checkpoints = Checkpoints(project)
    run_id = f"20250101T000000-lsp-{os.getpid()}-00000000"
    checkpoints.begin(run_id, Workspace(project))
    change = FileChange("calc.py", CALC.encode(), FIXED)
    checkpoints.apply(run_id, [change], skip=["calc.py"])
    record = checkpoints.folder / "runs" / f"{run_id}.json"
    values = json.loads(record.read_bytes())
    record.write_text(json.dumps({**values, "time": values["time"] - age_s}))
    editor = FakeEditor()
    finish_interrupted(folder_of(project, editor))
    assert {run.id: run.status for run in checkpoints.runs()}[run_id] == status
    assert len(editor.shown) == (status == "undone")
    assert (project / "calc.py").read_text() == CALC


def test_tests_without_the_sandbox_are_warned_of_once_a_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSP_AGENT_SANDBOX", "false")
    editor = FakeEditor()
    folder = folder_of(project, editor)
    for _ in range(2):
        folder.runner()
    assert editor.shown == ["project: Test runs are not sandboxed: the setting switched it off."]
