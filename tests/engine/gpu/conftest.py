"""Packages of small random checkpoints whose sizes the CUDA kernels take."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.package import Package

sys.path.insert(0, str(Path(__file__).parents[2] / "gpu"))

import gpu_checkpoints


@pytest.fixture(scope="session")
def gpu_package(tmp_path_factory):
    """`gpu_package(name, scheme)`: an imported package of a config in `gpu_checkpoints.CONFIGS`."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, scheme: str) -> Package:
        if (name, scheme) not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name, scheme] = folder / "package"
            import_checkpoint(gpu_checkpoints.write(folder / "source", name), made[name, scheme], scheme=scheme)
        return Package(made[name, scheme])

    return make
