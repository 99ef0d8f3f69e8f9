"""Tiny checkpoints imported once for all engine tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "golden"))

from tiny_checkpoint import MIXED, Type, write_checkpoint

from lsp_agent.engine.engine import Engine
from lsp_agent.engine.importing import import_checkpoint


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
