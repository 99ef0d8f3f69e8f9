"""Engines on the GPU and, for comparison, on the CPU, over the same packages."""

from __future__ import annotations

from pathlib import Path

import gpu_checkpoints
import pytest

from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.device import open_device
from lsp_agent.engine.gpu.placement import Placement
from lsp_agent.engine.package import Package
from lsp_agent.engine.session import Decoder
from lsp_agent.errors import UserError

RESIDENT = Placement("resident")


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
    """`decoders(name, scheme, placement, context)`: the decoder on the GPU, and the exact one on the CPU."""
    loaded: dict[tuple, tuple[Decoder, Decoder]] = {}

    def load(name: str, scheme: str, placement: Placement = RESIDENT, context: int = 256) -> tuple[Decoder, Decoder]:
        key = name, scheme, placement, context
        if key not in loaded:
            one = package(name, scheme)
            gpu = Decoder(one, 1, context, "fast", cuda, placement=placement)
            loaded[key] = gpu, Decoder(one, 4, context, "exact")
        return loaded[key]

    return load
