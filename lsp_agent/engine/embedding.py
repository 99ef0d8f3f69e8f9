"""Token embeddings straight from the checkpoint's own blocks: only the rows that are read become resident."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType, quants

from lsp_agent.engine.package import Package, Rows


class Embedding:
    """Looks rows up in the mapped table and dequantises them exactly."""

    def __init__(self, package: Package, name: str) -> None:
        weight = package.weights[name]
        assert isinstance(weight, Rows)
        self._table = package.array(weight.blocks)
        self._type = GGMLQuantizationType[weight.type]

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """fp32 rows [..., hidden] of int64 ids [...]."""
        raw = self._table[ids.reshape(-1)]
        rows = np.ascontiguousarray(quants.dequantize(raw, self._type), np.float32)
        return rows.reshape(*ids.shape, -1)
