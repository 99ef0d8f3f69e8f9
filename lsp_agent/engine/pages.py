"""Large arrays of zeros that cost no memory until they are written to, and none any more once nothing refers to them.

The C library reuses what it was given back, which has to be zeroed by writing all of it, or keeps it for later.
"""

from __future__ import annotations

import contextlib
import mmap
import sys

import numpy as np

SMALL = 1 << 20
"""Bytes below which the C library serves as well."""


def zero_pages(size: int, written_whole: bool = False) -> np.ndarray:
    """`size` bytes. `written_whole`: soon all of it will be, so the system may provide it in huge pages."""
    if size < SMALL or sys.platform == "win32":
        return np.zeros(size, np.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if written_whole and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)
