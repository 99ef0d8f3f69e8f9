"""Where the routed experts of each layer lie, and the tables by which the kernels find them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lsp_agent.engine.gpu.memory import Change, Load, Memory, Where, loaded_bytes
from lsp_agent.engine.package import Experts, Package

FIELDS = ("codes", "scales", "zero_points")


@dataclass(frozen=True)
class ExpertPlacement:
    """resident: all experts in the GPU's memory. host: all in page-locked main memory, read in place by the kernels."""

    where: Literal["resident", "host"] = "resident"


@dataclass(frozen=True)
class ExpertTensor:
    """An array of all experts of a layer, one after another, `stride` bytes each, `nbytes` in all."""

    address: int
    stride: int
    nbytes: int


class ExpertMemory:
    """Memory for the experts of all layers, by the names of their weights (`blk.0.experts_gate_up`).

    Integer codes are packed as `packing` says, fp32 scales kept in 16 bits; MXFP4 is kept as it is in the package.
    """

    def __init__(self, package: Package, memory: Memory, placement: ExpertPlacement) -> None:
        self._memory, self.placement = memory, placement
        self._count: dict[str, int] = {}
        self._tables: dict[tuple[str, str], int] = {}
        self.tensors: dict[str, ExpertTensor] = {}
        self.loads: list[Load] = []
        found: list[tuple[str, str, np.ndarray, Change]] = []
        where: Where = "device" if placement.where == "resident" else "host"
        for name, weight in package.weights.items():
            if isinstance(weight, Experts):
                self._count[name] = weight.count
                found += [(key, name, source, change) for key, source, change in arrays(package, name, weight)]
        sizes = [loaded_bytes(source, change) for _, _, source, change in found]
        addresses = memory.allocate(sizes, where)
        for (key, name, source, change), nbytes, address in zip(found, sizes, addresses, strict=True):
            self.tensors[key] = ExpertTensor(address, nbytes // self._count[name], nbytes)
            self.loads.append(Load(source, address, change, where))

    def table(self, gate_up: str, down: str) -> int:
        """The address of a layer's table, int64 [experts, 4 or 6]: where each expert's gate and up codes, their scales,
        down codes and their scales lie, and where there are any, the zero points of gate and up, and of down.

        Raises `ValueError` for experts that are not quantised.
        """
        if (gate_up, down) not in self._tables:
            rows = np.arange(self._count[gate_up], dtype=np.int64)
            columns = [rows * tensor.stride + tensor.address for tensor in self._layer(gate_up, down)]
            table = np.stack(columns, axis=1)
            (address,) = self._memory.allocate([table.nbytes])
            self._memory.load([Load(table, address)])
            self._tables[gate_up, down] = address
        return self._tables[gate_up, down]

    def _layer(self, gate_up: str, down: str) -> list[ExpertTensor]:
        keys = [f"{name}.{field}" for name in (gate_up, down) for field in ("codes", "scales")]
        keys += [f"{name}.zero_points" for name in (gate_up, down)]
        if keys[0] not in self.tensors:
            raise ValueError(f"{gate_up} is not quantised")
        return [self.tensors[key] for key in keys if key in self.tensors]


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
