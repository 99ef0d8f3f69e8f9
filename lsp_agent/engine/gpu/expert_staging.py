"""Experts from main memory on their way through the GPU's while a prompt is read.

ONNX Runtime's kernels read an expert once for every few tokens of it: over the bus that takes 127 ms a layer of
Qwen3-Coder-Next for 8,192 tokens on an H100, and 22 ms when the experts are copied into the GPU's memory first.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from lsp_agent.engine.gpu.compiler import KernelCompiler
from lsp_agent.engine.gpu.expert_memory import ExpertMemory
from lsp_agent.engine.gpu.launch import Launch
from lsp_agent.engine.gpu.memory import Memory
from lsp_agent.engine.gpu.operators import launch_node

MARKING_BLOCKS, MARKING_WARPS = 64, 8
GATHERING_BLOCKS, GATHERING_THREADS = 64, 512
MOST_PARTS = 4
"""Codes and scales of both projections."""


class ExpertStaging:
    """Room for all experts of one layer, which every layer fills with those that its tokens use.

    Of experts with zero points only the codes go through it: ONNX Runtime computes right with zero points only when it
    packs them, and their scales, when a session is made. `stages_scales` says whether they do.
    """

    def __init__(self, experts: ExpertMemory, memory: Memory, compiler: KernelCompiler) -> None:
        """Raises `UserError` where the GPU's memory does not suffice."""
        self._experts, self._memory, self._compiler = experts, memory, compiler
        self.stages_scales = not experts.has_zero_points
        self._fields = ("codes", "scales") if self.stages_scales else ("codes",)
        sizes: dict[str, int] = {}
        for name, tensor in experts.tensors.items():
            role = _role(name)
            if role.endswith(self._fields):
                sizes[role] = max(tensor.nbytes, sizes.get(role, 0))
        self._places = dict(zip(sizes, memory.allocate(list(sizes.values())), strict=True))

    def address(self, name: str) -> int | None:
        """Where an array of a layer's experts (`blk.0.experts_down.codes`) is read, if it goes through here."""
        return self._places.get(_role(name)) if name in self._experts.tensors else None

    def nodes(self, gate_up: str, down: str, logits: str, count: str, used: int, result: str) -> list[NodeProto]:
        """The operators that fetch a layer's experts for the router's `logits` (fp16), whose number is `count` (an
        int64), of which each token uses `used`. `result` is an fp16 [1] that is 0 when they are there."""
        tensors = self._experts.tensors
        names = [f"{name}.{field}" for name in (gate_up, down) for field in ("codes", "scales")]
        columns = [index for index, name in enumerate(names) if name.endswith(self._fields)]
        experts = tensors[names[0]].nbytes // tensors[names[0]].stride
        mark = mark_experts(experts, used)
        strides = [tensors[names[column]].stride for column in columns]
        addresses = 4 if self.stages_scales else 6
        gather = gather_experts(experts, addresses, columns, strides)
        targets = self._memory.store(np.array([self._places[_role(names[column])] for column in columns], np.int64))
        pointers = [self._experts.table(gate_up, down), targets]
        marks = [(f"{result}.marks", "i", (MARKING_BLOCKS, -(-experts // 32)))]
        return [
            launch_node(mark, self._compiler.function(mark), [logits, count], marks),
            launch_node(gather, self._compiler.function(gather), [marks[0][0]], [(result, "h", (1,))], pointers),
        ]


def mark_experts(experts: int, used: int) -> Launch:
    """Arguments: logits h [tokens, experts], their number int64; marks i32 [`MARKING_BLOCKS`, experts / 32], a bit
    for each expert."""
    macros = {"EXPERTS": experts, "USED": used, "WARPS": MARKING_WARPS, "BLOCKS": MARKING_BLOCKS}
    block = (32 * MARKING_WARPS, 1, 1)
    return Launch("mark_experts", _macros(macros), (MARKING_BLOCKS, 1, 1), block)


def gather_experts(experts: int, addresses: int, columns: list[int], strides: list[int]) -> Launch:
    """Arguments: marks; an fp16 that becomes 0; the table int64 [experts, addresses], and int64 [columns] of where the
    parts go that are in these columns of the table, `strides` bytes for each expert."""
    if any(stride % 16 for stride in strides):
        raise ValueError(f"experts whose parts have {strides} bytes: the kernel copies multiples of 16")
    macros = {
        "EXPERTS": experts,
        "ADDRESSES": addresses,
        "PARTS": len(columns),
        "MARKS": MARKING_BLOCKS,
    }
    copied = list(zip(columns, strides, strict=True))
    for index, (column, stride) in enumerate(copied + [(0, 0)] * (MOST_PARTS - len(copied))):
        macros |= {f"COLUMN_{index}": column, f"BYTES_{index}": stride}
    return Launch("gather_experts", _macros(macros), (GATHERING_BLOCKS, 1, 1), (GATHERING_THREADS, 1, 1))


def _macros(values: dict[str, int]) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in values.items())


def _role(name: str) -> str:
    """`experts_down.codes` of `blk.0.experts_down.codes`: layers have the same."""
    return ".".join(name.split(".")[-2:])
