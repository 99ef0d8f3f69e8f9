"""The operators that launch one kernel each, in graphs of ONNX Runtime: built, registered, written as nodes."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnx import NodeProto, helper

from lsp_agent.engine.gpu.launch import Launch
from lsp_agent.errors import UserError
from lsp_agent.paths import cache_dir

DOMAIN = "lsp_agent"
"""Of the operators; its version is 1."""
SOURCE = Path(__file__).parent / "operators.c"
HEADER = SOURCE.parent / "abi.h"

Output = tuple[str, str, Sequence[int]]
"""An output's name (empty: absent, a null pointer), its type (h, f or i) and its shape."""


@dataclass(frozen=True)
class Launcher:
    """Where the operators run: an execution provider, and addresses of functions that launch kernels there.

    `launch` has the shape of cuLaunchKernel, `launch_ex` of cuLaunchKernelEx, `error_string` of cuGetErrorString; 0 for
    none: without `launch_ex` launches never overlap.
    """

    provider: str
    launch: int
    launch_ex: int = 0
    error_string: int = 0


@cache
def cuda_launcher() -> Launcher:
    """Launches on the GPU, through the driver's library."""
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError as error:
        raise UserError("NVIDIA's driver is not installed; install it, or use the CPU.") from error
    names = ("cuLaunchKernel", "cuLaunchKernelEx", "cuGetErrorString")
    return Launcher("CUDAExecutionProvider", *(_address(driver, name) for name in names))


def _address(library: ctypes.CDLL, name: str) -> int:
    function = getattr(library, name, None)
    return (ctypes.cast(function, ctypes.c_void_p).value or 0) if function is not None else 0


def launch_node(
    launch: Launch,
    function: int,
    inputs: Sequence[str],
    outputs: Sequence[Output],
    pointers: Sequence[int] = (),
    overlap: bool = False,
    rows: int = 0,
) -> NodeProto:
    """A node that starts `launch`, whose kernel is `function`, with the addresses of inputs, outputs and `pointers`.

    `inputs`: names, at least one that is not empty; an empty one is a null pointer. `overlap`: start while the kernel
    before it still runs (programmatic dependent launch: the kernel must wait itself for what it reads). `rows`: the
    grid has a block along x for so many rows of the first input [..., length, columns], sizes of outputs that are 0 are
    that input's, and the kernel gets two integers of 64 bits more, the number of rows and the length.
    """
    attributes: dict[str, Any] = {
        "kernel": launch.name,
        "function": function,
        "grid": launch.grid,
        "block": launch.block,
        "shared": launch.shared,
        "ranks": [len(shape) for _, _, shape in outputs],
        "overlap": int(overlap),
        "rows": rows,
        "absent": sum(1 << index for index, name in enumerate(inputs) if not name),
    }
    # ONNX cannot type an empty list.
    shapes = [size for _, _, shape in outputs for size in shape]
    attributes |= {name: values for name, values in (("shapes", shapes), ("pointers", list(pointers))) if values}
    signature = "".join(kind for _, kind, _ in outputs)
    return helper.make_node(
        f"Launch_{signature}",
        [name for name in inputs if name],
        [name for name, _, _ in outputs],
        domain=DOMAIN,
        **attributes,
    )


def host_node(name: str, function: int, inputs: Sequence[str], outputs: Sequence[Output]) -> NodeProto:
    """A node that calls `function` on the host (see `HostFunction` in abi.h) while the work before it is queued.

    Sizes of outputs that are 0 are those of the first input; `name` is for errors.
    """
    node = launch_node(Launch(name, (), (1, 1, 1), (1, 1, 1)), function, inputs, outputs, rows=1)
    node.attribute.append(helper.make_attribute("host", 1))
    return node


def register(options: ort.SessionOptions, launcher: Launcher) -> None:
    """Let sessions of `options` use the operators. Raises `UserError` where their library cannot be built."""
    path = library()
    operators = ctypes.CDLL(str(path))
    operators.lsp_agent_configure.argtypes = [ctypes.c_char_p, *[ctypes.c_void_p] * 3]
    addresses = (launcher.launch, launcher.launch_ex, launcher.error_string)
    if operators.lsp_agent_configure(launcher.provider.encode(), *addresses):
        raise ValueError(f"operators for a third provider, {launcher.provider}")
    options.register_custom_ops_library(str(path))


@cache
def library() -> Path:
    """The operators' library, built at first use on this machine and kept in the cache folder."""
    source = SOURCE.read_bytes() + HEADER.read_bytes()
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    machine = f"{sys.platform}-{platform.machine().lower()}"
    target = cache_dir() / "operators" / f"{machine}-{hashlib.sha256(source).hexdigest()[:16]}{suffix}"
    if not target.exists():
        try:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # what lies there is run
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                made = Path(scratch) / f"operators{suffix}"
                _compile(made)
                made.replace(target)
        except OSError as error:
            raise UserError(f"The operators for the GPU cannot be kept in {target.parent} ({error}).") from error
    return target


def _compile(target: Path) -> None:
    if importlib.util.find_spec("ziglang") is None:
        raise UserError("Running on the GPU needs a C compiler; install it with pip install 'lsp-agent[gpu]'.")
    # -P: the user's current folder holds other people's code, and its `ziglang/` must not be run.
    command = [sys.executable, "-P", "-m", "ziglang", "cc", "-O2", "-shared", "-fvisibility=hidden", "-std=c11"]
    command += [] if os.name == "nt" else ["-fPIC"]
    done = subprocess.run([*command, str(SOURCE), "-o", str(target)], capture_output=True, text=True, check=False)
    if done.returncode or not target.exists():
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
        raise UserError(f"The operators for the GPU cannot be compiled ({reason}); reinstall ziglang, or use the CPU.")
