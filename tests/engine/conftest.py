"""Tiny checkpoints imported once for all engine tests."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from model_servers import ModelServer
from tiny_checkpoint import MIXED, Type, write_checkpoint
from tiny_hf import random_weights, write_hf_checkpoint

from lsp_agent.config import Backend
from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.remote import backend


@pytest.fixture(scope="session")
def tiny_package(tmp_path_factory):
    """`tiny_package(type, tied=False)`: an imported package folder."""
    made: dict[tuple[Type | str, bool], Path] = {}

    def make(kind: Type | str = MIXED, tied: bool = False) -> Path:
        if (kind, tied) not in made:
            folder = tmp_path_factory.mktemp("tiny")
            source = write_checkpoint(folder / "tiny.gguf", kind, tied)
            import_checkpoint(source, folder / "package")
            made[kind, tied] = folder / "package"
        return made[kind, tied]

    return make


@pytest.fixture(scope="session")
def tiny_engine(tiny_package):
    """`tiny_engine(type, tied=False, accuracy="exact")`: a loaded engine, shared between tests."""
    loaded: dict[tuple[Type | str, bool, str], Engine] = {}

    def load(kind: Type | str = MIXED, tied: bool = False, accuracy: str = "exact") -> Engine:
        if (kind, tied, accuracy) not in loaded:
            loaded[kind, tied, accuracy] = Engine.load(tiny_package(kind, tied), threads=1, accuracy=accuracy)
        return loaded[kind, tied, accuracy]

    return load


GOLDEN_HF = np.load(Path(__file__).parent / "golden" / "golden_hf.npz")


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """`hf_folder(name, dtype="F32", shards=1)`: the checkpoint of a config in `tiny_hf.CONFIGS`."""
    made: dict[tuple[str, str, int], Path] = {}

    def make(name: str, dtype: str = "F32", shards: int = 1) -> Path:
        if (name, dtype, shards) not in made:
            saved = json.loads(str(GOLDEN_HF[f"{name}.checkpoint"]))
            weights = random_weights(saved["shapes"], saved["config"])
            folder = tmp_path_factory.mktemp(name)
            made[name, dtype, shards] = write_hf_checkpoint(folder, saved["config"], weights, dtype, shards)
        return made[name, dtype, shards]

    return make


@pytest.fixture(scope="session")
def hf_package(tmp_path_factory, hf_folder):
    """`hf_package(name, scheme="keep")`: an imported package folder."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, scheme: str = "keep") -> Path:
        if (name, scheme) not in made:
            package = tmp_path_factory.mktemp("package") / name
            import_checkpoint(hf_folder(name), package, scheme=scheme)
            made[name, scheme] = package
        return made[name, scheme]

    return make


@pytest.fixture(scope="session")
def hf_engine(hf_package):
    """`hf_engine(name, scheme="keep", accuracy="exact")`: a loaded engine, shared between tests."""
    loaded: dict[tuple[str, str, str], Engine] = {}

    def load(name: str, scheme: str = "keep", accuracy: str = "exact") -> Engine:
        key = name, scheme, accuracy
        if key not in loaded:
            loaded[key] = Engine.load(hf_package(name, scheme), threads=1, accuracy=accuracy)
        return loaded[key]

    return load


@pytest.fixture(scope="session")
def model_server():
    """A server of another maker, which each test makes to be what it needs."""
    with ModelServer().running() as running:
        yield running


@pytest.fixture
def start(model_server, monkeypatch):
    """`start(answer, owner, model, settings={}, **entry)`: the server as it is now, and a model opened on it."""
    monkeypatch.setattr(backend, "_from_keyring", lambda url: "")
    with ExitStack() as stack:

        def run(answer, owner="vllm", model="qwen2.5-coder-7b", settings=None, **entry):
            model_server.serve(answer, owner, model, **entry)
            opened = backend.open_backend(Backend(url=model_server.url, **(settings or {})))
            stack.callback(opened.close)
            return model_server, opened

        yield run
