"""Where a package's bytes go on a device, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lsp_agent.engine.architecture import ModelConfig
from lsp_agent.engine.decoder import HEAD
from lsp_agent.engine.device import DeviceName
from lsp_agent.engine.package import Experts, Extent, Linear, LinearPart, Package, Rows
from lsp_agent.engine.state import PREFIX_SLOTS
from lsp_agent.errors import UserError

GPU_RUNTIME_BYTES = 700_000_000
"""CUDA's context and libraries: 0.65 GB more than the weights were in use on an H100 after loading."""
GPU_WORKSPACE_BYTES = 2_500_000_000
"""Activations of a prefill of 2,048 tokens and the captured graphs of Qwen3-Coder-Next: 2.5 GB on an H100."""
CPU_RUNTIME_BYTES = 300_000_000
MXFP4_SCALE_BYTES = 2
"""The GPU's kernel of MXFP4 experts keeps every scale once more in 16 bits: 4.8 GB of an 80B model on an H100."""

Where = Literal["gpu", "memory", "mapped"]
"""mapped: pages of a file, which the system may drop and read again."""


@dataclass(frozen=True)
class Item:
    """A part of a model, its bytes, and where they are."""

    what: str
    bytes: int
    where: Where


@dataclass(frozen=True)
class Plan:
    """The parts of a model on `device`. `context`: most tokens of a prompt and its answer."""

    device: DeviceName
    context: int
    bytes_a_token: int
    items: tuple[Item, ...]

    @property
    def needed(self) -> int:
        """Bytes that must be free on the device: of the GPU's memory, or of main memory."""
        scarce = "gpu" if self.device == "cuda" else "memory"
        return sum(item.bytes for item in self.items if item.where == scarce)

    def longest_context(self, free: int) -> int:
        """The longest context that fits into `free` bytes, in whole thousands; 0 when even the weights do not."""
        if not self.bytes_a_token:
            return self.context if free >= self.needed else 0
        tokens = (free - self.needed + self.context * self.bytes_a_token) // self.bytes_a_token
        return max(0, tokens // 1024 * 1024)

    def check(self, free: int, name: str) -> None:
        """Raise `UserError` that says what would fit when this does not."""
        if self.needed <= free:
            return
        have, where = f"{free / 1e9:.1f} GB", "of GPU memory" if self.device == "cuda" else "of memory"
        shorter = self.longest_context(free)
        advice = f"choose a context of at most {shorter}" if shorter else _alternative(self.device)
        raise UserError(
            f"{name} needs {self.needed / 1e9:.1f} GB {where} with a context of {self.context} tokens and {have} are "
            f"free; {advice}."
        )


def _alternative(device: DeviceName) -> str:
    return "use the CPU or a smaller model" if device == "cuda" else "use a smaller model"


def make_plan(package: Package, device: DeviceName, context: int) -> Plan:
    """Plan a package for a device with every expert resident (GPU) or paged (CPU)."""
    gpu = device == "cuda"
    weights: Where = "gpu" if gpu else "memory"
    sums = {"embedding": 0, "attention, norms and other matrices": 0, "experts": 0, "output matrix": 0}
    for name, weight in package.weights.items():
        if isinstance(weight, Rows):
            sums["embedding"] += weight.blocks.nbytes
        elif isinstance(weight, Experts):
            sums["experts"] += _part_bytes(weight.part, gpu)
        elif isinstance(weight, Extent):
            sums["attention, norms and other matrices"] += _extent_bytes(weight, gpu)
        else:
            assert isinstance(weight, Linear)
            kind = "output matrix" if name == HEAD else "attention, norms and other matrices"
            sums[kind] += sum(_part_bytes(part, gpu) for part in weight.parts)
    places: dict[str, Where] = dict.fromkeys(sums, weights)
    places["embedding"] = "mapped"
    if not gpu and _paged(package):
        places["experts"] = "mapped"
    a_token, fixed = state_bytes(package.config, gpu)
    items = [Item(what, count, places[what]) for what, count in sums.items() if count]
    items.append(Item(f"cache of {PREFIX_SLOTS} prompts", PREFIX_SLOTS * (a_token * context + fixed), weights))
    if gpu:
        items.append(Item("work space and CUDA", GPU_WORKSPACE_BYTES + GPU_RUNTIME_BYTES, weights))
    else:
        items.append(Item("work space", CPU_RUNTIME_BYTES, weights))
    return Plan(device, context, PREFIX_SLOTS * a_token, tuple(items))


def _paged(package: Package) -> bool:
    """Whether the CPU maps the experts from a file: all but unquantised ones and MXFP4, see `prepacked.py`."""
    forms = [weight.part.format for weight in package.weights.values() if isinstance(weight, Experts)]
    return all(form is not None and form.element == "int" for form in forms)


def _extent_bytes(extent: Extent, gpu: bool) -> int:
    """The GPU computes in fp16; on the CPU floats are fp32 when they are used."""
    count = int(np.prod(extent.shape, dtype=np.int64))
    return count if extent.dtype == "uint8" else count * (2 if gpu else 4)


def _part_bytes(part: LinearPart, gpu: bool) -> int:
    extents = part.extents()
    if gpu:  # which adds exact corrections only
        extents = {name: extent for name, extent in extents.items() if not name.startswith("correction_")}
    size = sum(_extent_bytes(extent, gpu) for extent in extents.values())
    if part.format is not None and part.format.element == "e2m1":
        assert part.scales is not None
        if gpu:
            return size + MXFP4_SCALE_BYTES * part.scales.nbytes
        return 2 * extents["codes"].nbytes + 4 * part.scales.nbytes  # widened to 8 bits
    return size


def state_bytes(config: ModelConfig, gpu: bool) -> tuple[int, int]:
    """Bytes of one sequence's state: for each token, and whatever its length (two buffers of recurrent state)."""
    element = 2 if gpu else 4
    linear = config.linear_attention
    attention = config.layers - (len(linear.layers) if linear else 0)
    a_token = 2 * attention * config.kv_heads * config.head_size * element
    if linear is None:
        return a_token, 0
    channels = 2 * linear.key_heads * linear.key_size + linear.value_heads * linear.value_size
    delta = 4 * linear.value_heads * linear.key_size * linear.value_size
    return a_token, 2 * len(linear.layers) * (delta + (linear.kernel - 1) * channels * element)
