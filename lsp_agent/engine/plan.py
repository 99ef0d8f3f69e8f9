"""Where a package's bytes go when it runs on a GPU, before anything is loaded. (For the CPU see `footprint.py`.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lsp_agent.engine.architecture import ModelConfig
from lsp_agent.engine.decoder import HEAD
from lsp_agent.engine.package import Experts, Extent, LinearPart, Package, Rows
from lsp_agent.engine.state import PREFIX_SLOTS
from lsp_agent.errors import UserError

RUNTIME_BYTES = 700_000_000
"""CUDA's context and libraries: 0.65 GB more than the weights were in use on an H100 after loading."""
WORKSPACE_BYTES = 2_500_000_000
"""Activations of a prefill of 2,048 tokens and the captured graphs of Qwen3-Coder-Next: 2.5 GB on an H100."""
MXFP4_SCALE_BYTES = 2
"""The kernel of MXFP4 experts keeps every scale once more in 16 bits: 4.8 GB of an 80B model on an H100."""
FP16_BYTES = 2

Where = Literal["gpu", "mapped"]
"""mapped: pages of a file in main memory, which the system may drop and read again."""


@dataclass(frozen=True)
class Item:
    """A part of a model, its bytes, and where they are."""

    what: str
    bytes: int
    where: Where


@dataclass(frozen=True)
class Plan:
    """The parts of a model. `context`: most tokens of a prompt and its answer; `bytes_a_token` of it in all caches."""

    context: int
    bytes_a_token: int
    items: tuple[Item, ...]

    @property
    def needed(self) -> int:
        """Bytes of the GPU's memory that must be free."""
        return sum(item.bytes for item in self.items if item.where == "gpu")

    def longest_context(self, free: int) -> int:
        """The longest context that fits into `free` bytes, in whole thousands; 0 when even the weights do not."""
        tokens = (free - self.needed + self.context * self.bytes_a_token) // self.bytes_a_token
        return max(0, tokens // 1024 * 1024)

    def check(self, free: int, name: str) -> None:
        """Raise `UserError` that says what would fit when this does not."""
        if self.needed <= free:
            return
        shorter = self.longest_context(free)
        advice = f"choose a context of at most {shorter}" if shorter else "use the CPU or a smaller model"
        raise UserError(
            f"{name} needs {self.needed / 1e9:.1f} GB of GPU memory with a context of {self.context} tokens and "
            f"{free / 1e9:.1f} GB are free; {advice}."
        )


def make_plan(package: Package, context: int) -> Plan:
    """Plan a package with every expert in the GPU's memory."""
    rest = "attention, norms and other matrices"
    sums = {"embedding": 0, rest: 0, "experts": 0, "output matrix": 0}
    for name, weight in package.weights.items():
        if isinstance(weight, Rows):
            sums["embedding"] += weight.blocks.nbytes
        elif isinstance(weight, Experts):
            sums["experts"] += _part_bytes(weight.part)
        elif isinstance(weight, Extent):
            sums[rest] += _extent_bytes(weight)
        else:
            sums["output matrix" if name == HEAD else rest] += sum(map(_part_bytes, weight.parts))
    items = [Item(what, count, "mapped" if what == "embedding" else "gpu") for what, count in sums.items() if count]
    a_token, fixed = state_bytes(package.config)
    items.append(Item(f"cache of {PREFIX_SLOTS} prompts", PREFIX_SLOTS * (a_token * context + fixed), "gpu"))
    items.append(Item("work space and CUDA", WORKSPACE_BYTES + RUNTIME_BYTES, "gpu"))
    return Plan(context, PREFIX_SLOTS * a_token, tuple(items))


def _extent_bytes(extent: Extent) -> int:
    """Codes as they are, all floats as fp16."""
    count = int(np.prod(extent.shape, dtype=np.int64))
    return count if extent.dtype == "uint8" else count * FP16_BYTES


def _part_bytes(part: LinearPart) -> int:
    # The graph adds exact corrections, not those rounded to 8 bits.
    extents = {name: extent for name, extent in part.extents().items() if not name.startswith("correction_")}
    size = sum(map(_extent_bytes, extents.values()))
    if part.format is not None and part.format.element == "e2m1":
        size += MXFP4_SCALE_BYTES * extents["scales"].nbytes
    return size


def state_bytes(config: ModelConfig) -> tuple[int, int]:
    """Bytes of one sequence's state: for each token, and whatever its length (two buffers of recurrent state)."""
    linear = config.linear_attention
    attention = config.layers - (len(linear.layers) if linear else 0)
    a_token = 2 * attention * config.kv_heads * config.head_size * FP16_BYTES
    if linear is None:
        return a_token, 0
    channels = 2 * linear.key_heads * linear.key_size + linear.value_heads * linear.value_size
    delta = 4 * linear.value_heads * linear.key_size * linear.value_size
    return a_token, 2 * len(linear.layers) * (delta + (linear.kernel - 1) * channels * FP16_BYTES)
