"""Where the routed experts of each layer lie, and the tables by which the kernels find them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lsp_agent.engine.gpu.expert_cache import initial_state, initial_table, state_type
from lsp_agent.engine.gpu.memory import Change, Load, Memory, Where, loaded_bytes
from lsp_agent.engine.gpu.placement import Placement
from lsp_agent.engine.package import Experts, Package

FIELDS = ("codes", "scales", "zero_points")


@dataclass(frozen=True)
class ExpertTensor:
    """An array of all experts, or of all slots, of a layer, one after another, `stride` bytes each, `nbytes` in all."""

    address: int
    stride: int
    nbytes: int

    def of(self, index: int) -> int:
        """Where one expert's part begins."""
        return self.address + index * self.stride


@dataclass(frozen=True)
class ExpertCache:
    """A layer's cache of experts in `slots` of the GPU's memory, by the device addresses that `expert_cache` wants.

    `table` int64 [experts, parts]: where each expert's parts lie now, see `ExpertMemory.table`; `home`: where they lie
    in main memory, always. `places` int64 [slots, parts]: where they lie in each slot. `state`: see
    `expert_cache.state_type`.
    """

    slots: int
    table: int
    home: int
    places: int
    state: int


@dataclass(frozen=True)
class CacheCounts:
    """Experts that tokens used and found in a slot (`hits`) or not; how often each was used, [experts] by the name of
    gate and up."""

    hits: int
    misses: int
    uses: dict[str, np.ndarray]


class ExpertMemory:
    """Memory for the experts of all layers, by the names of their weights (`blk.0.experts_gate_up`).

    Integer codes are packed as `packing` says, fp32 scales kept in 16 bits; MXFP4 is kept as it is in the package.
    Where they lie is `placement`'s to say. `loads` must be carried before a table is asked for: slots are then filled
    with the experts that were routed most by `uses`, [experts] by the name of gate and up.
    """

    def __init__(
        self, package: Package, memory: Memory, placement: Placement, uses: dict[str, np.ndarray] | None = None
    ) -> None:
        self._memory, self.placement = memory, placement
        self._known_uses = uses or {}
        self._counts: dict[str, int] = {}
        self._tables: dict[str, int] = {}
        self._caches: dict[str, ExpertCache] = {}
        self._slots: dict[str, ExpertTensor] = {}
        self.tensors: dict[str, ExpertTensor] = {}
        self.loads: list[Load] = []
        found: list[tuple[str, str, np.ndarray, Change]] = []
        where: Where = "device" if placement.kind == "resident" else "host"
        for name, weight in package.weights.items():
            if isinstance(weight, Experts):
                self._counts[name] = weight.count
                found += [(key, name, source, change) for key, source, change in arrays(package, name, weight)]
        sizes = [loaded_bytes(source, change) for _, _, source, change in found]
        addresses = memory.allocate(sizes, where)
        for (key, name, source, change), nbytes, address in zip(found, sizes, addresses, strict=True):
            self.tensors[key] = ExpertTensor(address, nbytes // self._counts[name], nbytes)
            self.loads.append(Load(source, address, change, where))
        if self._has_slots:
            for key, name, *_ in found:
                stride, slots = self.tensors[key].stride, min(placement.slots, self._counts[name])
                (address,) = memory.allocate([stride * slots])
                self._slots[key] = ExpertTensor(address, stride, stride * slots)

    @property
    def has_zero_points(self) -> bool:
        """Whether experts have zero points, which ONNX Runtime reads from its own packed copy only."""
        return any(name.endswith(".zero_points") for name in self.tensors)

    @property
    def _has_slots(self) -> bool:
        return self.placement.kind != "resident" and self.placement.slots > 0

    def table(self, gate_up: str, down: str) -> int:
        """The address of a layer's table, int64 [experts, 4 or 6]: where each expert's gate and up codes, their scales,
        down codes and their scales lie, and where there are any, the zero points of gate and up, and of down.

        Raises `ValueError` for experts that are not quantised.
        """
        if gate_up not in self._tables:
            cache = self.cache(gate_up, down)
            table = self._places(self._parts(self.tensors, gate_up, down), self._counts[gate_up])
            self._tables[gate_up] = cache.table if cache else self._memory.store(table)
        return self._tables[gate_up]

    def cache(self, gate_up: str, down: str) -> ExpertCache | None:
        """The slots of a layer, filled; None where the experts do not move. Raises `ValueError` as `table` does."""
        if not self._has_slots:
            return None
        if gate_up not in self._caches:
            self._caches[gate_up] = self._fill(gate_up, down)
        return self._caches[gate_up]

    def _fill(self, gate_up: str, down: str) -> ExpertCache:
        count = self._counts[gate_up]
        homes, slots = (self._parts(tensors, gate_up, down) for tensors in (self.tensors, self._slots))
        home, places = self._places(homes, count), self._places(slots, min(self.placement.slots, count))
        uses = self._known_uses.get(gate_up, np.zeros(0))
        if uses.shape != (count,):
            uses = np.zeros(count)
        hottest = np.argsort(-uses, kind="stable")[: len(places)]  # of those used alike the first ones
        copies = [
            (int(home[expert, part]), int(places[slot, part]), tensor.stride)
            for part, tensor in enumerate(homes)
            for slot, expert in enumerate(hottest)
        ]
        self._memory.copy(copies)
        state = initial_state(count, len(places), hottest.tolist())
        addresses = [
            self._memory.store(array)
            for array in (initial_table(state, home, places), home, places, state.view(np.uint8))
        ]
        return ExpertCache(len(places), *addresses)

    def counts(self) -> CacheCounts:
        """What all caches have seen since the model was loaded."""
        states = [self._state(name) for name in self._caches]
        uses = {name: state["uses"] for name, state in zip(self._caches, states, strict=True)}
        hits, misses = (sum(int(state[field]) for state in states) for field in ("hits", "misses"))
        return CacheCounts(hits, misses, uses)

    def _state(self, name: str) -> np.void:
        cache = self._caches[name]
        kind = state_type(self._counts[name], cache.slots)
        values: np.void = self._memory.read(cache.state, kind.itemsize).view(kind)[0]
        return values

    @staticmethod
    def _places(parts: list[ExpertTensor], count: int) -> np.ndarray:
        rows = np.arange(count, dtype=np.int64)
        return np.stack([rows * part.stride + part.address for part in parts], axis=1)

    @staticmethod
    def _parts(tensors: dict[str, ExpertTensor], gate_up: str, down: str) -> list[ExpertTensor]:
        keys = [f"{name}.{field}" for name in (gate_up, down) for field in ("codes", "scales")]
        keys += [f"{name}.zero_points" for name in (gate_up, down)]
        if keys[0] not in tensors:
            raise ValueError(f"{gate_up} is not quantised")
        return [tensors[key] for key in keys if key in tensors]


def arrays(package: Package, name: str, experts: Experts) -> Iterator[tuple[str, np.ndarray, Change]]:
    """Name, stored array and what becomes of it, of every array of a layer's experts."""
    form = experts.part.format
    if form is None:
        assert experts.part.values is not None
        values = package.array(experts.part.values)
        yield name, values, "half" if values.dtype == np.float32 else "copy"
        return
    for field, extent in experts.part.extents().items():
        if field in FIELDS:
            source = package.array(extent)
            change: Change = "half" if source.dtype == np.float32 else "copy"
            if field == "codes" and form.element == "int":
                change = "pack4" if form.bits == 4 else "pack8"
                source = source.reshape(len(source), -1)
            yield f"{name}.{field}", source, change
