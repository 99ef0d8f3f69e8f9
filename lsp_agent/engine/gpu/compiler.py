"""Compiles the CUDA kernels for this machine's GPU."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

from lsp_agent.engine.gpu.launch import KERNELS, Launch
from lsp_agent.errors import UserError


class KernelCompiler(Protocol):
    """Makes kernels that a launcher can start."""

    def function(self, launch: Launch) -> int:
        """The handle of the launch's kernel, compiled at the first call; it lives as long as this object."""


class CudaCompiler:
    """Compiles with NVRTC, through CuPy, which keeps the machine code on disk between runs."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._kernels: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}
        # CuPy's cache looks at the source only, not at what it includes.
        headers = b"".join(path.read_bytes() for path in sorted(KERNELS.glob("*.cuh")))
        self._mark = f"// headers {hashlib.sha256(headers).hexdigest()}\n"

    def function(self, launch: Launch) -> int:
        """See `KernelCompiler.function`: a CUfunction. Raises `UserError` where the kernel cannot be compiled."""
        key = (launch.source, launch.macros)
        kernel = self._kernels.get(key)
        try:
            if kernel is None:
                kernel = self._kernels[key] = self._compile(launch)
            if launch.shared > kernel.max_dynamic_shared_size_bytes:  # 48 KiB at first, less what is static
                kernel.max_dynamic_shared_size_bytes = launch.shared
        except (self._cupy.cuda.compiler.CompileException, self._cupy.cuda.driver.CUDADriverError) as error:
            reason = next((line for line in str(error).splitlines() if "error" in line), str(error))
            raise UserError(
                f"The GPU kernel {launch.name} cannot be made for this GPU ({reason}); report this, or use the CPU."
            ) from error
        return int(kernel.kernel.ptr)

    def _compile(self, launch: Launch) -> Any:
        options = ("-std=c++17", f"-I{KERNELS}", *launch.defines)
        code = f"{self._mark}#line 1\n{launch.path.read_text(encoding='utf-8')}"
        return self._cupy.RawModule(code=code, options=options, backend="nvrtc").get_function(launch.name)
