"""A CuPy without a GPU: enough of it to open a device, with the errors of a driver that fails."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lsp_agent.engine import device


class CUDARuntimeError(RuntimeError):
    """As CuPy names and words it."""


class _Stream:
    ptr = 1

    def __init__(self, non_blocking: bool = False) -> None:
        assert non_blocking


def fake_cupy(
    driver: int = 13000,
    count: int = 1,
    capability: tuple[int, int] = (9, 0),
    free: int = 80 * 10**9,
    fails: dict[str, str] | None = None,
) -> Any:
    """A module; `fails` names functions that raise CuPy's error with a message."""
    broken = fails or {}

    def call(name: str, value: Any) -> Any:
        def function(*_: Any, **__: Any) -> Any:
            if name in broken:
                raise CUDARuntimeError(broken[name])
            return value(*_) if callable(value) else value

        return function

    attributes = {75: capability[0], 76: capability[1], 36: 2_619_000, 37: 5120}
    runtime = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        driverGetVersion=call("driverGetVersion", driver),
        getDeviceCount=call("getDeviceCount", count),
        deviceGetAttribute=call("deviceGetAttribute", lambda attribute, _: attributes[attribute]),
        getDeviceProperties=call("getDeviceProperties", {"name": b"NVIDIA H100 80GB HBM3"}),
        memGetInfo=call("memGetInfo", (free, 80 * 10**9)),
    )
    cuda = SimpleNamespace(
        runtime=runtime,
        Stream=call("Stream", _Stream),
        get_current_stream=lambda: SimpleNamespace(synchronize=lambda: None),
        alloc_pinned_memory=bytearray,
    )
    pool = SimpleNamespace(free_all_blocks=lambda: None)
    pools = {f"get_default_{kind}pool": lambda: pool for kind in ("memory_", "pinned_memory_")}
    return SimpleNamespace(cuda=cuda, zeros=_zeros, copyto=np.copyto, **pools)


class _Array(np.ndarray):
    def set(self, values: np.ndarray) -> None:
        """As CuPy's: a copy from main memory."""
        self[...] = values


def _zeros(count: int, dtype: str) -> np.ndarray:
    return np.zeros(count, dtype).view(_Array)


def install(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Let the product find this CuPy, and an ONNX Runtime that was built with CUDA."""
    cupy = fake_cupy(**options)
    stream = cupy.cuda.Stream
    cupy.cuda.Stream = lambda non_blocking=False: stream(non_blocking)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(device.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(device.ort, "preload_dlls", lambda: None, raising=False)
