"""Which of the editor's settings count, and which are another server's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from editor_client import EditorClient

from lsp_agent.lsp.server import AgentServer

OTHERS = {"python": {"analysis": {"typeCheckingMode": "strict"}}, "rust-analyzer": {}, "editor.tabSize": 4}


def options_after(initial: Any, *changes: Any, model: str | None = None) -> dict[str, Any]:
    server = AgentServer(model)
    server.initialize_options(initial)
    for settings in changes:
        server.change_options(settings)
    return server.options


@pytest.mark.parametrize(
    "initial", [{"maxTurns": 3}, {"lspAgent": {"maxTurns": 3}, **OTHERS}, {"lsp-agent": {"maxTurns": 3}}]
)
def test_initialization_options_are_flat_or_in_our_section(initial: dict[str, Any]) -> None:
    assert options_after(initial) == {"maxTurns": 3}


@pytest.mark.parametrize("settings", [OTHERS, {}, None, [], {"lspAgent": None}, {"maxTurns": 9}])
def test_settings_without_our_section_change_nothing(settings: Any) -> None:
    assert options_after({"maxTurns": 3}, settings) == {"maxTurns": 3}


@pytest.mark.parametrize("section", ["lspAgent", "lsp-agent"])
def test_our_section_goes_over_the_initialization_options(section: str) -> None:
    initial = {"maxTurns": 3, "model": "a"}
    changed = {section: {"model": "b", "maxTurns": None}, **OTHERS}
    assert options_after(initial, changed) == {"maxTurns": 3, "model": "b"}
    assert options_after(initial, changed, {section: {}}) == initial, "what is no longer set is as at the start"


def test_the_command_line_wins() -> None:
    assert options_after({"lspAgent": {}}, {"lspAgent": {"model": "b"}}, model="c") == {"model": "c"}


def test_jobs_run_although_the_editor_sends_other_servers_settings(project: Path) -> None:
    with EditorClient(project, options={"runTestsOnSave": "off"}) as editor:
        editor.notify("workspace/didChangeConfiguration", {"settings": OTHERS})
        editor.run("lspAgent.runTests")
        editor.message("1 of 2 tests failed")
        editor.notify("workspace/didChangeConfiguration", {"settings": {"lspAgent": {"runTestsOnSave": "never"}}})
        editor.run("lspAgent.runTests")
        editor.message("'run_tests_on_save' in the editor's options")
