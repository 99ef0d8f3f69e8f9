"""What tests share: a state folder of its own for each, the real 0.5B model, random models for the GPU's kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gpu_checkpoints
import pytest

from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.package import Package
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


@pytest.fixture(scope="session")
def gpu_package(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Package]:
    """`gpu_package(name, scheme)`: an imported package of a config in `gpu_checkpoints.CONFIGS`."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, scheme: str) -> Package:
        if (name, scheme) not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name, scheme] = folder / "package"
            import_checkpoint(gpu_checkpoints.write(folder / "source", name), made[name, scheme], scheme=scheme)
        return Package(made[name, scheme])

    return make
