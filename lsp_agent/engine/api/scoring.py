"""Scoring a text beside other work of the engine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lsp_agent.engine.request import Request
from lsp_agent.engine.scoring import Scoring

if TYPE_CHECKING:
    from lsp_agent.engine.engine import Engine
    from lsp_agent.engine.service.host import EngineHost

FULL_POLL_S = 0.05
"""Until it is tried again to get a state of the engine's, when all are taken."""


async def score(host: EngineHost, engine: Engine, asked: Request) -> Scoring:
    """Score a prompt piece by piece; other requests advance in between. Raises `Cancelled` and `UserError`."""
    scoring = engine.scoring(asked.prompt, asked.cancel, asked.top)
    try:
        while not scoring.done:
            advanced = await host.call(engine, scoring.advance)
            if not advanced and not await host.call(engine, engine.scheduler.make_room):
                await asyncio.sleep(FULL_POLL_S)
    finally:
        await asyncio.shield(host.call(engine, scoring.close))
    return scoring
