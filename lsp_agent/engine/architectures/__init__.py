"""The architectures the engine can run; a new one is one short file here and a line in `ARCHITECTURES`."""

from __future__ import annotations

from lsp_agent.engine.architecture import Architecture
from lsp_agent.engine.architectures.qwen2 import QWEN2
from lsp_agent.engine.architectures.qwen2_moe import QWEN2_MOE
from lsp_agent.engine.architectures.qwen3 import QWEN3
from lsp_agent.engine.architectures.qwen3_moe import QWEN3_MOE
from lsp_agent.engine.architectures.qwen3_next import QWEN3_NEXT
from lsp_agent.errors import UserError

ARCHITECTURES = {architecture.name: architecture for architecture in (QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, QWEN3_NEXT)}


def architecture(name: str) -> Architecture:
    """Look up an architecture; raises `UserError` for one that the engine does not run."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"Models of architecture {name!r} are not supported; this version runs: {known}.")
    return ARCHITECTURES[name]
