"""The kernels of a decode step's mixture of experts: the router's choice, and what the chosen experts compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lsp_agent.engine.gpu.launch import Launch
from lsp_agent.engine.gpu.projection import Segment

WARP = 32
LANE_BYTES = 16
MOST_USED = 32
"""Experts of a token: a lane of a warp holds each."""
MOST_SHARED = 94 * 1024
"""Bytes of dynamic shared memory that a block may have on every GPU since compute capability 8.0."""
MOST_WARPS = 16
"""Warps of a block of `experts_down`, besides those of the shared expert."""
HELD = 2
"""16 bytes of codes that a lane of `experts_down` has of each group of rows."""
MXFP4_STEP, MXFP4_GROUP = 16, 32
"""Columns and rows of MXFP4 codes that a thread multiplies."""


@dataclass(frozen=True)
class ExpertForm:
    """How the routed experts' weights are stored.

    element "int": 4- or 8-bit codes as `packing` lays them out, fp16 scales for each `block` of columns, perhaps
    `zero_points`. "e2m1": MXFP4, codes [columns, rows / 2], the even row in the low nibble, and E8M0 scales [rows,
    columns / 32], or [columns / 32, rows] if `scales_by_block`.
    """

    element: Literal["int", "e2m1"]
    bits: int = 4
    block: int = 32
    zero_points: bool = False
    scales_by_block: bool = False

    @property
    def addresses(self) -> int:
        """Columns of an expert's row in the table: codes and scales of gate and up, of down, then their zero points."""
        return 6 if self.zero_points else 4


@dataclass(frozen=True)
class ExpertSizes:
    """`count` experts, of which each token uses `used`: [hidden] to [width] and back."""

    count: int
    used: int
    hidden: int
    width: int


@dataclass(frozen=True)
class SharedExpert:
    """The expert of all tokens: its down projection `down`, `width` columns; in the router's row r its gate and up
    projections begin at `offset` (gates first), the logit of its own gate is at `gate`."""

    down: Segment
    width: int
    offset: int
    gate: int


@dataclass(frozen=True)
class Routing:
    """How experts are chosen from r, `stride` wide, which begins with the router's logits: the largest ones, ties to
    the lower index. Their weights are a softmax over those chosen (`normalise`) or over all."""

    stride: int
    normalise: bool


@dataclass(frozen=True)
class ExpertTuning:
    """How the kernels spread their work; the results are the same up to rounding.

    Integers: a warp of gate and up owns `up_rows` rows, a multiple of 4 (of 8 bits, of 2), a block has `up_warps` of
    them. A block of down owns `down_groups` (1, 2, 4 or 8) times 4 rows (of 8 bits, 2), `shared_warps` of it the shared
    expert's; registers are spared so that `down_threads` threads fit onto a multiprocessor, by default what a batch
    fills. MXFP4: a block owns `up_block` or `down_block` rows, a multiple of 32.
    """

    up_rows: int = 4
    up_warps: int = 4
    down_groups: int = 4
    shared_warps: int = 2
    down_threads: int | None = None
    up_block: int = 64
    down_block: int = 128


@dataclass(frozen=True)
class ExpertKernel:
    """A launch with the memory that its kernel wants besides its tensors; 0 where it wants none.

    `scratch`: fp32 elements of the last output. `counters`: int32, zeroed once; every launch leaves them at zero.
    """

    launch: Launch
    scratch: int = 0
    counters: int = 0


def route(batch: int, sizes: ExpertSizes, routing: Routing) -> Launch:
    """The experts of each token, see `Routing`. Arguments: r f32 [batch, routing.stride]; experts i32 and weights f32
    [batch, used], the largest logit first."""
    macros = {"BATCH": batch, "USED": sizes.used} | routing_macros(sizes, routing)
    return Launch("route", _macros(macros), (batch, 1, 1), (WARP, 1, 1))


