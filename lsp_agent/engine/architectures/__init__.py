"""The architectures the engine can run: each is one short file here, found by being here.

Importing this loads no library, so that a program without a model in it can ask what is supported.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module

from lsp_agent.engine.architecture import Architecture
from lsp_agent.errors import UserError


def _found() -> Iterator[Architecture]:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        values = vars(import_module(module.name)).values()
        yield from (value for value in values if isinstance(value, Architecture))


ARCHITECTURES = {architecture.name: architecture for architecture in _found()}
"""By GGUF's name."""


def architecture(name: str) -> Architecture:
    """Look up an architecture; raises `UserError` for one that the engine does not run."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"Models of architecture {name!r} are not supported; this version runs: {known}.")
    return ARCHITECTURES[name]
