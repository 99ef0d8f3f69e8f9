"""Where a model's routed experts lie, and what follows from it for running."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lsp_agent.errors import ExitCode, UserError

PlacementKind = Literal["resident", "hybrid", "host", "cpu"]
PLACEMENTS: tuple[PlacementKind, ...] = get_args(PlacementKind)

RESIDENT_CHUNK = 2048
HOST_CHUNKS = (8192, 4096, RESIDENT_CHUNK)
"""A chunk of a prompt touches nearly all experts once: with these in main memory, longer chunks cross the bus less."""
PARALLEL = 4
"""Answers that are decoded together, for which memory is planned: as many as the agent asks for at once."""
MOST_PROMPTS = 4
"""Past prompts whose states are kept in GPU memory, the running one among them."""


@dataclass(frozen=True)
class Placement:
    """What a decoder needs to know of a plan.

    `resident`: all weights in GPU memory. `hybrid`: all experts in page-locked main memory, which the GPU reads in
    place, and of each layer `slots` in GPU memory besides. `host`: the same with slots for those of one token, into
    which they are copied for the kernels (without slots these read them over the bus, slower). `cpu`: no GPU.
    `chunk`: tokens of a prompt that are read in one run. `prompts`: past prompts whose states are kept.
    """

    kind: PlacementKind
    slots: int = 0
    chunk: int = RESIDENT_CHUNK
    prompts: int = MOST_PROMPTS


def placement_kind(name: str) -> PlacementKind:
    """`name` as a kind of placement; raises `UserError`."""
    for kind in PLACEMENTS:
        if name == kind:
            return kind
    raise UserError(f"There is no placement {name!r}; choose one of {', '.join(PLACEMENTS)}.", ExitCode.USAGE)
