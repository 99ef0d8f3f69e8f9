"""What every test shares: a state folder of its own, and the real 0.5B model where a test is about a real model."""

from __future__ import annotations

import pytest

from lsp_agent.errors import UserError
from lsp_agent.models import store

SMALL_MODEL = "qwen2.5-coder-0.5b"


@pytest.fixture(autouse=True)
def own_state_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's runs, checkpoints or logs."""
    monkeypatch.setenv("LSP_AGENT_STATE_DIR", str(tmp_path_factory.mktemp("state")))


@pytest.fixture
def small_model() -> store.InstalledModel:
    """The installed 0.5B model; tests that use it are marked `model`."""
    try:
        return store.resolve(SMALL_MODEL)
    except UserError as error:
        pytest.skip(str(error))
