"""A pytest plugin: the kernels' own tests run them on the GPU instead of in the emulator (`-p kernels_on_gpu`)."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cupy
import emulator
import numpy as np

from lsp_agent.engine.gpu.compiler import CudaCompiler
from lsp_agent.engine.gpu.launch import Launch

ALREADY_REGISTERED = 712


class CudaKernels:
    """As `EmulatedKernels`, on the GPU; what only an emulator finds is not found."""

    compiler: CudaCompiler | None = None

    def __init__(self, backwards: bool = False) -> None:
        """`backwards`: ignored, a GPU has no order."""

    def run(self, launch: Launch, *arguments: np.ndarray | int | None) -> None:
        """Copies the arrays to the GPU, runs the kernel and copies them back."""
        if CudaKernels.compiler is None:
            CudaKernels.compiler = CudaCompiler()
        arrays = {a.ctypes.data: a for a in arguments if isinstance(a, np.ndarray)}
        copies = {address: cupy.asarray(array.reshape(-1).view(np.uint8)) for address, array in arrays.items()}
        addresses = [
            copies[a.ctypes.data].data.ptr if isinstance(a, np.ndarray) else a if isinstance(a, int) else None
            for a in arguments
        ]
        values = (ctypes.c_void_p * len(addresses))(*addresses)
        pointers = (ctypes.c_void_p * len(addresses))(
            *[ctypes.addressof(values) + 8 * i for i in range(len(addresses))]
        )
        driver = ctypes.CDLL("libcuda.so.1")
        function = ctypes.c_void_p(CudaKernels.compiler.function(launch))
        tables = [a for a in arrays.values() if a.dtype.itemsize == 8 and a.dtype.kind in "iu"]
        plain = [a for a in arguments if isinstance(a, int)]
        with _visible([*plain, *(int(value) for table in tables for value in table.reshape(-1))]):
            stream = ctypes.c_void_p(cupy.cuda.get_current_stream().ptr)
            code = driver.cuLaunchKernel(function, *launch.grid, *launch.block, launch.shared, stream, pointers, None)
            if code:
                raise emulator.KernelFailed(f"{launch.name}: the launch failed with {code}")
            cupy.cuda.runtime.deviceSynchronize()
        for address, array in arrays.items():
            if array.flags.writeable:
                array.reshape(-1).view(np.uint8)[:] = copies[address].get()


@contextlib.contextmanager
def _visible(addresses: list[int]) -> Iterator[None]:
    """The regions of main memory that hold `addresses`, such as those in a table of experts, to the GPU as well."""
    registered = []
    runtime: Any = cupy.cuda.runtime
    for start, end in _regions():
        if not any(start <= address < end for address in addresses):
            continue
        try:
            runtime.hostRegister(start, end - start, 2)  # mapped
            registered.append(start)
        except runtime.CUDARuntimeError as error:
            if error.status != ALREADY_REGISTERED:
                raise
    try:
        yield
    finally:
        for start in registered:
            runtime.hostUnregister(start)


def _regions() -> Iterator[tuple[int, int]]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, *_ = line.split()
        if rights.startswith("rw"):
            start, end = span.split("-")
            yield int(start, 16), int(end, 16)


emulator.EmulatedKernels = CudaKernels  # type: ignore[assignment, misc]
emulator.ON_GPU = True
