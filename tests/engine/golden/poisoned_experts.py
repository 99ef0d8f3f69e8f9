"""Experts that must not be read: whoever computes with one gets a NaN."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lsp_agent.engine.gpu.weights import DeviceWeights


def poison(weights: DeviceWeights, chosen: Mapping[str, np.ndarray]) -> None:
    """Fill the scales of experts with NaNs, at home and in slots: of those `chosen`, booleans [experts] by the name of
    gate and up."""
    experts, memory = weights.experts, weights.experts._memory
    for gate_up, mask in chosen.items():
        down = gate_up.replace("gate_up", "down")
        cache = experts.cache(gate_up, down)
        parts = 6 if f"{gate_up}.zero_points" in experts.tensors else 4
        for table in {experts.table(gate_up, down), *([cache.home] if cache else [])}:
            places = memory.read(table, 8 * len(mask) * parts).view(np.int64).reshape(len(mask), parts)
            for column, name in ((1, gate_up), (3, down)):
                nbytes = experts.tensors[f"{name}.scales"].stride
                not_a_number = memory.store(np.full(nbytes, 0xFF, np.uint8))  # in fp16 and in E8M0
                memory.copy([(not_a_number, int(place), nbytes) for place in places[mask, column]])
