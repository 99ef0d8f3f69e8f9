"""What can go wrong with a GPU, as sentences: before it is used, for want of memory, and when it stops in mid-run."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lsp_agent.errors import UserError

CUDA_MAJOR = 13
LEAST_DRIVER = "580"
"""The first NVIDIA driver for CUDA 13."""
LEAST_CAPABILITY = (8, 0)

_LOST_CODES = {4, 46, 101, 214, 219, 220, 221, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 720, 721, 999}
"""Errors after which a process can use the GPU no more (NVIDIA's `cudaError_t` calls them so), or the GPU is gone."""
_LOST_WORDS = (
    "illegal memory access|illegal address|IllegalAddress|illegal instruction|misaligned address|launch failure|"
    "LaunchFailure|launch timed out|uncorrectable|ECC error|ECCUncorrectable|devices? (is|are) busy or unavailable|"
    "DevicesUnavailable|driver shutting down|Deinitialized|CudartUnloading|context is destroyed|ContextIsDestroyed|"
    "fallen off the bus|GPU is lost|CUBLAS_STATUS_EXECUTION_FAILED|CUDNN_STATUS_EXECUTION_FAILED|hardware stack error|"
    "cudaErrorUnknown|CUDA_ERROR_UNKNOWN"
)
_OF_GPU = re.compile("cuda|cublas|cudnn|gpu|bfcarena|MemoryError|the launch failed with", re.IGNORECASE)
_CODE = re.compile(r"(?:CUDA (?:failure|error):?|the launch failed with) (\d+)")
_LOST = re.compile(_LOST_WORDS, re.IGNORECASE)
_MEMORY = re.compile(
    r"out of memory|cudaErrorMemoryAllocation|CUDA (?:failure|error):? 2\b|CUBLAS_STATUS_ALLOC_FAILED|"
    r"Failed to allocate memory for requested buffer|Available memory of \d+ is smaller",
    re.IGNORECASE,
)


class NoGpu(UserError):  # noqa: N818 - named by what it says
    """This machine has no GPU that can be used, or the packages for it are missing."""


class GpuLost(UserError):  # noqa: N818 - named by what it says
    """The GPU stopped in mid-run: this process can use it no more, another may."""

    code = "gpu_lost"


def usable_cupy(providers: list[str]) -> Any:
    """CuPy over a working GPU; raises `NoGpu` that says what is missing.

    `providers`: what ONNX Runtime was built with.
    """
    try:
        import cupy
    except ImportError as error:
        raise NoGpu(
            "Running on the GPU needs the GPU packages; install them with pip install 'lsp-agent[gpu]'."
        ) from error
    if "CUDAExecutionProvider" not in providers:
        raise NoGpu(
            "This ONNX Runtime was built without CUDA: uninstall onnxruntime, then pip install 'lsp-agent[gpu]'."
        )
    runtime = cupy.cuda.runtime
    try:
        driver = int(runtime.driverGetVersion())
        _check_driver(driver)
        if not runtime.getDeviceCount():
            raise NoGpu("This machine has no NVIDIA GPU; use the CPU.")
        major, minor = (int(runtime.deviceGetAttribute(attribute, 0)) for attribute in (75, 76))
    except runtime.CUDARuntimeError as error:
        raise unusable(error) from error
    if (major, minor) < LEAST_CAPABILITY:
        raise NoGpu(
            f"The GPU has compute capability {major}.{minor} and {'.'.join(map(str, LEAST_CAPABILITY))} is the least "
            "that the engine's kernels run on (GeForce RTX 30, A100 and later); use the CPU."
        )
    return cupy


def _check_driver(version: int) -> None:
    if not version:
        raise NoGpu("No NVIDIA driver is installed; install one, or use the CPU.")
    if version // 1000 < CUDA_MAJOR:
        raise NoGpu(
            f"The NVIDIA driver is too old: it knows CUDA {version // 1000}.{version % 1000 // 10} and CUDA "
            f"{CUDA_MAJOR} is needed; install driver {LEAST_DRIVER} or later, or use the CPU."
        )


def unusable(error: Exception) -> UserError:
    """The error of one of the first calls as a sentence."""
    text = str(error)
    if "InsufficientDriver" in text:
        return NoGpu(f"The NVIDIA driver is too old for CUDA {CUDA_MAJOR}; install driver {LEAST_DRIVER} or later.")
    if "NoDevice" in text or "no CUDA-capable device" in text:
        return NoGpu("This machine has no NVIDIA GPU that may be used (CUDA_VISIBLE_DEVICES hides it?); use the CPU.")
    if _MEMORY.search(text):
        return NoGpu(f"The GPU has no memory left, not even to start. {in_use_by() or 'End what uses it.'}")
    return NoGpu(f"No NVIDIA GPU can be used ({text}); update the driver or use the CPU.")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of CUDA or ONNX Runtime says that memory is short."""
    return type(error).__name__ == "OutOfMemoryError" or _MEMORY.search(str(error)) is not None


def explain(error: BaseException) -> UserError | None:
    """The error of a run on the GPU as a sentence, if it is one: a `GpuLost`, or too little memory; else None."""
    if isinstance(error, UserError):
        return None
    kind, text = type(error).__name__, str(error)
    about = f"{kind}: {text}"
    if not _OF_GPU.search(about):
        return None
    if out_of_memory(error):
        others = in_use_by()
        return UserError(
            f"The GPU has too little memory left for this request. {others + ' ' if others else ''}"
            "Shorten the prompt, ask for fewer answers at once, or set LSP_AGENT_DEVICE=cpu."
        )
    code = _CODE.search(text)
    if (code and int(code[1]) in _LOST_CODES) or _LOST.search(text):
        return GpuLost(
            f"The GPU stopped working in mid-run ({_short(text)}); run again, and if it does so again set "
            "LSP_AGENT_DEVICE=cpu."
        )
    return None


def _short(text: str) -> str:
    """What CUDA says, without the source lines that libraries put around it."""
    found = re.search(
        r"CUDA failure \d+: [^;]+|cudaError\w+: [^;\n]+|CUDA_ERROR_\w+: [^;\n]+|\w+: the launch failed.*", text
    )
    return (found[0] if found else text.splitlines()[0][:200]).strip(" .;")


@contextmanager
def explained() -> Iterator[None]:
    """Raise the GPU's errors as sentences."""
    try:
        yield
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        raise sentence from error


def in_use_by() -> str:
    """A sentence that says which other processes hold GPU memory, as far as `nvidia-smi` tells; empty if none do."""
    query = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    holders = []
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) < 3 or not parts[0].isdigit() or int(parts[0]) == os.getpid():
            continue
        size = f"{int(parts[-1]) * 2**20 / 1e9:.1f} GB" if parts[-1].isdigit() else "some memory"
        name = ",".join(parts[1:-1]).rpartition("/")[2]
        holders.append(f"{name} (process {parts[0]}) holds {size}")
    return f"Of the GPU's memory, {', '.join(holders)}." if holders else ""
