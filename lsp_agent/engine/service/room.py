"""Whether one more model fits into memory beside those that are loaded."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lsp_agent.engine.device import open_device, requested_device
from lsp_agent.engine.footprint import footprint
from lsp_agent.engine.gpu.choice import Room, choose
from lsp_agent.engine.gpu.placement import PARALLEL
from lsp_agent.engine.package import Package
from lsp_agent.engine.prefixes.limits import size_of
from lsp_agent.machine import usable_memory

if TYPE_CHECKING:
    from lsp_agent.engine.service.catalog import Source
    from lsp_agent.engine.service.residents import Resident

LIMIT = "LSP_AGENT_ENGINE_MEMORY"
"""Most memory for all models together; not set: what the machine has."""


def memory_limit() -> float:
    """Bytes that all models together may take. Raises `UserError`."""
    text = os.environ.get(LIMIT, "")
    return size_of(text, LIMIT) if text else float("inf")


Fit = Literal["well", "somehow", "not"]
"""somehow: with a slower placement than it would get alone."""


def fit(source: Source, residents: Iterable[Resident]) -> Fit:
    """How the model can be loaded with all others staying."""
    needed = needed_memory(source.package)
    if needed + sum(resident.memory for resident in residents) > memory_limit():
        return "not"
    kind = _kind_on_gpu(source)
    on_cpu = needed <= usable_memory()
    if kind is None:
        return "well" if on_cpu else "not"
    if kind == "resident":
        return "well"
    return "somehow" if kind != "cpu" or (on_cpu and requested_device() == "auto") else "not"


@lru_cache(maxsize=64)
def needed_memory(package: Path) -> int:
    """Bytes of main memory that a package takes on the CPU, at most. Raises `UserError`."""
    return footprint(Package(package).weights.values()).memory


def _kind_on_gpu(source: Source) -> str | None:
    """The placement that it would get; None where no GPU is used."""
    device = open_device()
    if device.name != "cuda":
        return None
    package = Package(source.package)
    context = min(source.context, package.config.context)
    room = Room(device.free_memory(), usable_memory())
    return choose(package, source.name, context, room, batch=PARALLEL).kind


def give_back_memory() -> None:
    """Return freed memory to the system and the GPU: allocators keep it otherwise."""
    gc.collect()
    cupy: Any = sys.modules.get("cupy")
    if cupy is not None:
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def gpu_memory() -> int | None:
    """Bytes of the GPU's memory in use, by all processes; None where no GPU is used."""
    cupy: Any = sys.modules.get("cupy")
    if cupy is None:
        return None
    try:
        free, total = cupy.cuda.runtime.memGetInfo()
    except cupy.cuda.runtime.CUDARuntimeError:
        return None
    return int(total - free)
