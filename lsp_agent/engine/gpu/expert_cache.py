"""A cache in the GPU's memory for the routed experts of a layer, which all lie in page-locked main memory.

The GPU itself decides what to keep, without the host, so that a step may be a captured graph: `cache_route` chooses a
token's experts, and for those that are not there the least recently used of the others leave; `cache_fetch` copies the
newcomers. Three arrays of addresses go with it, int64 [experts or slots, form.addresses]: `home`, where each expert
lies in main memory, `slots`, where a slot's arrays are, and the table that the experts' kernels read, which names
either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lsp_agent.engine.gpu.expert_kernels import WARP, ExpertForm, ExpertSizes, Routing, routing_macros
from lsp_agent.engine.gpu.launch import Launch

FIRST_CLOCK = 1 << 16
"""Steps that seem to have been done before the first, so that every slot may be old enough to be filled."""
PIECE = 16


@dataclass(frozen=True)
class CacheTuning:
    """How `cache_fetch` spreads its work: blocks, their threads, and pieces of 16 bytes that each has under way."""

    blocks: int = 64
    threads: int = 256
    pieces: int = 8


def expert_bytes(sizes: ExpertSizes, form: ExpertForm) -> tuple[int, ...]:
    """Bytes of an expert's arrays, in the order of the table's columns."""
    shapes = ((2 * sizes.width, sizes.hidden), (sizes.hidden, sizes.width))
    found: list[int] = []
    for rows, columns in shapes:
        found += [rows * columns * form.bits // 8, rows * columns // form.block * (1 if form.element == "e2m1" else 2)]
    if form.zero_points:
        found += [rows * -(-columns // form.block * form.bits // 8) for rows, columns in shapes]
    return tuple(found)


def state_type(experts: int, slots: int) -> np.dtype[np.void]:
    """The cache's state, as `kernels/cache.cuh` has it: `hits` and `misses` count tokens' experts, `uses` those of each
    expert; `slot_of` is -1 for experts in no slot, `expert_in` -1 for empty slots."""
    return np.dtype(
        [
            ("hits", np.int64),
            ("misses", np.int64),
            ("clock", np.uint32),
            ("reserved", np.uint32),
            ("slot_of", np.int32, (experts,)),
            ("expert_in", np.int32, (slots,)),
            ("last_used", np.uint32, (slots,)),
            ("uses", np.uint32, (experts,)),
        ]
    )


def initial_state(experts: int, slots: int, kept: Sequence[int] = ()) -> np.ndarray:
    """The state, [1], in which slot i holds the expert `kept[i]`; the first of them leave last."""
    state = np.zeros(1, state_type(experts, slots))
    state["slot_of"], state["expert_in"], state["clock"] = -1, -1, FIRST_CLOCK
    for slot, expert in enumerate(kept[:slots]):
        state["slot_of"][0, expert], state["expert_in"][0, slot] = slot, expert
        state["last_used"][0, slot] = FIRST_CLOCK - slot
    return state


def initial_table(state: np.ndarray, home: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """The experts' table that goes with a state."""
    table = home.copy()
    for slot, expert in enumerate(state["expert_in"][0]):
        if expert >= 0:
            table[expert] = slots[slot]
    return table


def cache_route(
    batch: int, sizes: ExpertSizes, form: ExpertForm, routing: Routing, slots: int, least_age: int = 1
) -> Launch:
    """The experts of each token, and what the cache does about them.

    Arguments: r, experts and weights as of `experts_up`; copies i32 [1 + 2 * batch * used], what `cache_fetch` is to
    do: how many, then expert and slot of each; the state (see `state_type`), home, slots, table. An expert leaves only
    if it was not used within the last `least_age` steps, of which this is one; newcomers without a slot are read where
    they lie.
    """
    if least_age < 1 or not 1 <= slots <= sizes.count:
        raise ValueError(f"{slots} slots for {sizes.count} experts, kept for {least_age} steps at least")
    macros = {"BATCH": batch, "USED": sizes.used, **routing_macros(sizes, routing)}
    macros |= {"SLOTS": slots, "ADDRESSES": form.addresses, "MIN_AGE": least_age}
    described = tuple((name, str(value)) for name, value in macros.items())
    return Launch("cache_route", described, (1, 1, 1), (batch * WARP, 1, 1))


def cache_fetch(sizes: ExpertSizes, form: ExpertForm, tuning: CacheTuning | None = None) -> Launch:
    """Copies the newcomers, while `experts_up` computes what the others do.

    Arguments: copies of `cache_route`; fetched i32 [1], which only says what comes after; home, slots. `ValueError` for
    arrays that are no multiples of 16 bytes.
    """
    tuning = tuning or CacheTuning()
    sizes_of_arrays = expert_bytes(sizes, form)
    if any(size % PIECE for size in sizes_of_arrays):
        raise ValueError(f"experts of {sizes_of_arrays} bytes: the cache copies pieces of {PIECE}")
    macros = {
        "ADDRESSES": form.addresses,
        **{f"BYTES_{i}": sizes_of_arrays[i] if i < form.addresses else 0 for i in range(6)},
        "THREADS": tuning.threads,
        "BLOCKS": tuning.blocks,
        "PIECES": tuning.pieces,
    }
    described = tuple((name, str(value)) for name, value in macros.items())
    return Launch("cache_fetch", described, (tuning.blocks, 1, 1), (tuning.threads, 1, 1))
