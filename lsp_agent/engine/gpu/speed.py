"""What speed to expect of a plan: bytes a token from each memory over that memory's bandwidth. An estimate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lsp_agent.engine.gpu.choice import Choice
from lsp_agent.engine.gpu.routing_trace import WINDOW, hit_rate, make_trace
from lsp_agent.engine.plan import Sizes

LAUNCHES_A_BLOCK = 6
LAUNCH_S = 2.5e-6
"""From one kernel of a captured graph to the next, its ramp-up included."""
GPU_SHARE = 0.6
"""Of the memory's bandwidth, what small matrix-vector products reach."""
FLOPS_A_BYTE = 36
"""Prompts: operations a second over the memory's bandwidth; 17,300 tokens/s of an 80B-A3B model on an H100."""
PREFILL_LENGTH = 2048
TRACE_TOKENS = 512


@dataclass(frozen=True)
class Machine:
    """Bandwidths in bytes a second: of the GPU's memory, of the bus as the GPU reads main memory, and of main memory.

    `measured`: here and now; otherwise typical ones are assumed.
    """

    name: str = "a card like an RTX 4090"
    gpu: float = 1.0e12
    bus: float = 25e9
    host: float = 40e9
    measured: bool = False


@dataclass(frozen=True)
class Speed:
    """Tokens a second, and the bytes that a token reads: from the GPU's memory and from main memory."""

    decode: float
    prefill: float
    gpu_bytes: int
    host_bytes: int


def estimate(choice: Choice, sizes: Sizes, machine: Machine, length: int, hits: float | None = None) -> Speed:
    """Decoding one sequence after `length` tokens, and reading a prompt of `PREFILL_LENGTH`.

    `hits`: the share of a token's experts that are in slots, by default what is expected.
    """
    config = sizes.config
    dense = sum(sizes.dense.values()) + sizes.head + 2 * sizes.recurrent + sizes.a_token * length
    count, used = sizes.expert_count, config.experts.used if config.experts else 0
    routed = used * sizes.slot
    active = 2 * _parameters(sizes, routed)
    if choice.plan is None:
        seconds = (dense + routed) / machine.host
        return Speed(1 / seconds, 4 / seconds, 0, dense + routed)
    placement = choice.plan.placement
    missed = 0.0 if placement.kind == "resident" or not count else 1.0
    if hits is not None:
        missed = 1 - hits
    elif placement.kind == "hybrid":
        missed = 1 - expected_hits(placement.slots, count, used)
    host = int(routed * missed)
    gpu = dense + routed - host
    launches = LAUNCHES_A_BLOCK * config.layers
    seconds = launches * LAUNCH_S + gpu / (machine.gpu * GPU_SHARE) + host / machine.bus
    chunk = min(placement.chunk, PREFILL_LENGTH)
    # Of a chunk each expert that any token uses is read once; those that have a slot from the GPU's memory.
    touched = sum(sizes.experts.values()) * (1 - (1 - used / count) ** chunk) if count else 0.0
    outside = touched * (1 - placement.slots / count) if count and placement.kind != "resident" else 0.0
    reading = chunk * active / (machine.gpu * FLOPS_A_BYTE) + outside / machine.bus
    return Speed(1 / seconds, chunk / reading, gpu, host)


def _parameters(sizes: Sizes, routed: int) -> float:
    """Parameters that a token uses, from bytes at about 4.5 bits each."""
    return (sum(sizes.dense.values()) + routed) * 8 / 4.5


@lru_cache
def expected_hits(slots: int, count: int, used: int) -> float:
    """The share of a token's experts that the slots of a layer hold, after a synthetic trace of realistic reuse."""
    if slots >= count or count < used * (1 + WINDOW):
        return min(1.0, slots / count)
    return max(hit_rate(make_trace(TRACE_TOKENS, 2, count, used), slots), slots / count)
