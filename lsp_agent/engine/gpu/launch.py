"""One launch of a CUDA kernel: which source, compiled how, over which grid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).parent / "kernels"
"""The folder of the kernels and of the headers that they include."""

Extent3 = tuple[int, int, int]
"""Sizes along x, y and z."""


@dataclass(frozen=True)
class Launch:
    """A kernel and its launch configuration, without its arguments; equal ones are compiled once.

    `source`: the kernel `kernels/<source>.cu`, whose one `extern "C" __global__` function is called `<source>`.
    `macros`: pairs of name and value for the compiler. `grid` in blocks, `block` in threads, `shared` in bytes of
    dynamic shared memory, beyond the static arrays of the source.
    """

    source: str
    macros: tuple[tuple[str, str], ...]
    grid: Extent3
    block: Extent3
    shared: int = 0

    @property
    def path(self) -> Path:
        """The file of the source."""
        return KERNELS / f"{self.source}.cu"

    @property
    def name(self) -> str:
        """The kernel's function."""
        return self.path.stem

    @property
    def defines(self) -> tuple[str, ...]:
        """The macros as the compiler's options."""
        return tuple(f"-D{name}={value}" for name, value in self.macros)
