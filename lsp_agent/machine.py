"""What this process may use of the machine: memory and cores, within the limits of its container."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
MOST_THREADS = 8


def usable_memory() -> int:
    """Bytes of main memory a model may take now: what is available, within the container's limit if there is one."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((CGROUP / "memory.max").read_text()) - int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return available
    return max(0, min(available, limit))


def usable_cores() -> int:
    """Cores this process may run on at once: its affinity, and the container's quota rounded down, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, (CGROUP / "cpu.max").read_text().split())
    except (OSError, ValueError):
        return cores
    return max(1, min(cores, quota // period))


def default_threads() -> int:
    """Threads that decode: all usable physical cores but one, so that the tests and the editor keep one.

    At most eight, as decoding waits for memory. A decoder on every core loses most of its speed to any neighbour.
    """
    physical = psutil.cpu_count(logical=False) or 1
    return max(1, min(MOST_THREADS, min(physical, usable_cores()) - 1))
