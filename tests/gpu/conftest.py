"""Engines on the GPU and, for comparison, on the CPU, over the same packages."""

from __future__ import annotations

from pathlib import Path

import gpu_checkpoints
import pytest

from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.device import open_device
from lsp_agent.engine.package import Package
from lsp_agent.engine.session import Decoder
from lsp_agent.errors import UserError


@pytest.fixture(scope="session")
def cuda():
    """The GPU; tests that need it are skipped where there is none, and say why."""
    try:
        return open_device("cuda")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """`package(name, scheme)`: an imported package of a config in `gpu_checkpoints.CONFIGS`."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, scheme: str) -> Package:
        if (name, scheme) not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name, scheme] = folder / "package"
            import_checkpoint(gpu_checkpoints.write(folder / "source", name), made[name, scheme], scheme=scheme)
        return Package(made[name, scheme])

    return make


@pytest.fixture(scope="session")
def decoders(cuda, package):
    """`decoders(name, scheme)`: the decoder on the GPU, and the exact one on the CPU."""
    loaded: dict[tuple[str, str], tuple[Decoder, Decoder]] = {}

    def load(name: str, scheme: str) -> tuple[Decoder, Decoder]:
        if (name, scheme) not in loaded:
            one = package(name, scheme)
            loaded[name, scheme] = Decoder(one, 1, 256, "fast", cuda), Decoder(one, 4, 256, "exact")
        return loaded[name, scheme]

    return load
