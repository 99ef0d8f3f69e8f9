"""Engines on the GPU and, for comparison, on the CPU, over the same packages."""

from __future__ import annotations

import pytest

from lsp_agent.engine.device import open_device
from lsp_agent.engine.gpu.placement import Placement
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
def decoders(cuda, gpu_package):
    """`decoders(name, scheme, placement, context)`: the decoder on the GPU, and the exact one on the CPU."""
    loaded: dict[tuple, tuple[Decoder, Decoder]] = {}

    def load(name: str, scheme: str, placement: Placement = RESIDENT, context: int = 256) -> tuple[Decoder, Decoder]:
        key = name, scheme, placement, context
        if key not in loaded:
            one = gpu_package(name, scheme)
            gpu = Decoder(one, 1, context, "fast", cuda, placement=placement)
            loaded[key] = gpu, Decoder(one, 4, context, "exact")
        return loaded[key]

    return load
