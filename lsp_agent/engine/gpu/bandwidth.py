"""How fast this machine's memories are: read from the GPU's properties, or measured by copies of some hundred MB."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lsp_agent.engine.gpu.speed import Machine

COPIED_BYTES = 1 << 28
ROUNDS = 3
_MEMORY_CLOCK_KHZ, _BUS_BITS = 36, 37
"""`cudaDevAttrMemoryClockRate` and `cudaDevAttrGlobalMemoryBusWidth`."""
_DOUBLE_DATA_RATE = 2


def describe_machine(cupy: Any) -> Machine:
    """The GPU's name, the bandwidth of its memory by its properties, and the bus' as measured."""
    runtime = cupy.cuda.runtime
    clock, bits = (int(runtime.deviceGetAttribute(attribute, 0)) for attribute in (_MEMORY_CLOCK_KHZ, _BUS_BITS))
    memory = clock * 1000.0 * bits / 8 * _DOUBLE_DATA_RATE
    found = Machine(gpu_name(cupy), memory or measure_gpu(cupy), measure_bus(cupy), Machine().host, measured=True)
    _give_back(cupy)
    return found


def measure_machine(cupy: Any | None, threads: int) -> Machine:
    """All of it measured: copies inside the GPU's memory and over the bus (None: no GPU), and inside main memory."""
    host = measure_host(threads)
    if cupy is None:
        return Machine("CPU", host, host, host, measured=True)
    found = Machine(gpu_name(cupy), measure_gpu(cupy), measure_bus(cupy), host, measured=True)
    _give_back(cupy)
    return found


def _give_back(cupy: Any) -> None:
    """Free what was copied: CuPy keeps it for its own arrays, and a plan counts on it for the weights."""
    cupy.get_default_memory_pool().free_all_blocks()
    cupy.get_default_pinned_memory_pool().free_all_blocks()


def gpu_name(cupy: Any) -> str:
    """What the driver calls the first GPU."""
    found = cupy.cuda.runtime.getDeviceProperties(0)["name"]
    return found.decode() if isinstance(found, bytes) else str(found)


def measure_gpu(cupy: Any) -> float:
    """Bytes a second that a copy inside the GPU's memory reads and writes."""
    source, target = (cupy.zeros(4 * COPIED_BYTES, "uint8") for _ in range(2))
    return 2 * int(source.nbytes) / _best(lambda: cupy.copyto(target, source), _waiting(cupy))


def measure_bus(cupy: Any) -> float:
    """Bytes a second from page-locked main memory to the GPU's."""
    target = cupy.zeros(COPIED_BYTES, "uint8")
    source = np.frombuffer(cupy.cuda.alloc_pinned_memory(COPIED_BYTES), np.uint8, COPIED_BYTES)
    return COPIED_BYTES / _best(lambda: target.set(source), _waiting(cupy))


def _waiting(cupy: Any) -> Callable[[], None]:
    return lambda: cupy.cuda.get_current_stream().synchronize()


def measure_host(threads: int) -> float:
    """Bytes a second that copies inside main memory read and write, by several threads at once."""
    source, target = np.ones(COPIED_BYTES, np.uint8), np.zeros(COPIED_BYTES, np.uint8)
    pairs = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        return 2 * COPIED_BYTES / _best(lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs)), lambda: None)


def _best(copy: Callable[[], object], wait: Callable[[], None]) -> float:
    """Seconds of the fastest of a few rounds."""
    seconds = []
    for _ in range(ROUNDS):
        wait()
        started = time.perf_counter()
        copy()
        wait()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
