"""Runs the CUDA kernels on the CPU, so that they are tested where there is no GPU.

    kernels = EmulatedKernels()
    launch = Launch("project", (("BATCH", "1"), ...), grid=(132, 1, 1), block=(256, 1, 1))
    kernels.run(launch, x, None, y, weights)  # contiguous NumPy arrays, addresses (int), None for null pointers

Arrays are read and written in place. `KernelFailed` is raised for barriers that not all threads reach, misaligned
vector loads, indexes outside of shared arrays, addresses without memory and wrong launches. With `backwards=True`
blocks, warps and lanes run in reverse order, which makes other missing barriers visible: run each kernel both ways.
What a GPU does at the same time runs one after another here, so a kernel whose blocks wait for each other never ends.

`function` and `launcher` are for ONNX Runtime's CPU provider through `lsp_agent.engine.gpu.operators`.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from lsp_agent.engine.gpu.launch import KERNELS, Launch
from lsp_agent.paths import cache_dir

FOLDER = Path(__file__).parent
FLAGS = [
    *("-std=c++20", "-O2", "-shared", "-fPIC", "-g0", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-nostdinc++", "-nostdlib++", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-math-errno"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-variable", "-Wno-pass-failed"),
    *("-fsanitize=alignment,bounds,shift,integer-divide-by-zero", "-fsanitize-minimal-runtime"),
]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-march=x86_64_v3")  # conversions of fp16 in one instruction


ON_GPU = False
"""Whether the tests run on a GPU instead (see `tests/gpu/kernels_on_gpu.py`)."""
T = TypeVar("T")


def thinned(every: Iterable[T], here: Iterable[T]) -> list[T]:
    """A test's cases: `every` one on a GPU, fewer in the emulator, which takes up to a second for each to compile.

    `here` must still lead through all of the kernel's code.
    """
    return list(every if ON_GPU else here)


class KernelFailed(Exception):  # noqa: N818 - said as it is
    """A kernel that cannot be compiled, or did what a GPU does not allow."""


class EmulatedKernels:
    """Compiles kernels for the CPU, each once, and runs them."""

    def __init__(self, backwards: bool = False) -> None:
        self._backwards = backwards
        self._libraries: dict[Launch | str, ctypes.CDLL] = {}

    def run(self, launch: Launch, *arguments: np.ndarray | int | None) -> None:
        """Run `launch` with its kernel's pointers: inputs, outputs and constants, in the kernel's order."""
        library = self._library(launch)
        values = (ctypes.c_void_p * len(arguments))(*map(_address, arguments))
        pointers = (ctypes.c_void_p * (len(arguments) + 1))()  # the last stays null
        for i in range(len(arguments)):
            pointers[i] = ctypes.addressof(values) + 8 * i
        geometry = (ctypes.c_uint * 6)(*launch.grid, *launch.block)
        error = library.emulated_function(geometry, ctypes.c_size_t(launch.shared), pointers)
        if error:
            raise KernelFailed(f"{launch.name}: {error.decode()}")

    def function(self, launch: Launch) -> int:
        """The kernel's handle for `launcher`."""
        return ctypes.cast(self._library(launch).emulated_function, ctypes.c_void_p).value or 0

    @cached_property
    def launcher(self) -> int:
        """The address of a function with the shape of cuLaunchKernel."""
        return ctypes.cast(self._any_library().emulated_launch, ctypes.c_void_p).value or 0

    @cached_property
    def error_string(self) -> int:
        """The address of a function with the shape of cuGetErrorString, about `launcher`'s last error."""
        return ctypes.cast(self._any_library().emulated_error_string, ctypes.c_void_p).value or 0

    def _any_library(self) -> ctypes.CDLL:
        return self._library(Launch(str(FOLDER / "nothing"), (), (1, 1, 1), (32, 1, 1)))

    def _library(self, launch: Launch) -> ctypes.CDLL:
        key = Launch(launch.source, launch.macros, (1, 1, 1), (1, 1, 1))
        if key not in self._libraries:
            library = self._libraries[key] = ctypes.CDLL(str(compile_kernel(launch)))
            library.emulated_function.restype = ctypes.c_char_p
            library.emulated_backwards(int(self._backwards))
        return self._libraries[key]


def _address(argument: np.ndarray | int | None) -> int | None:
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous, "kernels take contiguous arrays"
        return argument.ctypes.data
    return argument


def compile_kernel(launch: Launch) -> Path:
    """The library of a kernel for the emulator, from the cache where it was compiled before."""
    # The macros are the kernel's only: the emulator's headers come before them.
    macros = "".join(f"#define {name} {value}\n" for name, value in launch.macros)
    forgotten = "".join(f"#undef {name}\n" for name, _ in launch.macros)
    source = f'#include "cuda_fp16.h"\n{macros}#include "{launch.path}"\n{forgotten}#define KERNEL_NAME {launch.name}\n'
    source += '#include "entry.h"\n'
    parts = [*FLAGS, source]
    for file in (*sorted(FOLDER.glob("*.h")), launch.path, *sorted(KERNELS.glob("*.cuh"))):
        parts.append(file.read_text())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    folder = cache_dir() / "emulated-kernels"
    target = folder / f"{launch.name}-{digest}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made, generated = Path(scratch) / "kernel.so", Path(scratch) / "kernel.cpp"
        generated.write_text(source)
        command = [sys.executable, "-m", "ziglang", "c++", *FLAGS, f"-I{FOLDER}", f"-I{KERNELS}", str(generated)]
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode:
            raise KernelFailed(f"{launch.name} does not compile:\n{done.stderr}")
        made.replace(target)
    return target
