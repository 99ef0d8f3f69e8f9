"""Which placement a model gets on a machine, and one sentence for what does not fit."""

from __future__ import annotations

from dataclasses import dataclass

from lsp_agent.engine.gpu.placement import HOST_CHUNKS, MOST_PROMPTS, RESIDENT_CHUNK, Placement, PlacementKind
from lsp_agent.engine.plan import WORKSPACE_FACTOR, Model, Plan, Sizes, make_plan, sizes_of
from lsp_agent.errors import UserError

PINNED_SHARE = 0.9
"""Of the main memory that can be used, the most that is locked in place: it cannot be swapped out."""
SPARE = 0.02
"""Of the GPU's free memory, what is left free where slots could fill it: allocators lose some to fragments."""
LEAST_SLOTS = 2
"""Fewer expert slots a layer than for so many tokens are not worth their memory."""


@dataclass(frozen=True)
class Room:
    """Bytes that can be had: `gpu` of its memory, `host` of main memory."""

    gpu: int
    host: int

    @property
    def pinned(self) -> int:
        """Bytes of main memory that may be locked in place."""
        return int(self.host * PINNED_SHARE)

    def holds(self, plan: Plan) -> bool:
        """Whether a plan fits."""
        return plan.needed <= self.gpu and plan.pinned <= self.pinned


@dataclass(frozen=True)
class Choice:
    """A plan for the GPU, or None for the CPU; `reason`: why nothing faster, in one sentence; empty if resident."""

    kind: PlacementKind
    plan: Plan | None
    reason: str


def choose(
    model: Model, name: str, context: int, room: Room, wanted: PlacementKind | None = None, batch: int = 1
) -> Choice:
    """The fastest placement that fits, or `wanted`, for which `UserError` is raised when it does not.

    `name` is the model's in sentences. Nothing fits: the CPU, with a reason that says what would.
    """
    if wanted == "cpu":
        return Choice("cpu", None, "It was asked for.")
    sizes = sizes_of(model)
    if wanted in (None, "resident"):
        for prompts in (MOST_PROMPTS, 2, 1):
            placement = Placement("resident", sizes.expert_count, min(RESIDENT_CHUNK, context), prompts)
            plan = make_plan(sizes, context, placement, batch)
            if room.holds(plan):
                return Choice("resident", plan, "")
        reason = shortage(plan, room, name)
        if wanted:
            raise UserError(f"{reason}; {_advice(sizes, plan, room, batch)}.")
    if not sizes.expert_count:
        reason = shortage(make_plan(sizes, context, Placement("resident", prompts=1), batch), room, name)
        if wanted in ("host", "hybrid"):
            raise UserError(f"{name} has no experts to place; choose --placement resident or cpu.")
        plan = make_plan(sizes, context, Placement("resident", 0, min(RESIDENT_CHUNK, context), 1), batch)
        return Choice("cpu", None, f"{reason}; {_advice(sizes, plan, room, batch)}.")
    for prompts in (2, 1):
        plan = _host(sizes, context, room, prompts, batch)
        more = (int(room.gpu * (1 - SPARE)) - plan.needed) // sizes.slot
        slots = min(plan.placement.slots + more, sizes.expert_count - 1)
        if wanted != "host" and room.holds(plan) and slots >= _least(sizes):
            filled = make_plan(sizes, context, Placement("hybrid", slots, plan.placement.chunk, prompts), batch)
            return Choice("hybrid", filled, "" if wanted else f"{reason}.")
        if wanted != "hybrid" and room.holds(plan):
            return Choice("host", plan, "" if wanted else f"{reason}.")
    if wanted == "hybrid":
        if _least(sizes) >= sizes.expert_count:
            raise UserError(f"{name} has too few experts to keep only some at hand; choose --placement resident.")
        room = Room(int(room.gpu * (1 - SPARE)), room.host)
        plan = make_plan(sizes, context, Placement("hybrid", _least(sizes), plan.placement.chunk, 1), batch)
    sentence = f"{shortage(plan, room, name)}; {_advice(sizes, plan, room, batch)}."
    if wanted:
        raise UserError(sentence)
    return Choice("cpu", None, sentence)


def _used(sizes: Sizes) -> int:
    assert sizes.config.experts is not None
    return sizes.config.experts.used


def _least(sizes: Sizes) -> int:
    return LEAST_SLOTS * _used(sizes)


def _host(sizes: Sizes, context: int, room: Room, prompts: int, batch: int) -> Plan:
    """All experts in main memory, with the longest chunks whose work space takes a sixth of the GPU's memory."""
    affordable = (c for c in HOST_CHUNKS if WORKSPACE_FACTOR * sizes.activations * c <= room.gpu / 6)
    chunk = min(next(affordable, HOST_CHUNKS[-1]), context)
    return make_plan(sizes, context, Placement("host", _used(sizes), chunk, prompts), batch)


def shortage(plan: Plan, room: Room, name: str) -> str:
    """What a plan needs more than there is, without a full stop."""
    of_experts = " even with all experts in main memory" if plan.placement.kind == "host" else ""
    if plan.needed > room.gpu:
        return (
            f"{name} needs {_gb(plan.needed)} of GPU memory with a context of {plan.context} tokens{of_experts} "
            f"and {_gb(room.gpu)} are free"
        )
    return f"{name} needs {_gb(plan.pinned)} of main memory for its experts and {_gb(room.pinned)} can be locked"


def _advice(sizes: Sizes, plan: Plan, room: Room, batch: int) -> str:
    """What would fit."""
    if plan.pinned <= room.pinned:
        shorter = min(plan.longest_context(room.gpu), plan.context)
        if shorter:
            return f"choose a context of at most {shorter}"
    if plan.placement.kind != "host" and sizes.expert_count and room.holds(_host(sizes, plan.context, room, 1, batch)):
        return "choose --placement host"
    return "use the CPU or a smaller model"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
