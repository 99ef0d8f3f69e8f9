"""Where a model's bytes go when it runs on a GPU, before anything is loaded. (For the CPU see `footprint.py`.)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from lsp_agent.engine.architecture import ModelConfig
from lsp_agent.engine.decoder import HEAD
from lsp_agent.engine.device import CudaDevice
from lsp_agent.engine.gpu.placement import Placement
from lsp_agent.engine.package import Experts, Extent, LinearPart, Rows, Weight

RUNTIME_BYTES = 700_000_000
"""CUDA's context and libraries: 0.65 GB more than the weights were in use on an H100 after loading."""
WORKSPACE_BYTES = 600_000_000
"""Captured graphs, logits and the step graphs' buffers, whatever the prompt."""
WORKSPACE_FACTOR = 2.0
"""ONNX Runtime's arena over the activations that are alive at once."""
PACKED_SCALE_BYTES = 2
"""Of experts with zero points, ONNX Runtime's kernels for prompts read scales and zero points in a layout of their own,
packed when a session is made. (Other scales they transpose at each call, see `SharedExperts`.)"""
PARALLEL_CONTEXT = 8192
"""Tokens of each answer of several and its prompt: room for all of them at the longest would be paid for always."""
TRANSIENT_RING = 2
"""Buffers of each recurrent state of sequences that are decoded together."""
FP16_BYTES = 2

Where = Literal["gpu", "pinned"]
"""pinned: main memory locked in place, which the GPU reads over the bus."""


class Model(Protocol):
    """What a plan needs of a package, or of one that does not exist yet (`synthetic.Layout`)."""

    @property
    def config(self) -> ModelConfig:
        """The decoder's sizes."""

    @property
    def weights(self) -> Mapping[str, Weight]:
        """Every weight by name."""


