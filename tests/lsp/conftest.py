"""A small project with bugs, and editors that open it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from editor_client import CALC, TEST_CALC


@pytest.fixture(autouse=True)
def private_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The server's cache and state, away from the user's."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(home / "cache"))
    monkeypatch.setenv("LSP_AGENT_STATE_DIR", str(home / "state"))
    # The plugins installed for our own tests take most of a short test run's time to load.
    if pytest.version_tuple >= (8, 4):
        monkeypatch.setenv("LSP_AGENT_PYTEST_ARGS", json.dumps(["--disable-plugin-autoload"]))
    yield home


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with one failing and one passing test."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "calc.py").write_text(CALC)
    (root / "test_calc.py").write_text(TEST_CALC)
    return root


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., str]:
    """Writes a model script and returns the model's name."""

    def write(*rules: dict[str, Any]) -> str:
        path = tmp_path / "script.json"
        path.write_text(json.dumps({"rules": list(rules)}))
        return f"scripted:{path}"

    return write
