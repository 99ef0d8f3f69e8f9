"""A package's weights in memory of our own: our kernels get their addresses, ONNX Runtime's sessions share them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime as ort
from gguf import GGMLQuantizationType, quants
from onnx import ModelProto, TensorProto, helper

from lsp_agent.cancel import CancelToken
from lsp_agent.engine.decoder import EMBEDDING
from lsp_agent.engine.gpu.expert_memory import ExpertMemory
from lsp_agent.engine.gpu.expert_staging import ExpertStaging
from lsp_agent.engine.gpu.expert_uses import load_uses, save_uses
from lsp_agent.engine.gpu.memory import Change, Load, Memory, Progress, Where, loaded_bytes
from lsp_agent.engine.gpu.placement import Placement
from lsp_agent.engine.graph import IR_VERSION, OPSET
from lsp_agent.engine.package import Extent, Linear, LinearPart, Package, Rows
from lsp_agent.machine import usable_cores

EMBEDDING_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
"""How the embedding kernel calls the types that it reads; tables of others become fp16."""
_DEQUANTISED_ROWS = 4096


class DeviceWeights:
    """Loads every weight of a package once; nothing is shared between weights, even if the package shares it on disk.

    Weights are found by the names that `CudaGraph` gives its initialisers: of the second part of a linear
    `blk.0.attn_qkv.1.codes`, `.zero_points`, `.scales` and `.corrections` (fp16 [rows, blocks]), `blk.0.ffn_gate_inp.0`
    of a part that is dense (fp16 [columns, rows]), `blk.0.attn_norm` of a vector (fp32), `blk.0.experts_down.codes` of
    the experts.
    """

    def __init__(
        self,
        package: Package,
        memory: Memory,
        placement: Placement | None = None,
        on_progress: Progress | None = None,
        cancel: CancelToken | None = None,
    ) -> None:
        """Allocates and loads. Raises `UserError` when there is too little memory, and `Cancelled`."""
        self._package, self._memory = package, memory
        self._addresses: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._shared: set[str] = set()
        self._loads: list[Load] = []
        try:
            self._plan()
            self._earlier_uses = load_uses(package)
            self.experts = ExpertMemory(package, memory, placement or Placement("resident"), self._earlier_uses)
            self._addresses |= {name: tensor.address for name, tensor in self.experts.tensors.items()}
            self._sizes |= {name: tensor.nbytes for name, tensor in self.experts.tensors.items()}
            self._shared |= self.experts.tensors.keys()
            memory.load([*self._loads, *self.experts.loads], on_progress, cancel)
        except BaseException:
            memory.close()
            raise
        self._loads = self.experts.loads = []

    def _plan(self) -> None:
        package = self._package
        for name, weight in package.weights.items():
            if isinstance(weight, Extent):
                self._add(name, package.array(weight))
            elif isinstance(weight, Rows):
                assert name == EMBEDDING
                self._embedding = self._add_embedding(weight)
            elif isinstance(weight, Linear):
                for index, part in enumerate(weight.parts):
                    self._add_part(f"{name}.{index}", part)

    def _add(self, name: str, source: np.ndarray, where: Where = "device", halve: bool = False) -> None:
        change: Change = "half" if halve and source.dtype == np.float32 else "copy"
        self._sizes[name] = loaded_bytes(source, change)
        (self._addresses[name],) = self._memory.allocate([self._sizes[name]], where)
        self._loads.append(Load(source, self._addresses[name], change, where))

    def _add_part(self, name: str, part: LinearPart) -> None:
        package = self._package
        if part.values is not None:
            self._add(name, package.array(part.values), halve=True)
            self._shared.add(name)
        for field, extent in part.extents().items():
            if field in ("codes", "scales", "zero_points", "corrections"):
                self._add(f"{name}.{field}", package.array(extent), halve=True)
                if field != "corrections":  # which the prefill graph wants transposed
                    self._shared.add(f"{name}.{field}")

    def _add_embedding(self, rows: Rows) -> tuple[int, str]:
        table = self._package.array(rows.blocks)
        kind = EMBEDDING_TYPES.get(rows.type)
        self._add(EMBEDDING, table if kind else _dequantised(table, GGMLQuantizationType[rows.type]), "host")
        return self._addresses[EMBEDDING], kind or "f16"

    def address(self, name: str) -> int:
        """Of a weight's array; see the class for its name."""
        return self._addresses[name]

    def sizes(self) -> dict[str, int]:
        """Bytes of every array, constants left out, by its name."""
        return dict(self._sizes)

    def constant(self, name: str, values: np.ndarray) -> int:
        """Of an array that is made at load, kept once for each name, which is no weight's."""
        if name not in self._addresses:
            self._addresses[name] = self._memory.store(values)
        return self._addresses[name]

    def expert_table(self, gate_up: str, down: str) -> int:
        """See `ExpertMemory.table`."""
        return self.experts.table(gate_up, down)

    def embedding(self) -> tuple[int, str]:
        """Of the embedding's rows in page-locked memory, and their type: f16, bf16 or f32."""
        return self._embedding

    def share(
        self, model: ModelProto, options: ort.SessionOptions, device: str, staging: ExpertStaging | None = None
    ) -> list[Any]:
        """Let a session read every matrix and all experts that `model` names from here, not from the file.

        `device` is cpu or cuda; `staging` is the graph's. Returns what must live as long as the session.
        """
        values = []
        for tensor in model.graph.initializer:
            if tensor.name in self._shared:
                staged = staging.address(tensor.name) if staging is not None else None
                value = borrowed(staged or self._addresses[tensor.name], tensor.dims, tensor.data_type, device)
                options.add_initializer(tensor.name, value)
                values.append(value)
        return values

    def remember(self) -> None:
        """Keep which experts were used most, for the next run to begin with; only caches of experts count."""
        save_uses(self._package, self.experts.counts().uses, self._earlier_uses)

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()


def _dequantised(table: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """fp16 rows of GGUF's blocks."""
    pieces = (table[start : start + _DEQUANTISED_ROWS] for start in range(0, len(table), _DEQUANTISED_ROWS))
    with ThreadPoolExecutor(usable_cores()) as pool:
        return np.concatenate(list(pool.map(lambda piece: quants.dequantize(piece, kind).astype(np.float16), pieces)))


_lender: ort.InferenceSession | None = None


def borrowed(address: int, shape: Any, kind: int, device: str) -> ort.OrtValue:
    """An `OrtValue` of ONNX type `kind` over memory that ONNX Runtime neither owns nor copies.

    Of ONNX Runtime's ways to make one, only a binding takes an address and any type; the session that it belongs to is
    never run.
    """
    global _lender
    if _lender is None:
        x, y = (helper.make_tensor_value_info(name, TensorProto.UINT8, ["n"]) for name in "xy")
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "lender", [x], [y])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        _lender = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    binding = _lender.io_binding()
    binding.bind_output("y", device, 0, kind, list(shape), address)
    return binding.get_outputs()[0]