def experts_up(
    batch: int,
    sizes: ExpertSizes,
    form: ExpertForm,
    routing: Routing | None = None,
    cached: bool = False,
    tuning: ExpertTuning | None = None,
) -> ExpertKernel:
    """`silu(gate) * up` of the chosen experts. Rows of gate and up alternate, the gate first.

    Arguments: normed h [batch, hidden], experts i32 [batch, used]; act h [batch, used, width]; table i64 [count,
    form.addresses]. With `routing` it does what `route` does as well, a launch less: normed, r; act, experts, weights;
    table. `cached`, behind a cache of experts: normed, experts, copies, fetched; act; table, see `expert_cache`.
    """
    tuning = tuning or ExpertTuning()
    _check(sizes, form)
    macros = _common(batch, sizes, form) | {"ROUTED": int(routing is not None), "CACHED": int(cached)}
    if routing is not None:
        macros |= routing_macros(sizes, routing)
    if form.element == "e2m1":
        rows, threads = _block(2 * sizes.width, tuning.up_block, sizes.hidden)
        macros |= {"BLOCK_ROWS": rows, "THREADS": threads}
        grid = (2 * sizes.width // rows, batch * sizes.used, 1)
        launch = Launch("mxfp4_up", _macros(macros), grid, (threads, 1, 1), threads * MXFP4_STEP * LANE_BYTES)
        return ExpertKernel(launch)
    per_warp = _part(2 * sizes.width, tuning.up_rows, 16 // form.bits)
    per_row = sizes.hidden * form.bits // 8
    warps = _part(2 * sizes.width // per_warp, min(tuning.up_warps, MOST_SHARED // (per_warp * per_row)))
    macros |= {"ROWS": per_warp, "WARPS": warps}
    grid = (2 * sizes.width // (per_warp * warps), batch * sizes.used, 1)
    shared = per_warp * warps * per_row
    if shared > MOST_SHARED:
        raise ValueError(f"experts with {sizes.hidden} columns need {shared} bytes of shared memory")
    return ExpertKernel(Launch("experts_up", _macros(macros), grid, (warps * WARP, 1, 1), shared))


def experts_down(
    batch: int,
    sizes: ExpertSizes,
    form: ExpertForm,
    stride: int,
    shared: SharedExpert | None,
    tuning: ExpertTuning | None = None,
) -> ExpertKernel:
    """The weighted sum of the chosen experts, and of the shared one behind its gate.

    Arguments: act h [batch, used, width], experts i32 and weights f32 [batch, used], r f32 [batch, stride] (null
    without shared expert); out h [batch, hidden], and, if the kernel wants it, its scratch; table i64 [count,
    form.addresses], if wanted counters, then codes, scales and zero points of `shared.down` (null if there are none).
    """
    tuning = tuning or ExpertTuning()
    _check(sizes, form)
    macros = _common(batch, sizes, form) | {"R_STRIDE": stride} | _shared(sizes, shared)
    if form.element == "e2m1":
        rows, threads = _block(sizes.hidden, tuning.down_block, sizes.width)
        parts = sizes.used + (shared is not None)
        macros |= {"BLOCK_ROWS": rows, "THREADS": threads}
        if shared is not None:
            each = _ceil(shared.width * shared.down.bits // 8, WARP * LANE_BYTES)
            if shared.down.bits != 16 and each > MXFP4_STEP:
                raise ValueError(f"a shared expert of {shared.width} columns beside MXFP4 experts")
            macros["SHARED_ROWS"] = _part(rows // (threads // WARP), MXFP4_STEP // each)
        grid = (sizes.hidden // rows, parts, batch)
        launch = Launch("mxfp4_down", _macros(macros), grid, (threads, 1, 1), threads * MXFP4_STEP * LANE_BYTES)
        return ExpertKernel(launch, batch * parts * sizes.hidden, batch * (sizes.hidden // rows))
    groups = _part(sizes.hidden // _interleave(form), min(tuning.down_groups, WARP // _interleave(form)))
    warps, shared_warps, staged = _warps(sizes.used * _slices(sizes.width, form)), 0, 0
    if shared is not None:
        each = 0
        if shared.down.bits != 16:
            each = _ceil(shared.width * shared.down.bits // 8, WARP * LANE_BYTES) * WARP * LANE_BYTES
        while groups > 1 and _staged(tuning, shared, groups * _interleave(form), each) > MOST_SHARED:
            groups //= 2
        shared_warps = min(tuning.shared_warps, groups * _interleave(form))
        staged = _staged(tuning, shared, groups * _interleave(form), each)
        if staged > MOST_SHARED:
            raise ValueError(f"a shared expert of {shared.width} columns needs {staged} bytes of shared memory")
    macros |= {"GROUPS": groups, "WARPS": warps, "SHARED_WARPS": shared_warps}
    grid = (sizes.hidden // (groups * _interleave(form)), batch, 1)
    block = ((warps + shared_warps) * WARP, 1, 1)
    macros["RESIDENT"] = max(1, (tuning.down_threads or (384 if batch == 1 else 768)) // block[0])
    return ExpertKernel(Launch("experts_down", _macros(macros), grid, block, staged))


def _interleave(form: ExpertForm) -> int:
    """Rows of integers that lie together, see `kernels/expert_rows.cuh`."""
    return 16 // form.bits


def _slices(columns: int, form: ExpertForm) -> int:
    """Slices of so many columns, a warp's work, see `kernels/expert_rows.cuh`."""
    loads = _ceil(_interleave(form) * columns * form.bits // 8, WARP * LANE_BYTES)
    return _ceil(loads, HELD)


def _warps(tasks: int) -> int:
    """Warps of a block that share `tasks` evenly."""
    return _ceil(tasks, _ceil(tasks, MOST_WARPS))


def _staged(tuning: ExpertTuning, shared: SharedExpert, rows: int, row_bytes: int) -> int:
    """Bytes of shared memory for the shared expert: activations of each of its warps, and codes."""
    return min(tuning.shared_warps, rows) * shared.width * 2 + rows * row_bytes


def routing_macros(sizes: ExpertSizes, routing: Routing) -> dict[str, int]:
    """What `kernels/routing.cuh` expects, but for USED. Raises `ValueError` for experts that it cannot choose from."""
    if sizes.used > min(MOST_USED, sizes.count):
        raise ValueError(f"{sizes.used} of {sizes.count} experts for a token: at most {MOST_USED}")
    return {"EXPERTS": sizes.count, "R_STRIDE": routing.stride, "NORMALISE": int(routing.normalise)}


def _check(sizes: ExpertSizes, form: ExpertForm) -> None:
    for columns in (sizes.hidden, sizes.width):
        if form.element == "e2m1" and columns % MXFP4_GROUP:
            raise ValueError(
                f"MXFP4 experts of {sizes.width} x {sizes.hidden}: both must be multiples of {MXFP4_GROUP}"
            )
        if form.element == "int" and (columns % 64 or columns % form.block or form.bits not in (4, 8)):
            raise ValueError(f"{form.bits}-bit experts with {columns} columns in blocks of {form.block}")
    if sizes.used > MOST_USED:
        raise ValueError(f"{sizes.used} experts for a token: at most {MOST_USED}")


def _common(batch: int, sizes: ExpertSizes, form: ExpertForm) -> dict[str, int]:
    macros = {
        "BATCH": batch,
        "USED": sizes.used,
        "HIDDEN": sizes.hidden,
        "WIDTH": sizes.width,
        "ADDRESSES": form.addresses,
    }
    if form.element == "e2m1":
        return macros | {"SCALES_BY_BLOCK": int(form.scales_by_block)}
    return macros | {"BITS": form.bits, "BLOCK": form.block, "ZERO": int(form.zero_points)}


def _shared(sizes: ExpertSizes, shared: SharedExpert | None) -> dict[str, int]:
    if shared is None:
        return {"SHARED_WIDTH": 0}
    down = shared.down
    if down.rows != sizes.hidden or (down.bits != 16 and shared.width % down.block):
        raise ValueError(
            f"a shared expert of {down.rows} x {shared.width} {down.bits}-bit codes in blocks of {down.block}"
        )
    if down.bits != 16 and down.block * down.bits % (8 * LANE_BYTES):
        raise ValueError(f"a shared expert of {down.bits}-bit codes in blocks of {down.block}")
    return {
        "SHARED_WIDTH": shared.width,
        "SHARED_OFFSET": shared.offset,
        "GATE_OFFSET": shared.gate,
        "SHARED_BITS": down.bits,
        "SHARED_BLOCK": down.block,
        "SHARED_SCALE_HALF": int(down.half_scales),
        "SHARED_ZERO": int(down.zero_points),
    }


def _block(rows: int, wanted: int, columns: int) -> tuple[int, int]:
    """Rows of a block, of `rows`, and its threads, which multiply all columns of MXFP4 codes."""
    most = MOST_SHARED // (MXFP4_STEP * LANE_BYTES)
    parts = columns // MXFP4_STEP
    own = _part(rows, min(wanted, max(1, most // parts) * MXFP4_GROUP), MXFP4_GROUP)
    threads = _ceil(own // MXFP4_GROUP * parts, WARP) * WARP
    if threads > most:
        raise ValueError(f"MXFP4 experts with {columns} columns")
    return own, threads


def _part(whole: int, wanted: int, least: int = 1) -> int:
    """The largest size up to `wanted` that divides `whole`: `least` times a power of two."""
    if whole % least:
        raise ValueError(f"experts of {whole} rows: the kernels take multiples of {least}")
    part = least
    while 2 * part <= wanted and whole % (2 * part) == 0:
        part *= 2
    return part


def _ceil(number: int, by: int) -> int:
    return -(-number // by)


def _macros(values: dict[str, int]) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in values.items())