@dataclass(frozen=True)
class Item:
    """A part of a model in one memory, its bytes in all, and the blocks that have a share in it."""

    what: str
    bytes: int
    where: Where
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts. By block: dense matrices, all experts with their scales.

    Of what prompts need besides: `packed_scales`, and `staging`, room for the experts of one block, into which they are
    fetched from main memory. `a_token`: keys and values of one token;
    `recurrent`: one buffer of a sequence's recurrent states; `activations`: of a token of a prompt.
    """

    config: ModelConfig
    embedding: int
    head: int
    dense: dict[int, int]
    experts: dict[int, int]
    packed_scales: int
    staging: int
    a_token: int
    recurrent: int
    activations: int

    @property
    def expert_count(self) -> int:
        """Experts of a layer, 0 if the model has none."""
        return self.config.experts.count if self.config.experts and self.experts else 0

    @property
    def slot(self) -> int:
        """One expert of every layer."""
        return sum(self.experts.values()) // self.expert_count if self.expert_count else 0


@dataclass(frozen=True)
class Plan:
    """The parts of a model under a placement. `context`: most tokens of a prompt and its answer; `bytes_a_token` of it
    in the caches of all prompts; `batch`: sequences that are decoded together."""

    placement: Placement
    context: int
    batch: int
    bytes_a_token: int
    items: tuple[Item, ...]
    sizes: Sizes = field(repr=False)

    @property
    def needed(self) -> int:
        """Bytes of the GPU's memory that must be free."""
        return sum(item.bytes for item in self.items if item.where == "gpu")

    @property
    def pinned(self) -> int:
        """Bytes of main memory that are locked in place."""
        return sum(item.bytes for item in self.items if item.where == "pinned")

    def longest_context(self, free: int) -> int:
        """The longest context that fits into `free` bytes, in whole thousands; 0 when even the weights do not."""
        tokens = (free - self.needed + self.context * self.bytes_a_token) // self.bytes_a_token
        return max(0, tokens // 1024 * 1024)


def make_plan(model: Model | Sizes, context: int, placement: Placement | None = None, batch: int = 1) -> Plan:
    """Add up the parts of a model under a placement on the GPU (by default all in its memory)."""
    sizes = model if isinstance(model, Sizes) else sizes_of(model)
    where = placement or Placement("resident", sizes.expert_count)
    config = sizes.config
    linear = config.linear_attention.layers if config.linear_attention else ()
    blocks = range(config.layers)
    attention = tuple(index for index in blocks if index not in linear)
    items = [Item("embedding", sizes.embedding, "pinned")]
    for what, of in (("Gated DeltaNet blocks, dense", linear), ("attention blocks, dense", attention)):
        items.append(Item(what, sum(sizes.dense[index] for index in of), "gpu", tuple(of)))
    items.append(Item("output matrix", sizes.head, "gpu"))
    items += _experts(sizes, where)
    items.append(Item("experts' scales for prompts", sizes.packed_scales, "gpu", tuple(sizes.experts)))
    running, kept = sizes.a_token * context, where.prompts
    ring = 1 + CudaDevice.history
    items += [
        Item("keys and values", running, "gpu", attention),
        Item("recurrent states, a ring", ring * sizes.recurrent, "gpu", linear),
        Item(f"the same of {kept - 1} earlier prompts", (kept - 1) * (running + sizes.recurrent), "gpu"),
        Item("checkpoints of prompts", kept * CudaDevice.checkpoints * sizes.recurrent, "gpu", linear),
    ]
    if batch > 1:
        parallel = batch * (sizes.a_token * min(context, PARALLEL_CONTEXT) + TRANSIENT_RING * sizes.recurrent)
        items.append(Item(f"states of {batch} answers at once", parallel, "gpu"))
    work = WORKSPACE_BYTES + int(WORKSPACE_FACTOR * sizes.activations * where.chunk)
    items.append(Item(f"work space for {where.chunk} tokens", work, "gpu"))
    items.append(Item("CUDA", RUNTIME_BYTES, "gpu"))
    return Plan(where, context, batch, kept * sizes.a_token, tuple(item for item in items if item.bytes), sizes)


def _experts(sizes: Sizes, where: Placement) -> list[Item]:
    every, total, count = tuple(sizes.experts), sum(sizes.experts.values()), sizes.expert_count
    if where.kind == "resident":
        return [Item(f"experts, {count} a layer", total, "gpu", every)]
    slots = where.slots * sizes.slot
    return [
        Item(f"experts, {where.slots} of {count} a layer", slots, "gpu", every),
        Item(f"experts, {count} a layer", total, "pinned", every),
        Item("experts of a layer for prompts", sizes.staging, "gpu"),
    ]


def sizes_of(model: Model) -> Sizes:
    """Add up a model's parts, as they lie in memory: scales in 16 bits, codes as they are stored."""
    config = model.config
    embedding = head = 0
    dense = dict.fromkeys(range(config.layers), 0)
    experts: dict[int, int] = {}
    staged: dict[int, int] = {}
    packed = 0
    for name, weight in model.weights.items():
        index = int(name.split(".")[1]) if name.startswith("blk.") else config.layers - 1  # the last norm
        if isinstance(weight, Rows):
            embedding += weight.blocks.nbytes
        elif isinstance(weight, Experts):
            experts[index] = experts.get(index, 0) + _part_bytes(weight.part)
            scales, staging = _for_prompts(weight.part)
            packed += scales
            staged[index] = staged.get(index, 0) + staging
        elif isinstance(weight, Extent):
            dense[index] += _extent_bytes(weight)
        elif name == HEAD:
            head += sum(map(_linear_part_bytes, weight.parts))
        else:
            dense[index] += sum(map(_linear_part_bytes, weight.parts))
    return Sizes(
        config,
        embedding,
        head,
        dense,
        experts,
        packed,
        max(staged.values(), default=0),
        *state_bytes(config),
        _activations(config),
    )


def _for_prompts(part: LinearPart) -> tuple[int, int]:
    """Packed scales, and what is fetched of experts that are not resident."""
    if part.format is None or part.scales is None or part.codes is None:
        return 0, 0
    if part.format.asymmetric:
        scales = int(np.prod(part.scales.shape, dtype=np.int64))
        return 2 * PACKED_SCALE_BYTES * scales, part.codes.nbytes
    return 0, _part_bytes(part)


def _extent_bytes(extent: Extent) -> int:
    """Codes as they are, all floats as fp16."""
    count = int(np.prod(extent.shape, dtype=np.int64))
    return count if extent.dtype == "uint8" else count * FP16_BYTES


def _part_bytes(part: LinearPart) -> int:
    # The graph adds exact corrections, not those rounded to 8 bits.
    extents = {name: extent for name, extent in part.extents().items() if not name.startswith("correction_")}
    return sum(map(_extent_bytes, extents.values()))


def _linear_part_bytes(part: LinearPart) -> int:
    # Prompts want corrections transposed, decode steps do not.
    return _part_bytes(part) + (_extent_bytes(part.corrections) if part.corrections else 0)


def _activations(config: ModelConfig) -> int:
    """fp16 values of a token in the widest block: its residuals, projections and, of a mixture, the permuted inputs,
    gates, products and fp32 results of the experts that it uses."""
    width = config.hidden * 6
    projected = (config.heads * 2 + config.kv_heads * 2) * config.head_size
    linear = config.linear_attention
    if linear is not None:
        channels = 2 * linear.key_heads * linear.key_size + 2 * linear.value_heads * linear.value_size
        projected = max(projected, channels)
    width += 3 * projected
    experts = config.experts
    if experts is not None:
        width += experts.used * (3 * config.hidden + 3 * experts.intermediate)
        width += 3 * experts.shared_intermediate
    else:
        width += 3 * config.intermediate
    return width * FP16_BYTES


def state_bytes(config: ModelConfig) -> tuple[int, int]:
    """Bytes of one sequence's state: for each token, and of one buffer of its recurrent states."""
    linear = config.linear_attention
    attention = config.layers - (len(linear.layers) if linear else 0)
    a_token = 2 * attention * config.kv_heads * config.head_size * FP16_BYTES
    if linear is None:
        return a_token, 0
    channels = 2 * linear.key_heads * linear.key_size + linear.value_heads * linear.value_size
    delta = 4 * linear.value_heads * linear.key_size * linear.value_size
    return a_token, len(linear.layers) * (delta + (linear.kernel - 1) * channels * FP16_BYTES)
