"""What tests share: a state folder of its own for each, the real 0.5B model, random models for the GPU's kernels."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_checkpoints
import pytest
from filelock import FileLock, Timeout

from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.package import Package
from lsp_agent.engine.service.runtime import read_about
from lsp_agent.errors import UserError
from lsp_agent.models import store

SMALL_MODEL = "qwen2.5-coder-0.5b"


def end_engines(folder: Path) -> None:
    """Kill the engines whose runtime folder this is, also those that are about to start."""
    deadline = time.monotonic() + 30
    for file in folder.glob("*.lock"):
        lock = FileLock(file, thread_local=False)
        while True:
            about = read_about(file.with_suffix(".json"))
            if about is not None and about.process is not None:
                about.process.kill()
            try:
                lock.acquire(timeout=0.1)
                lock.release()
                break
            except Timeout:
                assert time.monotonic() < deadline, f"an engine does not end: {file}"


@pytest.fixture(scope="session", autouse=True)
def own_runtime_folder() -> Iterator[Path]:
    """No test talks to the user's engine, and none outlives the tests."""
    folder = Path(tempfile.mkdtemp(prefix="lsp-agent-test-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSP_AGENT_RUNTIME_DIR", str(folder))
        patch.setenv("LSP_AGENT_ENGINE_IDLE_SECONDS", "300")
        yield folder
    end_engines(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def own_state_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, own_runtime_folder: Path
) -> Iterator[None]:
    """No test reads or writes the user's runs, checkpoints or logs; an engine that it starts ends with it."""
    state = tmp_path_factory.mktemp("state")
    runtime = own_runtime_folder / state.name
    monkeypatch.setenv("LSP_AGENT_STATE_DIR", str(state))
    monkeypatch.setenv("LSP_AGENT_RUNTIME_DIR", str(runtime))
    yield
    if runtime.exists():
        end_engines(runtime)


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
