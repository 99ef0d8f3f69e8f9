"""How much past prompts may take of main memory and of the disk."""

from __future__ import annotations

import os
import re

from lsp_agent.errors import UserError
from lsp_agent.machine import usable_memory

MEMORY_VARIABLE = "LSP_AGENT_CACHE_MEMORY"
DISK_VARIABLE = "LSP_AGENT_CACHE_DISK"
SHARE = 4
"""Of the main memory that is usable when a model is loaded, a quarter."""
MOST = 32 << 30

_UNITS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def memory_limit() -> int:
    """Bytes of main memory: as the environment says, else a share of what is usable now. Raises `UserError`."""
    wanted = os.environ.get(MEMORY_VARIABLE)
    return size_of(wanted, MEMORY_VARIABLE) if wanted else min(usable_memory() // SHARE, MOST)


def disk_limit() -> int:
    """Bytes of disk for each model: as the environment says, else none. Raises `UserError`."""
    wanted = os.environ.get(DISK_VARIABLE)
    return size_of(wanted, DISK_VARIABLE) if wanted else 0


def size_of(text: str, variable: str) -> int:
    """Bytes that a text such as 4GiB, 500 MB or 0 means, K, M, G and T being powers of 1024. Raises `UserError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UserError(f"{variable} is {text!r}, which is no size; set it to one such as 4GiB, or to 0.")
    return int(float(match[1]) * (1 << _UNITS[match[2].lower()]))
